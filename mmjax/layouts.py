"""How activations and kernels lie in memory, where XLA chooses badly."""

import math

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from mmjax import platform
from mmjax.sharding import BATCH_AXES, per_device


def rows_first(x: jax.Array) -> jax.Array:
    """The axes of `x`, [batch, tokens, …], in their order.

    XLA likes to put tokens before rows, which are more often a multiple of a tile's 8; then each
    attention copies what it takes, and what it gives.
    """
    if platform.current() != "tpu":
        return x
    order = tuple(range(x.ndim))
    batch_split = (BATCH_AXES, *(None for _ in order[1:]))
    return per_device(lambda x: _laid_out(x, order), [x], [batch_split])


def heads_in_columns(x: jax.Array) -> jax.Array:
    """[batch, tokens, heads, head_width] of one device with tokens innermost.

    That is what XLA's attention works on: tokens fill the 128 columns of a tile, which the 64 of a
    head do not.
    """
    return _laid_out(x, (0, 2, 3, 1))


def as_rows(x: jax.Array) -> jax.Array:
    """[…, features] as a matrix on a CPU, as it is elsewhere.

    For the gradient of a kernel a CPU would copy an activation whose rows have several axes; a TPU
    would copy to join them, where tokens do not fill its tiles.
    """
    return x.reshape(-1, x.shape[-1]) if platform.current() == "cpu" else x


def matrix(x: jax.Array, inputs: int, kept: bool = False) -> jax.Array:
    """`x` with its first `inputs` axes joined into one, if any, and the others into another.

    Left to itself XLA takes the heads of an attention's kernel apart again, above all for the
    gradient, and lays out activations so that heads are rows of their own. Where what attends wants
    them side by side, that is a copy of each, and they are `kept` joined.
    """
    joined = x.reshape(*([math.prod(x.shape[:inputs])] if inputs else []), -1)
    if kept and joined.shape != x.shape and platform.current() == "tpu":
        return jax.lax.optimization_barrier(joined)
    return joined


def _laid_out(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return with_layout_constraint(x, Layout(axes)) if platform.current() == "tpu" else x
