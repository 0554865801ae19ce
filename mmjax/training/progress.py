"""What people see of a run: its metrics in files, its progress on the terminal."""

import collections
import contextlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Self, TextIO

import absl.logging
import rich.console
import rich.progress
import rich.table
from etils import epath

from mmjax.errors import InputError
from mmjax.folders import absolute, is_remote

# --- Metrics in files ---------------------------------------------------------------------------

REWRITTEN_EVERY = 60.0  # seconds; an object is written whole, however little is new


class MetricWriter:
    """Writes scalars to `WORKDIR/metrics.jsonl`, and to TensorBoard and Weights & Biases if asked.

    A line of the file is `{"step": 100, "train/loss": 3.2, …}`; it is on the disk when `write`
    returns, so that a crash loses nothing (in object storage, a minute). A resumed run makes the
    steps since its checkpoint again, so what the file says of them is dropped first: no step stands
    there twice.

    Args:
        workdir: the run's folder, made if absent.
        config: the run's configuration, shown by Weights & Biases.
        tensorboard: also write event files to `WORKDIR/tensorboard`.
        wandb_project: also log to this Weights & Biases project; '' for none.
        resume_step: the step of the checkpoint that the run goes on from; 0: from the start.
        enabled: False makes every method do nothing, as on all processes but the first.

    Raises:
        InputError: a line of an existing file other than the last is not JSON, or
            `wandb_project` names one and the package is not installed.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        config: Mapping[str, Any],
        tensorboard: bool = True,
        wandb_project: str = "",
        resume_step: int = 0,
        enabled: bool = True,
    ):
        self._file: TextIO | _ObjectFile | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not enabled:
            return
        folder = epath.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        if wandb_project:
            self._wandb = _wandb_run(folder, wandb_project, config)
        path = folder / "metrics.jsonl"
        if path.exists():
            _drop_later_steps(path, resume_step)
        self._file = _ObjectFile(path) if is_remote(folder) else path.open("a")
        if tensorboard:
            self._tensorboard = _tensorboard_writer(folder / "tensorboard", resume_step)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of one step; their names have slashes (`train/loss`)."""
        if self._file is None:
            return
        values = {name: float(value) for name, value in scalars.items()}
        self._file.write(json.dumps({"step": int(step), **values}) + "\n")
        self._file.flush()
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=int(step))

    def close(self) -> None:
        """Writes out what is buffered and closes the files."""
        for writer in (self._file, self._tensorboard):
            if writer:
                writer.close()
        if self._wandb:
            self._wandb.finish()
        self._file = self._tensorboard = self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


