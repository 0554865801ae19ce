"""ALBEF (Li et al. 2021, "Align before Fuse").

The lower layers of a BERT encode the text alone; the upper ones, with cross-attention, fuse it with
the tokens of a ViT.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from mmjax.errors import InputError
from mmjax.layers import linear, split_key
from mmjax.models.bert import BertConfig, BertEncoder
from mmjax.models.cross_attention import BertDecoder, CrossFusion
from mmjax.models.features import Encoded, Fused
from mmjax.models.heads import (
    ContrastiveConfig,
    ContrastiveHead,
    MaskedLanguageHead,
    MatchingHead,
)
from mmjax.models.model import Moves, PairModel
from mmjax.models.vit import ViT, ViTConfig


@dataclass(frozen=True)
class AlbefConfig:
    """The parts of a model. A head exists where its field is set.

    A published file has those of its task: pre-training `embedding_width=256`, `matching` and
    `masked_language`, retrieval the first two, VQA `decoder_depth=6`, visual entailment three
    `labels`, NLVR2 two of them and `pictures=2`.
    """

    image: ViTConfig
    text: BertConfig  # all of the BERT: first the text encoder's layers, then the fusion's
    fusion_layer: int = 6  # how many of them are the text encoder's
    pictures: int = 1  # 2: every fusion layer twice, once for each picture
    embedding_width: int = 0  # of the contrastive space; 0: no contrastive head
    matching: bool = False
    masked_language: bool = False
    decoder_depth: int = 0  # of a decoder that answers questions; 0: no decoder
    labels: tuple[str, ...] = field(default=())  # of a classifier of the fused text
    # NLVR2's own pre-training: is the text of the first picture, of the second, or of neither?
    text_assignment: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        if not 0 < self.fusion_layer < self.text.depth:
            raise InputError(
                f"fusion_layer is {self.fusion_layer}; of the {self.text.depth} layers of text at "
                "least one encodes and one fuses."
            )
        if self.pictures not in (1, 2):
            raise InputError(f"pictures is {self.pictures}; an example has one picture or two.")


class Albef(PairModel):
    """Pictures and texts in, features and scores out."""

    # The lower layers of a BERT read, the upper ones fuse.
    adopts: ClassVar[Mapping[str, Moves]] = {
        "text": (
            ("text/embeddings", "text/embeddings"),
            ("text/blocks", "text/blocks"),
            ("text/blocks", "fusion/blocks@last"),
        )
    }

    # A head, or None where the config has it not.
    contrastive: Any
    matching: Any
    masked_language: Any

    def __init__(self, config: AlbefConfig, rngs: nnx.Rngs):
        self.config = config
        image, text, width = config.image, config.text, config.text.width
        fusion = replace(text, depth=text.depth - config.fusion_layer)
        self.image = ViT(image, rngs)
        self.text = BertEncoder(replace(text, depth=config.fusion_layer), rngs)
        self.fusion = CrossFusion(fusion, image.width, rngs, config.pictures)
        self.contrastive = (
            ContrastiveHead(
                image.width,
                width,
                ContrastiveConfig(config.embedding_width, temperature=0.07),
                rngs,
            )
            if config.embedding_width
            else None
        )
        self.matching = MatchingHead(width, rngs) if config.matching else None
        self.masked_language = (
            MaskedLanguageHead(width, text, text.dtype, rngs) if config.masked_language else None
        )
        self.decoder = (
            BertDecoder(replace(text, depth=config.decoder_depth), width, rngs)
            if config.decoder_depth
            else None
        )
        self.pair_classifier = (
            FusedClassifier(width, len(config.labels), text.dtype, rngs) if config.labels else None
        )
        self.text_assignment = linear(width, 3, "float32", rngs) if config.text_assignment else None

    @property
    def text_decoder(self) -> Any:
        """What writes answers, or None."""
        return self.decoder

    def fuse(
        self,
        image: Encoded,
        text: Encoded,
        key: Key[Array, ""] | None = None,
        image_b: Encoded | None = None,
    ) -> Fused:
        """Features of texts that look at the picture (or two) of the same row."""
        if (given := 1 if image_b is None else 2) != self.config.pictures:
            raise InputError(
                f"this model looks at {self.config.pictures} picture(s) with every text, and "
                f"{given} came: the second is the input 'image_b'."
            )
        return self.fusion(image, text, key=key, image_b=image_b)

    def forward(
        self,
        image: Float[Array, "batch height width 3"] | UInt8[Array, "batch height width 3"],
        text: Int[Array, "batch length"],
        text_mask: Bool[Array, "batch length"] | None = None,
        image_b: Float[Array, "batch height width 3"]
        | UInt8[Array, "batch height width 3"]
        | None = None,
        decoder_text: Int[Array, "batch answer_length"] | None = None,
        decoder_mask: Bool[Array, "batch answer_length"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """`sequence_output [B,L,D]`, `pooled_output [B,D]`, and what the model's heads say.

        `image_embeds`, `text_embeds [B,E]` and `logits_per_image [B,B]` are the contrastive head's,
        `itm_logits [B,2]` the matching head's (the second: they belong together), `mlm_logits
        [B,L,V]` those of masked words, `ve_logits` or, of two pictures, `nlvr_logits [B,labels]`
        the classifier's, `ta_logits [B,3]` the text assignment's. Of an answer `decoder_text` to
        each question `logits [B,A,V]` are those of the word behind every token.
        """
        image_key, second_key, text_key, fusion_key, decoder_key = split_key(key, 5)
        seen = self.encode_image(image, image_key)
        seen_b = None if image_b is None else self.encode_image(image_b, second_key)
        read = self.encode_text(text, text_mask, text_key)
        fused = self.fuse(seen, read, fusion_key, seen_b)
        out: dict[str, Any] = {"sequence_output": fused.text_tokens, "pooled_output": fused.pooled}
        if self.contrastive is not None:
            out |= self.contrastive.outputs(seen.pooled, read.pooled)
        if self.matching is not None:
            out["itm_logits"] = self.matching(fused.pooled)
        if self.masked_language is not None:
            out["mlm_logits"] = self.masked_language(fused.text_tokens, self.text.embeddings)
        if self.pair_classifier is not None:
            name = "nlvr_logits" if self.config.pictures == 2 else "ve_logits"
            out[name] = self.pair_classifier(fused.pooled)
        if self.text_assignment is not None:
            out["ta_logits"] = self.text_assignment(fused.pooled)
        if decoder_text is not None:
            question = self.answer_context(seen, fused, read)
            out["logits"] = self.decode(question, decoder_text, decoder_mask, decoder_key)
        return out

    def decode(
        self,
        context: Encoded,
        decoder_text: Int[Array, "batch answer_length"],
        decoder_mask: Bool[Array, "batch answer_length"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch answer_length words"]:
        """Scores of the word behind each token of an answer; see `answer_context`."""
        return self._decoder()(decoder_text, decoder_mask, context, key=key)

    def rank_answers(
        self,
        context: Encoded,
        answers: Int[Array, "answers answer_length"],
        answer_mask: Bool[Array, "answers answer_length"],
        top: int = 128,
    ) -> tuple[Int[Array, "batch top"], Float[Array, "batch top"]]:
        """The `top` answers of a list for each question, the best first, and their probabilities.

        As in the published code, an answer's first word chooses the candidates, and its log p is
        then added to that of the whole answer: it counts twice.
        """
        chosen, first, whole = self._decoder().rank(context, answers, answer_mask, top)
        probabilities, order = jax.lax.top_k(jax.nn.softmax(first + whole), top)
        return jnp.take_along_axis(chosen, order, axis=1), probabilities

    def _decoder(self) -> BertDecoder:
        if self.decoder is None:
            raise InputError("this model has no decoder of answers: config.decoder_depth is 0.")
        return self.decoder


class FusedClassifier(nnx.Module):
    """Scores of labels from a fused vector: dense, ReLU, dense."""

    def __init__(self, width: int, labels: int, dtype: str, rngs: nnx.Rngs):
        self.hidden = linear(width, width, dtype, rngs)
        self.classifier = linear(width, labels, "float32", rngs)

    def __call__(self, pooled: Float[Array, "batch width"]) -> Float[Array, "batch labels"]:
        """Logits of every label, float32."""
        return self.classifier(jax.nn.relu(self.hidden(pooled)))
