"""UNITER (Chen et al. 2020), and VILLA (Gan et al. 2020), its training against perturbations."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from mmjax.attention import MASKED
from mmjax.errors import InputError, near_misses
from mmjax.layers import (
    ACTIVATIONS,
    Attention,
    LayerConfig,
    embedding,
    layer_norm,
    linear,
    split_key,
)
from mmjax.models.features import Encoded, Fused, mask_of, shifted
from mmjax.models.heads import MatchingHead, MlpHead
from mmjax.models.regions import (
    RegionModel,
    RegionModelConfig,
    box_numbers,
    check_regions,
)

REASONINGS = ("paired", "paired_attention", "triplet")


@dataclass(frozen=True)
class UniterConfig(RegionModelConfig):
    """UNITER with the heads of its pre-training and of its tasks, as wanted."""

    region_features: bool = False  # features of masked regions
    region_classes: int = 0  # classes of masked regions; the first is the background
    matching: bool = False
    ranking: bool = False  # one score of a pair, for retrieval
    # A text about two pictures (NLVR2): 'triplet' puts all in one stream, 'paired' each picture
    # beside the text in a stream of its own, 'paired_attention' has those two look at each other.
    reasoning: str = ""

    def __post_init__(self) -> None:
        """Refuse unknown variants, and a second picture that has no type."""
        super().__post_init__()
        if self.reasoning and self.reasoning not in REASONINGS:
            hint = near_misses(self.reasoning, REASONINGS)
            raise InputError(f"reasoning is {self.reasoning!r}.{hint}")
        if self.text.types < (needed := 3 if self.reasoning else 2):
            raise InputError(
                f"text.types is {self.text.types}; words and each picture's regions have types of "
                f"their own: give {needed}."
            )


class Uniter(RegionModel):
    """Masked words, masked regions, matching, retrieval, questions and reasoning."""

    # A head, or None where the config has it not.
    feature_regression: Any
    region_classification: Any
    reasoning: Any

    def __init__(self, config: UniterConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        text, width, answers = config.text, config.text.width, len(config.answers)
        self.region_embeddings = UniterRegionEmbeddings(text, config.region_width, rngs)

        def scores(hidden: int, outputs: int) -> MlpHead | None:
            if not outputs:
                return None
            return MlpHead(width, hidden, outputs, text.dtype, rngs, "gelu", text.epsilon)

        self.region_classification = scores(width, config.region_classes)
        self.answering = scores(2 * width, answers)
        self.feature_regression = (
            FeatureRegression(text, config.region_width, rngs) if config.region_features else None
        )
        self.matching = MatchingHead(width, rngs) if config.matching else None
        self.ranking = linear(width, 1, "float32", rngs) if config.ranking else None
        self.reasoning = _reasoning(config, rngs)

    def encode_image(
        self,
        regions: Float[Array, "batch regions features"],
        boxes: Float[Array, "batch regions 4"],
        region_mask: Bool[Array, "batch regions"] | None = None,
        region_masked: Bool[Array, "batch regions"] | None = None,
        key: Key[Array, ""] | None = None,
        picture: int = 0,
        image_shift: Float[Array, "batch regions features"] | None = None,
    ) -> Encoded:
        """Regions as they enter the stream; the first stands for all.

        `picture` is the number of this one among the text's. Features that `region_masked` hides
        are replaced by a vector that is learnt. VILLA adds `image_shift` to features.
        """
        check_regions(regions, boxes, self.config.region_width)
        kind = self.text_embeddings.type_embedding(jnp.asarray(1 + picture))
        tokens = self.region_embeddings(regions, boxes, kind, region_masked, key, image_shift)
        return Encoded(tokens=tokens, mask=region_mask, pooled=tokens[:, 0])

    def forward(
        self,
        text: Int[Array, "batch length"],
        regions: Float[Array, "batch regions features"],
        boxes: Float[Array, "batch regions 4"],
        text_mask: Bool[Array, "batch length"] | None = None,
        text_type: Int[Array, "batch length"] | None = None,
        region_mask: Bool[Array, "batch regions"] | None = None,
        region_masked: Bool[Array, "batch regions"] | None = None,
        regions_b: Float[Array, "batch regions_b features"] | None = None,
        boxes_b: Float[Array, "batch regions_b 4"] | None = None,
        region_mask_b: Bool[Array, "batch regions_b"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """The outputs of `describe`, and what the other heads say.

        Of regions, where `region_masked` hides some: `region_features [B,R,F]`, `region_logits
        [B,R,classes]`. Of the pair: `rank_logits [B]`. Of a text and two pictures: `nlvr_logits
        [B,2]` (the second: it is true of them); the other outputs are then of the first picture,
        but in a 'triplet', whose `region_output` holds the regions of both.
        """
        self._check_pictures(regions_b, boxes_b)
        text_key, image_key, second_key, fusion_key, head_key = split_key(key, 5)
        words = self.encode_text(text, text_mask, text_type, text_key)
        image = self.encode_image(regions, boxes, region_mask, region_masked, image_key)
        if regions_b is None or boxes_b is None:
            return self._heads(self.fuse(image, words, fusion_key))
        second = self.encode_image(regions_b, boxes_b, region_mask_b, key=second_key, picture=1)
        if self.config.reasoning == "triplet":
            fused = self.fuse(_joined(image, second), words, fusion_key)
            return self._heads(fused) | {"nlvr_logits": self.reasoning(fused.pooled)}
        fusion_key, other_key = split_key(fusion_key, 2)
        fused, other = self.fuse(image, words, fusion_key), self.fuse(second, words, other_key)
        if self.config.reasoning == "paired":
            pooled = jnp.concatenate([fused.pooled, other.pooled], axis=-1)
            return self._heads(fused) | {"nlvr_logits": self.reasoning(pooled)}
        streams = _stream(fused, words, image), _stream(other, words, second)
        return self._heads(fused) | {"nlvr_logits": self.reasoning(*streams, head_key)}

    @property
    def region_heads(self) -> dict[str, Callable[[Array], Array]]:
        """`region_features` and `region_logits`, whose first class is the background."""
        heads: dict[str, Callable[[Array], Array]] = {}
        if self.feature_regression is not None:
            projection = self.region_embeddings.features
            heads["region_features"] = partial(self.feature_regression, projection=projection)
        if self.region_classification is not None:
            heads["region_logits"] = self.region_classification
        return heads

    def _heads(self, fused: Fused) -> dict[str, Any]:
        out = self.describe(fused)
        return out if self.ranking is None else out | {"rank_logits": self.rank(fused)}

    def _check_pictures(self, regions: Any, boxes: Any) -> None:
        given = regions is not None, boxes is not None
        if self.reasoning is not None and not all(given):
            raise InputError("this Uniter reasons about two pictures: give regions_b and boxes_b.")
        if self.reasoning is None and any(given):
            raise InputError("this Uniter has no head for two pictures: config.reasoning sets one.")


class UniterRegionEmbeddings(nnx.Module):
    """A region's features and its box, each projected and normalised; their sum, normalised."""

    def __init__(self, config: LayerConfig, region_width: int, rngs: nnx.Rngs):
        width, epsilon, dtype = config.width, config.epsilon, config.dtype
        self.features = linear(region_width, width, dtype, rngs)
        self.features_norm = layer_norm(width, epsilon, dtype, rngs)
        self.box = linear(7, width, dtype, rngs)
        self.box_norm = layer_norm(width, epsilon, dtype, rngs)
        # Row 1 stands for features behind a mask; row 0, of the others, is never read.
        self.mask_embedding = embedding(2, region_width, dtype, rngs)
        self.norm = layer_norm(width, epsilon, dtype, rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self,
        regions: Float[Array, "batch regions features"],
        boxes: Float[Array, "batch regions 4"],
        kind: Float[Array, " width"],
        masked: Bool[Array, "batch regions"] | None = None,
        key: Key[Array, ""] | None = None,
        shift: Float[Array, "batch regions features"] | None = None,
    ) -> Float[Array, "batch regions width"]:
        """Embed regions; `kind` is the vector of their type, `masked` hides features.

        `shift` is added to features, to hidden ones too.
        """
        if masked is not None:
            regions = jnp.where(masked[..., None], self.mask_embedding(jnp.asarray(1)), regions)
        features = self.features_norm(self.features(shifted(regions, shift)))
        x = self.norm(features + self.box_norm(self.box(box_numbers(boxes, 7))) + kind)
        return self.dropout(x, deterministic=key is None, rngs=key)


