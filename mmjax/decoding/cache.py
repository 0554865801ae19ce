"""What a decoder of `Block`s remembers of the tokens it has seen, so as not to see them again."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmjax.layers import KeysValues, LayerConfig, Stack


class Cache(NamedTuple):
    """Keys and values of every layer: of the text so far, and of the context it is about.

    A decoder of other layers may have a cache of its own: decoding asks for `repeated` and
    `reordered` alone.
    """

    own: KeysValues  # [depth, rows, length, heads, head_width]
    context: KeysValues | None  # [depth, batch, keys, heads, head_width]
    context_mask: Bool[Array, "batch 1 keys"] | None
    padding: Int[Array, " batch"]  # tokens of padding on the left of every prompt

    def repeated(self, beams: int) -> "Cache":
        """`beams` rows of text for each that there is; they share its context and padding."""
        return self._replace(own=jax.tree.map(lambda x: jnp.repeat(x, beams, axis=1), self.own))

    def reordered(self, beams: Int[Array, "batch beams"]) -> "Cache":
        """The beams of every example picked anew by their number."""

        def pick(x: Array) -> Array:
            split = x.reshape(len(x), *beams.shape, *x.shape[2:])
            index = beams.reshape(1, *beams.shape, *[1] * (x.ndim - 2))
            return jnp.take_along_axis(split, index, axis=2).reshape(x.shape)

        return self._replace(own=jax.tree.map(pick, self.own))

    def positions(self, at: int | Int[Array, ""], tokens: int) -> Int[Array, "rows tokens"]:
        """Numbers of the tokens from column `at` on; the first that is no padding is number 0."""
        columns = at + jnp.arange(tokens)
        return jnp.maximum(columns - self._paddings()[:, None], 0)

    def visible(self, at: int | Int[Array, ""], tokens: int) -> Bool[Array, "rows tokens length"]:
        """What the tokens from column `at` on may look at: what stands before, without padding."""
        columns = jnp.arange(self.own.key.shape[2])
        before = columns <= (at + jnp.arange(tokens))[:, None]
        return before & (columns >= self._paddings()[:, None, None])

    def _paddings(self) -> Int[Array, " rows"]:
        rows = self.own.key.shape[1]
        return jnp.repeat(self.padding, rows // len(self.padding), total_repeat_length=rows)


def start(
    blocks: Stack,
    config: LayerConfig,
    length: int,
    padding: Int[Array, " batch"],
    context: Float[Array, "batch keys context_width"] | None = None,
    context_mask: Bool[Array, "batch keys"] | None = None,
) -> Cache:
    """The cache of a stack of `Block`s before the first token of texts of at most `length`."""
    shape = (config.depth, len(padding), length, config.heads, config.width // config.heads)
    empty = jnp.zeros(shape, config.dtype)
    remembered = None
    if context is not None:
        remembered = blocks.run(lambda layer, _, key: ((), layer.remember(context)), ())[1]
    mask = None if context_mask is None else context_mask[:, None, :]
    return Cache(KeysValues(empty, empty), remembered, mask, padding)


def step(
    blocks: Stack, x: Float[Array, "rows tokens width"], cache: Cache, at: int | Int[Array, ""]
) -> tuple[Float[Array, "rows tokens width"], Cache]:
    """The next tokens through a stack of `Block`s; they stand from column `at` on."""
    visible = cache.visible(at, x.shape[1])

    def call(layer, x, _, own, context):
        return layer.step(x, own, at, visible, context, cache.context_mask)

    x, own = blocks.run(call, x, None, cache.own, cache.context)
    return x, cache._replace(own=own)
