"""What can end a run early. Imports nothing heavy: a mistyped command must fail at once."""

import os
import re
import shlex
import unicodedata
from contextlib import suppress
from pathlib import Path

ADVICE = ("weights_only", "weights only", "safe_globals", "allow_pickle")  # torch's and NumPy's words about a pickle
REFUSED = re.compile(r"Unsupported (?:global: GLOBAL|class) \S+|Unsupported operand \d+|TorchScript archive")


class ConfigurationError(ValueError):
    """A user's input cannot work: says in one sentence what was expected, what came and how to mend it."""


class NonFiniteError(RuntimeError):
    """A loss, a gradient norm, a weight or a picture stopped being finite numbers: the run has diverged."""


def first_line(error: Exception | str) -> str:
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
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


def folder_or_name(source: str, option: str) -> Path | str:
    """The folder that `source` is, or else the name that it has on the hub.

    Raises ConfigurationError, naming the option to change, if it reads as a folder and there is none.
    """
    if source.startswith((".", "/", "~")) or folders_named(Path(source)):
        return existing_folder(source, option)
    return source


def existing_folder(source: str, option: str) -> Path:
    """Raises ConfigurationError, naming the option to change, if there is none."""
    found = folders_named(Path(source).expanduser())
    if not found:
        raise ConfigurationError(f"{option}={source}: there is no such folder.")
    return found[0]


def normal_form(name: str) -> str:
    """A name in the one Unicode form (NFC) in which names that read alike are equal."""
    return unicodedata.normalize("NFC", name)


def folders_named(folder: Path) -> list[Path]:
    """All folders whose path reads like this one, this one first: the disk may have it in another Unicode form."""
    found = [Path(folder.anchor)]
    for part in folder.relative_to(folder.anchor).parts:
        below = [place / part for place in found]
        if not part.isascii():
            for place in found:
                with suppress(OSError):  # it cannot be listed, or is none
                    below += sorted(path for path in place.iterdir() if normal_form(path.name) == normal_form(part))
        found = list(dict.fromkeys(path for path in below if os.path.isdir(path)))
    return found


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived; raised where the state of the run is whole. Passes `except Exception`."""


KNOWN = (ConfigurationError, NonFiniteError, Interrupted)  # what a sentence explains


def known_cause(error: BaseException | None) -> BaseException | None:
    """The one of these that an error is or was raised from; Hydra wraps what a constructor raises."""
    while error is not None and not isinstance(error, KNOWN):
        error = error.__cause__
    return error


def as_override(option: str, value: str) -> str:
    """`option=value` as it can be typed into a shell, whatever is in the value: quoted for the shell and for Hydra."""
    if not re.fullmatch(r"[A-Za-z_./~][A-Za-z0-9_./:@%+~-]*", value) or value.lower() in (
        "null",
        "true",
        "false",
        "nan",
        "inf",
    ):
        # an interpolation's beginning is escaped for OmegaConf, a quote for Hydra; so are backslashes before either
        value = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", value)
        value = re.sub(r"(\\*)'", lambda found: found[1] * 2 + "\\'", value)
        trailing = len(value) - len(value.rstrip("\\"))
        value = f"'{value}{chr(92) * trailing}'"
    return shlex.quote(f"{option}={value}")
