"""A mistyped name gets the nearest ones."""

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, names: Iterable[str]) -> str:
    """ "; did you mean a, b?" of the likest names, "" if none is alike."""
    names = sorted(names)
    by_end = [other for other in names if name and other.rpartition("/")[2] == name.rpartition("/")[2]]
    alike = list(dict.fromkeys([*by_end, *get_close_matches(name, names, n=3, cutoff=0.5)]))[:3]
    return f"; near it: {', '.join(alike)}" if alike else ""
