"""The text encoders of contrastive models: CLIP's, left to right, and SigLIP's, both ways."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from mmjax.errors import InputError, near_misses
from mmjax.layers import Block, LayerConfig, Stack, embedding, layer_norm, linear
from mmjax.models.features import Encoded, shifted
from mmjax.sharding import gather_table

POOLS = ("end", "largest", "last")


@dataclass(frozen=True)
class TextTowerConfig(LayerConfig):
    """CLIP: the defaults (Radford et al. 2021, section 2.4).

    SigLIP (Zhai et al. 2023): causal=False, pool='last', head, and the padding attended to.
    """

    epsilon: float = 1e-5
    activation: str = "quick_gelu"

    vocabulary_size: int = 0
    max_length: int = 77
    causal: bool = True  # a token sees those before it
    # Which token stands for the text: the first `end_token`, the one of the largest id (how OpenAI
    # finds the end), or the last, padding or not.
    pool: str = "end"
    end_token: int = 49407
    head: bool = False  # a dense layer on the pooled vector

    def __post_init__(self) -> None:
        """Refuse unknown variants."""
        super().__post_init__()
        if self.pool not in POOLS:
            raise InputError(f"text pool is {self.pool!r}.{near_misses(self.pool, POOLS)}")


class TextTower(nnx.Module):
    """Word and position vectors, pre-norm blocks, a final LayerNorm, and one token's vector."""

    def __init__(self, config: TextTowerConfig, rngs: nnx.Rngs):
        if config.vocabulary_size < 1:
            raise InputError("text.vocabulary_size is 0: give the tokenizer's number of words.")
        self.config = config
        width, dtype = config.width, config.dtype
        self.token_embedding = embedding(config.vocabulary_size, width, dtype, rngs)
        self.position_embedding = embedding(config.max_length, width, dtype, rngs)
        self.blocks = Stack(lambda rngs: Block(config, rngs), config, rngs)
        self.norm = layer_norm(width, config.epsilon, dtype, rngs)
        self.head = linear(width, width, dtype, rngs) if config.head else None

    def __call__(
        self,
        text: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
        shift: Float[Array, "batch length width"] | None = None,
    ) -> Encoded:
        """Encode token ids; `mask` is true on what may be looked at (None: everything).

        `shift` is added to the words' vectors.
        """
        length = text.shape[1]
        if length > self.config.max_length:
            raise InputError(
                f"the text has {length} tokens and the encoder {self.config.max_length} positions: "
                "give it shorter texts."
            )
        table = gather_table(jnp.asarray(self.token_embedding.embedding[...], self.config.dtype))
        x = jnp.take(table, text, axis=0) + self.position_embedding(jnp.arange(length))
        x = shifted(x, shift)
        tokens = self.norm(self.blocks(x, self._visible(length, mask), key=key))
        pooled = self._pool(text, tokens)
        return Encoded(tokens, mask, pooled if self.head is None else self.head(pooled))

    def _visible(self, length, mask):
        visible = None if mask is None else mask[:, None, :]
        if not self.config.causal:
            return visible
        causal = jnp.tril(jnp.ones((1, length, length), bool))
        return causal if visible is None else causal & visible

    def _pool(
        self, text: Int[Array, "batch length"], tokens: Float[Array, "batch length width"]
    ) -> Float[Array, "batch width"]:
        if self.config.pool == "last":
            return tokens[:, -1]
        is_end = text == self.config.end_token if self.config.pool == "end" else text
        return jnp.take_along_axis(tokens, is_end.argmax(axis=1)[:, None, None], axis=1)[:, 0]
