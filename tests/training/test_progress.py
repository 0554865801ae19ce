import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import types

import pytest

from mmjax.errors import InputError
from mmjax.training import progress
from mmjax.training.progress import MetricWriter, ProgressBar


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def write(workdir, steps, **options):
    with MetricWriter(workdir, config={}, **{"tensorboard": False, **options}) as writer:
        for step in steps:
            writer.write(step, {"train/loss": 1 / step})


# --- MetricWriter -------------------------------------------------------------------------------


def test_a_line_is_on_the_disk_when_write_returns(tmp_path):
    with MetricWriter(tmp_path / "new", config={}, tensorboard=False) as writer:
        writer.write(5, {"train/loss": 0.5})
        writer.write(10, {"train/loss": 0.25, "eval/R@1": 3})
        expected = [
            {"step": 5, "train/loss": 0.5},
            {"step": 10, "train/loss": 0.25, "eval/R@1": 3.0},
        ]
        assert lines(tmp_path / "new") == expected


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    write(tmp_path, [10, 20, 30])
    write(tmp_path, [30, 40], resume_step=20)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30, 40]
    write(tmp_path, [5])  # from scratch
    assert [line["step"] for line in lines(tmp_path)] == [5]


@pytest.mark.parametrize(
    "tail", ['{"step": 40, "tr', '{"step": 40}', "{}", "\0\0", '{"step": 40}\n\n']
)
def test_a_half_written_last_line_is_tolerated(tmp_path, tail):
    write(tmp_path, [10, 20])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    write(tmp_path, [30], resume_step=20)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30]


def test_a_whole_last_line_without_its_line_end_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}')
    write(tmp_path, [30], resume_step=20)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\nhello\n{"step": 20}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl, line 2: .*hello"):
        MetricWriter(tmp_path, config={}, tensorboard=False, resume_step=20)


