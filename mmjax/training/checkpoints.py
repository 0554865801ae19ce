"""Checkpoints: written while training goes on, found again by path, loaded onto any mesh.

A run keeps its checkpoints in `WORKDIR/checkpoints/STEP/`:

    state/     the training state, arrays in Orbax's sharded format
    assets/    what else the model needs, in plain files: `config.json`, `tokenizer.text`, …
    metrics/   the scores at that step, by which the best checkpoint is chosen

The position in the data is the step itself: batch `STEP` is the next one to draw, whatever the
number of processes. A folder under the plain name `STEP` is whole; Orbax writes under a
temporary name and renames when every process has finished. Nothing is pickled.
"""

import contextlib
import dataclasses
import difflib
import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Self, TypeAlias

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from mmjax.errors import InputError, near_misses
from mmjax.folders import absolute
from mmjax.rules import by_path

Tree = Any  # a pytree of arrays, or of their ShapeDtypeStructs
Path: TypeAlias = str | os.PathLike[str]

LISTED_AT_MOST = 10


class Checkpointer:
    """The checkpoints of one work directory.

    Keeps the `keep` latest and, where `best_metric` is named, the one with the best score. Every
    process of a run makes one and calls the same methods in the same order. What a killed run left
    half written is removed in the background, before the first save.

    Args:
        workdir: the run's folder; checkpoints live in its `checkpoints` folder.
        every: `save` writes at multiples of this step; 0: only when forced.
        keep: how many of the latest checkpoints stay, at least 1.
        best_metric: name among the `metrics` given to `save`, or '' to keep none for its score.
        best_mode: whether a high ('max') or a low ('min') score is good.

    Raises:
        InputError: for arguments out of range and for a damaged checkpoint folder.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        every: int,
        keep: int,
        best_metric: str = "",
        best_mode: Literal["max", "min"] = "max",
    ):
        if every < 0:
            raise InputError(f"checkpoint.every is {every}; expected 0 or more steps.")
        if keep < 1:
            raise InputError(f"checkpoint.keep is {keep}; expected at least 1.")
        if best_mode not in ("max", "min"):
            raise InputError(f"checkpoint.best_mode is {best_mode!r}; expected 'max' or 'min'.")
        self._every = every
        self._policy = _KeepLatestAndBest(keep, best_metric, best_mode)
        folder = absolute(workdir) / "checkpoints"
        context = ocp.Context()
        # Replicas share the writing of an array by slicing it on the device, which compiles a
        # program for every shape: seconds at the first save, for arrays that are not worth it.
        context.array.saving.min_slice_bytes_for_replica_parallel = 2**20
        with _blaming(folder):
            self._orbax = ocp.training.Checkpointer(
                folder,
                context=context,
                preservation_policy=self._policy,
                cleanup_tmp_directories=True,
            )

    @property
    def steps(self) -> list[int]:
        """The steps with a checkpoint, ascending; one that is still being written counts."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def latest_step(self) -> int | None:
        """The last of `steps`, or None where there is no checkpoint."""
        return max(self.steps, default=None)

    def due(self, step: int, force: bool = False) -> bool:
        """Whether `save` would write: on schedule or forced, and not there yet."""
        on_schedule = self._every > 0 and step % self._every == 0
        return (force or on_schedule) and step not in self.steps

    def save(
        self,
        step: int,
        state: Tree,
        assets: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        force: bool = False,
    ) -> bool:
        """Starts to write a checkpoint, if one is due, and returns while it is being written.

        The state may be donated or overwritten as soon as this returns. A save that is still
        running is waited for, never skipped; if it failed, its error is raised here.

        Args:
            step: steps done so far, hence also the position in the data.
            state: pytree of jax.Arrays.
            assets: by name, what else the model needs: a `str` becomes `NAME.text` as it is, any
                other JSON value `NAME.json`.
            metrics: the scores of an evaluation made at this step; None where none was made.
            force: write off schedule, as at the end of a run.

        Returns:
            Whether a checkpoint was written: False off schedule and where `step` already has one.

        Raises:
            InputError: `best_metric` is not among the metrics (the checkpoint is written still).
        """
        if not self.due(step, force):
            return False
        # Orbax's own schedule skips a save while another runs; forced, it waits for the other.
        self._orbax.save_checkpointables_async(
            step,
            {"state": state, "assets": _Assets(assets)},
            metrics={name: float(value) for name, value in (metrics or {}).items()},
            custom_metadata={
                "best_metric": self._policy.best_metric,
                "best_mode": self._policy.best_mode,
            },
            force=True,
        )
        if metrics and self._policy.best_metric and self._policy.best_metric not in metrics:
            raise InputError(
                f"checkpoint.best_metric={self._policy.best_metric} is not a metric of the "
                f"evaluation.{near_misses(self._policy.best_metric, metrics)}"
            )
        return True

    def restore(self, abstract_state: Tree, step: int | None = None) -> Tree:
        """The state at `step` (default: the latest), laid out as `abstract_state` says.

        Args:
            abstract_state: the state's pytree of `jax.ShapeDtypeStruct`s; their shardings may
                belong to another mesh and another number of processes than wrote the checkpoint.
            step: one of `steps`.

        Raises:
            InputError: there is no such checkpoint, it is damaged, or it holds another
                architecture; then the message lists what is missing, unexpected and misshapen.
        """
        self.wait()
        steps = self.steps
        if not steps:
            raise InputError(f"{self._orbax.directory} holds no checkpoint.")
        step = max(steps) if step is None else step
        if step not in steps:
            raise InputError(
                f"{self._orbax.directory} holds no checkpoint of step {step}; it has {steps}."
            )
        return _load(self._orbax.directory / str(step), abstract_state)

    def wait(self) -> None:
        """Returns when nothing is being written any more; raises the error of a failed save."""
        self._orbax.wait()

    def close(self) -> None:
        """Waits, then frees the threads."""
        # Orbax waits for its removal of what is half written before a save alone. Where a run ends
        # without one, as by an error in its config, that thread would outlive the interpreter.
        self._orbax._manager._maybe_await_cleanup_tmp_directory()
        self._orbax.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class _KeepLatestAndBest:
    """Orbax's preservation policy: what stays when the checkpoint being written is whole."""

    keep: int
    best_metric: str
    best_mode: Literal["max", "min"]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-self.keep :], self.best_step(checkpoints)}
        return [step in kept for step in steps]

    def best_step(self, checkpoints: Sequence[Any]) -> int | None:
        """The step with the best finite score, the later of equals; None where none has one."""
        scores = {
            checkpoint.step: (checkpoint.metrics or {}).get(self.best_metric, math.nan)
            for checkpoint in checkpoints
        }
        sign = 1 if self.best_mode == "max" else -1
        scored = [(sign * score, step) for step, score in scores.items() if math.isfinite(score)]
        return max(scored)[1] if scored else None


