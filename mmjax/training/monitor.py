"""Keeps an eye on a run: fetches its metrics, writes them, warns, and says when to stop."""

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from mmjax.errors import InputError
from mmjax.folders import is_remote, move
from mmjax.training.diagnostics import Diagnosis
from mmjax.training.optimizer import make_schedule
from mmjax.training.progress import MetricWriter, ProgressBar
from mmjax.training.throughput import Stopwatch

_PROFILE_FROM = 5  # compilation and the first, slower steps are past


class Monitor:
    """The metrics of a run, on the terminal and in its files.

    Args:
        config: the resolved config.
        workdir: the run's folder.
        first_step: steps done before.
        records: in the training source: what `data.max_bad_fraction` is a fraction of.
        flops: model FLOPs of a step.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: epath.Path,
        *,
        first_step: int,
        records: int,
        flops: float,
    ):
        self.config, self.workdir = config, workdir
        self.first_step, self.records = first_step, records
        self.stop_reason = ""  # why the run must stop, after a checkpoint
        enabled = jax.process_index() == 0
        self._writer = MetricWriter(
            workdir,
            config=config.to_dict(),
            tensorboard=config.log.tensorboard,
            wandb_project=config.log.wandb_project,
            resume_step=first_step,
            enabled=enabled,
        )
        self._bar = ProgressBar(
            config.total_steps,
            start_step=first_step,
            images_per_step=config.batch_size,
            enabled=enabled,
        )
        self._watch = Stopwatch(flops, config.batch_size)
        self._schedule = make_schedule(config.optimizer.to_dict(), config.total_steps)
        self._diagnosis = Diagnosis(
            config.log.warn_after, warmup_steps=config.optimizer.schedule.warmup_steps
        )
        self._pending: list[Mapping[str, jax.Array]] = []
        self._bad_records = 0
        self._profiling = self._profiled = False

    def observe(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Take the (unfetched) metrics of a step that was just dispatched; log where it is time.

        Raises InputError where the loss is no number any more.
        """
        self._pending.append(metrics)
        if len(self._pending) > 1:
            jax.block_until_ready(self._pending[-2])  # stay one step ahead of the devices, no more
        self._profile(step)
        last = step == self.config.total_steps
        if step % self.config.log.every and not last:
            self._bar.update(step)
            return
        scalars = self._fetch(step)
        self._writer.write(step, scalars)
        self._bar.update(step, scalars)

    def scores(self, step: int, scores: Mapping[str, float]) -> None:
        """Log an evaluation."""
        self._writer.write(step, {f"eval/{name}": value for name, value in scores.items()})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
        logging.info("Evaluation at step %d: %s", step, shown)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time within is spent waiting for input."""
        with self._watch.waiting():
            yield

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time within is not training time; the steps before have finished when it begins."""
        jax.block_until_ready(self._pending)
        with self._watch.pause():
            yield

    def _fetch(self, step: int) -> dict[str, float]:
        """Means over the steps since the last log, with the pace and the learning rate."""
        fetched = jax.device_get(self._pending)
        self._bad_records += int(sum(metrics["bad_records"] for metrics in fetched))
        means = {name: float(np.mean([m[name] for m in fetched])) for name in fetched[0]}
        means["bad_records"] = self._bad_records
        self._require_finite(step, means)
        for warning in self._diagnosis.observe(step, means):
            logging.warning("%s", warning)
        means |= self._diagnosis.metrics
        self._check_bad_records(step)
        means["learning_rate"] = float(self._schedule(step - 1))
        means |= self._watch.lap(len(fetched))
        self._pending.clear()
        return {f"train/{name}": value for name, value in means.items()}

    def require_finite(self, step: int) -> None:
        """Raise InputError where this step's update is no number: called before it is saved."""
        if self._pending:
            self._require_finite(step, jax.device_get(self._pending[-1]))

    def _require_finite(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name in ("loss", "gradient_norm", "parameter_norm"):
            if not math.isfinite(metrics[name]):
                raise InputError(
                    f"the {name.replace('_', ' ')} is {metrics[name]} at step {step}: the run has "
                    f"diverged. Resume from the last checkpoint in {self.workdir} with a lower "
                    "optimizer.learning_rate, a longer warm-up, or optimizer.clip_norm."
                )

    def _check_bad_records(self, step: int) -> None:
        """More bad records than the allowed share of the data, or of the examples drawn so far."""
        drawn = (step - self.first_step) * self.config.batch_size
        allowed = self.config.data.max_bad_fraction * max(drawn, self.records)
        if self._bad_records > allowed:
            self.stop_reason = (
                f"{self._bad_records} bad records were replaced up to step {step}, more than "
                f"data.max_bad_fraction = {self.config.data.max_bad_fraction} of "
                f"{max(drawn, self.records)}. They are named in the log above; mend them or raise "
                "the fraction, and start again to resume from here."
            )

    def _profile(self, step: int) -> None:
        """Trace `log.profile` steps (view with TensorBoard or Perfetto)."""
        begin = self.first_step + _PROFILE_FROM
        if self.config.log.profile and step == begin:
            # The profiler writes to disks alone.
            local = tempfile.mkdtemp() if is_remote(self.workdir) else self.workdir / "profile"
            self._profile_folder = epath.Path(local)
            jax.profiler.start_trace(str(local))
            self._profiling = True
        elif self._profiling and step >= begin + self.config.log.profile:
            self._end_profile()

    def _end_profile(self) -> None:
        jax.block_until_ready(self._pending)
        jax.profiler.stop_trace()
        if self._profile_folder != self.workdir / "profile":
            move(self._profile_folder, self.workdir / "profile")
        self._profiling, self._profiled = False, True
        logging.info("Wrote a profiler trace to %s.", self.workdir / "profile")

    def __enter__(self) -> Self:
        self._writer.__enter__()
        self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._profiling:
            self._end_profile()
        elif self.config.log.profile and not self._profiled:
            logging.warning("No profile was written: the run ended before its fifth step.")
        self._bar.__exit__(*error)
        self._writer.__exit__(*error)
