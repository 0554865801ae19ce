"""The BERT encoder (Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional …")."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from mmjax.errors import InputError, near_misses
from mmjax.layers import (
    Block,
    LayerConfig,
    Stack,
    embedding,
    layer_norm,
    linear,
    look_up,
    split_key,
)
from mmjax.models.features import Encoded, shifted
from mmjax.sharding import gather_table

# width, depth, heads, MLP width: the paper's section 3, and Turc et al. 2019 for the small ones.
SIZES = {
    "tiny": (128, 2, 2, 512),
    "mini": (256, 4, 4, 1024),
    "small": (512, 4, 8, 2048),
    "medium": (512, 8, 8, 2048),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
}


@dataclass(frozen=True)
class BertConfig(LayerConfig):
    """A BERT by name (`size='base'`) or by explicit widths; a width given beside a name wins."""

    norm: str = "post"
    epsilon: float = 1e-12

    size: str = ""
    vocabulary_size: int = 0  # 0: the tokenizer's, filled in when a run starts
    max_length: int = 512  # of the position table
    first_position: int = 0  # RoBERTa counts from 2, and padding stands at the position before
    padding: int = -1  # id of [PAD], whose vector then stays as it is; -1: trained like any other
    types: int = 2  # rows of the token-type table; 0: no such table (BLIP)
    pooler: bool = False  # a dense layer and tanh on the pooled vector

    def __post_init__(self) -> None:
        """Fill widths from the named size."""
        if self.size:
            if self.size not in SIZES:
                raise InputError(
                    f"text size {self.size!r} is unknown.{near_misses(self.size, SIZES)}"
                )
            self.fill_widths(*SIZES[self.size])
        super().__post_init__()


class BertEmbeddings(nnx.Module):
    """The sum of word, position and type vectors, normalised."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        if config.vocabulary_size < 1:
            raise InputError(
                "model.text.vocabulary_size is 0: give the tokenizer's number of words."
            )
        self.config = config
        width, dtype = config.width, config.dtype
        self.token_embedding = embedding(config.vocabulary_size, width, dtype, rngs)
        self.position_embedding = embedding(config.max_length, width, dtype, rngs)
        self.type_embedding: Any = (
            embedding(config.types, width, dtype, rngs) if config.types else None
        )
        self.norm = layer_norm(width, config.epsilon, dtype, rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(
        self,
        text: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"] | None = None,
        types: Int[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
        shift: Float[Array, "batch length width"] | None = None,
    ) -> Float[Array, "batch length width"]:
        """Embed token ids; `mask` is true on tokens, and only RoBERTa's positions ask for it.

        `shift` is added to the words' vectors.
        """
        return self.normalise(shifted(self.sum(text, mask, types), shift), key)

    def sum(
        self,
        text: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"] | None = None,
        types: Int[Array, "batch length"] | None = None,
        positions: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length width"]:
        """Word, position and type vectors, summed: what some models add to before `normalise`.

        `positions` are those of tokens that do not stand one after another from the first on.
        """
        x = look_up(self.table(), text, self.config.padding)
        if self.type_embedding is not None:
            x = x + self.type_embedding(jnp.zeros_like(text) if types is None else types)
        positions = self._positions(text, mask) if positions is None else positions
        table = self.position_embedding.embedding[...].astype(x.dtype)
        return x + look_up(table, positions, self.config.first_position - 1)

    def normalise(
        self, x: Float[Array, "batch length width"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "batch length width"]:
        """LayerNorm, then dropout."""
        return self.dropout(self.norm(x), deterministic=key is None, rngs=key)

    def logits(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch words"]:
        """Scores of every word by the embedding table itself (tied output weights), in float32."""
        table = self.table().astype(x.dtype)
        return jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)

    def table(self) -> Float[Array, "words width"]:
        """The vectors of all words."""
        return gather_table(self.token_embedding.embedding[...].astype(self.config.dtype))

    def _positions(self, text, mask):
        first, length = self.config.first_position, text.shape[1]
        if first + length > self.config.max_length:
            raise InputError(
                f"the text has {length} tokens and the encoder {self.config.max_length - first} "
                "positions: lower data.text_length or raise model.text.max_length."
            )
        if not first:
            return jnp.arange(length)
        mask = text != self.config.padding if mask is None else mask
        return jnp.where(mask, first - 1 + jnp.cumsum(mask, axis=1), first - 1)


class BertEncoder(nnx.Module):
    """Embeddings, then Transformer layers; [CLS] is the pooled vector.

    Post-norm as published, or pre-norm (`norm='pre'`, with a final LayerNorm), which trains from
    scratch with less care.
    """

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        self.config = config
        width, dtype = config.width, config.dtype
        self.embeddings = BertEmbeddings(config, rngs)
        self.blocks = Stack(lambda rngs: Block(config, rngs), config, rngs)
        pre = config.norm == "pre"
        self.norm = layer_norm(width, config.epsilon, dtype, rngs) if pre else None
        self.pooler = linear(width, width, dtype, rngs) if config.pooler else None

    def __call__(
        self,
        text: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"] | None = None,
        types: Int[Array, "batch length"] | None = None,
        key: Key[Array, ""] | None = None,
        shift: Float[Array, "batch length width"] | None = None,
    ) -> Encoded:
        """Encode token ids; `mask` is true on tokens, false on padding (None: all are tokens).

        `shift` is added to the words' vectors.
        """
        key, embedding_key = split_key(key, 2)
        x = self.embeddings(text, mask, types, embedding_key, shift)
        tokens = self.blocks(x, None if mask is None else mask[:, None, :], key=key)
        if self.norm is not None:
            tokens = self.norm(tokens)
        pooled = tokens[:, 0]
        if self.pooler is not None:
            pooled = jnp.tanh(self.pooler(pooled))
        return Encoded(tokens=tokens, mask=mask, pooled=pooled)
