"""What models of words and regions in one stream share: VisualBERT, UNITER, Oscar, VL-BERT.

A region is a box that a detector found in a picture, with the detector's features there (Anderson
et al. 2018). Words are embedded as in BERT, regions by each family in its own way, and all of them
run through one stack of BERT's layers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from mmjax.errors import InputError
from mmjax.models.bert import BertConfig, BertEmbeddings
from mmjax.models.features import Encoded, Fused
from mmjax.models.heads import MaskedLanguageHead
from mmjax.models.merged import Merged
from mmjax.models.model import Model, Moves


@dataclass(frozen=True)
class StreamConfig(BertConfig):
    """BERT as these models have it: the words' embeddings, and the layers that all run through."""

    padding: int = 0
    pooler: bool = True


@dataclass(frozen=True)
class RegionModelConfig:
    """What every one of these models is told. A head exists where its field is set."""

    text: StreamConfig
    region_width: int = 2048  # features that the detector has of a region
    masked_language: bool = False  # words behind masks
    answers: tuple[str, ...] = ()  # the closed list of a question's answers

    def __post_init__(self) -> None:
        """A list names each of its members once."""
        if len(set(self.answers)) != len(self.answers):
            raise InputError(f"{type(self).__name__}.answers names an answer twice.")


class RegionModel(Model):
    """Words and regions in one stream. A family adds how regions enter it, and its heads."""

    # A BERT becomes the stream. (Its types are not those of words and regions.)
    adopts: ClassVar[Mapping[str, Moves]] = {
        "text": (
            ("text/embeddings/token_embedding", "text_embeddings/token_embedding"),
            ("text/embeddings/position_embedding", "text_embeddings/position_embedding"),
            ("text/embeddings/norm", "text_embeddings/norm"),
            ("text/blocks", "fusion/blocks"),
            ("text/pooler", "fusion/pooler"),
        )
    }

    def __init__(self, config: RegionModelConfig, rngs: nnx.Rngs):
        text = config.text
        self.config = config
        self.text_embeddings = BertEmbeddings(text, rngs)
        self.fusion = Merged(text, rngs, text.pooler)
        self.masked_language = (
            MaskedLanguageHead(text.width, text, text.dtype, rngs)
            if config.masked_language
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
        """Token ids as they enter the stream; the first token stands for all.

        `text_shift` is added to the words' vectors.
        """
        tokens = self.text_embeddings(text, text_mask, text_type, key, text_shift)
        return Encoded(tokens=tokens, mask=text_mask, pooled=tokens[:, 0])

    def fuse(self, image: Encoded, text: Encoded, key: Key[Array, ""] | None = None) -> Fused:
        """Features of pairs: row i of the pictures with row i of the texts."""
        return self.fusion(image.tokens, text.tokens, image.mask, text.mask, key=key)

    @property
    def word_embeddings(self) -> BertEmbeddings:
        """The embeddings of words."""
        return self.text_embeddings

    @property
    def region_heads(self) -> dict[str, Callable[[Array], Array]]:
        """What masked regions are asked for, by name: those heads that the model has."""
        return {}

    def score_regions(
        self, image_tokens: Float[Array, "batch regions width"]
    ) -> dict[str, Float[Array, "batch regions _"]]:
        """What is said of every region after the fusion, by the names of `region_heads`."""
        return {name: head(image_tokens) for name, head in self.region_heads.items()}

    def describe(self, fused: Fused) -> dict[str, Any]:
        """What all families say under the same names, those outputs whose heads they have.

        `sequence_output [B,L,D]` of words, `region_output [B,R,D]`, `pooled_output [B,D]`;
        `mlm_logits [B,L,V]`, `itm_logits [B,2]` (the second: they belong together), `vqa_logits
        [B,answers]`, and what `score_regions` says.
        """
        out = {
            "sequence_output": fused.text_tokens,
            "region_output": fused.image_tokens,
            "pooled_output": fused.pooled,
        }
        if self.masked_language is not None:
            out["mlm_logits"] = self.score_words(fused.text_tokens)
        if self.matching is not None:
            out["itm_logits"] = self.match(fused)
        if self.answering is not None:
            out["vqa_logits"] = self.score_answers(fused)
        return out | self.score_regions(fused.image_tokens)


def check_regions(regions: jax.Array, boxes: jax.Array | None, width: int) -> None:
    """Raises InputError unless features are `[B,R,width]` and boxes, if any, `[B,R,4]`."""
    if regions.ndim != 3 or regions.shape[-1] != width:
        raise InputError(
            f"regions are {list(regions.shape)}, and this model takes [batch, regions, {width}]: "
            "the detector's features alone, without their boxes; region_width is their number."
        )
    if boxes is not None and boxes.shape != (*regions.shape[:2], 4):
        raise InputError(
            f"boxes are {list(boxes.shape)}, expected {[*regions.shape[:2], 4]}: x1, y1, x2, y2 in "
            "[0,1] of every region. What else a model wants to know of a box it works out."
        )


def box_numbers(boxes: Float[Array, "*batch 4"], count: int) -> Float[Array, "*batch count"]:
    """The first `count` of x1, y1, x2, y2, width, height, area: 6 for Oscar, 7 for UNITER."""
    sides = boxes[..., 2:] - boxes[..., :2]
    area = sides.prod(axis=-1, keepdims=True)
    return jnp.concatenate([boxes, sides, area], axis=-1)[..., :count]


def box_waves(boxes: Float[Array, "*batch 4"], width: int) -> Float[Array, "*batch waves"]:
    """Sines and cosines of a box's centre and sides, `8 * width` numbers (Su et al. 2020, VL-BERT).

    Each of x, y, width and height, in hundredths of the picture's, gives `width` sines and then as
    many cosines, of wavelengths from 2π to 2000π.
    """
    sides = boxes[..., 2:] - boxes[..., :2]
    centre = (boxes[..., :2] + boxes[..., 2:]) / 2
    places = 100 * jnp.concatenate([centre, sides], axis=-1)
    angles = places[..., None] / 1000 ** (jnp.arange(width) / width)
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return waves.reshape(*boxes.shape[:-1], 8 * width)
