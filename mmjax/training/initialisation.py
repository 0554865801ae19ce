"""Starting from the parameters of another model or another task (`init_from`)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mmjax.errors import InputError
from mmjax.rules import by_path
from mmjax.training.checkpoints import Tree, listed

Resize = Callable[[str, np.ndarray, tuple[int, ...]], np.ndarray | None]


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What became of each parameter, by slash path."""

    loaded: tuple[str, ...]
    resized: tuple[str, ...]  # loaded too, at another shape
    left_initial: tuple[str, ...]  # the source has none
    unused: tuple[str, ...]  # the model has none

    def __str__(self) -> str:
        return (
            f"{len(self.loaded)} parameters loaded, {len(self.resized)} of them resized."
            + listed("left at their initial value", self.left_initial)
            + listed("not used", self.unused)
        )


def merge_parameters(
    initial: Tree, loaded: Tree, *, resize: Resize | None = None
) -> tuple[Tree, MergeReport]:
    """`initial` with every parameter that `loaded` has, at the types and shardings of `initial`.

    Args:
        initial: nested dict of arrays, freshly initialised.
        loaded: nested dict of numpy arrays, of another model or another task.
        resize: called with (path, array, wanted shape) for a parameter of another shape, such as
            position embeddings of another resolution; returns the resized array, or None to
            decline.

    Raises:
        InputError: a parameter has another shape and is not resized; or no path is common.
    """
    source = {path: np.asarray(leaf) for path, leaf in by_path(loaded).items()}
    target = by_path(initial)
    merged, resized, misshapen = dict(target), [], []
    for path in [path for path in target if path in source]:
        value: np.ndarray | None = source[path]
        wanted = tuple(target[path].shape)
        if source[path].shape != wanted:
            value = resize(path, source[path], wanted) if resize else None
            resized.append(path)
        if value is None or value.shape != wanted:
            misshapen.append(f"{path}: {source[path].shape} loaded, {wanted} configured")
        else:
            merged[path] = _like(target[path], value)
    if misshapen:
        raise InputError(
            "Parameters to initialise from have another shape than the configured model."
            + listed("of another shape", sorted(misshapen))
            + "\nConfigure the sizes of the model that they come from."
        )
    report = MergeReport(
        loaded=tuple(sorted(target.keys() & source.keys())),
        resized=tuple(sorted(resized)),
        left_initial=tuple(sorted(target.keys() - source.keys())),
        unused=tuple(sorted(source.keys() - target.keys())),
    )
    if not report.loaded:
        raise InputError(
            "None of the parameters to initialise from is in the configured model."
            + listed("to initialise from", report.unused)
            + listed("configured", report.left_initial)
        )
    return jax.tree.unflatten(jax.tree.structure(initial), list(merged.values())), report


def _like(target: Any, value: np.ndarray) -> Any:
    """`value` with the type and, for a jax.Array, the sharding of `target`."""
    value = value.astype(target.dtype)
    if not isinstance(target, jax.Array):
        return value
    return jax.make_array_from_callback(value.shape, target.sharding, lambda index: value[index])
