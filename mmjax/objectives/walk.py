"""Rows of the global batch scored with all candidates of it, without the matrix of all scores.

Contrastive losses and hard negatives compare every row with every candidate. Here each device keeps
its own rows and walks over the candidates of all devices, `CHUNK` of them at a time: it gathers a
chunk, scores its rows with it, folds the scores into a few numbers a row and forgets them. The
backward pass walks again. So a device holds [its rows, CHUNK] scores and one chunk of vectors,
whatever the global batch, and what comes out is that of the whole matrix.

What is made of the scores is a `Fold` (`mmjax.objectives.folds`). Those that are asked of one
`Walk` share it: hard negatives are drawn in passing.
"""

import itertools
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from mmjax.sharding import BATCH_AXES, batch_devices

# Candidates that are looked at together. Fewer save memory and take more steps.
CHUNK = 1024


class Side(NamedTuple):
    """Rows of one modality: unit vectors, and what is known of each row."""

    vectors: Float[Array, "rows embedding"] | None  # (None inside of this file alone)
    image_id: Int[Array, " rows"]  # equal ids show the same picture
    valid: Bool[Array, " rows"]
    example: Int[Array, " rows"]  # its number in the data set
    row: Int[Array, " rows"]  # of the global batch; −1: of an earlier one
    teacher: Float[Array, "rows embedding"] | None = None  # the same rows, by another model


class Scale(NamedTuple):
    """What makes logits of cosines."""

    factor: Float[Array, ""]
    offset: Float[Array, ""]


class Pairs(NamedTuple):
    """Some rows with some candidates."""

    rows: Side
    candidates: Side
    logits: Float[Array, "rows candidates"]
    teacher: Float[Array, "rows candidates"] | None  # logits by the rows' teacher

    @property
    def positive(self) -> Bool[Array, "rows candidates"]:
        """Where a valid candidate shows the row's picture."""
        return (self.rows.image_id[:, None] == self.candidates.image_id) & self.candidates.valid


class Fold:
    """What is made of a row's scores, some candidates at a time. Every array has a row for each."""

    learns: ClassVar[bool] = True  # whether its result has a gradient

    def start(self, rows: Side) -> Any:
        """The state before any candidate was seen."""
        raise NotImplementedError

    def add(self, state: Any, pairs: Pairs) -> Any:
        """The state after these candidates as well."""
        raise NotImplementedError

    def result(self, state: Any) -> Any:
        """What is made of all candidates' scores."""
        raise NotImplementedError

    def slope(self, state: Any, pairs: Pairs) -> Float[Array, "rows candidates"]:
        """The result's gradient by the logits of some candidates, by the state after all."""
        raise NotImplementedError


class Walk:
    """One walk of rows over candidates, for all that is asked before the first answer.

    With `learns=False` there is no gradient with respect to the candidates.
    """

    def __init__(self, scale: Scale, rows: Side, candidates: Side, learns: bool = True):
        self.scale, self.rows, self.candidates, self.learns = scale, rows, candidates, learns
        self.further: tuple[Side, ...] = ()  # candidates beside those of the batch
        self._asked: dict[str, Fold] = {}
        self._answers: dict[str, Any] = {}

    def ask(self, name: str, fold: Fold) -> None:
        """Fold the scores in this way too; a name stands for the same fold wherever it is used."""
        if name not in self._answers:
            self._asked.setdefault(name, fold)

    def answer(self, name: str) -> Any:
        """The result of a fold that was asked for."""
        if name not in self._answers:
            folds = tuple(self._asked.values())
            candidates = self.candidates, *self.further
            found = walk(self.scale, self.rows, candidates, folds, self.learns)
            self._answers |= dict(zip(self._asked, found, strict=True))
            self._asked = {}
        return self._answers[name]


def walk(
    scale: Scale,
    rows: Side,
    candidates: tuple[Side, ...],
    folds: tuple[Fold, ...],
    learns: bool = True,
) -> tuple[Any, ...]:
    """The results of folding every row's scores with all `candidates`, a result a fold.

    Differentiable with respect to `scale`, the rows' vectors and, if it `learns`, the candidates'.
    Under a mesh all arrays are split over its batch axes by rows, and so are the results.
    """
    vectors = rows.vectors, tuple(side.vectors for side in candidates)
    bare = rows._replace(vectors=None), tuple(side._replace(vectors=None) for side in candidates)
    return _walk(learns, scale, vectors, (*bare, folds))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _walk(learns, scale, vectors, rest):
    """The vectors stand apart from the rest, which has no gradient."""
    return _forward(learns, scale, vectors, rest)[0]


def _forward(learns, scale, vectors, rest):
    rows, candidates, folds = _together(vectors, rest)
    states = _on_every_device(_fold_all, (scale, folds), (rows, candidates))
    results = tuple(fold.result(state) for fold, state in zip(folds, states, strict=True))
    return results, (scale, vectors, rest, states)


