"""How fast training goes: step time, examples a second, MFU, waiting for input, memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from mmjax.training.flops import utilisation


class Stopwatch:
    """Time spent on steps since the last lap, pauses left out.

    `flops` are the model FLOPs of one step, `batch_size` its examples.
    """

    def __init__(self, flops: float, batch_size: int):
        self.flops, self.batch_size = flops, batch_size
        self._lap_start = time.perf_counter()
        self._paused = self._waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent within counts as waiting for input."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent within (an evaluation, a checkpoint) is not training time."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def lap(self, steps: int) -> dict[str, float]:
        """What the last `steps` steps took, and start anew."""
        now = time.perf_counter()
        seconds = max(now - self._lap_start - self._paused, 1e-9) / steps
        scalars = {
            "step_seconds": seconds,
            "pairs_per_second": self.batch_size / seconds,
            "input_wait_seconds": self._waited / steps,
            "model_tflops_per_second": self.flops / seconds / 1e12,
        }
        if (mfu := utilisation(self.flops, seconds)) is not None:
            scalars["mfu"] = mfu
        if memory := jax.local_devices()[0].memory_stats():
            scalars["device_memory_gib"] = memory.get("peak_bytes_in_use", 0) / 2**30
        self._lap_start, self._paused, self._waited = now, 0.0, 0.0
        return scalars
