"""CoCa (Yu et al. 2022, "CoCa: Contrastive Captioners are Image-Text Foundation Models").

A captioner whose decoder reads the text alone in its lower half, so that one pass over a picture
and its text gives both vectors of a contrastive loss and the scores of every next word.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from mmjax.decoding import Cache, Generated, GenerationConfig, cache, generate
from mmjax.errors import InputError
from mmjax.layers import (
    TABLE_INIT,
    Attention,
    Block,
    LayerConfig,
    Stack,
    embedding,
    layer_norm,
    linear,
    split_key,
)
from mmjax.models.captioner import prompts
from mmjax.models.features import AnyArray, Encoded, Fused, shifted
from mmjax.models.heads import ContrastiveConfig, ContrastiveHead
from mmjax.models.model import PairModel
from mmjax.models.vit import ViT, ViTConfig
from mmjax.sharding import gather_table


@dataclass(frozen=True)
class CocaTextConfig(LayerConfig):
    """The decoder's two halves: `depth` layers see the text alone, the others the picture as well.

    CoCa-Base is width=768, depth=12 (table 1), of a vocabulary of 64,000.
    """

    multimodal_depth: int = 0  # of the upper half; 0: as many as `depth`
    vocabulary_size: int = 0
    max_length: int = 64  # of a text, without the [CLS] that is put behind it

    def __post_init__(self) -> None:
        """Both halves are as deep where nothing else is said."""
        super().__post_init__()
        object.__setattr__(self, "multimodal_depth", self.multimodal_depth or self.depth)


@dataclass(frozen=True)
class CocaConfig:
    """The parts of a model."""

    image: ViTConfig
    text: CocaTextConfig
    caption_queries: int = 256  # picture tokens that the decoder looks at
    embedding_width: int = 512  # of the contrastive space
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    def __post_init__(self) -> None:
        """Refuse a picture that is pooled twice."""
        if self.image.pool == "attention" or self.image.pooler:
            raise InputError(
                "CoCa pools the picture's tokens itself: set image.pool to 'mean' or "
                "'class_token', and image.pooler to False."
            )


class Coca(PairModel):
    """Pictures and texts in; vectors of both, and scores of the next word out."""

    def __init__(self, config: CocaConfig, rngs: nnx.Rngs):
        self.config = config
        image, text = config.image, config.text
        self.image = PooledViT(image, config.caption_queries, rngs)
        self.text = UnimodalDecoder(text, rngs)
        self.text_decoder = MultimodalDecoder(text, image.width, rngs)
        self.contrastive = ContrastiveHead(
            image.width, text.width, ContrastiveConfig(config.embedding_width, bias=False), rngs
        )

    def fuse(self, image: Encoded, text: Encoded, key: Key[Array, ""] | None = None) -> Fused:
        """Features of texts that look at the picture of the same row; the last word's is pooled."""
        tokens = self.text_decoder(text, image, key)
        last = -1 if text.mask is None else jnp.asarray(text.mask).sum(axis=1) - 1
        pooled = tokens[jnp.arange(len(tokens)), last]
        return Fused(image_tokens=image.tokens, text_tokens=tokens, pooled=pooled)

    def score_words(
        self, tokens: Float[Array, "batch length width"]
    ) -> Float[Array, "batch length words"]:
        """Scores of the word behind each of a fused text."""
        return self.text_decoder.head(tokens)

    def decode(
        self,
        context: Encoded,
        decoder_text: Int[Array, "batch length"],
        decoder_mask: Bool[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch length words"]:
        """Scores of the word behind each token; the context is an encoded picture."""
        text_key, fusion_key = split_key(key, 2)
        text = self.encode_text(decoder_text, decoder_mask, text_key)
        return self.score_words(self.text_decoder(text, context, fusion_key))

    def forward(
        self,
        image: Float[Array, "batch height width 3"] | UInt8[Array, "batch height width 3"],
        text: Int[Array, "batch length"],
        text_mask: Bool[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """`image_embeds`, `text_embeds [B,E]`, `logits_per_image [B,B]`, and of the pairs `logits`.

        Those are `[B,L,V]`, of the word behind each of the text.
        """
        image_key, text_key, fusion_key = split_key(key, 3)
        seen = self.encode_image(image, image_key)
        read = self.encode_text(text, text_mask, text_key)
        logits = self.score_words(self.text_decoder(read, seen, fusion_key))
        return {**self.contrastive.outputs(seen.pooled, read.pooled), "logits": logits}

    @property
    def max_length(self) -> int:
        """The longest text that there are positions for (`mmjax.decoding.Decoder`)."""
        return self.config.text.max_length

    def generate(
        self,
        image: Float[AnyArray, "batch height width 3"] | UInt8[AnyArray, "batch height width 3"],
        decoder_text: Int[AnyArray, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
        **options: Any,
    ) -> Generated:
        """A caption of each picture; `options` are fields of `GenerationConfig`.

        `decoder_text` is how the captions begin. The start token is put before it unless it is
        there.
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
    ) -> "Caches":
        """The cache before the first token (`mmjax.decoding.Decoder`)."""
        lower, upper = self.text, self.text_decoder
        seen = self.encode_image(image).tokens
        return Caches(
            lower=cache.start(lower.blocks, lower.config, length, padding),
            upper=cache.start(upper.blocks, upper.config, length, padding, seen),
        )

    def step(
        self, tokens: Int[Array, "rows tokens"], memory: "Caches", at: int | Int[Array, ""]
    ) -> tuple[Float[Array, "rows words"], "Caches"]:
        """Scores of the word behind the last of the next tokens (`mmjax.decoding.Decoder`)."""
        x = self.text.embed(tokens, memory.lower.positions(at, tokens.shape[1]))
        x, lower = cache.step(self.text.blocks, x, memory.lower, at)
        x, upper = cache.step(self.text_decoder.blocks, x, memory.upper, at)
        last = self.text_decoder.norm(x[:, -1])
        return self.text_decoder.head(last), Caches(lower, upper)


class Caches(NamedTuple):
    """What both halves of the decoder remember (`mmjax.decoding.decoder.Memory`)."""

    lower: Cache
    upper: Cache

    def repeated(self, beams: int) -> "Caches":
        """`beams` rows of text for each that there is."""
        return Caches(*(half.repeated(beams) for half in self))

    def reordered(self, beams: Int[Array, "batch beams"]) -> "Caches":
        """The beams of every example picked anew by their number."""
        return Caches(*(half.reordered(beams) for half in self))


class PooledViT(ViT):
    """A ViT that hands on the tokens captions look at, and pooled of those the vector to contrast.

    The two poolers stand in cascade, the contrastive one above the other (section 3.2).
    """

    def __init__(self, config: ViTConfig, caption_queries: int, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.caption_pooler = AttentionalPooler(caption_queries, config, rngs)
        self.contrastive_pooler = AttentionalPooler(1, config, rngs)

    def __call__(
        self,
        image: Float[Array, "batch height width 3"] | UInt8[Array, "batch height width 3"],
        key: Key[Array, ""] | None = None,
        shift: Float[Array, "batch length channels"] | None = None,
    ) -> Encoded:
        """Encode pictures, as a ViT does, and pool."""
        tokens = self.caption_pooler(super().__call__(image, key, shift).tokens)
        return Encoded(tokens=tokens, mask=None, pooled=self.contrastive_pooler(tokens)[:, 0])


class AttentionalPooler(nnx.Module):
    """Learnt queries look at a picture's tokens through one attention layer (section 3.2)."""

    def __init__(self, queries: int, config: LayerConfig, rngs: nnx.Rngs):
        self.queries = nnx.Param(TABLE_INIT(rngs.params(), (queries, config.width)))
        self.attention = Attention(config, rngs)
        self.norm = layer_norm(config.width, config.epsilon, config.dtype, rngs)

    def __call__(
        self, tokens: Float[Array, "batch patches width"]
    ) -> Float[Array, "batch queries width"]:
        """One vector for each query."""
        queries = self.queries[...].astype(tokens.dtype)
        queries = jnp.broadcast_to(queries, (len(tokens), *queries.shape))
        return self.norm(self.attention(queries, tokens))


class UnimodalDecoder(nnx.Module):
    """The lower half: a text from left to right, and behind it a [CLS] that has seen all of it.

    No word sees [CLS]. It has no position, so that padding before it does not move it.
    """

    def __init__(self, config: CocaTextConfig, rngs: nnx.Rngs):
        if config.vocabulary_size < 1:
            raise InputError("text.vocabulary_size is 0: give the tokenizer's number of words.")
        self.config = config
        width, dtype = config.width, config.dtype
        self.token_embedding = embedding(config.vocabulary_size, width, dtype, rngs)
        self.position_embedding = embedding(config.max_length, width, dtype, rngs)
        self.class_token = nnx.Param(TABLE_INIT(rngs.params(), (1, width)))
        self.dropout = nnx.Dropout(config.dropout)
        self.blocks = Stack(lambda rngs: Block(config, rngs), config, rngs)
        self.class_norm = layer_norm(width, config.epsilon, dtype, rngs)

    def __call__(
        self,
        text: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
        shift: Float[Array, "batch length width"] | None = None,
    ) -> Encoded:
        """Features of token ids, as the upper half goes on with them; [CLS] is the pooled vector.

        `mask` is true on tokens, false on padding, which stands behind them; `shift` is added to
        the words' vectors.
        """
        batch, length = text.shape
        if length > self.config.max_length:
            raise InputError(
                f"the text has {length} tokens and the decoder {self.config.max_length} positions: "
                "lower data.text_length or raise model.text.max_length."
            )
        key, embedding_key = split_key(key, 2)
        x = shifted(self.embed(text, jnp.arange(length)), shift)
        token = self.class_token[...].astype(x.dtype)
        x = jnp.concatenate([x, jnp.broadcast_to(token, (batch, 1, x.shape[2]))], axis=1)
        x = self.dropout(x, deterministic=key is None, rngs=embedding_key)
        with_class = None if mask is None else jnp.pad(mask, ((0, 0), (0, 1)), constant_values=True)
        tokens = self.blocks(x, _visible(length + 1, with_class), key=key)
        return Encoded(tokens=tokens[:, :-1], mask=mask, pooled=self.class_norm(tokens[:, -1]))

    def embed(
        self, text: Int[Array, "batch length"], positions: Int[Array, "*batch length"]
    ) -> Float[Array, "batch length width"]:
        """Word and position vectors, summed."""
        table = gather_table(self.token_embedding.embedding[...].astype(self.config.dtype))
        return jnp.take(table, text, axis=0) + self.position_embedding(positions)


class MultimodalDecoder(nnx.Module):
    """The upper half: the text goes on from left to right, and looks at the picture."""

    def __init__(self, config: CocaTextConfig, image_width: int, rngs: nnx.Rngs):
        self.config = replace(config, depth=config.multimodal_depth)
        self.blocks = Stack(
            lambda rngs: Block(config, rngs, cross=True, context_width=image_width),
            self.config,
            rngs,
        )
        self.norm = layer_norm(config.width, config.epsilon, config.dtype, rngs)
        self.head = linear(config.width, config.vocabulary_size, "float32", rngs, bias=False)

    def __call__(
        self, text: Encoded, image: Encoded, key: Key[Array, ""] | None = None
    ) -> Float[Array, "batch length width"]:
        """What `head` scores the next words by."""
        visible = _visible(text.tokens.shape[1], text.mask)
        return self.norm(self.blocks(text.tokens, visible, image.tokens, key=key))


def _visible(
    length: int, mask: Bool[AnyArray, "batch length"] | None
) -> Bool[Array, "#batch length length"]:
    """Tokens look at themselves and at those before, and at no padding."""
    before = jnp.tril(jnp.ones((1, length, length), bool))
    return before if mask is None else before & jnp.asarray(mask)[:, None, :]
