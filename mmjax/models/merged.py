"""The merged fusion: one stream of both modalities' tokens through one stack.

VisualBERT, UNITER, Oscar, VL-BERT and ViLT differ in what enters the stream, not in the stream.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from mmjax.layers import Block, LayerConfig, Stack, layer_norm, linear
from mmjax.models.features import Fused


class Merged(nnx.Module):
    """Text tokens, then image tokens, each looking at all; the first one stands for the pair."""

    def __init__(self, config: LayerConfig, rngs: nnx.Rngs):
        width, dtype = config.width, config.dtype
        self.blocks = Stack(lambda rngs: Block(config, rngs), config, rngs)
        pre = config.norm == "pre"
        self.norm = layer_norm(width, config.epsilon, dtype, rngs) if pre else None
        self.pooler = linear(width, width, dtype, rngs)

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
        mask = jnp.concatenate(masks, axis=1)[:, None, :]
        tokens = self.blocks(jnp.concatenate([text, image], axis=1), mask, key=key)
        if self.norm is not None:
            tokens = self.norm(tokens)
        length = text.shape[1]
        return Fused(
            image_tokens=tokens[:, length:],
            text_tokens=tokens[:, :length],
            pooled=jnp.tanh(self.pooler(tokens[:, 0])),
        )