def test_other_processes_write_nothing(tmp_path):
    write(tmp_path / "run", [1], enabled=False, wandb_project="project", tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_same_scalars(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    write(tmp_path, [1, 2, 4], tensorboard=True)
    (file,) = (tmp_path / "tensorboard").iterdir()
    content, found = file.read_bytes(), {}
    while content:  # records of TFRecord: length, checksum, data, checksum
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]
        found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
    assert found == {("train/loss", 1): 1.0, ("train/loss", 2): 0.5, ("train/loss", 4): 0.25}


class FakeRun:
    def __init__(self, options):
        self.options, self.logged, self.finished = options, [], False
        self.id = options["id"] or "abc123"

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def test_wandb_goes_on_with_the_run_of_the_work_directory(tmp_path, monkeypatch):
    runs = []

    def init(**options):
        runs.append(FakeRun(options))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for step in (1, 2):
        with MetricWriter(
            tmp_path, config={"seed": 3}, tensorboard=False, wandb_project="vision"
        ) as writer:
            writer.write(step, {"train/loss": 0.5})
    assert [run.options["id"] for run in runs] == [None, "abc123"]
    assert [run.logged for run in runs] == [[(s, {"train/loss": 0.5})] for s in (1, 2)]
    assert runs[0].options["config"] == {"seed": 3}
    assert runs[0].options["project"] == "vision"
    assert all(run.finished for run in runs)


def test_wandb_asked_for_but_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        MetricWriter(tmp_path, config={}, tensorboard=False, wandb_project="vision")


# --- ProgressBar --------------------------------------------------------------------------------

SCALARS = {
    "train/matching/loss": 0.6365,
    "train/loss": 4.25,
    "train/contrastive/loss": 3.5,
    "train/learning_rate": 1e-4,
    "eval/loss": 9.0,
}


class Clock:
    """Stands in for the module `time`."""

    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_plain_lines_come_at_intervals_and_at_the_end(clock):
    output = io.StringIO()
    with ProgressBar(1000, start_step=100, images_per_step=64, output=output) as bar:
        clock.now += 15  # compilation
        for step in range(101, 201):
            bar.update(step, SCALARS if step % 5 == 0 else None)
            clock.now += 0.5
    losses = "loss 4.25  matching 0.6365  contrastive 3.5"
    printed = output.getvalue().splitlines()
    assert printed[0] == f"step 105/1000  {losses}  128 images/s  elapsed 0:17  left 7:28"
    assert [line.split()[1].split("/")[0] for line in printed] == [
        "105",
        "125",
        "145",
        "165",
        "185",
        "200",
    ]
    assert "\x1b" not in output.getvalue()
    assert "\r" not in output.getvalue()


def test_an_exception_shows_the_last_step_and_passes(clock):
    output = io.StringIO()

    def run():
        with ProgressBar(10, images_per_step=1, output=output) as bar:
            for step in (1, 2, 3):
                bar.update(step, SCALARS)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        run()
    assert [line[:9] for line in output.getvalue().splitlines()] == ["step 1/10", "step 3/10"]


def test_a_run_with_nothing_to_do_prints_nothing():
    output = io.StringIO()
    with ProgressBar(10, start_step=10, images_per_step=1, output=output):
        pass
    assert output.getvalue() == ""


def test_disabled_bar_prints_nothing():
    output = io.StringIO()
    with ProgressBar(10, images_per_step=1, output=output, enabled=False) as bar:
        bar.update(1, SCALARS)
    assert output.getvalue() == ""


def test_rate_leaves_out_compilation(clock):
    bar = ProgressBar(10, images_per_step=32, output=io.StringIO())
    assert bar.images_per_second is None
    clock.now += 60
    bar.update(1)
    assert bar.images_per_second is None
    clock.now += 2
    bar.update(3)
    assert bar.images_per_second == pytest.approx(32)


LIVE = """
import logging, sys, time, warnings
import absl.logging
logging.basicConfig(format="%(message)s")
from mmjax.training.progress import ProgressBar
scalars = {"train/loss": 4.25, "train/contrastive/loss": 3.5, "train/masked_language/loss": 1.5}
try:
    with ProgressBar(40, images_per_step=64) as bar:
        for step in range(1, 31):
            bar.update(step, scalars)
            time.sleep(0.02)
            if step % 10 == 0:
                logging.warning(f"[logged {step}]")
                absl.logging.warning(f"[absl {step}]")
                print(f"[printed {step}]")
                print(f"[error {step}]", file=sys.stderr)
        raise KeyError("boom")
except KeyError:
    logging.warning("[after]")
"""


@pytest.mark.parametrize("columns", [80, 140])
def test_on_a_terminal_one_line_lives_and_messages_do_not_tear_it(columns):
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", LIVE], stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    received = b""
    try:
        while data := os.read(ours, 65536):
            received += data
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(ours)
    assert child.wait(timeout=30) == 0
    # Each redraw returns to the line's start and erases it: what stays is what comes after.
    visible = [
        re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", re.split(r"\r|\x1b\[2K", line)[-1]).rstrip()
        for line in received.decode().replace("\r\n", "\n").rstrip().split("\n")
    ]
    kinds = ("logged", "absl", "printed", "error")
    assert [line for line in visible if line.startswith("[")] == [
        *(f"[{kind} {step}]" for step in (10, 20, 30) for kind in kinds),
        "[after]",
    ]
    bars = [line for line in visible if "/40" in line]
    assert visible.index(bars[-1]) == len(visible) - 2  # the bar stays, then comes "[after]"
    assert re.match(r"30/40 .*loss 4.25  contrastive 3.5", bars[-1])
    assert re.search(r"images/s \d+:\d\d, \d+:\d\d left$", bars[-1])
    assert ("masked_language 1.5 " in bars[-1]) == (columns > 80)
    assert len(bars) == 1, "a bar was left behind by a message"
    assert visible[-1] == "[after]"
