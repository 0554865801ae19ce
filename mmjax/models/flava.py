"""FLAVA: an encoder of pictures, one of texts, and one of both (Singh et al. 2022)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from mmjax.errors import InputError
from mmjax.layers import (
    ACTIVATIONS,
    TABLE_INIT,
    Block,
    LayerConfig,
    Stack,
    layer_norm,
    linear,
    split_key,
)
from mmjax.models.bert import BertConfig, BertEncoder
from mmjax.models.features import AnyArray, Encoded, Fused
from mmjax.models.heads import ContrastiveConfig, ContrastiveHead, MaskedLanguageHead, MatchingHead
from mmjax.models.model import Model
from mmjax.models.vit import ViT, ViTConfig


@dataclass(frozen=True)
class FlavaConfig:
    """Three pre-norm encoders, each with a pooler."""

    image: ViTConfig
    text: BertConfig
    fusion: LayerConfig
    class_token: bool = True  # the fusion puts one in front; without it the picture's stands there
    mask_token: bool = True  # what stands in a masked patch's place
    embedding_width: int = 768  # of the contrastive space

    pretraining: bool = False  # heads for masked words and patches, and for pairs that match
    codes: int = 8192  # of the picture tokenizer, whose codes are predicted of masked patches

    def __post_init__(self) -> None:
        """Refuse encoders that are not FLAVA's."""
        parts = {"image": self.image, "text": self.text, "fusion": self.fusion}
        for name, part in parts.items():
            if part.norm != "pre":
                raise InputError(f"FlavaConfig.{name}.norm is {part.norm!r}: FLAVA's is 'pre'.")
        if not (self.image.pooler and self.text.pooler and self.image.pool == "class_token"):
            raise InputError(
                "FlavaConfig: FLAVA pools class tokens; set image.pooler and text.pooler, and "
                "leave image.pool at 'class_token'."
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlavaEncoded(Encoded):
    """One modality after its encoder; the first token is the pooled vector."""

    states: Float[AnyArray, "batch length width"]  # before the final LayerNorm: the fusion's input


class FlavaImage(ViT):
    """A ViT in which a learnt token may take the places of patches."""

    def __init__(self, config: ViTConfig, mask_token: bool, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.mask_token = (
            nnx.Param(TABLE_INIT(rngs.params(), (1, config.width))) if mask_token else None
        )

    def __call__(
        self,
        image: Float[Array, "batch height width 3"] | UInt8[Array, "batch height width 3"],
        key: Key[Array, ""] | None = None,
        shift: Float[Array, "batch length channels"] | None = None,
        patch_mask: Bool[Array, "batch patches"] | None = None,
    ) -> FlavaEncoded:
        """Encode pictures without the patches where `patch_mask` is true."""
        embedding_key, key = split_key(key, 2)
        x = self.embed(image, shift=shift)
        if patch_mask is not None:
            x = self._hide(x, patch_mask)
        x = self.dropout(x, deterministic=embedding_key is None, rngs=embedding_key)
        return _encoded(self.blocks(x, key=key), self.norm)

    def _hide(self, x, patch_mask):
        if self.mask_token is None:
            raise InputError("patch_mask is given, but this FLAVA has no mask_token.")
        hidden = self.mask_token[...] + self.position_embedding[1:]
        patches = jnp.where(patch_mask[..., None], hidden.astype(x.dtype), x[:, 1:])
        return jnp.concatenate([x[:, :1], patches], axis=1)


class FlavaText(BertEncoder):
    """A pre-norm BERT."""

    def __call__(
        self,
        text: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"] | None = None,
        types: Int[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
        shift: Float[Array, "batch length width"] | None = None,
    ) -> FlavaEncoded:
        """Encode token ids; `mask` is true on tokens, false on padding (None: all are tokens)."""
        embedding_key, key = split_key(key, 2)
        x = self.embeddings(text, mask, types, embedding_key, shift)
        states = self.blocks(x, None if mask is None else mask[:, None, :], key=key)
        return _encoded(states, self.norm, mask)


def _encoded(states, norm, mask=None):
    tokens = norm(states)
    return FlavaEncoded(tokens=tokens, mask=mask, pooled=tokens[:, 0], states=states)


class FlavaFusion(nnx.Module):
    """Both encoders' states, projected, through one more stack, behind a class token of its own."""

    def __init__(self, config: FlavaConfig, rngs: nnx.Rngs):
        fusion = config.fusion
        width, dtype = fusion.width, fusion.dtype
        self.image_projection = linear(config.image.width, width, dtype, rngs)
        self.text_projection = linear(config.text.width, width, dtype, rngs)
        self.class_token = (
            nnx.Param(TABLE_INIT(rngs.params(), (1, width))) if config.class_token else None
        )
        self.blocks = Stack(lambda rngs: Block(fusion, rngs), fusion, rngs)
        self.norm = layer_norm(width, fusion.epsilon, dtype, rngs)
        self.pooler = linear(width, width, dtype, rngs)

    def __call__(
        self, image: FlavaEncoded, text: FlavaEncoded, key: Key[Array, ""] | None = None
    ) -> Fused:
        """Fuse row i of the pictures with row i of the texts.

        The class token counts among the picture's tokens, as their first; it is the pooled vector.
        """
        parts = [self.image_projection(image.states), self.text_projection(text.states)]
        if self.class_token is not None:
            token = self.class_token[...].astype(parts[0].dtype)
            parts.insert(0, jnp.broadcast_to(token, (len(parts[0]), *token.shape)))
        x = jnp.concatenate(parts, axis=1)
        split = x.shape[1] - text.states.shape[1]
        mask = None
        if text.mask is not None:
            mask = jnp.pad(text.mask, ((0, 0), (split, 0)), constant_values=True)[:, None, :]
        tokens = self.norm(self.blocks(x, mask, key=key))
        return Fused(
            image_tokens=tokens[:, :split], text_tokens=tokens[:, split:], pooled=tokens[:, 0]
        )


class Flava(Model):
    """FlavaModel, and with the heads of its pre-training FlavaForPreTraining.

    `matching`, `masked_language` and `masked_image` are of pairs; of a text or a picture alone are
    `masked_text_alone` and `masked_image_alone`. The tokenizer that gives pictures their codes
    (DALL-E's) is not part of it.
    """

    # A head, or None where the config has it not.
    masked_image: Any
    masked_text_alone: Any
    masked_image_alone: Any

    def __init__(self, config: FlavaConfig, rngs: nnx.Rngs):
        self.config = config
        image, text, width = config.image, config.text, config.fusion.width
        self.image = FlavaImage(image, config.mask_token, rngs)
        self.text = FlavaText(text, rngs)
        self.fusion = FlavaFusion(config, rngs)
        self.contrastive = ContrastiveHead(
            image.width, text.width, ContrastiveConfig(config.embedding_width), rngs
        )

        def words(width: int) -> MaskedLanguageHead:
            return MaskedLanguageHead(width, text, text.dtype, rngs, tied=False)

        def codes(width: int) -> CodeHead:
            return CodeHead(width, image, config.codes, rngs)

        wanted = config.pretraining
        self.matching = PooledMatchingHead(width, config.fusion.dtype, rngs) if wanted else None
        self.masked_language = words(width) if wanted else None
        self.masked_image = codes(width) if wanted else None
        self.masked_text_alone = words(text.width) if wanted else None
        self.masked_image_alone = codes(image.width) if wanted else None

    def encode_image(
        self,
        image: Float[Array, "batch height width 3"] | UInt8[Array, "batch height width 3"],
        patch_mask: Bool[Array, "batch patches"] | None = None,
        key: Key[Array, ""] | None = None,
        image_shift: Float[Array, "batch length channels"] | None = None,
    ) -> FlavaEncoded:
        """Features of pictures (uint8, or float already normalised), masked patches hidden.

        `image_shift` is added to the vectors of the patches, and of the class token in front.
        """
        return self.image(image, key, image_shift, patch_mask)

    def encode_text(
        self,
        text: Int[Array, "batch length"],
        text_mask: Bool[Array, "batch length"] | None = None,
        text_type: Int[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
        text_shift: Float[Array, "batch length width"] | None = None,
    ) -> FlavaEncoded:
        """Features of token ids; `text_shift` is added to the words' vectors."""
        return self.text(text, text_mask, text_type, key, text_shift)

    def fuse(
        self, image: FlavaEncoded, text: FlavaEncoded, key: Key[Array, ""] | None = None
    ) -> Fused:
        """Features of pairs: row i of the pictures with row i of the texts."""
        return self.fusion(image, text, key=key)

    def score_codes(
        self, tokens: Float[Array, "batch patches width"]
    ) -> Float[Array, "batch patches codes"]:
        """Logits of every code at every patch of a fused picture."""
        return self.masked_image(tokens)

    def score_codes_alone(
        self, tokens: Float[Array, "batch patches width"]
    ) -> Float[Array, "batch patches codes"]:
        """Logits of every code at every patch of a picture that has not met its text."""
        return self.masked_image_alone(tokens)

    def score_words_alone(
        self, tokens: Float[Array, "batch length width"]
    ) -> Float[Array, "batch length words"]:
        """Logits of every word at every position of a text that has not met its picture."""
        return self.masked_text_alone(tokens, self.word_embeddings)

    def forward(
        self,
        image: Float[Array, "batch height width 3"]
        | UInt8[Array, "batch height width 3"]
        | None = None,
        text: Int[Array, "batch length"] | None = None,
        text_mask: Bool[Array, "batch length"] | None = None,
        text_type: Int[Array, "batch length"] | None = None,
        patch_mask: Bool[Array, "batch patches"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """Of pictures `image_embeddings [B,1+N,D]`, of texts `text_embeddings [B,L,D]`, and of both
        `multimodal_embeddings [B,2+N+L,D]`, in the order class token, picture, text.

        Each is also the `last_hidden_state`, beside a `pooler_output [B,D]`, of `image_output`,
        `text_output` or `multimodal_output`. `image_embeds [B,E]` and `text_embeds` are unit
        vectors, and `contrastive_logits_per_image [B,B]` their scaled similarities. With heads
        there are `itm_logits [B,2]`, `mmm_image_logits [B,N,codes]` and `mmm_text_logits [B,L,V]`
        of pairs, and `mim_logits [B,1+N,codes]` or `mlm_logits [B,L,V]` of one modality alone.
        """
        image_key, text_key, fusion_key = split_key(key, 3)
        out: dict[str, Any] = {}
        pictures = texts = None
        if image is not None:
            pictures = self.encode_image(image, patch_mask, image_key)
            out |= _describe("image", pictures.tokens, self.image.pooler)
            out["image_embeds"] = self.embed_image(pictures)
        if text is not None:
            texts = self.encode_text(text, text_mask, text_type, text_key)
            out |= _describe("text", texts.tokens, self.text.pooler)
            out["text_embeds"] = self.embed_text(texts)
        if pictures is not None and texts is not None:
            return out | self._describe_pairs(out, self.fuse(pictures, texts, fusion_key))
        if pictures is not None and self.masked_image_alone is not None:
            out["mim_logits"] = self.score_codes_alone(pictures.tokens)
        if texts is not None and self.masked_text_alone is not None:
            out["mlm_logits"] = self.score_words_alone(texts.tokens)
        return out

    def _describe_pairs(self, alone, fused):
        tokens = jnp.concatenate([fused.image_tokens, fused.text_tokens], axis=1)
        out = _describe("multimodal", tokens, self.fusion.pooler)
        logits = self.contrastive.logits(alone["image_embeds"], alone["text_embeds"])
        out["contrastive_logits_per_image"] = logits
        out["contrastive_logits_per_text"] = logits.T
        if self.config.pretraining:
            patches = alone["image_embeddings"].shape[1] - 1
            out["itm_logits"] = self.match(fused)
            out["mmm_image_logits"] = self.score_codes(fused.image_tokens[:, -patches:])
            out["mmm_text_logits"] = self.score_words(fused.text_tokens)
        return out


def _describe(name, tokens, pooler):
    """A modality's output under Hugging Face's names."""
    pooled = jnp.tanh(pooler(tokens[:, 0]))
    whole = {"last_hidden_state": tokens, "pooler_output": pooled}
    return {f"{name}_embeddings": tokens, f"{name}_output": whole}


class PooledMatchingHead(MatchingHead):
    """Does the text belong to the picture? With a pooler of its own before the two logits."""

    def __init__(self, width: int, dtype: str, rngs: nnx.Rngs):
        super().__init__(width, rngs)
        self.pooler = linear(width, width, dtype, rngs)

    def __call__(self, pooled: Float[Array, "batch width"]) -> Float[Array, "batch 2"]:
        """Logits of no and yes, float32."""
        return super().__call__(jnp.tanh(self.pooler(pooled)))


class CodeHead(nnx.Module):
    """Scores of every code of the picture tokenizer: dense, activation, LayerNorm, dense."""

    def __init__(self, width: int, image: ViTConfig, codes: int, rngs: nnx.Rngs):
        self.activation = image.activation
        self.transform = linear(width, image.width, image.dtype, rngs)
        self.norm = layer_norm(image.width, image.epsilon, image.dtype, rngs)
        self.decoder = linear(image.width, codes, "float32", rngs)

    def __call__(self, tokens: Float[Array, "*batch width"]) -> Float[Array, "*batch codes"]:
        """Logits of every code, float32."""
        return self.decoder(self.norm(ACTIVATIONS[self.activation](self.transform(tokens))))
