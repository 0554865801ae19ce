"""VL-BERT over the features of a detector (Su et al. 2020), which are its 'precomputed' models.

Every element of the stream is of a word and of something seen. Words see the whole picture, which
is the first region; regions have one word for all of them, and an end element follows the last.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from mmjax.errors import InputError, near_misses
from mmjax.layers import TABLE_INIT, layer_norm, linear, split_key
from mmjax.models.features import Encoded, Fused, mask_of, shifted
from mmjax.models.heads import MatchingHead, MlpHead
from mmjax.models.regions import (
    RegionModel,
    RegionModelConfig,
    StreamConfig,
    box_waves,
    check_regions,
)
from mmjax.models.visualbert import last_word

CLASSIFIERS = ("mlm", "2fc")


@dataclass(frozen=True)
class VlBertTextConfig(StreamConfig):
    """Two types of words, and that of regions."""

    types: int = 3
    padding: int = -1


@dataclass(frozen=True)
class VlBertConfig(RegionModelConfig):
    """VL-BERT with the heads of its pre-training, or with one for answers."""

    text: VlBertTextConfig
    # Put the whole picture before its regions; false: the first region that is given is it.
    whole_picture: bool = False
    box_width: int = 256  # an eighth of the numbers that describe a box
    region_classes: int = 0  # of masked regions; 0: no head, and no regions behind masks
    matching: bool = False
    texts_alone: bool = False  # whether text without a picture was trained as well
    classifier: str = "mlm"  # of answers: BERT's transform and a dense layer, or '2fc', an MLP
    classifier_width: int = 0  # of the hidden layer of '2fc'; 0: the model's

    def __post_init__(self) -> None:
        """Refuse unknown variants, and regions that have no type."""
        super().__post_init__()
        if self.classifier not in CLASSIFIERS:
            hint = near_misses(self.classifier, CLASSIFIERS)
            raise InputError(f"classifier is {self.classifier!r}.{hint}")
        if self.text.types < 3:
            raise InputError(f"text.types is {self.text.types}; the third is that of regions.")


class VlBert(RegionModel):
    """Masked words, masked regions, matching and questions."""

    # A head, or None where the config has it not.
    region_classification: Any

    def __init__(self, config: VlBertConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        text, width = config.text, config.text.width
        self.region_embeddings = VlBertRegionEmbeddings(config, rngs)
        self.picture_norm = layer_norm(width, text.epsilon, text.dtype, rngs)
        self.end = nnx.Param(TABLE_INIT(rngs.params(), (width,)))
        self.no_picture = (
            nnx.Param(TABLE_INIT(rngs.params(), (width,))) if config.texts_alone else None
        )
        self.region_classification = (
            MlpHead(width, width, config.region_classes, text.dtype, rngs, text.activation)
            if config.region_classes
            else None
        )
        self.matching = MatchingHead(width, rngs) if config.matching else None
        self.answering = _classifier(config, rngs) if config.answers else None

    def encode_text(
        self,
        text: Int[Array, "batch length"],
        text_mask: Bool[Array, "batch length"] | None = None,
        text_type: Int[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
        text_shift: Float[Array, "batch length width"] | None = None,
    ) -> Encoded:
        """Token ids, not yet normalised: `fuse` adds what they see of the picture.

        `text_shift` is added to the words' vectors.
        """
        if (length := text.shape[1]) + 2 > (positions := self.config.text.max_length):
            raise InputError(
                f"the text has {length} tokens; with the positions of regions and end these are "
                f"{length + 2}, and text.max_length is {positions}."
            )
        tokens = shifted(self.text_embeddings.sum(text, text_mask, text_type), text_shift)
        return Encoded(tokens=tokens, mask=text_mask, pooled=tokens[:, 0])

    def encode_image(
        self,
        regions: Float[Array, "batch regions features"],
        boxes: Float[Array, "batch regions 4"],
        region_mask: Bool[Array, "batch regions"] | None = None,
        region_masked: Bool[Array, "batch regions"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Encoded:
        """Regions, not yet placed: `fuse` does, for they stand behind the text.

        What words see of the picture is the pooled vector. Features that `region_masked` hides are
        replaced by a vector that is learnt.
        """
        check_regions(regions, boxes, self.config.region_width)
        if region_masked is not None and self.region_classification is None:
            raise InputError("this VlBert has no masks for regions: config.region_classes adds it.")
        if self.config.whole_picture:
            regions, boxes, region_mask, region_masked = with_whole_picture(
                regions, boxes, region_mask, region_masked
            )
        tokens, picture = self.region_embeddings(regions, boxes, region_masked, key)
        return Encoded(tokens=tokens, mask=region_mask, pooled=picture)

    def fuse(self, image: Encoded, text: Encoded, key: Key[Array, ""] | None = None) -> Fused:
        """Features of pairs: row i of the pictures with row i of the texts."""
        words_key, regions_key, key = split_key(key, 3)
        embeddings, text_mask, image_mask = self.text_embeddings, mask_of(text), mask_of(image)
        words = text.tokens + self.picture_norm(image.pooled)[:, None]
        # All regions are at the position behind the text, the end at the next.
        place = text_mask.sum(axis=1, keepdims=True)
        regions = image.tokens + embeddings.position_embedding(place)
        end = self._rows(self.end, place) + embeddings.position_embedding(place + 1)
        regions = jnp.concatenate([regions, end], axis=1)
        regions = regions + embeddings.type_embedding(jnp.asarray(2))
        fused = self.fusion(
            embeddings.normalise(regions, regions_key),
            embeddings.normalise(words, words_key),
            jnp.concatenate([image_mask, jnp.ones_like(place, bool)], axis=1),
            text_mask,
            key=key,
        )
        return replace(fused, image_tokens=fused.image_tokens[:, :-1], text_mask=text_mask)

    @property
    def region_heads(self) -> dict[str, Callable[[Array], Array]]:
        """`region_logits`."""
        head = self.region_classification
        return {} if head is None else {"region_logits": head}

    def score_regions(
        self, image_tokens: Float[Array, "batch regions width"]
    ) -> dict[str, Float[Array, "batch _ _"]]:
        """What is said of every region that was given."""
        return super().score_regions(image_tokens[:, int(self.config.whole_picture) :])

    def score_answers(self, fused: Fused) -> Float[Array, "batch answers"]:
        """Logits of the closed list of answers, read at the last word."""
        return self.answering(last_word(fused.text_tokens, fused.text_mask))

    def forward(
        self,
        text: Int[Array, "batch length"],
        regions: Float[Array, "batch regions features"] | None = None,
        boxes: Float[Array, "batch regions 4"] | None = None,
        text_mask: Bool[Array, "batch length"] | None = None,
        text_type: Int[Array, "batch length"] | None = None,
        region_mask: Bool[Array, "batch regions"] | None = None,
        region_masked: Bool[Array, "batch regions"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """The outputs of `describe`.

        Among them `region_logits [B,R,classes]`, where `region_masked` hides some. `vqa_logits` are
        read at the last word of the text, a [MASK] that stands for the answer: [CLS] question [SEP]
        [MASK] [SEP], of types 0 to the first [SEP] and 1 from there.

        The first region is the whole picture, with the mean of the features of all others that are
        not masked. With `config.whole_picture` it is not given, but made here, and `region_output`
        begins with it. A text alone is one without `regions` and `boxes`.
        """
        text_key, image_key, fusion_key = split_key(key, 3)
        words = self.encode_text(text, text_mask, text_type, text_key)
        if regions is None or boxes is None:
            image = self._no_picture(text, regions, boxes)
        else:
            image = self.encode_image(regions, boxes, region_mask, region_masked, image_key)
        return self.describe(self.fuse(image, words, fusion_key))

    def _no_picture(self, text: Array, regions: Any, boxes: Any) -> Encoded:
        if self.no_picture is None or regions is not None or boxes is not None:
            raise InputError(
                "this VlBert needs regions and boxes; with config.texts_alone it does without both."
            )
        none, picture = (self._rows(self.no_picture, text[:, at]) for at in (slice(0), 0))
        return Encoded(tokens=none, mask=None, pooled=picture)

    def _rows(self, vector: Any, places: Int[Array, "*places"]) -> Float[Array, "*places width"]:
        """One vector at all places."""
        vector = vector[...].astype(self.config.text.dtype)
        return jnp.broadcast_to(vector, (*places.shape, *vector.shape))


class VlBertRegionEmbeddings(nnx.Module):
    """A region's place and features, projected, beside the word that all regions have."""

    masked_word: Any
    masked_features: Any

    def __init__(self, config: VlBertConfig, rngs: nnx.Rngs):
        text, features, masks = config.text, config.region_width, config.region_classes > 0
        width, dtype = text.width, text.dtype
        self.box_width = config.box_width
        self.projection = linear(8 * config.box_width + features, width, dtype, rngs)
        self.norm = layer_norm(width, text.epsilon, dtype, rngs)
        self.word = nnx.Param(TABLE_INIT(rngs.params(), (width,)))
        self.masked_word = nnx.Param(TABLE_INIT(rngs.params(), (width,))) if masks else None
        self.masked_features = nnx.Param(jnp.zeros(features)) if masks else None
        self.dropout = nnx.Dropout(text.dropout)

    def __call__(
        self,
        regions: Float[Array, "batch regions features"],
        boxes: Float[Array, "batch regions 4"],
        masked: Bool[Array, "batch regions"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "batch regions width"], Float[Array, "batch width"]]:
        """Regions embedded, and the first, the whole picture, as words see it."""
        word = self.word[...]
        if masked is not None:
            masked = masked[..., None]
            regions = jnp.where(masked, self.masked_features[...], regions)
            word = jnp.where(masked, self.masked_word[...], word)
        inputs = jnp.concatenate([box_waves(boxes, self.box_width), regions], axis=-1)
        inputs = self.dropout(inputs, deterministic=key is None, rngs=key)
        seen = jax.nn.relu(self.projection(inputs))
        return self.norm(seen) + word.astype(seen.dtype), seen[:, 0]


