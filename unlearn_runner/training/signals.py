"""SIGINT, SIGTERM and SIGHUP: finish what must not be torn, then raise Interrupted."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, final

from unlearn_runner.distributed import any_of, world_size
from unlearn_runner.errors import Interrupted

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))  # Windows
ONE = 2.0  # seconds within which several are one: a shell, a scheduler and a process group send it to whom they know


@final
class Interrupts:
    """Within `with interrupts:` the signals raise Interrupted; within `shield()` they wait for its end.

    So Interrupted finds the run's state whole. A second signal during a shield, more than two seconds after the first,
    raises a plain KeyboardInterrupt. Within functions that `protect` was given none raises anything. A SIGHUP that
    nohup has turned off stays so. Several processes, which may be a step apart when a signal comes, take it at the end
    of the same shield.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._first = 0.0
        self._shields = 0
        self._protected: tuple[CodeType, ...] = ()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # only there Python lets one set handlers
            wanted = [number for number in SIGNALS if not _turned_off(number)]
            self._previous = {number: signal.signal(number, self._handle) for number in wanted}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def protect(self, *functions: Callable[..., Any]) -> None:
        """Signals are only noted while one of these functions runs, from its first instruction on."""
        self._protected = tuple(function.__code__ for function in functions)

    @contextmanager
    def shield(self) -> Iterator[None]:
        """What runs in here is finished before the interruption takes effect."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
        if self._shields == 0:
            self._heed()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Within a shield, a part that may be interrupted; what was waiting takes effect at its beginning."""
        shields, self._shields = self._shields, 0
        try:
            self._heed()
            yield
        finally:
            self._shields = shields

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, now = self.received is not None, time.monotonic()
        if again and now - self._first < ONE:
            return
        if not again:
            self.received, self._first = number, now
        if self._in_protected(frame):
            return
        waits = self._shields > 0 or world_size() > 1
        if waits and again:
            raise KeyboardInterrupt(signal.Signals(number).name)
        if not waits:
            self._heed()

    def _in_protected(self, frame: FrameType | None) -> bool:
        while frame is not None and self._protected:
            if any(frame.f_code is code for code in self._protected):
                return True
            frame = frame.f_back
        return False

    def _heed(self) -> None:
        received = any_of(self.received)
        if self.received is None:
            self.received, self._first = received, time.monotonic()
        if self.received is not None:
            raise Interrupted(f"{signal.Signals(self.received).name} received")


def _turned_off(number: int) -> bool:
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN
