"""Pictures in, texts out: an image encoder, and a decoder that looks at its tokens."""

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from mmjax.decoding import Cache, Generated, GenerationConfig, generate
from mmjax.layers import linear, split_key
from mmjax.models.encoders import ImageConfig, image_encoder
from mmjax.models.features import AnyArray, Encoded
from mmjax.models.gpt2 import GPT2, GPT2Config
from mmjax.models.model import PictureModel


@dataclass(frozen=True)
class CaptionerConfig:
    """An image encoder, a decoder, and how it generates where a call does not say."""

    image: ImageConfig
    text: GPT2Config
    generation: GenerationConfig = field(default_factory=GenerationConfig)


class Captioner(PictureModel):
    """A text about a picture, word by word: VisionEncoderDecoderModel of ViT and GPT-2.

    Where the two differ in width, a linear map leads from the one to the other.
    """

    def __init__(self, config: CaptionerConfig, rngs: nnx.Rngs):
        self.config = config
        self.image = image_encoder(config.image, rngs)
        self.text = GPT2(config.text, rngs, cross=True)
        inputs, width = config.image.width, config.text.width
        self.projection = (
            linear(inputs, width, config.text.dtype, rngs) if inputs != width else None
        )

    @property
    def max_length(self) -> int:
        """The longest text that there are positions for (`mmjax.decoding.Decoder`)."""
        return self.text.max_length

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
        context = self._context(encoded)
        logits = self.text(decoder_text, decoder_mask, context, encoded.mask, text_key)
        return {"logits": logits, "encoder_last_hidden_state": encoded.tokens}

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
        prompt = jnp.full((len(image), 1), config.start, jnp.int32)
        if decoder_text is not None:
            text = jnp.asarray(decoder_text, jnp.int32)
            has_start = (text[:, :1] == prompt).any()
            prompt = text if has_start else jnp.concatenate([prompt, text], axis=1)
        return generate(self, config, prompt, key=key, image=image)

    def start(
        self,
        padding: Int[Array, " batch"],
        length: int,
        image: Float[Array, "batch height width 3"] | UInt8[Array, "batch height width 3"],
    ) -> Cache:
        """The cache before the first token (`mmjax.decoding.Decoder`)."""
        encoded = self.encode_image(image)
        return self.text.start(padding, length, self._context(encoded), encoded.mask)

    def step(
        self, tokens: Int[Array, "rows tokens"], memory: Cache, at: int | Int[Array, ""]
    ) -> tuple[Float[Array, "rows words"], Cache]:
        """Scores of the word behind the last of the next tokens (`mmjax.decoding.Decoder`)."""
        return self.text.step(tokens, memory, at)

    def _context(self, encoded: Encoded) -> Array:
        tokens = jnp.asarray(encoded.tokens)
        return tokens if self.projection is None else self.projection(tokens)