class _Assets:
    """Plain files beside the state; Orbax calls `save` in its background thread."""

    def __init__(self, assets: Mapping[str, Any]):
        texts = {f"{name}.text": value for name, value in assets.items() if isinstance(value, str)}
        others = {
            f"{name}.json": json.dumps(value, indent=1, ensure_ascii=False)
            for name, value in assets.items()
            if not isinstance(value, str)
        }
        self._files = texts | others

    async def save(self, directory: ocp.path.PathAwaitingCreation) -> Any:
        async def write() -> None:
            folder = await directory.await_creation()
            if jax.process_index() == 0:
                for name, text in self._files.items():
                    (folder / name).write_bytes(text.encode())

        return write()

    async def load(self, directory: ocp.path.Path) -> Any:
        """Orbax's protocol asks for it, but nothing loads through Orbax what are plain files."""
        raise TypeError("assets are plain files: read them with load_assets")


# --- Finding and loading by path ----------------------------------------------------------------


def find_checkpoint(path: Path) -> epath.Path:
    """The STEP folder that `path` means; its name is the step.

    Args:
        path: a work directory, its `checkpoints` folder or one STEP folder; the first two take the
            latest checkpoint, or with `@STEP`, `@best`, `@latest` at the end the one so named.

    Raises:
        InputError: there is no such folder, or no such checkpoint in it.
    """
    selector = re.search(r"@(\d+|best|latest)$", str(path))
    which = selector[1] if selector else ""
    folder = absolute(str(path).removesuffix(f"@{which}"))
    if not folder.exists():
        raise InputError(
            f"No checkpoint at {folder}: there is no such folder. Expected a work directory of "
            "train.py, or one checkpoint in it, as in WORKDIR/checkpoints/STEP or WORKDIR@best."
        )
    if not which and folder.name.isdecimal() and (folder / "state").exists():
        return folder
    root = folder / "checkpoints" if (folder / "checkpoints").exists() else folder
    # This leaves out unfinished checkpoints.
    steps = sorted(found.step for found in ocp.path.step.standard_name_format().find_all(root))
    if not steps:
        raise InputError(
            f"{folder} holds no whole checkpoint: expected {folder}/checkpoints/STEP. Has the run "
            "reached its first checkpoint (checkpoint.every)?"
        )
    if which in ("", "latest"):
        return root / str(steps[-1])
    step = _best_step(root) if which == "best" else int(which)
    if step not in steps:
        raise InputError(f"{root} holds no checkpoint of step {step}; it has {steps}.")
    return root / str(step)


