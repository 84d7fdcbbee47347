"""Which process writes into a run folder: the one named in its file `.claimed`, as long as that one lives.

Imports nothing heavy: comparing runs asks, too, who is still running.
"""

import json
import os
import socket
import threading
import time
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Any, final

from unlearn_runner.errors import ConfigurationError

CLAIM = ".claimed"
BEAT, SILENCE = 20.0, 120.0  # seconds between two signs of life; after which an owner on another machine is dead
TOLERANCE = 5.0  # seconds by which two processes may read the start of a third one differently


@cache
def machine() -> str:
    """Tells machines, their boots and containers apart: a process id means something within one alone."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def myself() -> dict[str, Any]:
    import psutil

    pid = os.getpid()
    return {
        "pid": pid,
        "host": socket.gethostname(),
        "machine": machine(),
        "started": psutil.Process(pid).create_time(),
    }


def owner_of(folder: Path, now: float | None = None) -> dict[str, Any] | None:
    """The living process that writes into a run folder; None if there is none, or it is dead.

    On this machine that is looked up. One on another machine is alive if it gave a sign within the last two minutes of
    `now`, a time of the folder's file system.
    """
    claim = folder / CLAIM
    try:
        owner, seen = json.loads(claim.read_text()), claim.stat().st_mtime
    except (OSError, ValueError):  # nobody, or of a version that did not say
        return None
    if not isinstance(owner, dict) or not {"pid", "host", "machine", "started"} <= owner.keys():
        return None
    if owner["machine"] != machine():
        return owner if (time.time() if now is None else now) - seen < SILENCE else None
    import psutil

    try:
        process = psutil.Process(owner["pid"])
        same = abs(process.create_time() - owner["started"]) < TOLERANCE
        return owner if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.Error, TypeError, ValueError):
        return None


def require_no_owner(folder: Path, now: float | None = None) -> None:
    """Raise ConfigurationError if a living process writes into the folder.

    One on another machine, which may have been killed a moment ago, is watched until it gives a sign of life or has
    given none for two minutes: a job that is begun again on another node need not fail.
    """
    owner = owner_of(folder, now)
    if owner is not None and not (owner["machine"] != machine() and _falls_silent(folder, owner)):
        raise ConfigurationError(
            f"{folder} belongs to process {owner['pid']} on {owner['host']}, which is still running; wait until it has "
            f"ended or end it, or, if you know that it is gone, delete {folder / CLAIM}."
        )


def _falls_silent(folder: Path, owner: dict[str, Any]) -> bool:
    """Watch an owner on another machine; whether it has let go of the folder, or is dead."""
    print(f"waiting for a sign of life of {folder}'s process {owner['pid']} on {owner['host']}", flush=True)
    claim, end = folder / CLAIM, time.monotonic() + SILENCE
    with suppress(OSError):  # it is gone
        seen = claim.stat().st_mtime
        while owner_of(folder) == owner and time.monotonic() < end:
            time.sleep(BEAT / 20)
            if claim.stat().st_mtime != seen and owner_of(folder) == owner:
                return False
    return owner_of(folder) in (owner, None)


@final
class Ownership:
    """This process's own hold of a run folder. Given up by `release`, and by its death."""

    def __init__(self, folder: Path):
        """Raises ConfigurationError if the folder has a living owner, OSError if it cannot be written."""
        self.claim = folder / CLAIM
        self.me = myself()
        self.lost = False  # another process has taken the folder, which could not see that this one lives
        self._ended = threading.Event()
        with ExitStack() as guarded:
            guard = self._guard(guarded)
            require_no_owner(folder, guard.stat().st_mtime if guard.is_file() else None)
            self._write(self.me)
        threading.Thread(target=self._live, daemon=True).start()

    def release(self) -> None:
        """Nobody's from now on."""
        self._ended.set()
        if not self.lost:
            self._write({})

    def require(self) -> None:
        """Raise ConfigurationError if the folder is no longer this process's."""
        if self.lost:
            raise ConfigurationError(
                f"{self.claim.parent} was taken over by another process while this one gave no sign of life; this one "
                "stops, for two would spoil the run."
            )

    def _guard(self, guarded: ExitStack) -> Path:
        """A lock for the moment of taking, where the file system has locks; its time is the file system's now."""
        from filelock import FileLock

        guard = self.claim.with_name(f"{CLAIM}.lock")
        with suppress(OSError, NotImplementedError):
            guarded.enter_context(FileLock(guard, timeout=60))
            os.utime(guard)
        return guard

    def _write(self, content: dict[str, Any]) -> None:
        temporary = self.claim.with_name(f".{CLAIM}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(content))
        os.replace(temporary, self.claim)

    def _live(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError, ValueError):
                if json.loads(self.claim.read_text()) != self.me:
                    self.lost = not self._ended.is_set()
                    return
                os.utime(self.claim)
