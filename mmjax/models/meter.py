"""METER: CLIP's ViT and RoBERTa, then co-attention (Dou et al. 2022, "An Empirical Study of …").

Its own model and not a `VisionLanguageModel`: it has a word table of its own in its language head,
heads of four fine-tuning tasks and a second picture, and nothing contrastive.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from mmjax.errors import InputError
from mmjax.layers import linear, split_key
from mmjax.models.bert import BertConfig, BertEncoder
from mmjax.models.features import Encoded, Fused
from mmjax.models.fusion import CoAttention, CoAttentionConfig
from mmjax.models.heads import AnsweringHead, MaskedLanguageHead, MatchingHead
from mmjax.models.model import PairModel
from mmjax.models.vit import ViT, ViTConfig


def _clip_without_its_last_block() -> ViTConfig:
    return ViTConfig(
        size="B/16",
        depth=11,
        image_size=288,
        patch_bias=False,
        embedding_norm=True,
        activation="quick_gelu",
        epsilon=1e-5,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    )


def _roberta() -> BertConfig:
    return BertConfig(
        size="base",
        vocabulary_size=50265,
        max_length=514,
        first_position=2,
        padding=1,
        types=1,
        epsilon=1e-5,
        dropout=0.1,
    )


def _co_attention() -> CoAttentionConfig:
    return CoAttentionConfig(
        width=768,
        depth=6,
        norm="post",
        epsilon=1e-12,
        dropout=0.1,
        project=True,
        token_types=True,
    )


@dataclass(frozen=True)
class MeterConfig:
    """The defaults are METER-CLIP16-RoBERTa as pre-trained. A head exists where its field is set.

    `image`, `text` and `fusion` replace theirs as a whole. The first two defaults say what differs
    from `ViTConfig` and `BertConfig` in CLIP's ViT and in RoBERTa.
    """

    image: ViTConfig = field(default_factory=_clip_without_its_last_block)
    text: BertConfig = field(default_factory=_roberta)
    fusion: CoAttentionConfig = field(default_factory=_co_attention)

    matching: bool = True
    masked_language: bool = True
    answers: tuple[str, ...] = ()  # the closed list of a VQA head; none: no head
    reasoning: bool = False  # NLVR2: is a text true of two pictures?
    entailment: bool = False  # SNLI-VE: does a picture contradict, entail or neither a text?
    ranking: bool = False  # one score of a pair, as fine-tuned for retrieval


class Meter(PairModel):
    """Pictures and texts in, features and scores out."""

    # A head, or None where the config has it not.
    reasoning: Any
    entailment: Any

    def __init__(self, config: MeterConfig, rngs: nnx.Rngs):
        self.config = config
        fusion, dtype = config.fusion, config.fusion.dtype
        self.image = ViT(config.image, rngs)
        self.text = BertEncoder(config.text, rngs)
        self.fusion = CoAttention(
            fusion,
            config.image.width,
            config.text.width,
            rngs,
            image_class_token=config.image.pool == "class_token",
            pictures=2 if config.reasoning else 1,
        )
        pooled, hidden = self.fusion.pooled_width, 2 * fusion.width

        def classifier(width: int, classes: int) -> AnsweringHead:
            return AnsweringHead(width, hidden, classes, dtype, rngs)

        # The language head is of the fusion's kind, not of the text encoder's.
        words = replace(
            config.text,
            width=fusion.width,
            heads=fusion.heads,
            activation=fusion.activation,
            epsilon=fusion.epsilon,
        )
        self.matching = MatchingHead(pooled, rngs) if config.matching else None
        self.masked_language = (
            MaskedLanguageHead(fusion.width, words, dtype, rngs, tied=False)
            if config.masked_language
            else None
        )
        self.answering = classifier(pooled, len(config.answers)) if config.answers else None
        self.reasoning = classifier(2 * pooled, 2) if config.reasoning else None
        self.entailment = classifier(pooled, 3) if config.entailment else None
        self.ranking = linear(pooled, 1, "float32", rngs) if config.ranking else None

    def fuse(
        self,
        image: Encoded,
        text: Encoded,
        key: Key[Array, ""] | None = None,
        picture: int = 0,
    ) -> Fused:
        """Features of pairs; `picture` is 1 where these are the second ones of their examples."""
        return self.fusion(image, text, key=key, picture=picture)

    def forward(
        self,
        image: Float[Array, "batch height width 3"] | UInt8[Array, "batch height width 3"],
        text: Int[Array, "batch length"],
        text_mask: Bool[Array, "batch length"] | None = None,
        image_b: Float[Array, "batch height width 3"]
        | UInt8[Array, "batch height width 3"]
        | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """All that the model has to say of a batch of pairs, by name; heads it lacks are absent.

        `sequence_output [B,L,D]` is the text, `image_output [B,1+N,D]` the picture after the
        fusion, `pooled_output [B,2D]` both; scores are `itm_logits [B,2]`, `mlm_logits [B,L,V]`,
        `vqa_logits [B,answers]`, `ve_logits [B,3]`, `rank_logits [B]`. A second picture adds
        `nlvr_logits [B,2]` and changes nothing else.
        """
        image_key, text_key, fusion_key, *second_keys = split_key(key, 5)
        encoded_text = self.encode_text(text, text_mask, text_key)
        fused = self.fuse(self.encode_image(image, image_key), encoded_text, fusion_key)
        out: dict[str, Any] = {
            "sequence_output": fused.text_tokens,
            "image_output": fused.image_tokens,
            "pooled_output": fused.pooled,
        }
        if self.matching is not None:
            out["itm_logits"] = self.match(fused)
        if self.masked_language is not None:
            out["mlm_logits"] = self.score_words(fused.text_tokens)
        if self.answering is not None:
            out["vqa_logits"] = self.score_answers(fused)
        if self.entailment is not None:
            out["ve_logits"] = self.entailment(fused.pooled)
        if self.ranking is not None:
            out["rank_logits"] = self.rank(fused)
        if image_b is not None:
            if self.reasoning is None:
                raise InputError("image_b is given, but this METER has no head for two pictures.")
            encoded_image = self.encode_image(image_b, second_keys[0])
            second = self.fuse(encoded_image, encoded_text, second_keys[1], picture=1)
            both = jnp.concatenate([fused.pooled, second.pooled], axis=-1)
            out["nlvr_logits"] = self.reasoning(both)
        return out
