"""Starting processes on localhost that make up one run, gloo between their simulated devices."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from mmjax.distributed import PLACING
from tests.compilation import QUICKLY

ROOT = Path(__file__).resolve().parents[1]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(*command, processes, devices=1, different=None, by_flags=True):
    """The started processes, placed by flags or by variables.

    `different` has further arguments for some of them, by number.
    """
    port = free_port()

    def placed(number):
        if processes == 1:
            return [], {}
        values = (f"localhost:{port}", processes, number)
        if by_flags:
            return [f"--{name}={value}" for name, value in zip(PLACING, values, strict=True)], {}
        named = zip(PLACING.values(), map(str, values), strict=True)
        return ["--distributed"], dict(named)

    return [
        subprocess.Popen(
            [
                sys.executable,
                *map(str, command),
                *placed(number)[0],
                *(different or {}).get(number, []),
            ],
            cwd=ROOT,
            env=os.environ
            | placed(number)[1]
            | {
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICKLY}",
                "PYTHONUNBUFFERED": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(processes)
    ]


def outputs(started, timeout=1200):
    """What each wrote, when all have ended; none of them outlives the call."""
    try:
        return [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()


def run(*command, **options):
    """Start and wait; all must end well."""
    started = start(*command, **options)
    for process, output in zip(started, outputs(started), strict=True):
        assert process.returncode == 0, output[-3000:]
