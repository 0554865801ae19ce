"""LXMERT: words and regions in encoders of their own, then co-attention (Tan and Bansal 2019)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from mmjax.errors import InputError
from mmjax.layers import (
    ACTIVATIONS,
    Block,
    LayerConfig,
    Stack,
    layer_norm,
    linear,
    look_up,
    split_key,
)
from mmjax.models.bert import BertEmbeddings
from mmjax.models.features import Encoded, Fused, shifted
from mmjax.models.fusion import CoAttention, CoAttentionConfig
from mmjax.models.heads import MaskedLanguageHead, MatchingHead, MlpHead
from mmjax.models.model import Model, Moves
from mmjax.models.regions import StreamConfig, check_regions


@dataclass(frozen=True)
class LxmertConfig:
    """Three encoders of one width. The paper has 9, 5 and 5 layers of BERT-base's."""

    text: StreamConfig  # the language encoder; the layers of the others are like its own
    region_depth: int = 5
    fusion_depth: int = 5
    region_width: int = 2048  # features that the detector has of a region

    answers: tuple[str, ...] = ()  # the closed list of a question's answers; none: no head
    masked_language: bool = False  # a head for words behind masks
    matching: bool = False  # a head for text and picture belonging together
    region_objects: int = 0  # kinds of objects that a masked region may show; 0: no head
    region_attributes: int = 0  # kinds of attributes that it may have; 0: no head
    region_features: bool = False  # a head for its features

    def __post_init__(self) -> None:
        """A list names each of its members once."""
        if len(set(self.answers)) != len(self.answers):
            raise InputError("LxmertConfig.answers names an answer twice.")

    @property
    def region_head(self) -> bool:
        """Whether anything is predicted of masked regions."""
        return bool(self.region_objects or self.region_attributes or self.region_features)


