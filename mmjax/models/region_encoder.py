"""An encoder of regions: the picture of two-stream models that read what a detector found.

A region enters as in ViLBERT (Lu et al. 2019, section 3.1): its features and its place are
projected and summed. LXMERT's encoder, which normalises the two apart, is in its own file.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from mmjax.layers import Block, LayerConfig, Stack, layer_norm, linear, split_key
from mmjax.models.features import Encoded, masked_mean, shifted
from mmjax.models.regions import box_numbers, check_regions


@dataclass(frozen=True)
class RegionConfig(LayerConfig):
    """Layers over regions; ViLBERT has none before its streams meet, width 1024 and 8 heads."""

    least_depth: ClassVar[int] = 0

    norm: str = "post"
    epsilon: float = 1e-12
    region_width: int = 2048  # features that the detector has of a region


class RegionEncoder(nnx.Module):
    """Features and places of regions, projected, summed and normalised, and layers over them."""

    def __init__(self, config: RegionConfig, rngs: nnx.Rngs):
        self.config = config
        width, dtype = config.width, config.dtype
        self.features = linear(config.region_width, width, dtype, rngs)
        self.box = linear(5, width, dtype, rngs)
        self.embedding_norm = layer_norm(width, config.epsilon, dtype, rngs)
        self.dropout = nnx.Dropout(config.dropout)
        self.blocks = (
            Stack(lambda rngs: Block(config, rngs), config, rngs) if config.depth else None
        )
        last = config.norm == "pre" and config.depth > 0
        self.norm = layer_norm(width, config.epsilon, dtype, rngs) if last else None

    def __call__(
        self,
        regions: Float[Array, "batch regions features"],
        boxes: Float[Array, "batch regions 4"],
        region_mask: Bool[Array, "batch regions"] | None = None,
        region_masked: Bool[Array, "batch regions"] | None = None,
        key: Key[Array, ""] | None = None,
        shift: Float[Array, "batch regions features"] | None = None,
    ) -> Encoded:
        """Encode regions; the mean of those that are there is pooled.

        `region_mask` is true on them, false on padding (None: all are there); `region_masked` hides
        features of regions, as zeros; `shift` is added to features.
        """
        check_regions(regions, boxes, self.config.region_width)
        if region_masked is not None:
            regions = jnp.where(region_masked[..., None], 0, regions)
        key, embedding_key = split_key(key, 2)
        area = box_numbers(boxes, 7)[..., 6:]
        places = self.box(jnp.concatenate([boxes, area], axis=-1))
        x = self.embedding_norm(self.features(shifted(regions, shift)) + places)
        x = self.dropout(x, deterministic=key is None, rngs=embedding_key)
        if self.blocks is not None:
            x = self.blocks(x, None if region_mask is None else region_mask[:, None, :], key=key)
        tokens = x if self.norm is None else self.norm(x)
        return Encoded(tokens=tokens, mask=region_mask, pooled=masked_mean(tokens, region_mask))