class _ObjectFile:
    """A text in object storage, where nothing can be appended to what is there."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._parts = [path.read_text()] if path.exists() else []
        self._written_at = time.monotonic()

    def write(self, text: str) -> None:
        self._parts.append(text)

    def flush(self) -> None:
        if time.monotonic() - self._written_at >= REWRITTEN_EVERY:
            self.close()

    def close(self) -> None:
        self._path.write_text("".join(self._parts))
        self._written_at = time.monotonic()


def _tensorboard_writer(folder: epath.Path, resume_step: int) -> Any:
    import tensorboardX  # only where it is wanted: it takes a while to import

    try:
        return tensorboardX.SummaryWriter(str(folder), purge_step=resume_step + 1)
    except ImportError as error:  # of what it reaches object storage with
        raise InputError(
            f"log.tensorboard cannot write to {folder}: {error} Install it, or set "
            "log.tensorboard=False: metrics.jsonl has the same numbers."
        ) from error


def _drop_later_steps(path: epath.Path, last_step: int) -> None:
    """Rewrites a metrics file without the steps after `last_step` and without a half last line."""
    lines = path.read_bytes().splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break  # a crash while it was being written
            raise InputError(
                f"{path}, line {number}: expected a JSON object with a 'step', found "
                f"{line[:60]!r}. Delete the line, or start in an empty --workdir."
            ) from error
        if step <= last_step:
            kept.append(line if line.endswith(b"\n") else line + b"\n")
    if kept != lines:
        new = path.with_suffix(".tmp")
        new.write_bytes(b"".join(kept))
        new.replace(path)


def _wandb_run(folder: epath.Path, project: str, config: Mapping[str, Any]) -> Any:
    """The Weights & Biases run of a work directory, gone on with if it has one already."""
    try:
        import wandb
    except ImportError as error:
        raise InputError(
            f"log.wandb_project={project!r} needs Weights & Biases: pip install wandb, or leave "
            "log.wandb_project empty."
        ) from error
    remembered = folder / "wandb_run_id"
    run = wandb.init(
        project=project,
        name=absolute(folder).name,
        dir=None if is_remote(folder) else str(folder),
        config=dict(config),
        id=remembered.read_text().strip() if remembered.exists() else None,
        resume="allow",
    )
    remembered.write_text(run.id + "\n")
    return run


# --- Progress on the terminal -------------------------------------------------------------------

PLAIN_LINE_EVERY = 10.0  # seconds
RATE_WINDOW = 100  # updates
WIDTH_FOR_BAR = 110  # characters; on a narrower terminal the losses need the room


class ProgressBar:
    """Step, losses, images a second and time left, in one line that stays at the bottom.

    Where the output is no terminal (a log file, CI), a plain line is printed for the first losses,
    then every ten seconds, and at the end. Log lines written meanwhile go above the bar.

        with ProgressBar(total_steps, start_step=100, images_per_step=256) as bar:
            for step in …:
                …
                bar.update(step, {"train/loss": 3.1, "train/matching/loss": 0.6})

    Args:
        total_steps: the step at which the run ends.
        start_step: steps done by an earlier process.
        images_per_step: the global batch size.
        output: where to draw; default: the standard output.
        enabled: False draws nothing, as on all processes but the first.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        images_per_step: int,
        output: TextIO | None = None,
        enabled: bool = True,
    ):
        self._total = total_steps
        self._step = start_step
        self._images_per_step = images_per_step
        self._losses = "compiling"
        self._output = output or sys.stdout
        self._enabled = enabled
        self._live = enabled and self._output.isatty() and os.environ.get("TERM") != "dumb"
        self._open = contextlib.ExitStack()
        self._start = self._last_line = time.monotonic()
        self._printed_step: int | None = None
        # (time, step) of recent updates; the first comes after compilation, which is no measure.
        self._recent: collections.deque[tuple[float, int]] = collections.deque(maxlen=RATE_WINDOW)
        self._bar: rich.progress.Progress | None = None

    def update(self, step: int, scalars: Mapping[str, float] | None = None) -> None:
        """Shows that `step` steps are done.

        Args:
            step: steps done, by earlier processes too.
            scalars: where they have been fetched, the step's metrics: `train/loss` and
                `train/OBJECTIVE/loss` are shown, others not.
        """
        self._step = step
        now = time.monotonic()
        self._recent.append((now, step))
        if scalars:
            self._losses = _losses(scalars)
        if self._bar:
            self._bar.update(
                self._bar.task_ids[0], completed=step, losses=self._losses, **self._pace()
            )
        elif scalars and (self._printed_step is None or now - self._last_line >= PLAIN_LINE_EVERY):
            self._print_line()

    @property
    def images_per_second(self) -> float | None:
        """Over the recent updates; None before the second."""
        if len(self._recent) < 2:
            return None
        (start, first), (end, last) = self._recent[0], self._recent[-1]
        return (last - first) * self._images_per_step / max(end - start, 1e-9)

    def _pace(self) -> dict[str, Any]:
        rate = self.images_per_second
        left = (self._total - self._step) * self._images_per_step / rate if rate else None
        return {
            "rate": f"{rate:,.{0 if rate >= 10 else 1}f} images/s" if rate else "",
            "elapsed": _duration(time.monotonic() - self._start),
            "left": _duration(left) if left is not None else "?",
        }

    def _print_line(self) -> None:
        if not self._enabled or self._printed_step == self._step:
            return
        pace = self._pace()
        parts = [
            f"step {self._step}/{self._total}",
            self._losses,
            pace["rate"],
            f"elapsed {pace['elapsed']}",
            f"left {pace['left']}",
        ]
        print("  ".join(part for part in parts if part), file=self._output, flush=True)
        self._printed_step, self._last_line = self._step, time.monotonic()

    def __enter__(self) -> Self:
        self._start = self._last_line = time.monotonic()
        if self._live:
            console = rich.console.Console(file=self._output, highlight=False)
            whole = rich.table.Column(no_wrap=True)
            shrinking = rich.table.Column(no_wrap=True, overflow="ellipsis", ratio=1)
            columns = [
                rich.progress.TextColumn("{task.completed}/{task.total}", table_column=whole),
                rich.progress.BarColumn(bar_width=12),
                rich.progress.TextColumn("{task.fields[losses]}", table_column=shrinking),
                rich.progress.TextColumn("{task.fields[rate]}", table_column=whole),
                rich.progress.TextColumn(
                    "{task.fields[elapsed]}, {task.fields[left]} left", table_column=whole
                ),
            ]
            if console.width < WIDTH_FOR_BAR:
                del columns[1]
            self._bar = rich.progress.Progress(
                *columns,
                console=console,
                refresh_per_second=4,  # a redraw takes the interpreter from the data threads
                expand=True,
            )
            self._bar.add_task(
                "", total=self._total, completed=self._step, losses=self._losses, **self._pace()
            )
            self._open.enter_context(self._bar)
            self._open.enter_context(_logging_through(sys.stderr))
        return self

    def __exit__(self, *error: Any) -> None:
        if not self._live and self._recent:
            self._print_line()
        self._bar = None
        self._open.close()


def _losses(scalars: Mapping[str, float]) -> str:
    """'loss 3.14  contrastive 2.50  matching 0.64'."""
    shown = []
    for name, value in scalars.items():
        found = re.fullmatch(r"train/(?:([^/]+)/)?loss", name)
        if found:
            shown.append((found[1] is not None, f"{found[1] or 'loss'} {float(value):.4g}"))
    # The total comes first; sorted() keeps the order of the objectives.
    return "  ".join(text for _, text in sorted(shown, key=lambda pair: pair[0]))


def _duration(seconds: float) -> str:
    """'1:02:03', or '2:03' under an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@contextlib.contextmanager
def _logging_through(stream: TextIO) -> Iterator[None]:
    """Lets log handlers write to `stream`, which the live bar draws above itself.

    Handlers hold on to the stream that they were made with, so that they would write past the
    stand-ins which rich puts in the place of sys.stdout and sys.stderr.
    """
    handlers = [*logging.getLogger().handlers, absl.logging.get_absl_handler().python_handler]
    terminal = {sys.__stdout__, sys.__stderr__}
    moved = [
        (handler, handler.setStream(stream))
        for handler in handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream in terminal
    ]
    try:
        yield
    finally:
        for handler, original in moved:
            handler.setStream(original)
