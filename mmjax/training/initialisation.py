"""Starting from the parameters of another model or another task (`init_from`)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from mmjax import weights
from mmjax.errors import InputError
from mmjax.models.model import Model, Moves
from mmjax.rules import by_path
from mmjax.training.checkpoints import Tree, listed, load_assets, load_parameters
from mmjax.weights.hub import resolve


@dataclasses.dataclass(frozen=True)
class Start:
    """What parameters are taken from, for the whole model or for one part of it."""

    folder: str
    part: str  # '': the whole
    assets: Mapping[str, Any]  # of our checkpoints; {} for public weights

    def parameters(self, model: type[Model], initial: Tree) -> Tree:
        """By the paths that they have in `model`, whose own are `initial`."""
        if self.assets:
            loaded = load_parameters(self.folder)
        else:
            loaded = jax.tree.map(
                np.asarray, nnx.to_pure_dict(nnx.state(weights.load(self.folder)))
            )
        if not self.part:
            return loaded
        if self.part not in loaded:
            raise InputError(
                f"init_from.{self.part}: {self.folder} has no part of that name; it has "
                f"{', '.join(loaded)}."
            )
        return placed(loaded, model.adopts.get(self.part, ((self.part, self.part),)), initial)

    @property
    def tokenizer(self) -> str:
        """The JSON of a tokenizer of ours, or ''."""
        return self.assets.get("tokenizer", "") if self.reads_text else ""

    @property
    def vocabulary(self) -> Path | None:
        """BERT's vocabulary beside public weights, where there is one."""
        if not self.reads_text:
            return None
        path = resolve(self.folder, weights=False) / "vocab.txt"
        return path if path.exists() else None

    @property
    def reads_text(self) -> bool:
        """Whether the words of a text encoder come from here."""
        if self.part:
            return self.part == "text"
        return "tokenizer" in self.assets or "text" in self.assets.get("config", {"text": True})

    @property
    def answers(self) -> tuple[str, ...]:
        """The closed list of its answers."""
        trained = self.assets.get("config", {})
        # Converted weights have a family's config alone.
        return tuple(trained.get("model", trained).get("answers", ()))


def placed(loaded: Tree, moves: Moves, initial: Tree) -> Tree:
    """A tree of what lies under the first path of each move, under the second.

    Where a stack has fewer layers there, it takes the first of them, or, where the path ends in
    '@last', the last.
    """
    source, wanted = by_path(loaded), by_path(initial)
    tree: Tree = {}
    for start, move in moves:
        target, _, which = move.partition("@")
        for path, leaf in source.items():
            if not f"{path}/".startswith(f"{start}/"):
                continue
            new_path = target + path.removeprefix(start)
            if "/layers/" in new_path and new_path in wanted:
                depth = wanted[new_path].shape[0]
                leaf = leaf[-depth:] if which == "last" else leaf[:depth]
            *parents, name = new_path.split("/")
            functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[name] = leaf
    return tree


def starts(init_from: str | Mapping[str, str]) -> list[Start]:
    """What `config.init_from` names: nothing, one source for all, or one for each part."""
    # A resolved config has a ConfigDict of parts, which is no Mapping.
    parts = {"": init_from} if isinstance(init_from, str) else dict(init_from.items())
    return [Start(folder, part, _assets(folder)) for part, folder in parts.items() if folder]


def _assets(folder: str) -> Mapping[str, Any]:
    """Those of a checkpoint of ours, {} for weights of others."""
    is_public = folder.startswith("hf://") or (Path(folder) / "config.json").exists()
    is_ours = (Path(folder) / "checkpoints").exists()  # a workdir has a config.json too
    return {} if is_public and not is_ours else load_assets(folder)


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
