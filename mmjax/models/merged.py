"""The merged fusion: one stream of both modalities' tokens through one stack.

VisualBERT, UNITER, Oscar, VL-BERT and ViLT differ in what enters the stream, not in the stream.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from mmjax.layers import Block, LayerConfig, Stack, layer_norm, linear
from mmjax.models.features import Fused


class Merged(nnx.Module):
    """Text tokens, then image tokens, each looking at all; the first one stands for the pair."""

    def __init__(self, config: LayerConfig, rngs: nnx.Rngs, pooler: bool = True):
        width, dtype = config.width, config.dtype
        self.blocks = Stack(lambda rngs: Block(config, rngs), config, rngs)
        pre = config.norm == "pre"
        self.norm = layer_norm(width, config.epsilon, dtype, rngs) if pre else None
        self.pooler: Any = linear(width, width, dtype, rngs) if pooler else None

    def __call__(
        self,
        image: Float[Array, "batch patches width"],
        text: Float[Array, "batch length width"],
        image_mask: Bool[Array, "batch patches"] | None = None,
        text_mask: Bool[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Fused:
        """Fuse row i of the pictures with row i of the texts; without a mask all is looked at."""
        masks = [
            jnp.ones(tokens.shape[:2], bool) if mask is None else mask.astype(bool)
            for tokens, mask in ((text, text_mask), (image, image_mask))
        ]
        return self.run(image, text, jnp.concatenate(masks, axis=1)[:, None, :], key)

    def run(
        self,
        image: Float[Array, "batch patches width"],
        text: Float[Array, "batch length width"],
        mask: Bool[Array, "batch _ tokens"],
        key: Key[Array, ""] | None = None,
    ) -> Fused:
        """The same under any mask, text before image: true where a token may look."""
        tokens = self.blocks(jnp.concatenate([text, image], axis=1), mask, key=key)
        if self.norm is not None:
            tokens = self.norm(tokens)
        length, first = text.shape[1], tokens[:, 0]
        return Fused(
            image_tokens=tokens[:, length:],
            text_tokens=tokens[:, :length],
            pooled=first if self.pooler is None else jnp.tanh(self.pooler(first)),
        )
