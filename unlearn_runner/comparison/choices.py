"""A mistyped name gets the nearest ones."""

import argparse
import sys
from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, names: Iterable[str]) -> str:
    """ "; did you mean a, b?" of the likest names, "" if none is alike."""
    names = sorted(names)
    by_end = [other for other in names if name and other.rpartition("/")[2] == name.rpartition("/")[2]]
    alike = list(dict.fromkeys([*by_end, *get_close_matches(name, names, n=3, cutoff=0.5)]))[:3]
    return f"; near it: {', '.join(alike)}" if alike else ""


class Parser(argparse.ArgumentParser):
    """A script's options: one sentence for a mistake, with the nearest options for a mistyped one."""

    def __init__(self, description: str | None):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def parse_known_args(self, args=None, namespace=None):
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [option for option in self._option_string_actions if option.startswith("--")]
            self.error(f"there is no option '{unknown[0]}'{nearest(unknown[0].partition('=')[0], options)}.")
        return found, unknown

    def error(self, message):
        sys.exit(" ".join(message.split()))
