"""The assembled model: an image encoder, a text encoder, a fusion of the two, and heads."""

from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from mmjax.errors import InputError
from mmjax.models.bert import BertConfig, BertEncoder
from mmjax.models.features import Encoded, Fused
from mmjax.models.fusion import CoAttention, CoAttentionConfig
from mmjax.models.heads import (
    AnsweringHead,
    ContrastiveConfig,
    ContrastiveHead,
    MaskedLanguageHead,
    MatchingHead,
)
from mmjax.models.model import PairModel
from mmjax.models.vit import ViT, ViTConfig


@dataclass(frozen=True)
class ModelConfig:
    """The parts of a model. A head exists where its field is set."""

    image: ViTConfig
    text: BertConfig
    fusion: CoAttentionConfig
    embedding_width: int = 256  # of the contrastive space; 0: no contrastive head
    matching: bool = True
    masked_language: bool = True
    answers: tuple[str, ...] = field(default=())  # the closed list of a VQA head; none: no head

    def __post_init__(self) -> None:
        """Half a config is no config."""
        if len(set(self.answers)) != len(self.answers):
            raise InputError("model.answers names an answer twice.")


class VisionLanguageModel(PairModel):
    """Pictures and texts in, features and scores out.

    `key=None` runs without dropout; a key draws a mask anew in every layer.
    """

    # A head, or None where the config has it not. (Objectives check before they ask for one.)
    contrastive: Any
    matching: Any
    masked_language: Any
    answering: Any

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        image, text, dtype = config.image, config.text, config.fusion.dtype
        self.image = ViT(image, rngs)
        self.text = BertEncoder(text, rngs)
        self.fusion = CoAttention(
            config.fusion,
            image.width,
            text.width,
            rngs,
            image_class_token=image.pool == "class_token",
        )
        pooled, width = self.fusion.pooled_width, config.fusion.width
        self.contrastive = (
            ContrastiveHead(
                image.width, text.width, ContrastiveConfig(config.embedding_width), rngs
            )
            if config.embedding_width
            else None
        )
        self.matching = MatchingHead(pooled, rngs) if config.matching else None
        self.masked_language = (
            MaskedLanguageHead(width, text, dtype, rngs) if config.masked_language else None
        )
        self.answering = (
            AnsweringHead(pooled, 2 * width, len(config.answers), dtype, rngs)
            if config.answers
            else None
        )

    def fuse(self, image: Encoded, text: Encoded, key: Key[Array, ""] | None = None) -> Fused:
        """Features of pairs: row i of the pictures with row i of the texts."""
        return self.fusion(image, text, key=key)

    def forward(
        self,
        image: Float[Array, "batch height width 3"] | UInt8[Array, "batch height width 3"],
        text: Int[Array, "batch length"],
        text_mask: Bool[Array, "batch length"],
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """All that the model has to say of a batch of pairs, by name; heads it lacks are absent."""
        image_key, text_key, fusion_key = (None,) * 3 if key is None else jax.random.split(key, 3)
        encoded_image = self.encode_image(image, image_key)
        encoded_text = self.encode_text(text, text_mask, text_key)
        fused = self.fuse(encoded_image, encoded_text, fusion_key)
        out: dict[str, Any] = {"pooled_output": fused.pooled, "sequence_output": fused.text_tokens}
        if self.contrastive is not None:
            out |= self.contrastive.outputs(encoded_image.pooled, encoded_text.pooled)
        if self.matching is not None:
            out["itm_logits"] = self.matching(fused.pooled)
        if self.masked_language is not None:
            out["mlm_logits"] = self.masked_language(fused.text_tokens, self.text.embeddings)
        if self.answering is not None:
            out["vqa_logits"] = self.answering(fused.pooled)
        return out