def with_whole_picture(
    regions: Float[Array, "batch regions features"],
    boxes: Float[Array, "batch regions 4"],
    mask: Bool[Array, "batch regions"] | None,
    masked: Bool[Array, "batch regions"] | None,
) -> tuple[Array, Array, Array | None, Array | None]:
    """One region more, in front: all of the picture, with the mean of what is seen of the others.

    What is masked is not seen, else the mean would give it away.
    """
    seen = jnp.ones(regions.shape[:2], bool) if mask is None else mask
    seen = (seen if masked is None else seen & ~masked)[..., None]
    mean = jnp.where(seen, regions, 0).sum(axis=1) / jnp.maximum(seen.sum(axis=1), 1)

    def put(first: Any, rest: Array) -> Array:
        first = jnp.broadcast_to(jnp.asarray(first, rest.dtype), rest[:, 0].shape)
        return jnp.concatenate([first[:, None], rest], axis=1)

    return (
        put(mean, regions),
        put([0, 0, 1, 1], boxes),
        None if mask is None else put(True, mask),
        None if masked is None else put(False, masked),
    )


def _classifier(config: VlBertConfig, rngs: nnx.Rngs) -> MlpHead:
    text, answers = config.text, len(config.answers)
    if config.classifier == "2fc":
        hidden = config.classifier_width or text.width
        return MlpHead(text.width, hidden, answers, text.dtype, rngs, "relu")
    activation, epsilon = text.activation, text.epsilon
    return MlpHead(text.width, text.width, answers, text.dtype, rngs, activation, epsilon)
