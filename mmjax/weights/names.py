"""Name tables: which tensor of another code base is which of our parameters, both ways.

A table is a tuple of entries. Most name a module here and a module there, and its leaves follow:

    Entry("blocks/layers/mlp/up", "encoder.layer.{n}.intermediate.dense")

says that torch's `encoder.layer.0.intermediate.dense.weight`, `[out, in]`, transposed, is row 0 of
the stacked `…/mlp/up/kernel`, and `.bias` row 0 of `…/mlp/up/bias`. What is done to a tensor
follows from the kind of our leaf; an entry says what does not follow.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmjax.errors import InputError
from mmjax.rules import by_path

# Our leaf -> its name in a module of torch. Other leaves are tensors of their own.
TORCH_LEAVES = {
    "kernel": "weight",
    "bias": "bias",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}


@dataclass(frozen=True)
class Entry:
    """One module, or one parameter, here and there.

    Attributes:
      ours: path of a module, or of a parameter that is no leaf of a module (`class_token`). `{s}`
        stands for an index that occurs in both names, as the stage of a network.
      theirs: the name there. `{n}` stands for the layer, where ours is stacked over layers, and
        `{leaf}` for 'weight' or 'bias', where that does not stand behind a dot at the end.
      first: the number there of our first layer.
      step: from the number there of one of our layers to that of the next.
      part: (i, n): ours is the i-th of n equal parts of theirs along its outputs.
      transpose: false where kernels lie there as here, [in, out].
      inputs: how many leading axes of our kernel are inputs: 2 for an attention's output.
      leading: axes of size 1 that theirs has in front of ours (negative: that ours has).
      flax: theirs is a module of flax: leaves are named as ours, behind a slash, and lie as ours.
      resize: turns a table of another length into ours, (array, shape) -> array, when the user asks
        for another size.
    """

    ours: str
    theirs: str
    first: int = 0
    step: int = 1
    part: tuple[int, int] = (0, 1)
    transpose: bool = True
    inputs: int = 1
    leading: int = 0
    flax: bool = False
    resize: Callable[[np.ndarray, tuple[int, ...]], np.ndarray] | None = None


Table = Sequence[Entry]


def under(table: Table, ours: str, theirs: str, **changes: Any) -> tuple[Entry, ...]:
    """A table inside a bigger model: all names get the prefixes `ours` and `theirs`."""
    return tuple(
        replace(entry, ours=ours + entry.ours, theirs=theirs + entry.theirs, **changes)
        for entry in table
    )


def modules(names: Mapping[str, str]) -> tuple[Entry, ...]:
    """Entries for modules, ours -> theirs; `…attention/out` is known to have two input axes."""
    return tuple(
        Entry(ours, theirs, inputs=2 if ours.endswith("attention/out") else 1)
        for ours, theirs in names.items()
    )


def fused_attention(ours: str, theirs: str, **options: Any) -> tuple[Entry, ...]:
    """Query, key and value of the attention `ours`, which lie there in one tensor in this order."""
    return tuple(
        Entry(f"{ours}/{name}", theirs, part=(i, 3), **options)
        for i, name in enumerate(("query", "key", "value"))
    )


@dataclass(frozen=True)
class Pair:
    """One of our parameters and the tensors there that make it up: one, or one a layer."""

    path: str
    shape: tuple[int, ...]
    theirs: str  # with `{n}` for the layer, where ours is stacked over layers
    leaf: str  # '' of a parameter that is no leaf of a module
    entry: Entry

    @property
    def stacked(self) -> bool:
        """Whether ours holds all layers."""
        return "{n}" in self.theirs

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors there."""
        return tuple(self.theirs.replace("{n}", str(n)) for n in self._layers)

    @property
    def count(self) -> int:
        """How many tensors there make it up."""
        return len(self._layers)

    @property
    def title(self) -> str:
        """All names in one: 'layer.{0…11}.bias'."""
        return self.theirs.replace("{n}", f"{{{self._layers[0]}…{self._layers[-1]}}}")

    @property
    def their_shape(self) -> tuple[int, ...]:
        """The shape that each tensor there should have."""
        shape, (_, parts), axis = self._part_shape, self.entry.part, self.output_axis
        return tuple(size * parts if i == axis else size for i, size in enumerate(shape))

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """One tensor there as (one layer of) ours."""
        index, parts = self.entry.part
        if parts > 1:
            array = np.split(array, parts, axis=self.output_axis)[index]
        if self._is_convolution:
            return array.transpose(2, 3, 1, 0)
        return (array.T if self._is_transposed else array).reshape(self._layer_shape)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """(One layer of) ours as the tensor there, or as our part of it."""
        if self._is_convolution:
            return array.transpose(3, 2, 0, 1)
        if self._is_transposed:
            return array.reshape(self._part_shape[::-1]).T
        return array.reshape(self._part_shape)

    def describe(self) -> str:
        """What is done to tensors on their way here, in words."""
        index, parts = self.entry.part
        steps = [
            f"part {index + 1} of {parts}" if parts > 1 else "",
            "transposed" if self._is_convolution or self._is_transposed else "",
            f"{len(self.names)} layers stacked" if self.stacked else "",
        ]
        return ", ".join(filter(None, steps)) or "as it is"

    @property
    def output_axis(self) -> int:
        """The axis of a tensor there that its outputs lie on."""
        return 1 if self._is_matrix and not self.entry.transpose else 0

    @property
    def _layers(self) -> range:
        first, step = self.entry.first, self.entry.step
        return range(first, first + step * (self.shape[0] if self.stacked else 1), step)

    @property
    def _layer_shape(self) -> tuple[int, ...]:
        return self.shape[1:] if self.stacked else self.shape

    @property
    def _is_kernel(self) -> bool:
        return self.leaf == "kernel" and not self.entry.flax

    @property
    def _is_convolution(self) -> bool:
        return self._is_kernel and len(self._layer_shape) == 4 and self.entry.inputs == 1

    @property
    def _is_matrix(self) -> bool:
        return self._is_kernel and not self._is_convolution

    @property
    def _is_transposed(self) -> bool:
        return self._is_matrix and self.entry.transpose

    @property
    def _part_shape(self) -> tuple[int, ...]:
        shape, entry = self._layer_shape, self.entry
        if self._is_convolution:
            return tuple(shape[axis] for axis in (3, 2, 0, 1))
        if self._is_matrix:
            matrix = math.prod(shape[: entry.inputs]), math.prod(shape[entry.inputs :])
            return matrix[::-1] if entry.transpose else matrix
        if self.leaf == "bias" and not entry.flax:
            return (math.prod(shape),)
        return (1,) * entry.leading + shape[max(-entry.leading, 0) :]