class Lxmert(Model):
    """LxmertModel, LxmertForQuestionAnswering and LxmertForPreTraining, by the heads it has."""

    adopts: ClassVar[Mapping[str, Moves]] = {
        "text": (("text/embeddings", "text_embeddings"), ("text/blocks", "text_blocks"))
    }

    # A head, or None where the config has it not.
    region_head: Any

    def __init__(self, config: LxmertConfig, rngs: nnx.Rngs):
        self.config = config
        text, regions = config.text, replace(config.text, depth=config.region_depth)
        width, dtype = text.width, text.dtype
        self.text_embeddings = LxmertEmbeddings(text, rngs)
        self.text_blocks = Stack(lambda rngs: Block(text, rngs), text, rngs)
        self.region_embeddings = RegionEmbeddings(text, config.region_width, rngs)
        self.region_blocks = Stack(lambda rngs: Block(regions, rngs), regions, rngs)
        self.fusion = CoAttention(_fusion(config), width, width, rngs)
        self.masked_language = (
            MaskedLanguageHead(width, text, dtype, rngs) if config.masked_language else None
        )
        self.matching = MatchingHead(width, rngs) if config.matching else None
        self.region_head = RegionHead(config, rngs) if config.region_head else None
        answers = len(config.answers)
        self.answering = (
            MlpHead(width, 2 * width, answers, dtype, rngs, epsilon=text.epsilon)
            if answers
            else None
        )

    def encode_text(
        self,
        text: Int[Array, "batch length"],
        text_mask: Bool[Array, "batch length"] | None = None,
        text_type: Int[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
        text_shift: Float[Array, "batch length width"] | None = None,
    ) -> Encoded:
        """Features of token ids; [CLS] is their pooled vector.

        `text_shift` is added to the words' vectors.
        """
        embedding_key, key = split_key(key, 2)
        x = self.text_embeddings(text, text_mask, text_type, embedding_key, text_shift)
        return _encode(self.text_blocks, x, text_mask, key)

    def encode_image(
        self,
        regions: Float[Array, "batch regions features"],
        boxes: Float[Array, "batch regions 4"],
        region_mask: Bool[Array, "batch regions"] | None = None,
        key: Key[Array, ""] | None = None,
        image_shift: Float[Array, "batch regions features"] | None = None,
    ) -> Encoded:
        """Features of regions; nothing pools them, and the first stands for all.

        `image_shift` is added to what the detector has of them.
        """
        check_regions(regions, boxes, self.config.region_width)
        embedding_key, key = split_key(key, 2)
        x = self.region_embeddings(shifted(regions, image_shift), boxes, key=embedding_key)
        return _encode(self.region_blocks, x, region_mask, key)

    def fuse(self, image: Encoded, text: Encoded, key: Key[Array, ""] | None = None) -> Fused:
        """Features of pairs: row i of the pictures with row i of the texts."""
        return self.fusion(image, text, key=key)

    @property
    def word_embeddings(self) -> BertEmbeddings:
        """The embeddings of words."""
        return self.text_embeddings

    @property
    def region_heads(self) -> dict[str, nnx.LinearGeneral]:
        """What masked regions are asked for, by name: those heads that the model has."""
        return {} if self.region_head is None else self.region_head.heads

    def score_regions(
        self, image_tokens: Float[Array, "batch regions width"]
    ) -> dict[str, Float[Array, "batch regions _"]]:
        """What is said of every region after the fusion, by the names of `region_heads`."""
        return self.region_head(image_tokens)

    def forward(
        self,
        text: Int[Array, "batch length"],
        regions: Float[Array, "batch regions features"],
        boxes: Float[Array, "batch regions 4"],
        text_mask: Bool[Array, "batch length"] | None = None,
        text_type: Int[Array, "batch length"] | None = None,
        region_mask: Bool[Array, "batch regions"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """`language_output [B,L,D]`, `vision_output [B,R,D]`, `pooled_output [B,D]` and the heads'.

        Those are `prediction_logits [B,L,V]` of masked words, `cross_relationship_score [B,2]` (the
        second: they belong together), `question_answering_score [B,answers]`, and, of regions,
        `object_logits [B,R,objects]`, `attribute_logits [B,R,attributes]`, `region_features
        [B,R,F]`. Boxes are x1, y1, x2, y2 in [0,1].
        """
        text_key, image_key, fusion_key = split_key(key, 3)
        fused = self.fuse(
            self.encode_image(regions, boxes, region_mask, image_key),
            self.encode_text(text, text_mask, text_type, text_key),
            fusion_key,
        )
        out: dict[str, Any] = {
            "language_output": fused.text_tokens,
            "vision_output": fused.image_tokens,
            "pooled_output": fused.pooled,
        }
        if self.masked_language is not None:
            out["prediction_logits"] = self.score_words(fused.text_tokens)
        if self.matching is not None:
            out["cross_relationship_score"] = self.match(fused)
        if self.region_head is not None:
            out |= self.score_regions(fused.image_tokens)
        if self.answering is not None:
            out["question_answering_score"] = self.score_answers(fused)
        return out


class LxmertEmbeddings(BertEmbeddings):
    """BERT's, in which the row `padding` of the position and type tables rests untrained as well.

    With the published padding of 0 these are the first position and the first type.
    """

    def sum(
        self,
        text: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"] | None = None,
        types: Int[Array, "batch length"] | None = None,
        positions: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length width"]:
        """Word, position and type vectors, summed."""
        types = jnp.zeros_like(text) if types is None else types
        positions = self._positions(text, mask) if positions is None else positions
        words, padding = self.table(), self.config.padding
        places = self.position_embedding.embedding[...].astype(words.dtype)
        kinds = self.type_embedding.embedding[...].astype(words.dtype)
        x = look_up(words, text, padding) + look_up(kinds, types, padding)
        return x + look_up(places, positions, padding)


class RegionEmbeddings(nnx.Module):
    """The mean of a region's features and its box, each projected and normalised (section 2.1)."""

    def __init__(self, config: LayerConfig, region_width: int, rngs: nnx.Rngs):
        width, epsilon, dtype = config.width, config.epsilon, config.dtype
        self.features = linear(region_width, width, dtype, rngs)
        self.features_norm = layer_norm(width, epsilon, dtype, rngs)
        self.box = linear(4, width, dtype, rngs)
        self.box_norm = layer_norm(width, epsilon, dtype, rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self,
        regions: Float[Array, "batch regions features"],
        boxes: Float[Array, "batch regions 4"],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch regions width"]:
        """Embed regions; `key` draws dropout."""
        features = self.features_norm(self.features(regions))
        x = (features + self.box_norm(self.box(boxes))) / 2
        return self.dropout(x, deterministic=key is None, rngs=key)


class RegionHead(nnx.Module):
    """What a masked region showed: its object, its attribute, its features (section 3.1.2)."""

    def __init__(self, config: LxmertConfig, rngs: nnx.Rngs):
        text, width = config.text, config.text.width
        self.activation = text.activation
        self.transform = linear(width, width, text.dtype, rngs)
        self.norm = layer_norm(width, text.epsilon, text.dtype, rngs)

        def scores(outputs: int) -> nnx.LinearGeneral | None:
            return linear(width, outputs, "float32", rngs) if outputs else None

        self.objects = scores(config.region_objects)
        self.attributes = scores(config.region_attributes)
        self.features = scores(config.region_width if config.region_features else 0)

    def __call__(
        self, tokens: Float[Array, "batch regions width"]
    ) -> dict[str, Float[Array, "batch regions _"]]:
        """Scores and features by name, float32."""
        x = self.norm(ACTIVATIONS[self.activation](self.transform(tokens)))
        return {name: head(x) for name, head in self.heads.items()}

    @property
    def heads(self) -> dict[str, nnx.LinearGeneral]:
        """Those that the config asks for, by the names of what they say."""
        heads = {
            "object_logits": self.objects,
            "attribute_logits": self.attributes,
            "region_features": self.features,
        }
        return {name: head for name, head in heads.items() if head is not None}


def _encode(blocks: Stack, x: Array, mask: Array | None, key: Any) -> Encoded:
    tokens = blocks(x, None if mask is None else mask[:, None, :], key=key)
    return Encoded(tokens=tokens, mask=mask, pooled=tokens[:, 0])


def _fusion(config: LxmertConfig) -> CoAttentionConfig:
    layer = {field.name: getattr(config.text, field.name) for field in fields(LayerConfig)}
    layer["depth"] = config.fusion_depth
    return CoAttentionConfig(**layer, order="cross_first", share_cross=True, pool="text")
