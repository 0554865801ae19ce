"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners")."""

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from mmjax.decoding import Cache, Generated, GenerationConfig, cache, generate
from mmjax.errors import InputError, near_misses
from mmjax.layers import Block, LayerConfig, Stack, embedding, layer_norm, split_key
from mmjax.models.features import AnyArray, Encoded
from mmjax.models.model import Model
from mmjax.sharding import gather_table

# width, depth, heads, MLP width: the paper's table 2.
SIZES = {
    "small": (768, 12, 12, 3072),
    "medium": (1024, 24, 16, 4096),
    "large": (1280, 36, 20, 5120),
    "xl": (1600, 48, 25, 6400),
}


@dataclass(frozen=True)
class GPT2Config(LayerConfig):
    """A GPT-2 by name (`size='small'`) or by explicit widths; a width given beside a name wins."""

    epsilon: float = 1e-5
    activation: str = "gelu_tanh"

    size: str = ""
    vocabulary_size: int = 0
    max_length: int = 1024  # of the position table

    def __post_init__(self) -> None:
        """Fill widths from the named size."""
        if self.size:
            if self.size not in SIZES:
                raise InputError(
                    f"text size {self.size!r} is unknown.{near_misses(self.size, SIZES)}"
                )
            self.fill_widths(*SIZES[self.size])
        super().__post_init__()
        if self.vocabulary_size < 1:
            raise InputError("text.vocabulary_size is 0: give the tokenizer's number of words.")


class GPT2(nnx.Module):
    """Word and position vectors, pre-norm blocks that look back, a final LayerNorm, word scores.

    With `cross`, every block looks at a context as well, of the same width.
    """

    def __init__(self, config: GPT2Config, rngs: nnx.Rngs, cross: bool = False):
        self.config = config
        width, dtype = config.width, config.dtype
        self.token_embedding = embedding(config.vocabulary_size, width, dtype, rngs)
        self.position_embedding = embedding(config.max_length, width, dtype, rngs)
        self.dropout = nnx.Dropout(config.dropout)
        self.blocks = Stack(lambda rngs: Block(config, rngs, cross), config, rngs)
        self.norm = layer_norm(width, config.epsilon, dtype, rngs)

    @property
    def max_length(self) -> int:
        """The longest text that there are positions for (`mmjax.decoding.Decoder`)."""
        return self.config.max_length

    def __call__(
        self,
        text: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"] | None = None,
        context: Encoded | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch length words"]:
        """Scores of the word behind each; `mask` is true on tokens, false on padding."""
        length = text.shape[1]
        if length > self.config.max_length:
            raise InputError(
                f"the text has {length} tokens and the decoder {self.config.max_length} positions: "
                "give it shorter texts."
            )
        key, embedding_key = split_key(key, 2)
        x = self._embed(text, jnp.arange(length))
        x = self.dropout(x, deterministic=key is None, rngs=embedding_key)
        visible = jnp.tril(jnp.ones((1, length, length), bool))
        visible = visible if mask is None else visible & mask[:, None, :]
        seen = context_mask = None
        if context is not None:
            seen = context.tokens
            context_mask = None if context.mask is None else jnp.asarray(context.mask)[:, None, :]
        return self._logits(self.blocks(x, visible, seen, context_mask, key=key))

    def start(
        self, padding: Int[Array, " batch"], length: int, context: Encoded | None = None
    ) -> Cache:
        """The cache before the first token (`mmjax.decoding.Decoder`)."""
        seen = () if context is None else (context.tokens, context.mask)
        return cache.start(self.blocks, self.config, length, padding, *seen)

    def step(
        self, tokens: Int[Array, "rows tokens"], memory: Cache, at: int | Int[Array, ""]
    ) -> tuple[Float[Array, "rows words"], Cache]:
        """Scores of the word behind the last of the next tokens (`mmjax.decoding.Decoder`)."""
        x = self._embed(tokens, memory.positions(at, tokens.shape[1]))
        x, memory = cache.step(self.blocks, x, memory, at)
        return self._logits(x[:, -1]), memory

    def _embed(self, text, positions):
        return jnp.take(self._table(), text, axis=0) + self.position_embedding(positions)

    def _logits(self, x):
        """By the table of words itself, in float32."""
        return jnp.einsum(
            "...d,vd->...v", self.norm(x), self._table(), preferred_element_type=jnp.float32
        )

    def _table(self):
        return gather_table(self.token_embedding.embedding[...].astype(self.config.dtype))


@dataclass(frozen=True)
class LanguageModelConfig:
    """A GPT-2 on its own, and how it generates where a call does not say."""

    text: GPT2Config
    generation: GenerationConfig = field(default_factory=GenerationConfig)


class LanguageModel(Model):
    """Scores of the next word, and continuations: GPT2LMHeadModel."""

    def __init__(self, config: LanguageModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.text = GPT2(config.text, rngs)

    def forward(
        self,
        text: Int[Array, "batch length"],
        text_mask: Bool[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """`logits [B,L,V]` of the word behind each; tokens are numbered from the first column."""
        return {"logits": self.text(text, text_mask, key=key)}

    def generate(
        self,
        text: Int[AnyArray, "batch length"],
        text_mask: Bool[AnyArray, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
        **options: Any,
    ) -> Generated:
        """The texts and their continuations; `options` are fields of `GenerationConfig`.

        Texts of several lengths are padded on the left, and are numbered from their first token.
        """
        config = self.config.generation.changed(options)
        return generate(self.text, config, text, text_mask, key)
