"""What still holds the data of a run that was unlearned: checkpoints, dashboards, caches. Shows it, or removes it.

    python scripts/forget_traces.py <run folder>            # what there is
    python scripts/forget_traces.py <run folder> --delete   # removes it

The data itself and the model before unlearning are named, and never removed.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from unlearn_runner.comparison.request_report import read, size_in_words, traces_of
from unlearn_runner.errors import ConfigurationError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--delete", action="store_true", help="remove what is shown")
    asked = parser.parse_args(arguments)
    try:
        summary, config, _ = read(asked.run)
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 1
    kept = Path(str(config["model"]["weights"])).expanduser()
    for trace in traces_of(asked.run, summary, config):
        mine = trace.place != kept
        if asked.delete and mine:
            shutil.rmtree(trace.place)
            trace.place.with_name(f"{trace.place.name}.lock").unlink(missing_ok=True)
        done = "removed" if asked.delete and mine else "yours to remove" if not mine else "would be removed"
        print(f"{done}: {trace.place} ({trace.what}, {size_in_words(trace.size)})")
    print(f"yours to remove: the data, {config['dataset'].get('source') or config['choices']['dataset']}")
    if not asked.delete:
        print("Nothing was removed; --delete does.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