class FeatureRegression(nnx.Module):
    """Features of masked regions, through the transpose of the projection that embeds them."""

    def __init__(self, config: LayerConfig, region_width: int, rngs: nnx.Rngs):
        self.transform = linear(config.width, config.width, config.dtype, rngs)
        self.norm = layer_norm(config.width, config.epsilon, config.dtype, rngs)
        self.bias = nnx.Param(jnp.zeros(region_width))

    def __call__(
        self, tokens: Float[Array, "batch regions width"], projection: nnx.LinearGeneral
    ) -> Float[Array, "batch regions features"]:
        """Features of every region, float32."""
        x = self.norm(ACTIVATIONS["gelu"](self.transform(tokens)))
        kernel = projection.kernel[...].astype(x.dtype)
        features = jnp.einsum("brd,fd->brf", x, kernel, preferred_element_type=jnp.float32)
        return features + self.bias[...]


class PairedAttention(nnx.Module):
    """Two streams look at each other; each is pooled by attention, and both are classified."""

    def __init__(self, config: LayerConfig, rngs: nnx.Rngs):
        width, dtype = config.width, config.dtype
        self.first = Attention(config, rngs)
        self.second = Attention(config, rngs)
        self.merge = linear(2 * width, width, dtype, rngs)
        self.dropout = nnx.Dropout(config.dropout)
        self.pool = linear(width, 1, "float32", rngs)
        self.classifier = linear(2 * width, 2, "float32", rngs)

    def __call__(
        self, first: Encoded, second: Encoded, key: Key[Array, ""] | None = None
    ) -> Float[Array, "batch 2"]:
        """Logits of no and yes, float32."""
        first_key, second_key = split_key(key, 2)
        pooled = [
            self._look(self.first, first, second, first_key),
            self._look(self.second, second, first, second_key),
        ]
        return self.classifier(jnp.concatenate(pooled, axis=-1))

    def _look(self, attention, stream, other, key):
        seen = attention(stream.tokens, other.tokens, other.mask[:, None, :])
        tokens = jax.nn.relu(self.merge(jnp.concatenate([seen, stream.tokens], axis=-1)))
        tokens = self.dropout(tokens, deterministic=key is None, rngs=key)
        scores = jax.nn.relu(self.pool(tokens)[..., 0])
        weights = jax.nn.softmax(jnp.where(stream.mask, scores, MASKED))
        return jnp.einsum("bl,bld->bd", weights, tokens)


def _reasoning(config: UniterConfig, rngs: nnx.Rngs) -> nnx.Module | None:
    width = config.text.width
    if config.reasoning == "paired_attention":
        return PairedAttention(config.text, rngs)
    inputs = {"paired": 2 * width, "triplet": width}.get(config.reasoning)
    return linear(inputs, 2, "float32", rngs) if inputs else None


def _stream(fused: Fused, text: Encoded, image: Encoded) -> Encoded:
    """All tokens of a pair after the fusion."""
    words, regions = replace(text, tokens=fused.text_tokens), fused.image_tokens
    return _joined(words, replace(image, tokens=regions))


def _joined(first: Encoded, second: Encoded) -> Encoded:
    """The tokens of one behind those of the other."""
    tokens = jnp.concatenate([first.tokens, second.tokens], axis=1)
    mask = jnp.concatenate([mask_of(first), mask_of(second)], axis=1)
    return Encoded(tokens=tokens, mask=mask, pooled=first.pooled)