def _best_step(root: epath.Path) -> int:
    """The best step by the metric that the run was configured with."""
    with _blaming(root), ocp.training.Checkpointer(root) as orbax:
        checkpoints = orbax.checkpoints
        policy = _KeepLatestAndBest(keep=1, **orbax.metadata().custom_metadata)
    step = policy.best_step(checkpoints)
    if step is None:
        raise InputError(
            f"No checkpoint in {root} is the best one: the run named no checkpoint.best_metric, or "
            f"was never evaluated. Name a step: it has {[found.step for found in checkpoints]}."
        )
    return step


def load_parameters(path: Path, abstract_params: Tree = None, *, ema: bool = False) -> Tree:
    """The parameters of a checkpoint, without the rest of the training state.

    Args:
        path: as for `find_checkpoint`.
        abstract_params: nested dict of `jax.ShapeDtypeStruct`s with shardings that the parameters
            must match and are laid out by; None returns what there is, as numpy arrays.
        ema: load their exponential moving average instead.

    Raises:
        InputError: as for `Checkpointer.restore`; also where there is no EMA to load.
    """
    folder = find_checkpoint(path)
    field = "ema" if ema else "params"
    saved = _saved_tree(folder)
    if not jax.tree.leaves(saved.get(field)):
        raise InputError(
            f"{folder} holds no {field}."
            + (" The run kept no moving average; load the parameters themselves." if ema else "")
        )
    if abstract_params is None:
        abstract_params = jax.tree.map(lambda _: np.ndarray, saved[field])
        with _blaming(folder):
            return _load_fields(folder, {field: abstract_params})[field]
    return _load(folder, {field: abstract_params})[field]


def load_assets(path: Path) -> dict[str, Any]:
    """What was saved beside the state, by name: `{'config': dict, 'tokenizer': str, …}`.

    Args:
        path: as for `find_checkpoint`.

    Raises:
        InputError: as for `find_checkpoint`; also where a file is damaged.
    """
    folder = find_checkpoint(path) / "assets"
    with _blaming(folder):
        return {
            file.stem: json.loads(file.read_bytes())
            if file.suffix == ".json"
            # Bytes, so that no line ending is translated.
            else file.read_bytes().decode()
            for file in sorted(folder.iterdir())
            if file.suffix in (".json", ".text")  # Orbax leaves a marker here too
        }


