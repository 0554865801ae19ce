"""In which order the axes of an activation lie in a TPU's memory, where XLA chooses badly."""

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from mmjax import platform


def rows_first(x: jax.Array) -> jax.Array:
    """The axes of `x`, [batch, tokens, …], in their order.

    XLA likes to put tokens before rows, which are more often a multiple of a tile's 8; then each
    attention copies what it takes, and what it gives.
    """
    return _laid_out(x, tuple(range(x.ndim)))


def heads_in_columns(x: jax.Array) -> jax.Array:
    """[batch, tokens, heads, head_width] with tokens innermost: what XLA's attention works on.

    They fill the 128 columns of a tile, which the 64 of a head do not.
    """
    return _laid_out(x, (0, 2, 3, 1))


def _laid_out(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return with_layout_constraint(x, Layout(axes)) if platform.current() == "tpu" else x
