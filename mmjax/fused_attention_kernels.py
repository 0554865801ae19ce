"""The two kernels of `mmjax.fused_attention`: attention, and its gradients.

A head's scores fit on the chip whole, so of FlashAttention (Dao et al. 2022) neither the blocks of
keys nor the running maxima are needed, only that the backward pass computes the probabilities
again, from the log-sum-exp of their scores (appendix B.4). What makes the kernels fast:

- Arrays stay as the projections make them, `[batch, length, heads × head_width]`. A *tile* of 128
  lanes holds 128 / head_width heads; a head is multiplied as the whole tile with the other heads'
  lanes zeroed, which takes the matrix unit no longer than the head alone, and moves no lanes.
- Scores stand as `[keys, queries]`. Their maxima and sums then run over sublanes, which is cheap,
  and the products are `[head_width, length]`: fewer rows for the matrix unit to stream, heads are
  joined by stacking them, and a tile is transposed once.
- Work is written in the order in which it is to be issued, see `_staggered`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

LANES = 128  # of a TPU's vector registers
MASKED = -1e30  # added to the scores of masked keys, as in `mmjax.attention`

_QUERIES = 256  # whose scores are in work at once: a multiple of LANES
# Scores of one straight line of code: the longer it is, the less its ends matter, where half the
# units idle, and the longer it compiles.
_UNROLLED_SCORES = 2**20
# Numbers of a query and a key block: short rows share the fixed cost of a grid step.
_BLOCK_SIZE = 2**19
_VMEM_BYTES = 2**25  # twice the usual: for float32 at 1,024 tokens

_LOG2_E = math.log2(math.e)

# Contracted axes of a · b and a · bᵀ.
_PLAIN = (((1,), (0,)), ((), ()))
_TRANSPOSED = (((1,), (1,)), ((), ()))


def attend(
    query: Float[Array, "batch queries lanes"],
    key: Float[Array, "batch keys lanes"],
    value: Float[Array, "batch keys lanes"],
    bias: Float[Array, "#batch 1 keys"] | None,
    *,
    heads: int,
    interpret: bool = False,
) -> tuple[Float[Array, "batch queries lanes"], Float[Array, "batch steps heads queries"]]:
    """Attention of heads that lie side by side, and the log2-sum-exp2 of their scores."""
    steps = _Steps.over(query, key, heads)
    groups = heads // steps.heads, steps.heads
    log_sums = jax.ShapeDtypeStruct((len(query), *groups, query.shape[1]), jnp.float32)
    return pl.pallas_call(
        functools.partial(_attend, steps.heads),
        in_specs=(steps.of(query), steps.of(key), steps.of(value), steps.of_bias(bias)),
        out_specs=(steps.of(query), steps.of_log_sums(log_sums)),
        out_shape=(jax.ShapeDtypeStruct(query.shape, query.dtype), log_sums),
        name="fused_attention",
        interpret=interpret,
        **steps.options(query, key, products=2, moved=(query, key, value, query)),
    )(query, key, value, bias)


def attend_backward(
    query: Float[Array, "batch queries lanes"],
    key: Float[Array, "batch keys lanes"],
    value: Float[Array, "batch keys lanes"],
    bias: Float[Array, "#batch 1 keys"] | None,
    log_sums: Float[Array, "batch steps heads queries"],
    output_gradient: Float[Array, "batch queries lanes"],
    *,
    heads: int,
    interpret: bool = False,
) -> tuple[
    Float[Array, "batch queries lanes"],
    Float[Array, "batch keys lanes"],
    Float[Array, "batch keys lanes"],
]:
    """The gradients of query, key and value, with the log sums that `attend` has returned."""
    steps = _Steps.over(query, key, heads)
    sequences = query, key, value
    return pl.pallas_call(
        functools.partial(_attend_backward, steps.heads),
        in_specs=(
            *map(steps.of, sequences),
            steps.of_bias(bias),
            steps.of_log_sums(log_sums),
            steps.of(output_gradient),
        ),
        out_specs=tuple(map(steps.of, sequences)),
        out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in sequences),
        name="fused_attention_backward",
        interpret=interpret,
        **steps.options(query, key, products=5, moved=(*sequences, *sequences, query)),
    )(query, key, value, bias, log_sums, output_gradient)


class _Steps(NamedTuple):
    """A grid whose steps take so many rows of the batch, and so many heads: whole tiles."""

    rows: int
    heads: int
    grid: tuple[int, int]

    @classmethod
    def over(cls, query, key, heads):
        """The largest steps whose scores stay below the limits above."""
        batch, queries, lanes = query.shape
        scores = queries * key.shape[1]
        in_tile = max(LANES * heads // lanes, 1)
        in_step = heads
        if heads % in_tile == 0:
            most = _UNROLLED_SCORES // (scores * in_tile)
            in_step = in_tile * _largest_divisor(heads // in_tile, most)
        rows = _largest_divisor(batch, _BLOCK_SIZE // ((queries + key.shape[1]) * lanes))
        return cls(rows, in_step, (batch // rows, heads // in_step))

    def of(self, sequence):
        _, length, lanes = sequence.shape
        return pl.BlockSpec(
            (self.rows, length, lanes // self.grid[1]), lambda rows, heads: (rows, 0, heads)
        )

    def of_log_sums(self, log_sums):
        return pl.BlockSpec(
            (self.rows, 1, *log_sums.shape[2:]), lambda rows, heads: (rows, heads, 0, 0)
        )

    def of_bias(self, bias):
        if bias is None:
            return None
        if len(bias) == 1:
            return pl.BlockSpec(bias.shape, lambda rows, heads: (0, 0, 0))
        return pl.BlockSpec((self.rows, *bias.shape[1:]), lambda rows, heads: (rows, 0, 0))

    def options(self, query, key, products, moved):
        """What the compiler is told: so many products of matrices a head, these arrays moved."""
        batch, queries, lanes = query.shape
        scores = batch * queries * key.shape[1]
        return {
            "grid": self.grid,
            "compiler_params": pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_VMEM_BYTES
            ),
            "cost_estimate": pl.CostEstimate(
                flops=2 * products * scores * lanes,
                transcendentals=scores * self.heads * self.grid[1],
                bytes_accessed=sum(array.nbytes for array in moved),
            ),
        }


def _largest_divisor(number, most):
    """Not above `most`, but at least 1."""
    return max(d for d in range(1, number + 1) if d == 1 or (number % d == 0 and d <= most))


class _Unit(NamedTuple):
    """What a stage works on at once: a head, and some of its queries."""

    head: int
    tile: slice  # the lanes of its tile in the arrays
    own: slice  # its own lanes in the tile
    queries: slice
    last_queries: bool

    @property
    def in_log_sums(self):
        return slice(self.head, self.head + 1)

    @property
    def first_head(self):
        return self.own.start == 0

    @property
    def last_head(self):
        return self.own.stop == self.tile.stop - self.tile.start


def _units(heads, queries, lanes):
    """Tile by tile, block of queries by block of queries, head by head."""
    width = lanes // heads
    tile = max(width, LANES)
    return [
        _Unit(
            head=lane // width,
            tile=slice(start, min(start + tile, lanes)),
            own=slice(lane - start, lane - start + width),
            queries=slice(first, min(first + _QUERIES, queries)),
            last_queries=first + _QUERIES >= queries,
        )
        for start in range(0, lanes, tile)
        for first in range(0, queries, _QUERIES)
        for lane in range(start, min(start + tile, lanes), width)
    ]


def _staggered(units: list[_Unit], *stages: Callable[..., tuple]) -> None:
    """Every unit through all stages, each of which gets what the one before has returned.

    A stage comes one unit later than the stage before it, so that the matrix products of one head
    stand beside the exponentials of another: the compiler fills the matrix and the vector units
    with what it finds close together.
    """
    between: dict[int, tuple] = {}
    for start in range(len(units) + len(stages) - 1):
        for delay, stage in enumerate(stages):
            if 0 <= (number := start - delay) < len(units):
                between[number] = stage(units[number], *between.pop(number, ())) or ()


def _attend(heads, query, key, value, bias, output, log_sums):
    """A grid step of `attend`, on references to blocks of its arrays."""
    rows, queries, lanes = query.shape
    units = _units(heads, queries, lanes)
    to_log2 = _LOG2_E / math.sqrt(lanes // heads)  # exp(x) = 2 ** (x · log2 e)

    def of_row(row, _):
        column = _column(bias, row, queries)
        tile: dict[str, Any] = {}

        def scores(unit):
            alone = _alone(query[row, unit.queries, unit.tile], unit)
            return (_dot(key[row, :, unit.tile], alone, _TRANSPOSED),)

        def exponentials(unit, scores):
            scores = _biased(scores, column)
            top = scores.max(axis=0, keepdims=True)
            weights = jnp.exp2((scores - top) * to_log2)
            total = weights.sum(axis=0, keepdims=True)
            log_sums[row, 0, unit.in_log_sums, unit.queries] = top * to_log2 + jnp.log2(total)
            return weights.astype(value.dtype), total

        def outputs(unit, weights, total):
            if unit.first_head:
                tile.update(value=value[row, :, unit.tile].T, outputs=[])
            product = _dot(tile["value"][unit.own], weights, _PLAIN)
            tile["outputs"].append(product / total)
            if unit.last_head:
                output[row, unit.queries, unit.tile] = _joined(tile["outputs"], output.dtype)

        _staggered(units, scores, exponentials, outputs)

    jax.lax.fori_loop(0, rows, of_row, None)


def _attend_backward(
    heads, query, key, value, bias, log_sums, output_gradient, to_query, to_key, to_value
):
    """A grid step of `attend_backward`; `to_…` are the gradients it writes.

    With P the probabilities, S the scores and G the gradients: G_P = V · G_Oᵀ and
    G_S = P · (G_P - Σ P · G_P), the sum over keys.
    """
    rows, queries, lanes = query.shape
    units = _units(heads, queries, lanes)
    scale = 1 / math.sqrt(lanes // heads)
    to_log2 = _LOG2_E * scale

    def of_row(row, _):
        column = _column(bias, row, queries)
        tile: dict[str, Any] = {}

        def scores(unit):
            alone, gradient = (
                _alone(array[row, unit.queries, unit.tile], unit)
                for array in (query, output_gradient)
            )
            return (
                _dot(key[row, :, unit.tile], alone, _TRANSPOSED),
                _dot(value[row, :, unit.tile], gradient, _TRANSPOSED),
            )

        def weights(unit, scores, gradients):
            log_sum = log_sums[row, 0, unit.in_log_sums, unit.queries]
            weights = jnp.exp2(_biased(scores, column) * to_log2 - log_sum)
            products = weights * gradients
            return weights, products, products.sum(axis=0, keepdims=True)

        def gradients(unit, weights, products, total):
            if unit.first_head:
                tile.update(
                    query=query[row, unit.queries, unit.tile].T,
                    key=key[row, :, unit.tile].T,
                    output_gradient=output_gradient[row, unit.queries, unit.tile].T,
                    to_query=[],
                )
                if unit.queries.start == 0:
                    tile.update(to_key={}, to_value={})
            of_scores = (products - weights * total).astype(key.dtype)
            weights = weights.astype(key.dtype)
            tile["to_query"].append(_dot(tile["key"][unit.own], of_scores, _PLAIN))
            for name, other, factor in (
                ("to_key", "query", of_scores),
                ("to_value", "output_gradient", weights),
            ):
                product = _dot(tile[other][unit.own], factor, _TRANSPOSED)
                tile[name][unit.head] = tile[name].get(unit.head, 0) + product
            if unit.last_head:
                to_query[row, unit.queries, unit.tile] = _joined(
                    tile["to_query"], query.dtype, scale
                )
            if unit.last_head and unit.last_queries:
                to_key[row, :, unit.tile] = _joined(tile["to_key"].values(), key.dtype, scale)
                to_value[row, :, unit.tile] = _joined(tile["to_value"].values(), value.dtype)

        _staggered(units, scores, weights, gradients)

    jax.lax.fori_loop(0, rows, of_row, None)


def _alone(tile, unit):
    """A tile with the lanes of all heads but the unit's zeroed."""
    if unit.first_head and unit.last_head:
        return tile
    lane = jax.lax.broadcasted_iota(jnp.int32, tile.shape, 1)
    return jnp.where((lane >= unit.own.start) & (lane < unit.own.stop), tile, jnp.zeros_like(tile))


def _column(bias, row, queries):
    """A row's bias for each key, along sublanes, repeated over queries."""
    if bias is None:
        return None
    of_row = bias[0 if len(bias) == 1 else row]
    return jnp.broadcast_to(of_row, (min(queries, _QUERIES), of_row.shape[1])).T


def _biased(scores, column):
    return scores if column is None else scores + column[:, : scores.shape[1]]


def _joined(heads, dtype, scale=1.0):
    """`[head_width, length]` of each head of a tile, as the tile lies in the arrays."""
    return (jnp.concatenate(list(heads), axis=0).T * scale).astype(dtype)


def _dot(a, b, contracted):
    return jax.lax.dot_general(a, b, contracted, preferred_element_type=jnp.float32)
