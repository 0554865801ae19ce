"""Attention for a TPU: so many rows at a time that their scores stay in on-chip memory.

XLA does not fuse the two products of an attention. Over a whole batch the [queries, keys] matrices
between them are gigabytes, which go to HBM and back several times, forward and backward, each time
in another layout. Slices that fit into on-chip memory go nowhere: `docs/plans/README.md` has the
readings. For the gradient a slice's probabilities are computed again.
"""

import functools
import math
from collections.abc import Callable

import jax
from jaxtyping import Array, Bool, Float

from mmjax.layouts import heads_in_columns
from mmjax.sharding import HEADS_SPLIT, MASK_SPLIT, per_device

# Float32 scores of the rows that are worked on at a time: XLA keeps them and their gradient in the
# 128 MiB of vector memory of a v5e, v5p or v6e, beside the slices of the inputs.
SLICE_BYTES = 48 * 2**20
# A TPU's memory is tiles of so many rows and columns (here: queries and keys).
TILE = (8, 128)
# query, key, value, mask -> heads
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


def sliced_attention(
    attend: Attend,
    query: Float[Array, "batch queries heads head_width"],
    key: Float[Array, "batch keys heads head_width"],
    value: Float[Array, "batch keys heads head_width"],
    mask: Bool[Array, "#batch _ keys"] | None = None,
) -> Float[Array, "batch queries heads head_width"]:
    """`attend(query, key, value, mask)`, walked in slices of every device's own rows."""
    here = functools.partial(_attend_here, attend)
    # Over rows of the global batch the walk would send them from device to device.
    return per_device(here, [query, key, value, mask], [HEADS_SPLIT] * 3 + [MASK_SPLIT])


def rows_of_slice(rows: int, queries: int, keys: int, heads: int) -> int:
    """How many of the rows are worked on at a time: the most that divide them and fit."""
    padded = math.ceil(queries / TILE[0]) * TILE[0] * math.ceil(keys / TILE[1]) * TILE[1]
    fitting = max(SLICE_BYTES // (4 * heads * padded), 1)
    return max(size for size in range(1, rows + 1) if rows % size == 0 and size <= fitting)


def _attend_here(attend, query, key, value, mask):
    """Without regard to other devices."""
    rows, queries, heads, _ = query.shape
    size = rows_of_slice(rows, queries, key.shape[1], heads)
    if size == rows:
        return attend(query, key, value, mask)
    return _walk(attend, size, query, key, value, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _walk(attend, size, query, key, value, mask):
    return _forward(attend, size, query, key, value, mask)[0]


def _forward(attend, size, query, key, value, mask):
    query, key, value = (heads_in_columns(x) for x in (query, key, value))
    slices = [_cut(x, size) for x in (query, key, value)]
    mask_of = _slices_of_mask(mask, size)

    def step(number, output):
        return _put(output, attend(*(_take(x, number) for x in slices), mask_of(number)), number)

    # Not zeros, which the compiler would write before every walk.
    output = jax.lax.empty(slices[0].shape, slices[0].dtype)
    output = jax.lax.fori_loop(0, len(output), step, output)
    return _joined(output), (query, key, value, mask)


def _backward(attend, size, kept, gradient):
    *inputs, mask = kept
    gradient = _cut(heads_in_columns(gradient), size)
    mask_of = _slices_of_mask(mask, size)

    slices = [_cut(x, size) for x in inputs]

    def step(number, gradients):
        here = [_take(x, number) for x in slices]
        of_slice = jax.vjp(lambda *inputs: attend(*inputs, mask_of(number)), *here)[1]
        found = of_slice(_take(gradient, number))
        return tuple(map(lambda x, new: _put(x, new, number), gradients, found))

    start = tuple(jax.lax.empty(x.shape, x.dtype) for x in slices)
    gradients = jax.lax.fori_loop(0, len(gradient), step, start)
    return *map(_joined, gradients), None


_walk.defvjp(_forward, _backward)


def _slices_of_mask(mask, size):
    """The number of a slice -> its mask."""
    if mask is None or len(mask) == 1:
        return lambda number: mask
    slices = _cut(mask, size)
    return lambda number: _take(slices, number)


def _cut(x, size):
    return x.reshape(-1, size, *x.shape[1:])


def _joined(slices):
    return heads_in_columns(slices.reshape(-1, *slices.shape[2:]))


def _take(slices, number):
    return jax.lax.dynamic_index_in_dim(slices, number, keepdims=False)


def _put(slices, new, number):
    return jax.lax.dynamic_update_index_in_dim(slices, new, number, 0)
