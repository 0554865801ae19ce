"""How the two modalities meet.

Co-attention: two streams, each attending to itself and to the other. One layer serves the family:
LXMERT (Tan and Bansal 2019, section 2.3) crosses first and shares one cross-attention between both
directions; METER (Dou et al. 2022, section 3.3) attends to itself first and shares nothing. In
both, the context of a cross-attention is the other stream as it entered the layer.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from mmjax.errors import InputError, near_misses
from mmjax.layers import (
    AttentionSublayer,
    LayerConfig,
    MlpSublayer,
    Stack,
    embedding,
    layer_norm,
    linear,
    split_key,
)
from mmjax.models.features import Encoded, Fused

ORDERS = {"self_first": ("self", "cross"), "cross_first": ("cross", "self")}
POOLS = ("both", "text")


@dataclass(frozen=True)
class CoAttentionConfig(LayerConfig):
    """A co-attention fusion. METER: the defaults with norm='post', project and token_types.

    LXMERT: order='cross_first', share_cross=True, pool='text', norm='post'.
    """

    order: str = "self_first"  # which attention comes first in a layer: a key of ORDERS
    share_cross: bool = False  # one cross-attention for both directions
    project: bool = False  # a linear map of each encoder's tokens into this width
    token_types: bool = False  # a learnt vector a modality, added to its tokens
    pool: str = "both"  # tanh poolers of both first tokens, concatenated, or 'text' alone

    def __post_init__(self) -> None:
        """Refuse unknown variants."""
        super().__post_init__()
        for key, known in (("order", ORDERS), ("pool", POOLS)):
            if (value := getattr(self, key)) not in known:
                raise InputError(f"fusion {key} is {value!r}.{near_misses(value, known)}")


class CoAttentionLayer(nnx.Module):
    """Self-attention, cross-attention and MLP for each of the two streams."""

    def __init__(self, config: CoAttentionConfig, rngs: nnx.Rngs):
        self.order = ORDERS[config.order]
        self.image_self = AttentionSublayer(config, rngs)
        self.text_self = AttentionSublayer(config, rngs)
        pre = config.norm == "pre"
        if config.share_cross:
            self.cross = AttentionSublayer(config, rngs, norm_context=pre)
        else:
            self.image_cross = AttentionSublayer(config, rngs, norm_context=pre)
            self.text_cross = AttentionSublayer(config, rngs, norm_context=pre)
        self.share_cross = config.share_cross
        self.image_mlp = MlpSublayer(config, rngs)
        self.text_mlp = MlpSublayer(config, rngs)

    def __call__(
        self,
        streams: tuple[Float[Array, "batch patches width"], Float[Array, "batch length width"]],
        image_mask: Bool[Array, "batch 1 patches"] | None,
        text_mask: Bool[Array, "batch 1 length"] | None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "batch patches width"], Float[Array, "batch length width"]]:
        """Both streams after the layer; `key` draws dropout."""
        image, text = image_before, text_before = streams
        image_cross, text_cross = self._crosses()
        keys = iter(split_key(key, 6))
        for kind in self.order:
            if kind == "self":
                image = self.image_self(image, mask=image_mask, key=next(keys))
                text = self.text_self(text, mask=text_mask, key=next(keys))
            else:
                image = image_cross(image, text_before, text_mask, next(keys))
                text = text_cross(text, image_before, image_mask, next(keys))
        return self.image_mlp(image, next(keys)), self.text_mlp(text, next(keys))

    def text_to_image_weights(
        self,
        streams: tuple[Float[Array, "batch patches width"], Float[Array, "batch length width"]],
        image_mask: Bool[Array, "batch 1 patches"] | None,
        text_mask: Bool[Array, "batch 1 length"] | None,
    ) -> Float[Array, "batch length patches"]:
        """Where the words look: probabilities of their cross-attention, averaged over heads."""
        image, text = streams
        if self.order[0] == "self":
            text = self.text_self(text, mask=text_mask)
        return self._crosses()[1].weights(text, image, image_mask).mean(axis=1)

    def _crosses(self) -> tuple[AttentionSublayer, AttentionSublayer]:
        return (self.cross, self.cross) if self.share_cross else (self.image_cross, self.text_cross)


class CoAttention(nnx.Module):
    """`depth` co-attention layers over both encoders' tokens, and a pooled vector of the pair."""

    def __init__(
        self,
        config: CoAttentionConfig,
        image_width: int,
        text_width: int,
        rngs: nnx.Rngs,
        image_class_token: bool = True,
        pictures: int = 1,
    ):
        width, dtype = config.width, config.dtype
        if not config.project and {image_width, text_width} != {width}:
            raise InputError(
                f"model.fusion.width is {width}, but the encoders' widths are {image_width} "
                f"(image) and {text_width} (text): make them equal or set model.fusion.project."
            )
        self.config = config
        self.image_class_token = image_class_token
        project = config.project
        self.image_projection = linear(image_width, width, dtype, rngs) if project else None
        self.text_projection = linear(text_width, width, dtype, rngs) if project else None
        # Row 0 for text, then one for each picture of an example, as in METER.
        self.type_embedding = (
            embedding(1 + pictures, width, dtype, rngs) if config.token_types else None
        )
        self.blocks = Stack(lambda rngs: CoAttentionLayer(config, rngs), config, rngs)
        pre = config.norm == "pre"
        self.image_norm = layer_norm(width, config.epsilon, dtype, rngs) if pre else None
        self.text_norm = layer_norm(width, config.epsilon, dtype, rngs) if pre else None
        self.image_pooler = linear(width, width, dtype, rngs) if config.pool == "both" else None
        self.text_pooler = linear(width, width, dtype, rngs)

    @property
    def pooled_width(self) -> int:
        """Features of the pooled vector."""
        return self.config.width * (2 if self.image_pooler is not None else 1)

    def __call__(
        self,
        image: Encoded,
        text: Encoded,
        key: Key[Array, ""] | None = None,
        picture: int = 0,
    ) -> Fused:
        """Fuse row i of the pictures with row i of the texts.

        `picture` is the number of these among an example's, where a text is about several (NLVR2).
        """
        masks = _key_mask(image), _key_mask(text)
        streams = self._enter(image, text, picture)
        image_tokens, text_tokens = self.blocks(streams, *masks, key=key)
        if self.image_norm is not None and self.text_norm is not None:
            image_tokens, text_tokens = self.image_norm(image_tokens), self.text_norm(text_tokens)
        pooled = jnp.tanh(self.text_pooler(text_tokens[:, 0]))
        if self.image_pooler is not None:
            # Without a class token the mean of the patches stands for the picture.
            summary = image_tokens[:, 0] if self.image_class_token else image_tokens.mean(axis=1)
            pooled = jnp.concatenate([pooled, jnp.tanh(self.image_pooler(summary))], axis=-1)
        return Fused(image_tokens=image_tokens, text_tokens=text_tokens, pooled=pooled)

    def attention_maps(
        self, image: Encoded, text: Encoded
    ) -> Float[Array, "depth batch length patches"]:
        """Every layer's attention of each word over the picture's tokens, averaged over heads."""
        masks = _key_mask(image), _key_mask(text)

        def call(layer, streams, key):
            return layer(streams, *masks), layer.text_to_image_weights(streams, *masks)

        return self.blocks.run(call, self._enter(image, text))[1]

    def _enter(self, image: Encoded, text: Encoded, picture: int = 0):
        dtype = jnp.dtype(self.config.dtype)  # the encoders may compute in another
        image_tokens = jnp.asarray(image.tokens, dtype)
        text_tokens = jnp.asarray(text.tokens, dtype)
        if self.image_projection is not None and self.text_projection is not None:
            image_tokens = self.image_projection(image_tokens)
            text_tokens = self.text_projection(text_tokens)
        if self.type_embedding is not None:
            text_tokens = text_tokens + self.type_embedding(jnp.asarray(0))
            image_tokens = image_tokens + self.type_embedding(jnp.asarray(1 + picture))
        return image_tokens, text_tokens


def _key_mask(encoded: Encoded) -> Bool[Array, "batch 1 length"] | None:
    return None if encoded.mask is None else jnp.asarray(encoded.mask)[:, None, :]
