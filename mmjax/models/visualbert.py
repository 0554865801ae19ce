"""VisualBERT: words and regions in one BERT (Li et al. 2019, "VisualBERT: A Simple and …")."""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from mmjax.errors import InputError
from mmjax.layers import Block, embedding, linear, split_key
from mmjax.models.bert import BertConfig
from mmjax.models.features import Encoded, Fused
from mmjax.models.regions import RegionModel, RegionModelConfig, check_regions


@dataclass(frozen=True)
class VisualBertConfig(RegionModelConfig):
    """A BERT whose stream regions join at the bottom or at the top, with at most one classifier."""

    region_width: int = 512
    bypass: bool = False  # words alone pass the layers, and regions join them in one more, on top
    next_sentence: bool = False  # a head for the text's second caption being of another picture
    labels: tuple[str, ...] = ()  # of a text about a picture (NLVR2); a single one rates it (VCR)

    def __post_init__(self) -> None:
        """Both classifiers have one name among the outputs."""
        super().__post_init__()
        if self.answers and self.labels:
            raise InputError("VisualBertConfig has answers and labels: give one of them.")


class VisualBert(RegionModel):
    """VisualBertModel and its classes for pre-training, questions, reasoning and choices."""

    # A head, or None where the config has it not.
    next_sentence: Any
    classifier: Any

    def __init__(self, config: VisualBertConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        text, answers, labels = config.text, len(config.answers), len(config.labels)
        self.region_embeddings = VisualBertRegionEmbeddings(text, config.region_width, rngs)
        self.top = Block(text, rngs) if config.bypass else None
        self.next_sentence = (
            linear(text.width, 2, "float32", rngs) if config.next_sentence else None
        )
        self.answering = linear(text.width, answers, "float32", rngs) if answers else None
        self.classifier = linear(text.width, labels, "float32", rngs) if labels else None
        self.dropout = nnx.Dropout(text.dropout)

    def encode_image(
        self,
        regions: Float[Array, "batch regions features"],
        region_mask: Bool[Array, "batch regions"] | None = None,
        region_type: Int[Array, "batch regions"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Encoded:
        """Regions as they enter the stream; the first stands for all."""
        check_regions(regions, None, self.config.region_width)
        # The same LayerNorm as that of words.
        tokens = self.text_embeddings.normalise(self.region_embeddings(regions, region_type), key)
        return Encoded(tokens=tokens, mask=region_mask, pooled=tokens[:, 0])

    def fuse(self, image: Encoded, text: Encoded, key: Key[Array, ""] | None = None) -> Fused:
        """Features of pairs: row i of the pictures with row i of the texts."""
        if self.top is None:
            return replace(super().fuse(image, text, key), text_mask=text.mask)
        key, top_key = split_key(key, 2)
        length, masks = text.tokens.shape[1], (_keys(text), _keys(image))
        words = self.fusion.blocks(text.tokens, masks[0], key=key)
        tokens = jnp.concatenate([words, image.tokens], axis=1)
        tokens = self.top(tokens, jnp.concatenate(masks, axis=2), key=top_key)
        return Fused(
            image_tokens=tokens[:, length:],
            text_tokens=tokens[:, :length],
            pooled=jnp.tanh(self.fusion.pooler(tokens[:, 0])),
            text_mask=text.mask,
        )

    @property
    def matcher(self) -> Any:
        """The head that says whether the second caption is of another picture."""
        return self.next_sentence

    def match(self, fused: Fused) -> Float[Array, "batch 2"]:
        """Logits of no and yes: does the text belong to the picture?"""
        return self.matcher(fused.pooled)[:, ::-1]

    def score_answers(
        self, fused: Fused, key: Key[Array, ""] | None = None
    ) -> Float[Array, "batch answers"]:
        """Logits of the closed list of answers, read at the last word."""
        return self.answering(self._drop(last_word(fused.text_tokens, fused.text_mask), key))

    def forward(
        self,
        text: Int[Array, "batch length"],
        regions: Float[Array, "batch regions features"],
        text_mask: Bool[Array, "batch length"] | None = None,
        text_type: Int[Array, "batch length"] | None = None,
        region_mask: Bool[Array, "batch regions"] | None = None,
        region_type: Int[Array, "batch regions"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """`last_hidden_state [B,L+R,D]`, words first, `pooler_output [B,D]`, and what heads say.

        That is `prediction_logits [B,L+R,V]` of masked words and `seq_relationship_logits [B,2]`
        (the second: the second caption is of another picture), or `logits [B,answers or labels]`.
        Regions are of type 1 unless `region_type` says otherwise.
        """
        text_key, image_key, fusion_key, head_key = split_key(key, 4)
        words = self.encode_text(text, text_mask, text_type, text_key)
        image = self.encode_image(regions, region_mask, region_type, image_key)
        fused = self.fuse(image, words, fusion_key)
        tokens = jnp.concatenate([fused.text_tokens, fused.image_tokens], axis=1)
        out: dict[str, Any] = {"last_hidden_state": tokens, "pooler_output": fused.pooled}
        if self.masked_language is not None:
            out["prediction_logits"] = self.score_words(tokens)
        if self.next_sentence is not None:
            out["seq_relationship_logits"] = self.next_sentence(fused.pooled)
        if self.answering is not None:
            out["logits"] = self.score_answers(fused, head_key)
        if self.classifier is not None:
            out["logits"] = self.classifier(self._drop(fused.pooled, head_key))
        return out

    def _drop(self, x, key):
        return self.dropout(x, deterministic=key is None, rngs=key)


class VisualBertRegionEmbeddings(nnx.Module):
    """The sum of a region's projected features, its type and its position, which is always 0.

    The table of positions is as long as that of words, of which published models start as a copy.
    """

    def __init__(self, config: BertConfig, region_width: int, rngs: nnx.Rngs):
        width, dtype = config.width, config.dtype
        self.features = linear(region_width, width, dtype, rngs)
        self.position_embedding = embedding(config.max_length, width, dtype, rngs)
        self.type_embedding = embedding(config.types, width, dtype, rngs)

    def __call__(
        self,
        regions: Float[Array, "batch regions features"],
        types: Int[Array, "batch regions"] | None = None,
    ) -> Float[Array, "batch regions width"]:
        """Embed regions; without types all are of type 1."""
        types = jnp.ones(regions.shape[:2], int) if types is None else types
        x = self.features(regions) + self.type_embedding(types)
        return x + self.position_embedding(jnp.asarray(0))


def last_word(
    tokens: Float[Array, "batch length width"], mask: Bool[Array, "batch length"] | None
) -> Float[Array, "batch width"]:
    """The token before the last, which is [SEP]: the [MASK] that ends a question there."""
    if mask is None:
        return tokens[:, -2]
    index = mask.sum(axis=1) - 2
    return jnp.take_along_axis(tokens, index[:, None, None], axis=1)[:, 0]


def _keys(encoded: Encoded) -> Bool[Array, "batch 1 length"]:
    mask = jnp.ones(encoded.tokens.shape[:2], bool) if encoded.mask is None else encoded.mask
    return mask[:, None, :]
