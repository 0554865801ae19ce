"""How processes find each other, agree, and end."""

import time

import pytest

from mmjax.distributed import PLACING, Place, place_of
from mmjax.errors import InputError
from tests.processes import ROOT, free_port, outputs, start

NONE = dict.fromkeys(PLACING)
ALL = {"coordinator": "10.0.0.1:8476", "num_processes": 4, "process_id": 3}
VARIABLES = {
    "JAX_COORDINATOR_ADDRESS": "host.name:99",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "0",
}


def test_flags_place_a_process_and_variables_where_they_are_silent():
    assert place_of(ALL, {}) == Place("10.0.0.1:8476", 4, 3)
    assert place_of(NONE, VARIABLES) == Place("host.name:99", 2, 0)
    assert place_of({**NONE, "process_id": 1}, VARIABLES) == Place("host.name:99", 2, 1)
    assert place_of(NONE, {"SLURM_PROCID": "3"}) is None  # jax's own detection is asked


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coordinator": None}, "--num_processes and --process_id without --coordinator: a"),
        ({"num_processes": None, "coordinator": None}, "--process_id without --coordinator and"),
        ({"process_id": None}, "without --process_id"),
        ({"process_id": 4}, "--process_id is 4; with --num_processes=4 it lies between 0 and 3"),
        ({"process_id": -1}, "--process_id is -1"),
        ({"num_processes": 0}, "--num_processes is 0; it is at least 1"),
        ({"coordinator": "10.0.0.1"}, "--coordinator is '10.0.0.1'; expected HOST:PORT"),
        ({"coordinator": "10.0.0.1:http"}, "expected HOST:PORT"),
        ({"coordinator": ":8476"}, "expected HOST:PORT"),
        ({"coordinator": "10.0.0.1:84760"}, "expected HOST:PORT"),
    ],
)
def test_flags_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        place_of(ALL | changes, {})


def test_variables_that_cannot_be():
    with pytest.raises(InputError, match="JAX_NUM_PROCESSES is 'two'; expected a whole number"):
        place_of(NONE, VARIABLES | {"JAX_NUM_PROCESSES": "two"})
    # As SLURM's or the pod's variable was meant to fill it.
    with pytest.raises(InputError, match="without --process_id"):
        place_of(NONE, VARIABLES | {"JAX_PROCESS_ID": ""})


SCRIPT = """
import sys
import numpy as np
from absl import app, flags
from jax.experimental import multihost_utils
from mmjax import distributed
from mmjax.errors import InputError

FAILING = flags.DEFINE_list("failing", [], "Processes that fail.")
distributed.GRACE_SECONDS = 2

def main(_):
    with distributed.ending_together():
        try:
            distributed.join_if_asked()
            if str(flags.FLAGS.process_id) in FAILING.value:
                raise InputError("no such file")
            print("gathered", multihost_utils.process_allgather(np.ones(2)).sum())
        except InputError as error:
            print(error)
            sys.exit(2)

distributed.define_flags()
app.run(main)
"""


def run_script(failing, **options):
    """The exit statuses and outputs of two processes, some of which fail, and the seconds taken."""
    begun = time.monotonic()
    started = start("-c", SCRIPT, f"--failing={failing}", "--heartbeat_timeout=5", **options)
    written = outputs(started, timeout=100)
    return [process.returncode for process in started], written, time.monotonic() - begun


def test_two_processes_meet_by_variables_without_a_compilation_cache(tmp_path, monkeypatch):
    """Process 0 alone would write there: the next time it would load what the others compile."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    statuses, written, _ = run_script("", processes=2, by_flags=False)
    assert statuses == [0, 0], written
    assert all("gathered 4.0" in text for text in written)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_what_fails_on_one_process_ends_the_others(failing):
    statuses, written, seconds = run_script(str(failing), processes=2)
    assert statuses[failing] == 2, written
    assert "no such file" in written[failing]
    assert "this process ends the run" in written[failing]
    assert statuses[1 - failing] != 0
    # Without it they wait for each other for two minutes.
    assert seconds < 60


@pytest.mark.slow
def test_what_fails_on_every_process_ends_as_ever():
    statuses, written, seconds = run_script("0,1", processes=2)
    assert statuses == [2, 2], written
    assert not any("Terminating" in text or "Traceback" in text for text in written)
    assert seconds < 60


def assert_refused(started, message):
    for process, text in zip(started, outputs(started, timeout=100), strict=True):
        assert process.returncode == 2, text
        assert message in text
        assert "Traceback" not in text


TRAIN = ("train.py", f"--config={ROOT}/configs/pretrain/coattention_b16.py:tiny", "--workdir=no")


def test_processes_started_differently_all_say_so():
    started = start(*TRAIN, processes=2, different={1: ["--config.seed=3"]})
    assert_refused(started, "config.seed is 0 on process 0 and 3 on process 1. Start all of them")


@pytest.mark.slow
def test_a_coordinator_that_does_not_answer():
    place = [f"--coordinator=localhost:{free_port()}", "--num_processes=2", "--process_id=1"]
    started = start(*TRAIN, *place, "--initialization_timeout=1", processes=1)
    assert_refused(started, "does not answer after 1 s")


@pytest.mark.slow
def test_nothing_says_where_the_process_belongs():
    started = start(*TRAIN, "--distributed", processes=1)
    assert_refused(started, "--distributed: nothing says where this process belongs")
