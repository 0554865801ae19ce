"""The assembled model: an image encoder, a text encoder, a fusion of the two, and heads."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from mmjax.errors import InputError
from mmjax.layers import linear, split_key
from mmjax.models.bert import BertConfig, BertEncoder
from mmjax.models.cross_attention import BertDecoder
from mmjax.models.encoders import ImageConfig, image_encoder
from mmjax.models.features import Encoded, Fused
from mmjax.models.fusion import FUSIONS, FusionConfig
from mmjax.models.heads import (
    AnsweringHead,
    ContrastiveConfig,
    ContrastiveHead,
    MaskedLanguageHead,
    MatchingHead,
    MlpHead,
)
from mmjax.models.model import PairModel
from mmjax.models.region_encoder import RegionConfig


@dataclass(frozen=True)
class VisionLanguageConfig:
    """The parts of a model. A head exists where its field is set."""

    image: ImageConfig
    text: BertConfig
    fusion: FusionConfig
    embedding_width: int = 256  # of the contrastive space; 0: no contrastive head
    temperature: float = 0.0  # where a learnt divisor of similarities starts; 0: CLIP's factor
    matching: bool = True
    masked_language: bool = True
    answers: tuple[str, ...] = field(default=())  # the closed list of a VQA head; none: no head
    region_classes: int = 0  # classes of masked regions
    region_features: bool = False  # features of masked regions
    decoder_depth: int = 0  # of a decoder, otherwise like the text encoder; 0: no decoder

    def __post_init__(self) -> None:
        """Half a config is no config."""
        if len(set(self.answers)) != len(self.answers):
            raise InputError("model.answers names an answer twice.")
        if self.fusion.kind == "none" and self.matching and not self.embedding_width:
            raise InputError(
                "model.fusion.kind is 'none', so pairs are matched by their similarity: set "
                "model.embedding_width, or model.matching to False."
            )
        of_regions = self.region_classes > 0 or self.region_features
        if of_regions and not isinstance(self.image, RegionConfig):
            raise InputError(
                "model.region_classes and model.region_features are said of regions: set "
                "model.image.kind to 'region_encoder'."
            )


class VisionLanguageModel(PairModel):
    """Pictures and texts in, features and scores out.

    `key=None` runs without dropout; a key draws a mask anew in every layer.
    """

    def __init__(self, config: VisionLanguageConfig, rngs: nnx.Rngs):
        self.config = config
        image: Any = config.image
        text, fusion = config.text, config.fusion
        self.image = image_encoder(image, rngs)
        self.text = BertEncoder(text, rngs)
        self.fusion: Any = FUSIONS[fusion.kind](
            fusion,
            image.width,
            text.width,
            rngs,
            image_class_token=getattr(image, "pool", "") == "class_token",
        )
        pooled = self.fusion.pooled_width
        width = text.width if fusion.kind == "none" else fusion.width
        self.contrastive = (
            ContrastiveHead(
                image.width,
                text.width,
                ContrastiveConfig(config.embedding_width, temperature=config.temperature),
                rngs,
            )
            if config.embedding_width
            else None
        )
        self.matching = self._matching(pooled, rngs) if config.matching else None
        self.masked_language = (
            MaskedLanguageHead(width, text, fusion.dtype, rngs) if config.masked_language else None
        )
        self.answering = (
            AnsweringHead(pooled, 2 * fusion.width, len(config.answers), fusion.dtype, rngs)
            if config.answers
            else None
        )
        self.region_classification = self._of_regions(config.region_classes, rngs)
        self.feature_regression = (
            self._of_regions(image.region_width, rngs) if config.region_features else None
        )
        self.text_decoder: Any = (
            BertDecoder(replace(text, depth=config.decoder_depth), width, rngs)
            if config.decoder_depth
            else None
        )
        self.projection = (
            linear(image.width, width, text.dtype, rngs)
            if config.decoder_depth and image.width != width
            else None
        )

    def fuse(self, image: Encoded, text: Encoded, key: Key[Array, ""] | None = None) -> Fused:
        """Features of pairs: row i of the pictures with row i of the texts."""
        return self.fusion(image, text, key=key)

    def match(self, fused: Fused) -> Float[Array, "batch 2"]:
        """Logits of no and yes: by the fused pair, or, without a fusion, by its similarity."""
        if self.config.fusion.kind != "none":
            return self.matching(fused.pooled)
        text, image = jnp.split(fused.pooled, [self.config.text.width], axis=-1)
        return self.matching(self.contrastive.image(image), self.contrastive.text(text))

    @property
    def region_heads(self) -> dict[str, Callable[[Array], Array]]:
        """What masked regions are asked for, by name: those heads that the model has."""
        heads = {
            "region_features": self.feature_regression,
            "region_logits": self.region_classification,
        }
        return {name: head for name, head in heads.items() if head is not None}

    def score_regions(
        self, image_tokens: Float[Array, "batch regions width"]
    ) -> dict[str, Float[Array, "batch regions _"]]:
        """What is said of every region after the fusion, by the names of `region_heads`."""
        return {name: head(image_tokens) for name, head in self.region_heads.items()}

    def caption_context(self, image: Encoded) -> Encoded:
        """To describe pictures: their tokens, in the width of what the decoder looks at."""
        if self.projection is None:
            return image
        return replace(image, tokens=self.projection(image.tokens))

    def decode(
        self,
        context: Encoded,
        decoder_text: Int[Array, "batch decoded"],
        decoder_mask: Bool[Array, "batch decoded"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch decoded words"]:
        """Scores of the word behind each token; the context is a picture or a fused text."""
        if self.text_decoder is None:
            raise InputError("this model has no decoder: config.decoder_depth is 0.")
        return self.text_decoder(decoder_text, decoder_mask, context, key)

    def forward(
        self,
        text: Int[Array, "batch length"],
        text_mask: Bool[Array, "batch length"] | None = None,
        image: Float[Array, "batch height width 3"]
        | UInt8[Array, "batch height width 3"]
        | None = None,
        regions: Float[Array, "batch regions features"] | None = None,
        boxes: Float[Array, "batch regions 4"] | None = None,
        region_mask: Bool[Array, "batch regions"] | None = None,
        region_masked: Bool[Array, "batch regions"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """All that the model has to say of a batch of pairs, by name; heads it lacks are absent."""
        image_key, text_key, fusion_key = split_key(key, 3)
        encoded_image = self.encode_image(
            image,
            image_key,
            regions=regions,
            boxes=boxes,
            region_mask=region_mask,
            region_masked=region_masked,
        )
        encoded_text = self.encode_text(text, text_mask, text_key)
        fused = self.fuse(encoded_image, encoded_text, fusion_key)
        out: dict[str, Any] = {"pooled_output": fused.pooled, "sequence_output": fused.text_tokens}
        if self.contrastive is not None:
            out |= self.contrastive.outputs(encoded_image.pooled, encoded_text.pooled)
        if self.matching is not None:
            out["itm_logits"] = self.match(fused)
        if self.masked_language is not None:
            out["mlm_logits"] = self.score_words(fused.text_tokens)
        if self.answering is not None:
            out["vqa_logits"] = self.score_answers(fused)
        return out | self.score_regions(fused.image_tokens)

    def _of_regions(self, outputs: int, rngs: nnx.Rngs) -> MlpHead | None:
        """A head over the picture's tokens, as ViLBERT has it: dense, activation, norm, dense."""
        layer = self.config.fusion if self.config.fusion.kind != "none" else self.config.image
        if not outputs:
            return None
        width, dtype = layer.width, layer.dtype
        return MlpHead(width, width, outputs, dtype, rngs, layer.activation, layer.epsilon)

    def _matching(self, pooled: int, rngs: nnx.Rngs) -> nnx.Module:
        if self.config.fusion.kind == "none":
            return SimilarityMatching()
        return MatchingHead(pooled, rngs)


class SimilarityMatching(nnx.Module):
    """Does the text belong to the picture? By the cosine alone, scaled and shifted.

    Pairs rank by it as they do by their similarity.
    """

    def __init__(self) -> None:
        self.log_scale = nnx.Param(jnp.log(jnp.asarray(10.0)))
        self.bias = nnx.Param(jnp.zeros(()))

    def __call__(
        self, images: Float[Array, "batch embedding"], texts: Float[Array, "batch embedding"]
    ) -> Float[Array, "batch 2"]:
        """Logits of no, which is zero, and yes, of unit vectors."""
        yes = jnp.exp(self.log_scale[...]) * (images * texts).sum(axis=-1) + self.bias[...]
        return jnp.stack([jnp.zeros_like(yes), yes], axis=-1)
