"""Two processes on localhost train what one does, and their checkpoint is anybody's."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.test_train import log_of, losses_of

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    f"--config={ROOT}/configs/quickstart.py",
    *(f"--config.model.{part}.{key}" for part in ("image", "text", "fusion") for key in
      ("width=16", "heads=2", "depth=1", "unroll=False")),
    "--config.batch_size=16",
    "--config.optimizer.schedule.kind=constant",
    "--config.optimizer.schedule.warmup_steps=1",
    "--config.eval.every=2",
    "--config.eval.batch_size=8",
    "--config.eval.data.size=12",
    "--config.eval.retrieval.run=True",
    "--config.log.every=1",
    "--config.log.tensorboard=False",
]  # fmt: skip


def train(workdir, steps, processes):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    started = [
        subprocess.Popen(
            [
                *(sys.executable, ROOT / "train.py", *TINY, f"--workdir={workdir}"),
                *(f"--config.total_steps={steps}", f"--distributed={processes > 1}"),
            ],
            env=os.environ
            | {
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes}",
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(number),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(processes)
    ]
    for process in started:
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output[-3000:]


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(tmp_path):
    train(tmp_path / "one", steps=4, processes=1)
    train(tmp_path / "changing", steps=2, processes=2)
    train(tmp_path / "changing", steps=4, processes=1)
    np.testing.assert_allclose(
        losses_of(tmp_path / "changing"), losses_of(tmp_path / "one"), rtol=1e-5
    )
    name = "eval/retrieval/image_to_text/R@5"
    one, changing = (
        {line["step"]: line[name] for line in log_of(tmp_path / run) if name in line}
        for run in ("one", "changing")
    )
    assert one == changing
    assert sorted(one) == [2, 4]
