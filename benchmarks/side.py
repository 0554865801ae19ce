"""A process that holds a model and steps when it is told to, measured from within.

Several of them take turns: what slows the machine down slows all of them alike, and the memory of
each is its own.
"""

import argparse
import contextlib
import ctypes
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmjax.errors import InputError


class Side:
    """A process that holds one side's model and steps when it is told to."""

    def __init__(
        self, name: str, work: Callable[..., None], options: argparse.Namespace, *given: Any
    ):
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_run, args=(work, theirs, options, *given), daemon=True
        )
        self.process.start()
        theirs.close()  # so that a side that dies is an end of file here

    def receive(self) -> Any:
        """What it says next."""
        try:
            said = self.pipe.recv()
        except EOFError:
            raise InputError(f"{self.name} ended; what it said stands above.") from None
        if isinstance(said, InputError):
            raise said
        return said

    def ask(self, request: str) -> Any:
        """Its answer to a request."""
        with contextlib.suppress(BrokenPipeError):  # if it has ended, `receive` tells
            self.pipe.send(request)
        return self.receive()

    def step(self) -> Mapping[str, float]:
        """One training step: seconds, CPU seconds, loss and gradient norm."""
        return self.ask("step")

    def close(self) -> None:
        """Let it end."""
        self.pipe.send("end")
        self.process.join()


def _run(work: Callable[..., None], pipe: Any, options: Any, *given: Any) -> None:
    # Before a library is loaded: both take as many threads as they are given cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    # By default torch's threads spin where they wait for one another, which on a machine that
    # others use as well takes it several times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        work(pipe, options, *given)
    except InputError as error:
        pipe.send(error)


def serve(pipe: Any, step: Callable[[], tuple[float, float]]) -> None:
    """Answer a `Side`'s requests until the end; `step` returns the loss and the gradient's norm."""
    while (request := _heard(pipe)) != "end":
        if request == "step":
            start, cpu = time.perf_counter(), _cpu_seconds()
            loss, norm = step()
            spent = {"seconds": time.perf_counter() - start, "cpu_seconds": _cpu_seconds() - cpu}
            pipe.send({**spent, "loss": loss, "gradient_norm": norm})
        elif request == "watch memory":
            _forget_peak()
            pipe.send(None)
        else:
            pipe.send(_peak_gib())


def _heard(pipe: Any) -> str:
    try:
        return pipe.recv()
    except EOFError:
        return "end"


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _forget_peak() -> None:
    """Give back what the allocator keeps, and let the kernel count the peak from here."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _peak_gib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
