"""BLIP (Li et al. 2022, "Bootstrapping Language-Image Pre-training …").

One kind of layer, BERT's with a cross-attention in it, makes three things: a text encoder, a text
encoder that looks at the picture, and a decoder that looks at the picture or at a question.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from mmjax.decoding import Cache, Generated, GenerationConfig, generate
from mmjax.errors import InputError, near_misses
from mmjax.layers import split_key
from mmjax.models.bert import BertConfig
from mmjax.models.cross_attention import BertDecoder, CrossBert
from mmjax.models.features import AnyArray, Encoded, Fused
from mmjax.models.heads import ContrastiveConfig, ContrastiveHead, MatchingHead
from mmjax.models.model import Moves, PictureModel
from mmjax.models.vit import ViT, ViTConfig

DECODERS = ("", "image", "question")
# [DEC], [SEP] and [PAD], as published.
GENERATION = GenerationConfig(bos_token_id=30522, eos_token_id=(102,), pad_token_id=0)


@dataclass(frozen=True)
class BlipConfig:
    """The parts of a model.

    Retrieval has `embedding_width=256` and `matching`, question answering `decoder='question'`,
    captioning `encoder=False` and `decoder='image'`; pre-training `embedding_width=256`,
    `matching`, `decoder='image'` and `shared`.
    """

    image: ViTConfig
    text: BertConfig  # of the encoder and of the decoder
    encoder: bool = True  # of texts
    decoder: str = ""  # what a decoder looks at: the 'image', or the 'question'; '': no decoder
    shared: bool = False  # the decoder has all but its self-attention from the encoder
    embedding_width: int = 0  # of the contrastive space; 0: no contrastive head
    temperature: bool = True  # false: similarities are cosines, as `transformers` has them
    matching: bool = False
    # Whether a decoder that answers sees the question's padding as well: it does in `transformers`
    # 5.23, which leaves that mask unused, and did not in training as published.
    sees_padding: bool = False
    # What takes the place of the first token where a text looks at a picture ([ENC], 30523 as
    # published); -1: nothing does, as in `transformers`.
    pair_token: int = -1
    generation: GenerationConfig = field(default_factory=lambda: GENERATION)

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        if self.decoder not in DECODERS:
            raise InputError(f"decoder is {self.decoder!r}.{near_misses(self.decoder, DECODERS)}")
        needs = {
            "decoder='question'": self.decoder == "question",
            "embedding_width": self.embedding_width > 0,
            "matching": self.matching,
            "shared": self.shared,
        }
        for name, wanted in needs.items():
            if wanted and not self.encoder:
                raise InputError(f"{name} needs the text encoder: encoder is False.")
        if self.shared and self.decoder != "image":
            raise InputError(
                f"decoder is {self.decoder!r}; only one that looks at the image can share the "
                "encoder's layers, which look at it as well."
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlipEncoded(Encoded):
    """A text after its encoder, with its token ids: beside a picture they are read anew."""

    ids: Int[AnyArray, "batch length"]


class Blip(PictureModel):
    """Pictures and texts in, features, scores and texts out."""

    adopts: ClassVar[Mapping[str, Moves]] = {
        "text": (
            ("text/embeddings/token_embedding", "text/embeddings/token_embedding"),
            ("text/embeddings/position_embedding", "text/embeddings/position_embedding"),
            ("text/embeddings/norm", "text/embeddings/norm"),
            ("text/blocks", "text/blocks"),
            ("text/blocks", "text_decoder/bert/blocks"),
        )
    }

    # A part, or None where the config has it not.
    text: Any
    text_decoder: Any
    contrastive: Any
    matching: Any

    def __init__(self, config: BlipConfig, rngs: nnx.Rngs):
        self.config = config
        image, text = config.image, config.text
        seen = {"image": image.width, "question": text.width}
        self.image = ViT(image, rngs)
        self.text = CrossBert(text, image.width, rngs) if config.encoder else None
        self.text_decoder = (
            BertDecoder(text, seen[config.decoder], rngs) if config.decoder else None
        )
        if config.shared:
            self._share()
        self.contrastive = (
            ContrastiveHead(
                image.width,
                text.width,
                ContrastiveConfig(
                    config.embedding_width, scale=config.temperature, temperature=0.07
                ),
                rngs,
            )
            if config.embedding_width
            else None
        )
        self.matching = MatchingHead(text.width, rngs) if config.matching else None

    def encode_text(
        self,
        text: Int[Array, "batch length"],
        text_mask: Bool[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> BlipEncoded:
        """Features of token ids, which have not seen a picture."""
        read = self._encoder()(text, text_mask, key=key)
        return BlipEncoded(read.tokens, read.mask, read.pooled, ids=text)

    def fuse(self, image: Encoded, text: BlipEncoded, key: Key[Array, ""] | None = None) -> Fused:
        """Features of texts that look at the picture of the same row, from their ids on."""
        return self._fuse(image, jnp.asarray(text.ids), text.mask, key)

    def forward(
        self,
        image: Float[Array, "batch height width 3"] | UInt8[Array, "batch height width 3"],
        text: Int[Array, "batch length"] | None = None,
        text_mask: Bool[Array, "batch length"] | None = None,
        decoder_text: Int[Array, "batch decoded"] | None = None,
        decoder_mask: Bool[Array, "batch decoded"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """The picture's tokens, `last_hidden_state [B,N,D]`; of texts and heads what there is.

        Of a `text`: `question_embeds [B,L,D]`, its tokens after they have seen the picture;
        `itm_score [B,2]` of the matching head (the second: they belong together); `image_embeds`,
        `text_embeds [B,E]` and `logits_per_image [B,B]` of the contrastive head. Of a
        `decoder_text` the scores `logits [B,A,V]` of the word behind every token. Without a
        contrastive head `image_embeds` is another name of the picture's tokens.
        """
        image_key, fusion_key, text_key, decoder_key = split_key(key, 4)
        context = seen = self.encode_image(image, image_key)
        out: dict[str, Any] = {"last_hidden_state": seen.tokens, "image_embeds": seen.tokens}
        if text is not None:
            fused = self._fuse(seen, text, text_mask, fusion_key)
            out["question_embeds"] = fused.text_tokens
            if self.config.decoder == "question":
                context = self._question(fused, text_mask)
            if self.matching is not None:
                out["itm_score"] = self.matching(fused.pooled)
            if self.contrastive is not None:
                read = self.encode_text(text, text_mask, text_key)
                out |= self.contrastive.outputs(seen.pooled, read.pooled)
        elif self.config.decoder == "question" and decoder_text is not None:
            raise InputError("this model answers questions: give the question as 'text'.")
        if decoder_text is not None:
            out["logits"] = self.decode(context, decoder_text, decoder_mask, decoder_key)
        return out

    def answer_context(self, image: Encoded, fused: Fused, text: Encoded) -> Encoded:
        """What a decoder that answers looks at: the question, after it has seen the picture."""
        return self._question(fused, text.mask)

    def decode(
        self,
        context: Encoded,
        decoder_text: Int[Array, "batch decoded"],
        decoder_mask: Bool[Array, "batch decoded"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch decoded words"]:
        """Scores of the word behind each token; the context is an encoded picture or question."""
        return self._decoder()(decoder_text, decoder_mask, context, key=key)

    @property
    def max_length(self) -> int:
        """The longest text that there are positions for (`mmjax.decoding.Decoder`)."""
        return self.config.text.max_length

    def generate(
        self,
        image: Float[AnyArray, "batch height width 3"] | UInt8[AnyArray, "batch height width 3"],
        text: Int[AnyArray, "batch length"] | None = None,
        text_mask: Bool[AnyArray, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
        **options: Any,
    ) -> Generated:
        """A caption of each picture, which `text` may begin, or the answer to the question `text`.

        `text` is as a tokenizer gives it, from [CLS] to [SEP] and then padding; of a caption's
        beginning the first becomes the start token and the last is left out. `options` are fields
        of `GenerationConfig`.
        """
        config = self.config.generation.changed(options)
        image = jnp.asarray(image)
        prompt: Any = jnp.full((len(image), 1), config.start)
        mask: Any = None
        if self.config.decoder == "question":
            if text is None:
                raise InputError("this model answers questions: give the question as 'text'.")
            asked = {"text": jnp.asarray(text), "text_mask": text_mask}
            return generate(self, config, prompt, key=key, image=image, **asked)
        if text is not None:
            prompt, mask = _beginning(np.asarray(text), text_mask, config.start)
        return generate(self, config, prompt, mask, key, image=image)

    def start(
        self,
        padding: Int[Array, " batch"],
        length: int,
        image: Float[Array, "batch height width 3"] | UInt8[Array, "batch height width 3"],
        text: Int[Array, "batch text_length"] | None = None,
        text_mask: Bool[Array, "batch text_length"] | None = None,
    ) -> Cache:
        """The cache before the first token (`mmjax.decoding.Decoder`)."""
        context = self.encode_image(image)
        if text is not None:
            fused = self._fuse(context, text, text_mask)
            # Padding is looked at as well, in the original code and in `transformers`.
            context = Encoded(fused.text_tokens, None, fused.pooled)
        return self._decoder().start(padding, length, context)

    def step(
        self, tokens: Int[Array, "rows tokens"], memory: Cache, at: int | Int[Array, ""]
    ) -> tuple[Float[Array, "rows words"], Cache]:
        """Scores of the word behind the last of the next tokens (`mmjax.decoding.Decoder`)."""
        return self._decoder().step(tokens, memory, at)

    def _fuse(self, image, text, text_mask, key=None):
        if (token := self.config.pair_token) >= 0:
            text = text.at[:, 0].set(token)
        fused = self._encoder()(text, text_mask, image, key=key)
        return Fused(image_tokens=image.tokens, text_tokens=fused.tokens, pooled=fused.pooled)

    def _question(self, fused, text_mask):
        mask = None if self.config.sees_padding else text_mask
        return Encoded(fused.text_tokens, mask, fused.pooled)

    def _share(self) -> None:
        """The same modules in both, so that there is one parameter, and one gradient, of each."""
        decoder = self.text_decoder.bert
        decoder.embeddings = self.text.embeddings
        decoder.blocks.layers.cross_attention = self.text.blocks.layers.cross_attention
        decoder.blocks.layers.mlp = self.text.blocks.layers.mlp

    def _encoder(self) -> CrossBert:
        if self.text is None:
            raise InputError(
                "this model encodes no 'text': what its decoder begins with is 'decoder_text'."
            )
        return self.text

    def _decoder(self) -> BertDecoder:
        if self.text_decoder is None:
            raise InputError("this model has no decoder: config.decoder is ''.")
        return self.text_decoder


def _beginning(
    text: Int[np.ndarray, "batch length"],
    mask: Bool[AnyArray, "batch length"] | None,
    start: int,
) -> tuple[Int[np.ndarray, "batch prompt"], Bool[np.ndarray, "batch prompt"]]:
    """Texts with `start` as their first token and without their last, padded on the left."""
    lengths = np.full(len(text), text.shape[1]) if mask is None else np.asarray(mask).sum(axis=1)
    if lengths.min() < 2:
        raise InputError(
            f"a text to be continued has {lengths.min()} tokens: it comes from [CLS] to [SEP]."
        )
    columns = np.arange(lengths.max() - 1) - (lengths.max() - lengths)[:, None]
    prompt = np.take_along_axis(text, np.maximum(columns, 0), axis=1)
    return np.where(columns <= 0, start, prompt), columns >= 0
