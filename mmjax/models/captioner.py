"""Pictures in, texts out: an image encoder, and a decoder that looks at its tokens."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from mmjax.decoding import Cache, Generated, GenerationConfig, generate
from mmjax.layers import linear, split_key
from mmjax.models.bert import BertConfig
from mmjax.models.cross_attention import BertDecoder
from mmjax.models.encoders import ImageConfig, image_encoder
from mmjax.models.features import AnyArray, Encoded
from mmjax.models.gpt2 import GPT2, GPT2Config
from mmjax.models.model import PictureModel


@dataclass(frozen=True)
class CaptionerConfig:
    """An image encoder, a decoder, and how it generates where a call does not say."""

    image: ImageConfig
    text: GPT2Config | BertConfig
    generation: GenerationConfig = field(default_factory=GenerationConfig)


class Captioner(PictureModel):
    """A text about a picture, word by word: VisionEncoderDecoderModel of ViT and GPT-2.

    Any image encoder will do, and a BERT that reads from left to right. Where the two differ in
    width, a linear map leads from the one to the other.
    """

    def __init__(self, config: CaptionerConfig, rngs: nnx.Rngs):
        self.config = config
        self.image = image_encoder(config.image, rngs)
        self.text = _decoder(config.text, rngs)
        inputs, width = config.image.width, config.text.width
        self.projection = (
            linear(inputs, width, config.text.dtype, rngs) if inputs != width else None
        )

    @property
    def text_decoder(self) -> GPT2 | BertDecoder:
        """What writes."""
        return self.text

    @property
    def max_length(self) -> int:
        """The longest text that there are positions for (`mmjax.decoding.Decoder`)."""
        return self.config.text.max_length

    def forward(
        self,
        image: Float[Array, "batch height width 3"] | UInt8[Array, "batch height width 3"],
        decoder_text: Int[Array, "batch length"],
        decoder_mask: Bool[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """`logits [B,L,V]` of the word behind each, `encoder_last_hidden_state [B,N,D]`."""
        image_key, text_key = split_key(key, 2)
        encoded = self.encode_image(image, image_key)
        context = self.caption_context(encoded)
        logits = self.decode(context, decoder_text, decoder_mask, text_key)
        return {"logits": logits, "encoder_last_hidden_state": encoded.tokens}

    def caption_context(self, image: Encoded) -> Encoded:
        """What the decoder looks at: the picture's tokens, in its own width."""
        if self.projection is None:
            return image
        return replace(image, tokens=self.projection(image.tokens))

    def decode(
        self,
        context: Encoded,
        decoder_text: Int[Array, "batch length"],
        decoder_mask: Bool[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch length words"]:
        """Scores of the word behind each token; see `caption_context`."""
        return self.text(decoder_text, decoder_mask, context, key)

    def generate(
        self,
        image: Float[AnyArray, "batch height width 3"] | UInt8[AnyArray, "batch height width 3"],
        decoder_text: Int[AnyArray, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
        **options: Any,
    ) -> Generated:
        """A text about each picture; `options` are fields of `GenerationConfig`.

        `decoder_text` is how the texts begin. The start token is put before it unless it is there.
        """
        config = self.config.generation.changed(options)
        image = jnp.asarray(image)
        prompt = prompts(config.start, len(image), decoder_text)
        return generate(self, config, prompt, key=key, image=image)

    def start(
        self,
        padding: Int[Array, " batch"],
        length: int,
        image: Float[Array, "batch height width 3"] | UInt8[Array, "batch height width 3"],
    ) -> Cache:
        """The cache before the first token (`mmjax.decoding.Decoder`)."""
        return self.text.start(padding, length, self.caption_context(self.encode_image(image)))

    def step(
        self, tokens: Int[Array, "rows tokens"], memory: Cache, at: int | Int[Array, ""]
    ) -> tuple[Float[Array, "rows words"], Cache]:
        """Scores of the word behind the last of the next tokens (`mmjax.decoding.Decoder`)."""
        return self.text.step(tokens, memory, at)


def prompts(
    start: int, rows: int, beginning: Int[AnyArray, "rows length"] | None = None
) -> Int[Array, "rows prompt"]:
    """What texts start from: the token `start`, unless it is there, and how they begin."""
    prompt = jnp.full((rows, 1), start, jnp.int32)
    if beginning is None:
        return prompt
    text = jnp.asarray(beginning, jnp.int32)
    has_start = (text[:, :1] == prompt).any()
    return text if has_start else jnp.concatenate([prompt, text], axis=1)


def _decoder(config: GPT2Config | BertConfig, rngs: nnx.Rngs) -> GPT2 | BertDecoder:
    if isinstance(config, GPT2Config):
        return GPT2(config, rngs, cross=True)
    return BertDecoder(config, config.width, rngs)
