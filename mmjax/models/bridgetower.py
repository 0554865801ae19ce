"""BridgeTower: every layer of the fusion sees another layer of both encoders (Xu et al. 2023).

METER's encoders and co-attention layers, with bridges between them (section 3.2 of "BridgeTower:
Building Bridges Between Encoders in Vision-Language Representation Learning").
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from mmjax.errors import InputError
from mmjax.layers import Stack, StackConfig, embedding, layer_norm, linear, split_key
from mmjax.models.bert import BertConfig, BertEncoder
from mmjax.models.features import AnyArray, Encoded, Fused
from mmjax.models.fusion import CoAttentionConfig, CoAttentionLayer
from mmjax.models.heads import (
    ContrastiveConfig,
    ContrastiveHead,
    MaskedLanguageHead,
    MatchingHead,
    unit,
)
from mmjax.models.model import Model
from mmjax.models.vit import ViT, ViTConfig


@dataclass(frozen=True)
class BridgeTowerConfig:
    """Two encoders of one depth and as many fusion layers as shall see one of their last layers."""

    image: ViTConfig
    text: BertConfig
    fusion: CoAttentionConfig

    # Of the bridges and of the language head. The layers of the fusion have its own.
    epsilon: float = 1e-5
    activation: str = "gelu"  # of the language head

    matching: bool = False
    masked_language: bool = False
    embedding_width: int = 0  # of the contrastive space; 0: no contrastive heads

    def __post_init__(self) -> None:
        """Refuse what has no bridges, or ends that do not meet."""
        depth, encoders = self.fusion.depth, {self.image.depth, self.text.depth}
        if len(encoders) > 1 or not 2 <= depth <= max(encoders):
            raise InputError(
                f"BridgeTower: the fusion has {depth} layers and the encoders {self.image.depth} "
                f"(image) and {self.text.depth} (text): the encoders have equally many, and the "
                "fusion at least two and no more than they."
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EncodedLayers(Encoded):
    """One modality after its encoder, with what its last layers send over the bridges."""

    layers: Float[AnyArray, "batch depth length fusion_width"]


class BridgeTower(Model):
    """BridgeTowerModel and …ForImageAndTextRetrieval, …ForMaskedLM, …ForContrastiveLearning."""

    # A head, or None where the config has it not.
    pair_projection: Any

    def __init__(self, config: BridgeTowerConfig, rngs: nnx.Rngs):
        self.config = config
        fusion, width, dtype = config.fusion, config.fusion.width, config.fusion.dtype
        self.image = ViT(config.image, rngs)
        self.text = BertEncoder(config.text, rngs)
        self.fusion = BridgedCoAttention(config, rngs)
        words = replace(
            config.text,
            width=width,
            heads=fusion.heads,
            activation=config.activation,
            epsilon=config.epsilon,
        )
        self.matching = MatchingHead(2 * width, rngs) if config.matching else None
        self.masked_language = (
            MaskedLanguageHead(width, words, dtype, rngs, tied=False)
            if config.masked_language
            else None
        )
        space = config.embedding_width
        self.contrastive = (
            ContrastiveHead(width, config.text.width, ContrastiveConfig(space), rngs)
            if space
            else None
        )
        self.pair_projection = linear(2 * width, space, "float32", rngs) if space else None

    def encode_image(
        self,
        image: Float[Array, "batch height width 3"] | UInt8[Array, "batch height width 3"],
        key: Key[Array, ""] | None = None,
        image_shift: Float[Array, "batch length channels"] | None = None,
    ) -> EncodedLayers:
        """Features of pictures (uint8, or float already normalised), as they enter the fusion.

        `image_shift` is added to the vectors of the patches, and of the class token in front.
        """
        key, embedding_key = split_key(key, 2)
        x = self.image.embed(image, embedding_key, image_shift)
        layers = self.image.norm(self._last_layers(self.image.blocks, x, None, key))
        layers = self.fusion.enter_image(layers)
        return EncodedLayers(layers[:, -1], None, layers[:, -1, 0], layers)

    def encode_text(
        self,
        text: Int[Array, "batch length"],
        text_mask: Bool[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
        text_shift: Float[Array, "batch length width"] | None = None,
    ) -> EncodedLayers:
        """Features of token ids; `text_shift` is added to the words' vectors."""
        key, embedding_key = split_key(key, 2)
        # The mask is not for the positions: those go by the ids alone.
        x = self.text.embeddings(text, key=embedding_key, shift=text_shift)
        mask = None if text_mask is None else text_mask[:, None, :]
        layers = self._last_layers(self.text.blocks, x, mask, key)
        tokens = layers[:, -1]
        return EncodedLayers(tokens, text_mask, tokens[:, 0], self.fusion.enter_text(layers))

    def fuse(
        self, image: EncodedLayers, text: EncodedLayers, key: Key[Array, ""] | None = None
    ) -> Fused:
        """Features of pairs: row i of the pictures with row i of the texts."""
        return self.fusion(image, text, key=key)

    def forward(
        self,
        image: Float[Array, "batch height width 3"] | UInt8[Array, "batch height width 3"],
        text: Int[Array, "batch length"],
        text_mask: Bool[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """`text_features [B,L,D]`, `image_features [B,1+N,D]`, `pooler_output [B,2D]`, and scores.

        Those are `itm_logits [B,2]`, `mlm_logits [B,L,V]`, and `text_embeds`, `image_embeds` and
        `cross_embeds [B,E]` with their similarities `logits_per_image [B,B]`. Hugging Face has a
        class for each head and calls what it scores `logits`; so do we where there is one head (of
        the contrastive ones, the three vectors).
        """
        image_key, text_key, fusion_key = split_key(key, 3)
        encoded_image = self.encode_image(image, image_key)
        encoded_text = self.encode_text(text, text_mask, text_key)
        fused = self.fuse(encoded_image, encoded_text, fusion_key)
        out: dict[str, Any] = {
            "text_features": fused.text_tokens,
            "image_features": fused.image_tokens,
            "pooler_output": fused.pooled,
        }
        scores = []
        if self.matching is not None:
            out["itm_logits"] = self.match(fused)
            scores.append(out["itm_logits"])
        if self.masked_language is not None:
            out["mlm_logits"] = self.score_words(fused.text_tokens)
            scores.append(out["mlm_logits"])
        if self.contrastive is not None:
            texts, images = self.embed_text(encoded_text), self.embed_image(encoded_image)
            pairs = unit(self.pair_projection(fused.pooled))
            out |= {"text_embeds": texts, "image_embeds": images, "cross_embeds": pairs}
            out["logits_per_image"] = self.contrastive.logits(images, texts)
            scores.append(jnp.stack([texts, images, pairs], axis=1))
        if len(scores) == 1:
            out["logits"] = scores[0]
        return out

    def _last_layers(self, blocks, x, mask, key):
        """What each of an encoder's last layers gives, [batch, layers, length, width]."""

        def call(layer, x, key):
            x = layer(x, mask, key=key)
            return x, x

        _, layers = blocks.run(call, x, key)
        return jnp.moveaxis(layers[-self.config.fusion.depth :], 0, 1)


class BridgedCoAttention(nnx.Module):
    """Co-attention layers, each but the first behind a bridge, and a pooled vector of the pair."""

    def __init__(self, config: BridgeTowerConfig, rngs: nnx.Rngs):
        fusion, width, dtype = config.fusion, config.fusion.width, config.fusion.dtype
        self.dtype = jnp.dtype(dtype)
        self.image_projection = linear(config.image.width, width, dtype, rngs)
        self.text_projection = linear(config.text.width, width, dtype, rngs)
        self.type_embedding = embedding(2, width, dtype, rngs)  # of text, of pictures
        self.image_norm = layer_norm(width, config.epsilon, dtype, rngs)
        self.text_norm = layer_norm(width, config.epsilon, dtype, rngs)
        self.first = CoAttentionLayer(fusion, rngs)
        rest = StackConfig(fusion.depth - 1, fusion.remat, fusion.unroll)
        self.rest = Stack(lambda rngs: BridgedLayer(config, rngs), rest, rngs)
        self.image_pooler = linear(width, width, dtype, rngs)
        self.text_pooler = linear(width, width, dtype, rngs)

    def enter_image(
        self, tokens: Float[Array, "*batch image_width"]
    ) -> Float[Array, "*batch fusion_width"]:
        """Tokens of pictures in the fusion's width, marked as such."""
        return self.image_projection(tokens) + self.type_embedding(jnp.asarray(1))

    def enter_text(
        self, tokens: Float[Array, "*batch text_width"]
    ) -> Float[Array, "*batch fusion_width"]:
        """Tokens of texts in the fusion's width, marked as such."""
        return self.text_projection(tokens) + self.type_embedding(jnp.asarray(0))

    def __call__(
        self, image: EncodedLayers, text: EncodedLayers, key: Key[Array, ""] | None = None
    ) -> Fused:
        """Fuse row i of the pictures with row i of the texts."""
        first_key, key = split_key(key, 2)
        images, texts = (
            jnp.moveaxis(jnp.asarray(encoded.layers, self.dtype), 1, 0) for encoded in (image, text)
        )
        mask = None if text.mask is None else jnp.asarray(text.mask)[:, None, :]
        streams = self.image_norm(images[0]), self.text_norm(texts[0])
        streams = self.first(streams, None, mask, first_key)

        def call(layer, streams, key, image, text):
            return layer(streams, (image, text), mask, key), None

        (image_tokens, text_tokens), _ = self.rest.run(call, streams, key, images[1:], texts[1:])
        summaries = self.text_pooler(text_tokens[:, 0]), self.image_pooler(image_tokens[:, 0])
        pooled = jnp.tanh(jnp.concatenate(summaries, axis=-1))
        return Fused(image_tokens=image_tokens, text_tokens=text_tokens, pooled=pooled)


class BridgedLayer(nnx.Module):
    """LayerNorm of each stream's sum with what the bridge leads to it, then co-attention."""

    def __init__(self, config: BridgeTowerConfig, rngs: nnx.Rngs):
        width, dtype = config.fusion.width, config.fusion.dtype
        self.image_bridge = layer_norm(width, config.epsilon, dtype, rngs)
        self.text_bridge = layer_norm(width, config.epsilon, dtype, rngs)
        self.fusion = CoAttentionLayer(config.fusion, rngs)

    def __call__(
        self,
        streams: tuple[Float[Array, "batch patches width"], Float[Array, "batch length width"]],
        bridged: tuple[Float[Array, "batch patches width"], Float[Array, "batch length width"]],
        text_mask: Bool[Array, "batch 1 length"] | None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "batch patches width"], Float[Array, "batch length width"]]:
        """Both streams after the layer; `bridged` are tokens of one layer of either encoder."""
        image = self.image_bridge(streams[0] + bridged[0])
        text = self.text_bridge(streams[1] + bridged[1])
        return self.fusion((image, text), None, text_mask, key)
