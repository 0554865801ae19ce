"""Stopping between two steps instead of in the middle of one."""

import signal
from types import FrameType
from typing import Any, Self

import jax
from absl import logging
from jax.experimental import multihost_utils


class Interruption:
    """Turns Ctrl-C and the scheduler's SIGTERM into a request that the loop asks for.

    A second signal acts as it always did, so that a stuck run can be stopped. With several
    processes jax itself listens for SIGTERM and lets all of them agree on the step; Ctrl-C then
    ends a process at once, as the others could not know of it.
    """

    def __init__(self) -> None:
        self._requested = False
        self._before: dict[signal.Signals, Any] = {}

    def requested(self, step: int) -> bool:
        """Whether to stop after this step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else ():
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: Any) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        logging.warning("%s: stopping after this step.", signal.Signals(number).name)
        self._requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
