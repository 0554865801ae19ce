"""Two and four processes on localhost train what one does, and their checkpoint is anybody's."""

import json
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from mmjax.config import model_config
from mmjax.training.checkpoints import find_checkpoint, load_assets, load_parameters
from mmjax.training.state import init_params
from tests.process_worker import RATE
from tests.processes import ROOT, outputs, run, start
from tests.test_train import log_of, losses_of

RECALL = "eval/retrieval/image_to_text/R@5"
EVALUATED = {
    "eval.every": 3,
    "eval.batch_size": 8,
    "eval.data.size": 12,
    "eval.retrieval.run": True,
}
TINY = [
    f"--config={ROOT}/configs/pretrain/siglip_b16.py:tiny",
    "--config.batch_size=8",
    "--config.log.every=1",
    "--config.log.tensorboard=False",
    "--config.total_steps=100000",
]


def work(folder, jobs, **options):
    """Make the runs in `folder`: {its name: changes of the recipe}."""
    listed = [{"workdir": str(folder / name), "config": jobs[name]} for name in jobs]
    file = folder / "jobs.json"
    file.write_text(json.dumps(listed))
    run("-m", "tests.process_worker", f"--jobs={file}", **options)


def parameters(workdir, step):
    """Those of a run; step 0: as it started."""
    if step:
        params = load_parameters(f"{workdir}@{step}")
    else:
        config = load_assets(workdir)["config"]
        params = init_params(model_config(config["model"]), jax.random.key(config["seed"]))
    return vector(params)


def vector(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


def assert_same_training(workdir, expected):
    """Losses, gradients and parameters to 1e-5, the last two relative to their norm."""
    np.testing.assert_allclose(losses_of(workdir), losses_of(expected), rtol=1e-5)
    steps = range(len(losses_of(expected)) + 1)
    ours, theirs = ([parameters(path, step) for step in steps] for path in (workdir, expected))
    for step in steps[1:]:
        gradient, one = ((x[step - 1] - x[step]) / RATE for x in (ours, theirs))
        assert np.linalg.norm(gradient - one) < 1e-5 * np.linalg.norm(one), f"step {step}"
        difference = np.linalg.norm(ours[step] - theirs[step])
        assert difference < 1e-5 * np.linalg.norm(theirs[step]), f"step {step}"
    averages = (vector(load_parameters(path, ema=True)) for path in (workdir, expected))
    np.testing.assert_allclose(*averages, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """What one process with one device does in three steps, and a run that it left after one."""
    folder = tmp_path_factory.mktemp("one_process")
    jobs = {"whole": {"total_steps": 3, **EVALUATED}, "begun": {"total_steps": 1}}
    work(folder, jobs, processes=1)
    return folder


@pytest.mark.slow
@pytest.mark.xdist_group("one_process")
def test_two_processes_train_what_one_does(one_process, tmp_path):
    jobs = {
        "data": {"total_steps": 3},
        "data, whole state": {"total_steps": 3, "optimizer.sharded": False},
        "data and fsdp": {"total_steps": 3, "mesh.fsdp": 2, **EVALUATED},
    }
    work(tmp_path, jobs, processes=2, devices=2)
    for name in jobs:
        assert_same_training(tmp_path / name, one_process / "whole")
    scores = (log_of(path)[-1][RECALL] for path in (tmp_path / name, one_process / "whole"))
    assert len(set(scores)) == 1


@pytest.mark.slow
@pytest.mark.xdist_group("one_process")
def test_four_processes_go_on_from_one_and_one_from_four(one_process, tmp_path):
    shutil.copytree(one_process / "begun", tmp_path / "from one")
    jobs = {
        "from one": {"total_steps": 3, "mesh.fsdp": 2, "mesh.tensor": 2},
        "from four": {"total_steps": 1, "mesh.fsdp": 2},
    }
    work(tmp_path, jobs, processes=4, devices=2)
    work(tmp_path, {"from four": {"total_steps": 3}}, processes=1)
    for name in jobs:
        assert_same_training(tmp_path / name, one_process / "whole")


def when_it_steps(workdir, started):
    """Wait until the run has logged two steps."""
    metrics, deadline = workdir / "metrics.jsonl", time.monotonic() + 1200
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in started), outputs(started)
        time.sleep(0.2)


@pytest.mark.slow
def test_sigterm_to_one_of_two_saves_a_step_that_both_agree_on(tmp_path):
    command = ("train.py", *TINY, f"--workdir={tmp_path}", "--interrupted_status=75")
    started = start(*command, processes=2, devices=2, by_flags=False)
    when_it_steps(tmp_path, started)
    started[1].send_signal(signal.SIGTERM)
    written = outputs(started, timeout=100)
    assert [process.returncode for process in started] == [75, 75], written
    (step,) = (int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert step == log_of(tmp_path)[-1]["step"] >= 2
    assert find_checkpoint(tmp_path).name == str(step)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_end_when_a_process_dies(tmp_path, victim):
    started = start(
        *("train.py", *TINY, f"--workdir={tmp_path}", "--heartbeat_timeout=10"), processes=2
    )
    when_it_steps(tmp_path, started)
    killed_at = time.monotonic()
    started[victim].kill()
    survivor = started[1 - victim]
    assert survivor.wait(timeout=120) != 0
    seconds = time.monotonic() - killed_at
    text = outputs(started)[1 - victim]
    assert seconds < 60, text[-2000:]