def pairs_of(table: Table, params: Any) -> list[Pair]:
    """A table spelt out for a tree of parameters, or of their shapes.

    Raises InputError for parameters that the table has no name for.
    """
    pairs, nameless = [], []
    for path, leaf in by_path(params).items():
        matches = (_match(entry, path, tuple(leaf.shape)) for entry in table)
        if (pair := next(filter(None, matches), None)) is None:
            nameless.append(path)
        else:
            pairs.append(pair)
    if nameless:
        raise InputError(
            "these parameters have no name in the other format:\n  " + "\n  ".join(nameless)
        )
    return pairs


def _match(entry: Entry, path: str, shape: tuple[int, ...]) -> Pair | None:
    pattern = re.escape(entry.ours).replace(r"\{s\}", r"(?P<s>\d+)")
    found = re.fullmatch(pattern + r"(/(?P<leaf>[a-z]+))?", path)
    if found is None or (found["leaf"] or "kernel") not in TORCH_LEAVES:
        return None
    leaf, theirs = found["leaf"] or "", entry.theirs
    if leaf:
        if "{leaf}" not in theirs:
            theirs += "/{leaf}" if entry.flax else ".{leaf}"
        theirs = theirs.replace("{leaf}", leaf if entry.flax else TORCH_LEAVES[leaf])
    theirs = theirs.replace("{s}", found.groupdict().get("s") or "")
    return Pair(path, shape, theirs, leaf, entry)


def to_theirs(table: Table, params: Any) -> dict[str, np.ndarray]:
    """Our parameters under the names and in the shapes of the other format."""
    parameters = by_path(params)
    parts: dict[str, dict[int, np.ndarray]] = {}
    axes: dict[str, int] = {}
    for pair in pairs_of(table, params):
        array = np.asarray(parameters[pair.path])
        for name, layer in zip(pair.names, array if pair.stacked else [array], strict=True):
            parts.setdefault(name, {})[pair.entry.part[0]] = pair.to_theirs(layer)
            axes[name] = pair.output_axis
    return {
        name: np.concatenate([found[i] for i in sorted(found)], axis=axes[name])
        if len(found) > 1
        else found[0]
        for name, found in parts.items()
    }
