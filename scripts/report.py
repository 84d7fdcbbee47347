"""The report on a deletion request, of the run that carried it out: one page for whoever asked, and for the file.

    python scripts/report.py <run folder> --id 2026-17 --text "Remove the pictures of Ann" --received 2026-11-02
    python scripts/report.py <folder of requests>      # scripts/ledger.py: a page for each, and one over all

Writes report.html, report.json and MANIFEST.sha256 into the run's folder; report.pdf, too, with --pdf and a Chromium.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from unlearn_runner.comparison.ledger import REQUESTS, ledger_of
from unlearn_runner.comparison.request_report import RequestDescription, ledger_page, write_report
from unlearn_runner.errors import ConfigurationError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run, or of requests")
    parser.add_argument("--id", help="of the request")
    parser.add_argument("--text", help="the request in its own words")
    parser.add_argument("--received", help="when it came")
    parser.add_argument("--pdf", action="store_true", help="report.pdf, too; needs Chromium")
    asked = parser.parse_args(arguments)
    try:
        if (asked.run / REQUESTS).is_file():
            of_all(asked.run)
        else:
            write_report(asked.run, RequestDescription(asked.id, asked.text, asked.received))
        if asked.pdf:
            print_page(asked.run / "report.html", asked.run / "report.pdf")
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"The report: {asked.run / 'report.html'}")
    return 0


def of_all(folder: Path) -> None:
    """A report on each request of a ledger that is done, and a page over all. Raises ConfigurationError if none is."""
    ledger = ledger_of(folder)
    if not ledger["requests"]:
        raise ConfigurationError(f"{folder}: no request is done yet; python scripts/ledger.py {folder} does them.")
    for request in ledger["requests"]:
        write_report(Path(request["folder"]), RequestDescription(request["id"], request["text"], request["received"]))
    (folder / "report.html").write_text(ledger_page(folder, ledger), encoding="utf-8")


def print_page(html: Path, pdf: Path) -> None:
    """Raises ConfigurationError without a Chromium, or if it fails."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    by_hand = f"print {html} from a browser"
    if browser is None:
        raise ConfigurationError(f"--pdf needs one of {', '.join(BROWSERS)}, and none is installed; {by_hand}.")
    with tempfile.TemporaryDirectory() as profile:
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-pdf-header-footer",
            f"--user-data-dir={profile}",
        ]
        command = [browser, *options, f"--print-to-pdf={pdf.resolve()}", html.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, timeout=120)
    if done.returncode or not pdf.is_file():
        raise ConfigurationError(f"--pdf: {browser} did not write {pdf}; {by_hand}.")


if __name__ == "__main__":
    sys.exit(main())
