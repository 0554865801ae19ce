"""How the two modalities meet: not at all, in one stream, in two, or the text looks at the picture.

Co-attention: two streams, each attending to itself and to the other. One layer serves the family:
LXMERT (Tan and Bansal 2019, section 2.3) crosses first and shares one cross-attention between both
directions; METER (Dou et al. 2022, section 3.3) attends to itself first and shares nothing. In
both, the context of a cross-attention is the other stream as it entered the layer.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from mmjax.errors import InputError, near_misses
from mmjax.layers import (
    AttentionSublayer,
    Block,
    LayerConfig,
    MlpSublayer,
    Stack,
    embedding,
    layer_norm,
    linear,
    split_key,
)
from mmjax.models.features import Encoded, Fused, masked_mean

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


@dataclass(frozen=True)
class FusionConfig(CoAttentionConfig):
    """Any of FUSIONS, by its `kind`. `order` and `share_cross` are for co-attention alone.

    Without a fusion the widths and the depth are not used.
    """

    kind: str = "co_attention"

    def __post_init__(self) -> None:
        """Refuse unknown kinds, and options that a kind has no use for."""
        super().__post_init__()
        if self.kind not in FUSIONS:
            raise InputError(f"fusion.kind is {self.kind!r}.{near_misses(self.kind, FUSIONS)}")
        if self.kind != "co_attention" and (self.order != "self_first" or self.share_cross):
            raise InputError(
                f"fusion.order and fusion.share_cross are for kind='co_attention', not for "
                f"{self.kind!r}: leave them at their defaults."
            )


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


class Fusion(nnx.Module):
    """How every fusion begins and ends: projections and types, and a pooled vector of the pair.

    One that can show where words look has `attention_maps` too.
    """

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
        self.blocks: Any = self._layers(rngs)
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
        image_tokens, text_tokens = self._run(streams, masks, key)
        if self.image_norm is not None and self.text_norm is not None:
            image_tokens, text_tokens = self.image_norm(image_tokens), self.text_norm(text_tokens)
        pooled = jnp.tanh(self.text_pooler(text_tokens[:, 0]))
        if self.image_pooler is not None:
            # Without a class token the mean of its tokens stands for the picture.
            mean = masked_mean(image_tokens, image.mask)
            summary = image_tokens[:, 0] if self.image_class_token else mean
            pooled = jnp.concatenate([pooled, jnp.tanh(self.image_pooler(summary))], axis=-1)
        return Fused(image_tokens=image_tokens, text_tokens=text_tokens, pooled=pooled)

    def _layers(self, rngs: nnx.Rngs) -> Stack:
        raise NotImplementedError

    def _run(self, streams, masks, key):
        """Both streams after the layers."""
        raise NotImplementedError

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


class CoAttention(Fusion):
    """`depth` co-attention layers over both encoders' tokens, and a pooled vector of the pair."""

    def attention_maps(
        self, image: Encoded, text: Encoded
    ) -> Float[Array, "depth batch length patches"]:
        """Every layer's cross-attention of each word over the picture's tokens, over heads."""
        masks = _key_mask(image), _key_mask(text)

        def call(layer, streams, key):
            return layer(streams, *masks), layer.text_to_image_weights(streams, *masks)

        return self.blocks.run(call, self._enter(image, text))[1]

    def _layers(self, rngs: nnx.Rngs) -> Stack:
        return Stack(lambda rngs: CoAttentionLayer(self.config, rngs), self.config, rngs)

    def _run(self, streams, masks, key):
        return self.blocks(streams, *masks, key=key)


class MergedStream(Fusion):
    """`depth` layers over one stream: the text's tokens, then the picture's, each sees all.

    The single-stream fusion of VisualBERT (Li et al. 2019), UNITER and ViLT, above encoders.
    """

    def attention_maps(
        self, image: Encoded, text: Encoded
    ) -> Float[Array, "depth batch length patches"]:
        """Every layer's attention of each word over the picture's tokens, averaged over heads."""
        streams = self._enter(image, text)
        tokens, mask = _stream(streams, (_key_mask(image), _key_mask(text)))
        length = streams[1].shape[1]

        def call(layer, x, key):
            weights = layer.self_attention.weights(x, None, mask).mean(axis=1)
            return layer(x, mask), weights[:, :length, length:]

        return self.blocks.run(call, tokens)[1]

    def _layers(self, rngs: nnx.Rngs) -> Stack:
        return Stack(lambda rngs: Block(self.config, rngs), self.config, rngs)

    def _run(self, streams, masks, key):
        length = streams[1].shape[1]
        tokens = self.blocks(*_stream(streams, masks), key=key)
        return tokens[:, length:], tokens[:, :length]


class CrossAttention(Fusion):
    """`depth` layers in which the text looks at itself and at the picture; the picture rests.

    As in ALBEF (Li et al. 2021, section 3.1) and BLIP.
    """

    def attention_maps(
        self, image: Encoded, text: Encoded
    ) -> Float[Array, "depth batch length patches"]:
        """Every layer's cross-attention of each word over the picture's tokens, over heads."""
        image_tokens, text_tokens = self._enter(image, text)
        image_mask, text_mask = _key_mask(image), _key_mask(text)

        def call(layer, x, key):
            seen = layer.self_attention(x, mask=text_mask)
            weights = layer.cross_attention.weights(seen, image_tokens, image_mask).mean(axis=1)
            return layer(x, text_mask, image_tokens, image_mask), weights

        return self.blocks.run(call, text_tokens)[1]

    def _layers(self, rngs: nnx.Rngs) -> Stack:
        return Stack(lambda rngs: Block(self.config, rngs, cross=True), self.config, rngs)

    def _run(self, streams, masks, key):
        (image_tokens, text_tokens), (image_mask, text_mask) = streams, masks
        return image_tokens, self.blocks(text_tokens, text_mask, image_tokens, image_mask, key=key)


class NoFusion(nnx.Module):
    """The two modalities side by side: both encoders' tokens and pooled vectors as they are."""

    def __init__(
        self,
        config: CoAttentionConfig,
        image_width: int,
        text_width: int,
        rngs: nnx.Rngs,
        image_class_token: bool = True,
    ):
        self.config = config
        self.pooled_width = text_width + image_width

    def __call__(self, image: Encoded, text: Encoded, key: Key[Array, ""] | None = None) -> Fused:
        """The pooled vector is the text's, then the picture's."""
        pooled = jnp.concatenate([text.pooled, image.pooled], axis=-1)
        return Fused(image_tokens=image.tokens, text_tokens=text.tokens, pooled=pooled)


# By `config.model.fusion.kind`. Another fusion is a class like these, and a line here.
FUSIONS: dict[str, Any] = {
    "none": NoFusion,
    "merged": MergedStream,
    "co_attention": CoAttention,
    "cross_attention": CrossAttention,
}


def _stream(streams, masks):
    """One stream of both modalities, text first, and which of its tokens may be looked at."""
    (image, text), (image_mask, text_mask) = streams, masks
    seen = [
        jnp.ones((x.shape[0], 1, x.shape[1]), bool) if mask is None else mask
        for x, mask in ((text, text_mask), (image, image_mask))
    ]
    return jnp.concatenate([text, image], axis=1), jnp.concatenate(seen, axis=-1)


def _key_mask(encoded: Encoded) -> Bool[Array, "batch 1 length"] | None:
    return None if encoded.mask is None else jnp.asarray(encoded.mask)[:, None, :]