def _backward(learns, residuals, cotangents):
    scale, vectors, rest, states = residuals
    rows, candidates, folds = _together(vectors, rest)
    learning = [place for place, fold in enumerate(folds) if fold.learns]
    if not learning:
        return None, None, None
    folds, states, cotangents = (
        tuple(each[place] for place in learning) for each in (folds, states, cotangents)
    )
    of_scale, of_rows, of_candidates = _on_every_device(
        partial(_slopes, learns=learns),
        (scale, folds),
        (rows, candidates, states, cotangents),
        reduces=True,
    )
    return of_scale, (of_rows, of_candidates if learns else None), None


_walk.defvjp(_forward, _backward)


def _together(vectors, rest):
    of_rows, of_candidates = vectors
    rows, candidates, folds = rest
    candidates = tuple(
        side._replace(vectors=v) for side, v in zip(candidates, of_candidates, strict=True)
    )
    return rows._replace(vectors=of_rows), candidates, folds


def _fold_all(scale, folds, rows, candidates, axes):
    """The states of all folds after all candidates, of this device's rows."""

    def look(states, part):
        pairs = _score(scale, rows, _gather(part, axes))[0]
        return tuple(f.add(state, pairs) for f, state in zip(folds, states, strict=True)), None

    start = tuple(fold.start(rows) for fold in folds)
    return jax.lax.scan(look, start, _chunks(candidates, axes))[0]


def _slopes(scale, folds, rows, candidates, states, cotangents, axes, learns):
    """What the results' cotangents are in terms of the scale, the rows and the candidates."""

    def look(carry, part):
        of_scale, of_rows = carry
        chunk = _gather(part, axes)
        pairs, cosines = _score(scale, rows, chunk)
        slope = sum(
            cotangent[:, None] * fold.slope(state, pairs)
            for fold, state, cotangent in zip(folds, states, cotangents, strict=True)
        )
        of_scale = Scale(of_scale.factor + (slope * cosines).sum(), of_scale.offset + slope.sum())
        of_rows = of_rows + scale.factor * _product(slope, chunk.vectors)
        if not learns:
            return (of_scale, of_rows), None
        of_chunk = scale.factor * _product(slope.T, rows.vectors)
        return (of_scale, of_rows), _scatter(of_chunk, axes)

    start = jax.tree.map(jnp.zeros_like, (scale, rows.vectors))
    carry, of_chunks = jax.lax.scan(look, start, _chunks(candidates, axes))
    of_scale, of_rows = carry
    of_scale = jax.lax.psum(of_scale, axes) if axes else of_scale
    return of_scale, of_rows, _unchunked(of_chunks, candidates) if learns else ()


def _score(scale, rows, chunk) -> tuple[Pairs, Float[Array, "rows candidates"]]:
    """Logits, and the cosines that they were made of.

    At full float32 precision: a TPU would round the factors to bfloat16, and the scale makes tenths
    of a logit of that.
    """
    cosines = _product(rows.vectors, chunk.vectors.T)
    teacher = None
    if rows.teacher is not None:
        teacher = scale.factor * _product(rows.teacher, chunk.vectors.T) + scale.offset
    return Pairs(rows, chunk, scale.factor * cosines + scale.offset, teacher), cosines


def _product(a, b):
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _chunks(candidates: tuple[Side, ...], axes) -> Side:
    """This device's candidates, [chunks, candidates of one, ...]; invalid ones fill the last."""
    together = jax.tree.map(lambda *parts: jnp.concatenate(parts), *candidates)
    count = len(together.valid)
    size = _share(count, axes)
    padding = -count % size

    def split(x):
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape((count + padding) // size, size, *x.shape[1:])

    return jax.tree.map(split, together)


def _unchunked(of_chunks, candidates):
    """What belongs to each part of the candidates."""
    flat = of_chunks.reshape(-1, of_chunks.shape[-1])
    ends = np.cumsum([0, *(len(part.valid) for part in candidates)])
    return tuple(flat[start:end] for start, end in itertools.pairwise(ends))


def _share(count: int, axes) -> int:
    """Of this device's candidates, how many are in a chunk."""
    return max(1, min(count, CHUNK // (batch_devices() if axes else 1)))


def _gather(part, axes):
    """Everybody's part of a chunk."""
    if not axes:
        return part
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axes, tiled=True), part)


def _scatter(of_chunk, axes):
    """The sum over devices of what belongs to this one's part of a chunk."""
    if not axes:
        return of_chunk
    return jax.lax.psum_scatter(of_chunk, axes, scatter_dimension=0, tiled=True)


def _on_every_device(function, whole, split, reduces=False):
    """`function(*whole, *split, axes)`: by devices, where a mesh is in force.

    Every device has its rows of what is `split`, and all of what is `whole`; of the results the
    first is a sum over devices, if the function `reduces`, and all others are split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*whole, *split, axes=())
    everywhere, by_rows = PartitionSpec(), PartitionSpec(BATCH_AXES)
    return jax.shard_map(
        partial(function, axes=BATCH_AXES),
        in_specs=(*(everywhere for _ in whole), *(by_rows for _ in split)),
        out_specs=(everywhere, by_rows, by_rows) if reduces else by_rows,
        check_vma=False,
    )(*whole, *split)
