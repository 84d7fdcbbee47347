"""SIGINT and SIGTERM: finish what must not be torn, then raise Interrupted."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, final

from unlearn_runner.distributed import any_of, world_size
from unlearn_runner.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@final
class Interrupts:
    """Within `with interrupts:` the two signals raise Interrupted; within `shield()` they wait for its end.

    So Interrupted finds the run's state whole. A second signal during a shield raises a plain KeyboardInterrupt.
    Several processes, which may be a step apart when a signal comes, take it at the end of the same shield.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._shields = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # only there Python lets one set handlers
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

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

    def _handle(self, number: int, _: FrameType | None) -> None:
        waits = self._shields > 0 or world_size() > 1
        if waits and self.received is not None:
            raise KeyboardInterrupt(signal.Signals(number).name)
        self.received = number
        if not waits:
            self._heed()

    def _heed(self) -> None:
        self.received = any_of(self.received)
        if self.received is not None:
            raise Interrupted(f"{signal.Signals(self.received).name} received")
