"""The report on a deletion request, of the run that carried it out: one page for whoever asked, and for the file.

    python scripts/report.py <run folder> --id 2026-17 --text "Remove the pictures of Ann" --received 2026-11-02

Writes report.html, report.json and MANIFEST.sha256 into the run's folder; report.pdf, too, with --pdf and a Chromium.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from unlearn_runner.comparison.request_report import Asked, manifest, page, report
from unlearn_runner.errors import ConfigurationError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--id", help="of the request")
    parser.add_argument("--text", help="the request in its own words")
    parser.add_argument("--received", help="when it came")
    parser.add_argument("--pdf", action="store_true", help="report.pdf, too; needs Chromium")
    asked = parser.parse_args(arguments)
    try:
        content = report(asked.run, Asked(asked.id, asked.text, asked.received))
        written = {
            "report.json": json.dumps(content, indent=1, ensure_ascii=False),
            "report.html": page(asked.run, content),
        }
        written["MANIFEST.sha256"] = manifest(asked.run)
        for name, text in written.items():
            (asked.run / name).write_text(text, encoding="utf-8")
        if asked.pdf:
            print_page(asked.run / "report.html", asked.run / "report.pdf")
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"The report: {asked.run / 'report.html'}")
    return 0


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
