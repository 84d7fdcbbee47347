"""What can end a run early. Imports nothing heavy: a mistyped command must fail at once."""

import re
from pathlib import Path

ADVICE = ("weights_only", "weights only", "safe_globals", "allow_pickle")  # torch's and NumPy's words about a pickle
REFUSED = re.compile(r"Unsupported (?:global: GLOBAL|class) \S+|Unsupported operand \d+|TorchScript archive")


class ConfigurationError(ValueError):
    """A user's input cannot work: says in one sentence what was expected, what came and how to mend it."""


class NonFiniteError(RuntimeError):
    """A loss or a gradient norm stopped being a finite number: the run has diverged."""


def first_line(error: Exception) -> str:
    """What an error says, for a message of one sentence; its type where it says nothing.

    Libraries that refuse a pickle advise to read it all the same, which would run the code in it: only what was refused
    is passed on.
    """
    said = plain(str(error)).strip()
    if any(words in said.lower() for words in ADVICE):
        what = REFUSED.search(said)
        return "it holds more than tensors, a pickle that could run code" + (f" ({what[0]})" if what else "")
    return (said.splitlines() or [type(error).__name__])[0]


def plain(text: str) -> str:
    """Text of others without what would move or colour a terminal."""
    if text.isprintable():
        return text
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


def folder_or_name(source: str, option: str) -> Path | str:
    """The folder that `source` is, or else the name that it has on the hub.

    Raises ConfigurationError, naming the option to change, if it reads as a folder and there is none.
    """
    if source.startswith((".", "/", "~")) or Path(source).is_dir():
        return existing_folder(source, option)
    return source


def existing_folder(source: str, option: str) -> Path:
    """Raises ConfigurationError, naming the option to change, if there is none."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise ConfigurationError(f"{option}={source}: there is no such folder.")
    return folder


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived; raised where the state of the run is whole. Passes `except Exception`."""


KNOWN = (ConfigurationError, NonFiniteError, Interrupted)  # what a sentence explains


def known_cause(error: BaseException | None) -> BaseException | None:
    """The one of these that an error is or was raised from; Hydra wraps what a constructor raises."""
    while error is not None and not isinstance(error, KNOWN):
        error = error.__cause__
    return error
