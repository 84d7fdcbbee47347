"""What can end a run early. Imports nothing heavy: a mistyped command must fail at once."""

import errno
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path

ADVICE = ("weights_only", "weights only", "safe_globals", "allow_pickle")  # torch's and NumPy's words about a pickle
REFUSED = re.compile(r"Unsupported (?:global: GLOBAL|class) \S+|Unsupported operand \d+|TorchScript archive")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    if text.isprintable():
        return text
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


def near(name: str, known: Iterable[str]) -> str:
    """ "; near it: a, b" of the names that are most like a mistyped one; "" if none is."""
    known = sorted(known)
    same_end = [other for other in known if name and other.rpartition("/")[2] == name.rpartition("/")[2]]
    whole_word = [other for other in known if len(name) > 2 and name in re.split(r"[_/.]", other)]
    alike = list(dict.fromkeys([*same_end, *whole_word, *get_close_matches(name, known, n=3)]))[:3]
    return f"; near it: {', '.join(alike)}" if alike else ""


def no_checkpoint(wanted: str) -> ConfigurationError:
    """The sentence for a place where there is nothing to resume from."""
    return ConfigurationError(
        f"resume_from_checkpoint={wanted}: expected latest, a run folder or its checkpoints/step_<n>; found no "
        "checkpoint there."
    )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What is written in here to `path`: where there is no room for it, the error says so and names the place.

    Neither Python's writes nor torch's, safetensors' and Pillow's name the file that the disk had no room for.
    """
    try:
        yield
    except Exception as error:
        number = no_room(error)
        if number is None or getattr(error, "filename", None) is not None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def no_room(error: BaseException) -> int | None:
    """The errno of a write for which there was no room; None for any other error."""
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return error.errno
    if "PytorchStreamWriter failed" in str(error) or "inline_container" in str(error):  # it does not say what failed
        return errno.ENOSPC
    return next((number for number in NO_ROOM if os.strerror(number) in str(error)), None)


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
    """SIGINT, SIGTERM or SIGHUP arrived; raised where the state of the run is whole. Passes `except Exception`."""


KNOWN = (ConfigurationError, NonFiniteError, Interrupted)  # what a sentence explains


def known_cause(error: BaseException | None) -> BaseException | None:
    """The one of these that an error is or was raised from; Hydra wraps what a constructor raises."""
    while error is not None and not isinstance(error, KNOWN):
        error = error.__cause__
    return error
