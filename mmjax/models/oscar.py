"""Oscar (Li et al. 2020), and its successor VinVL (Zhang et al. 2021).

The text is a caption or a question, and behind it, as a second segment, the names of the objects
that were detected in the picture.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from mmjax.errors import InputError, near_misses
from mmjax.layers import layer_norm, linear, split_key
from mmjax.models.features import Encoded, Fused
from mmjax.models.heads import MlpHead
from mmjax.models.regions import RegionModel, RegionModelConfig, box_numbers, check_regions

CLASSIFIERS = ("linear", "mlp")


@dataclass(frozen=True)
class OscarConfig(RegionModelConfig):
    """Oscar with the heads of its pre-training or of one task."""

    region_epsilon: float = 0.0  # of a LayerNorm on embedded regions, which some have; 0: none
    contrasts: int = 0  # classes of a pair: matching, or one of the kinds of pollution
    matching: bool = False  # retrieval
    reasoning: bool = False  # a text about two pictures (NLVR2)
    classifier: str = "linear"  # of answers, of matching and of reasoning: a key of CLASSIFIERS
    classifier_width: int = 0  # of the hidden layer of an 'mlp'; 0: twice the width

    def __post_init__(self) -> None:
        """One classifier at most: the published files have one name for all of them."""
        super().__post_init__()
        if bool(self.answers) + self.matching + self.reasoning > 1:
            raise InputError("OscarConfig: give one of answers, matching and reasoning.")
        if self.classifier not in CLASSIFIERS:
            hint = near_misses(self.classifier, CLASSIFIERS)
            raise InputError(f"classifier is {self.classifier!r}.{hint}")


class Oscar(RegionModel):
    """Masked words, polluted pairs, captions, questions, retrieval and reasoning."""

    # A head, or None where the config has it not.
    contrast: Any
    reasoning: Any

    def __init__(self, config: OscarConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        width = config.text.width
        self.region_embeddings = OscarRegionEmbeddings(config, rngs)
        self.contrast = (
            linear(width, config.contrasts, "float32", rngs) if config.contrasts else None
        )
        answers = len(config.answers)
        self.answering = _classifier(config, width, answers, rngs) if answers else None
        self.matching = _classifier(config, width, 2, rngs) if config.matching else None
        self.reasoning = _classifier(config, 2 * width, 2, rngs) if config.reasoning else None

    def encode_image(
        self,
        regions: Float[Array, "batch regions features"],
        boxes: Float[Array, "batch regions 4"],
        region_mask: Bool[Array, "batch regions"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Encoded:
        """Regions as they enter the stream; the first stands for all."""
        check_regions(regions, boxes, self.config.region_width)
        tokens = self.region_embeddings(regions, boxes, key)
        return Encoded(tokens=tokens, mask=region_mask, pooled=tokens[:, 0])

    def fuse(
        self,
        image: Encoded,
        text: Encoded,
        key: Key[Array, ""] | None = None,
        attention_mask: Bool[Array, "batch tokens tokens"] | None = None,
    ) -> Fused:
        """Features of pairs: row i of the pictures with row i of the texts.

        `attention_mask`, in place of the masks of either, says of each token which it looks at.
        """
        if attention_mask is None:
            return super().fuse(image, text, key)
        return self.fusion.run(image.tokens, text.tokens, attention_mask, key)

    @property
    def matcher(self) -> Any:
        """That of retrieval, or else that of pre-training."""
        return self.contrast if self.matching is None else self.matching

    def match(self, fused: Fused) -> Float[Array, "batch 2"]:
        """Logits of no and yes: does the text belong to the picture?

        In pre-training yes is the class of clean pairs, and all kinds of pollution together are no.
        """
        logits = self.matcher(fused.pooled)
        if self.matching is not None:
            return logits
        polluted = jax.nn.logsumexp(logits[:, 1:], axis=-1)
        return jnp.stack([polluted, logits[:, 0]], axis=-1)

    def forward(
        self,
        text: Int[Array, "batch length"],
        regions: Float[Array, "batch regions features"],
        boxes: Float[Array, "batch regions 4"],
        text_mask: Bool[Array, "batch length"] | None = None,
        text_type: Int[Array, "batch length"] | None = None,
        region_mask: Bool[Array, "batch regions"] | None = None,
        attention_mask: Bool[Array, "batch tokens tokens"] | None = None,
        text_b: Int[Array, "batch length_b"] | None = None,
        text_mask_b: Bool[Array, "batch length_b"] | None = None,
        text_type_b: Int[Array, "batch length_b"] | None = None,
        regions_b: Float[Array, "batch regions_b features"] | None = None,
        boxes_b: Float[Array, "batch regions_b 4"] | None = None,
        region_mask_b: Bool[Array, "batch regions_b"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """The outputs of `describe`, and what the other heads say.

        Of the pair `contrast_logits [B,contrasts]` (the first: nothing is polluted); of a text and
        two pictures `nlvr_logits [B,2]` (the second: it is true of them), all else then being of
        the first.

        `text_type` is 1 on the names of objects. `text_b` is the text with those of the second
        picture. With `attention_mask [B,L+R,L+R]`, words before regions, a caption is written:
        each of its words looks at itself and those before, and nothing looks at the caption.
        """
        keys = split_key(key, 4)
        self._check_pictures(text_b, regions_b, boxes_b)
        words = self.encode_text(text, text_mask, text_type, keys[0])
        image = self.encode_image(regions, boxes, region_mask, keys[1])
        fused = self.fuse(image, words, keys[2], attention_mask)
        out = self.describe(fused)
        if self.contrast is not None:
            out["contrast_logits"] = self.contrast(fused.pooled)
        if text_b is not None and regions_b is not None and boxes_b is not None:
            second_keys = split_key(keys[3], 3)
            second = self.fuse(
                self.encode_image(regions_b, boxes_b, region_mask_b, second_keys[0]),
                self.encode_text(text_b, text_mask_b, text_type_b, second_keys[1]),
                second_keys[2],
            )
            pooled = jnp.concatenate([fused.pooled, second.pooled], axis=-1)
            out["nlvr_logits"] = self.reasoning(pooled)
        return out

    def _check_pictures(self, *second: Any) -> None:
        given = [array is not None for array in second]
        if self.reasoning is not None and not all(given):
            raise InputError(
                "this Oscar reasons about two pictures: give text_b, regions_b and boxes_b."
            )
        if self.reasoning is None and any(given):
            raise InputError("this Oscar has no head for two pictures: config.reasoning adds it.")


class OscarRegionEmbeddings(nnx.Module):
    """A region's features and the six numbers of its box in one projection."""

    def __init__(self, config: OscarConfig, rngs: nnx.Rngs):
        text, epsilon = config.text, config.region_epsilon
        self.projection = linear(config.region_width + 6, text.width, text.dtype, rngs)
        self.norm = layer_norm(text.width, epsilon, text.dtype, rngs) if epsilon else None
        self.dropout = nnx.Dropout(text.dropout)

    def __call__(
        self,
        regions: Float[Array, "batch regions features"],
        boxes: Float[Array, "batch regions 4"],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch regions width"]:
        """Embed regions; `key` draws dropout."""
        x = self.projection(jnp.concatenate([regions, box_numbers(boxes, 6)], axis=-1))
        x = x if self.norm is None else self.norm(x)
        return self.dropout(x, deterministic=key is None, rngs=key)


def _classifier(config: OscarConfig, width: int, outputs: int, rngs: nnx.Rngs) -> nnx.Module:
    if config.classifier == "linear":
        return linear(width, outputs, "float32", rngs)
    text, hidden = config.text, config.classifier_width or 2 * config.text.width
    # What normalises the regions normalises here as well, but in reasoning alone.
    epsilon = text.epsilon if config.reasoning and config.region_epsilon else 0.0
    return MlpHead(width, hidden, outputs, text.dtype, rngs, "relu", epsilon)