def _load(folder: epath.Path, abstract: Tree) -> Tree:
    """The state in `folder`, or those of its fields that `abstract` has, checked before loading."""
    saved = _saved_tree(folder)
    if isinstance(abstract, Mapping):
        saved = {field: saved[field] for field in abstract}
    _require_same_tree(_shapes(saved), _shapes(abstract), folder)
    first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or first_device
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    with _blaming(folder):
        return _load_fields(folder, jax.tree.map(placed, abstract))


def _load_fields(folder: epath.Path, abstract: Tree) -> Tree:
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return ocp.load(folder, abstract, checkpointable_name="state")


def _saved_tree(folder: epath.Path) -> dict[str, Tree]:
    """Shapes and types of the state in `folder`, as nested dicts and lists; no array is read."""
    with _blaming(folder):
        tree = ocp.metadata(folder, "state").metadata
        if tree is None:  # Orbax has logged why
            raise ValueError("the description of the arrays is unreadable")
        return dict(tree)


@contextlib.contextmanager
def _blaming(folder: epath.Path) -> Iterator[None]:
    """Says of any failure within that the checkpoint in `folder` is damaged."""
    try:
        yield
    except (InputError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except PermissionError as error:
        raise InputError(f"No permission to use {folder}: {error}.") from error
    # Truncated or missing files surface as ValueError, KeyError, OSError or a bare Exception.
    except Exception as error:
        # Orbax abandons its other reads, and asyncio would print a page about each of them.
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{folder} cannot be read; the checkpoint seems damaged or incomplete. Delete the "
            "folder to go on from the checkpoint before it, or name another one. The reader says: "
            f"{reason[:300]}"
        ) from error


# --- Comparing trees ----------------------------------------------------------------------------


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    return {path: tuple(getattr(leaf, "shape", ())) for path, leaf in by_path(tree).items()}


def _require_same_tree(
    saved: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], folder: epath.Path
) -> None:
    """Raises InputError that lists every difference, those of the parameters alone if any."""
    missing = [path for path in wanted if path not in saved]
    unexpected = [path for path in saved if path not in wanted]
    misshapen = [path for path in wanted if path in saved and wanted[path] != saved[path]]
    different = missing + unexpected + misshapen
    if not different:
        return
    model_differs = any(path.startswith("params/") for path in different)
    if model_differs:
        # Optimizer and EMA repeat the parameters: naming these once is enough.
        missing, unexpected, misshapen = (
            [path for path in paths if path.startswith("params/")]
            for paths in (missing, unexpected, misshapen)
        )
    nearest = {path: difflib.get_close_matches(path, unexpected, n=1) for path in missing[:10]}
    raise InputError(
        f"The checkpoint {folder} "
        + (
            "holds another architecture than the configured model."
            if model_differs
            else "fits the model, but the optimizer or the moving average is another one."
        )
        + listed(
            "missing from the checkpoint",
            [
                path + "".join(f" (nearest there: {near})" for near in nearest.get(path, []))
                for path in missing
            ],
        )
        + listed("only in the checkpoint", unexpected)
        + listed(
            "of another shape",
            [f"{path}: {saved[path]} there, {wanted[path]} configured" for path in misshapen],
        )
        + "\nConfigure what the checkpoint was trained with (its assets/config.json), or start in "
        "an empty --workdir, with --config.init_from to take the parameters that fit."
    )


def listed(title: str, lines: Sequence[str]) -> str:
    """Indented lines for a message: the title with the number of lines, and the first of them."""
    shown = [f"\n    {line}" for line in lines[:LISTED_AT_MOST]]
    left_out = len(lines) - len(shown)
    if left_out:
        shown.append(f"\n    … and {left_out} more")
    return f"\n  {title} ({len(lines)}):{''.join(shown)}" if lines else ""
