"""What can end a run early. Imports nothing heavy: a mistyped command must fail at once."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ConfigurationError(ValueError):
    """A user's input cannot work: says in one sentence what was expected, what came and how to mend it."""


class NonFiniteError(RuntimeError):
    """A loss, a gradient norm, a weight or a picture stopped being finite numbers: the run has diverged."""


def first_line(error: Exception) -> str:
    """What an error says, for a message of one sentence; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def naming(path: Path) -> Iterator[None]:
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
    """SIGINT, SIGTERM or SIGHUP arrived; raised where the state of the run is whole. Passes `except Exception`."""


KNOWN = (ConfigurationError, NonFiniteError, Interrupted)  # what a sentence explains


def known_cause(error: BaseException | None) -> BaseException | None:
    """The one of these that an error is or was raised from; Hydra wraps what a constructor raises."""
    while error is not None and not isinstance(error, KNOWN):
        error = error.__cause__
    return error
