"""SIGINT and SIGTERM: finish what must not be torn, then raise Interrupted."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, final

from unlearn_runner.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@final
class Interrupts:
    """Within `with interrupts:` the two signals raise Interrupted; within `shield()` they wait for its end.

    So Interrupted finds the run's state whole. A second signal during a shield raises a plain KeyboardInterrupt.
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
        if self.received is not None and self._shields == 0:
            self._raise()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Within a shield, a part that may be interrupted; what was waiting takes effect at its beginning."""
        shields, self._shields = self._shields, 0
        try:
            if self.received is not None:
                self._raise()
            yield
        finally:
            self._shields = shields

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._shields and self.received is not None:
            raise KeyboardInterrupt(signal.Signals(number).name)
        self.received = number
        if not self._shields:
            self._raise()

    def _raise(self) -> None:
        raise Interrupted(f"{signal.Signals(self.received).name} received")
