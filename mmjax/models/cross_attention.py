"""Text that looks at a context: at a picture's tokens, or, to answer, at a question's.

BERT layers with a cross-attention between their self-attention and their MLP. ALBEF (Li et al.
2021, section 3.1) has such layers above a text encoder; in BLIP (Li et al. 2022, section 3.1) every
layer of the text encoder and of the decoder is one.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from mmjax.decoding import Cache, cache
from mmjax.layers import Block, LayerConfig, Stack, layer_norm, split_key
from mmjax.models.bert import BertConfig, BertEmbeddings
from mmjax.models.features import Encoded, Fused
from mmjax.models.heads import MaskedLanguageHead


class CrossFusion(nnx.Module):
    """`config.depth` layers in which text tokens look at one another and at the picture.

    With two `pictures` (NLVR2) there are twice as many, in turn for the first and the second.
    """

    def __init__(self, config: LayerConfig, image_width: int, rngs: nnx.Rngs, pictures: int = 1):
        self.config = config
        layer: Any = PairBlock if pictures == 2 else partial(Block, cross=True)
        self.blocks = Stack(
            lambda rngs: layer(config, rngs, context_width=image_width), config, rngs
        )
        pre = config.norm == "pre"
        self.norm = layer_norm(config.width, config.epsilon, config.dtype, rngs) if pre else None

    @property
    def pooled_width(self) -> int:
        """Features of the pooled vector."""
        return self.config.width

    def __call__(
        self,
        image: Encoded,
        text: Encoded,
        key: Key[Array, ""] | None = None,
        image_b: Encoded | None = None,
    ) -> Fused:
        """Fuse row i of the pictures with row i of the texts; [CLS] stands for the pair."""
        pictures = [image] if image_b is None else [image, image_b]
        contexts = [x for picture in pictures for x in (picture.tokens, _key_mask(picture.mask))]
        tokens = self.blocks(text.tokens, _key_mask(text.mask), *contexts, key=key)
        if self.norm is not None:
            tokens = self.norm(tokens)
        return Fused(image_tokens=image.tokens, text_tokens=tokens, pooled=tokens[:, 0])


class PairBlock(nnx.Module):
    """A fusion layer for each of two pictures, with the same keys and values (ALBEF, section 5)."""

    def __init__(self, config: LayerConfig, rngs: nnx.Rngs, context_width: int):
        self.first = Block(config, rngs, cross=True, context_width=context_width)
        self.second = Block(config, rngs, cross=True, context_width=context_width)
        first, second = self.first.cross_attention, self.second.cross_attention
        assert first is not None
        assert second is not None
        second.attention.key, second.attention.value = first.attention.key, first.attention.value

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        mask: Bool[Array, "#batch _ length"] | None,
        image: Float[Array, "batch patches image_width"],
        image_mask: Bool[Array, "#batch _ patches"] | None,
        image_b: Float[Array, "batch patches_b image_width"],
        image_b_mask: Bool[Array, "#batch _ patches_b"] | None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch length width"]:
        """Apply both; `key` draws their dropout."""
        first_key, second_key = split_key(key, 2)
        x = self.first(x, mask, image, image_mask, key=first_key)
        return self.second(x, mask, image_b, image_b_mask, key=second_key)


class CrossBert(nnx.Module):
    """A BERT whose every layer can look at a context. Without one it is a BERT."""

    def __init__(self, config: BertConfig, context_width: int, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = BertEmbeddings(config, rngs)
        self.blocks = Stack(
            lambda rngs: Block(config, rngs, cross=True, context_width=context_width), config, rngs
        )
        pre = config.norm == "pre"
        self.norm = layer_norm(config.width, config.epsilon, config.dtype, rngs) if pre else None

    def __call__(
        self,
        text: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"] | None = None,
        context: Encoded | None = None,
        causal: bool = False,
        key: Key[Array, ""] | None = None,
    ) -> Encoded:
        """Encode token ids; [CLS] is the pooled vector. `causal`: a token sees those before it."""
        key, embedding_key = split_key(key, 2)
        visible, length = _key_mask(mask), text.shape[1]
        if causal:
            before = jnp.tril(jnp.ones((1, length, length), bool))
            visible = before if visible is None else before & visible
        seen = (None, None) if context is None else (context.tokens, _key_mask(context.mask))
        x = self.embeddings(text, mask, key=embedding_key)
        tokens = self.blocks(x, visible, *seen, key=key)
        if self.norm is not None:
            tokens = self.norm(tokens)
        return Encoded(tokens=tokens, mask=mask, pooled=tokens[:, 0])


class BertDecoder(nnx.Module):
    """A `CrossBert` from left to right, and the scores of the next word."""

    def __init__(self, config: BertConfig, context_width: int, rngs: nnx.Rngs):
        self.bert = CrossBert(config, context_width, rngs)
        self.head = MaskedLanguageHead(config.width, config, config.dtype, rngs)

    def __call__(
        self,
        text: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"] | None,
        context: Encoded,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch length words"]:
        """Scores of the word behind each token."""
        tokens = self.bert(text, mask, context, causal=True, key=key).tokens
        return self.head(tokens, self.bert.embeddings)

    def start(self, padding: Int[Array, " batch"], length: int, context: Encoded) -> Cache:
        """The cache before the first token (`mmjax.decoding.Decoder`)."""
        bert = self.bert
        return cache.start(bert.blocks, bert.config, length, padding, context.tokens, context.mask)

    def step(
        self, tokens: Int[Array, "rows tokens"], memory: Cache, at: int | Int[Array, ""]
    ) -> tuple[Float[Array, "rows words"], Cache]:
        """Scores of the word behind the last of the next tokens (`mmjax.decoding.Decoder`)."""
        bert, positions = self.bert, memory.positions(at, tokens.shape[1])
        x = bert.embeddings.normalise(bert.embeddings.sum(tokens, positions=positions))
        x, memory = cache.step(bert.blocks, x, memory, at)
        x = x[:, -1] if bert.norm is None else bert.norm(x[:, -1])
        return self.head(x, bert.embeddings), memory

    def rank(
        self,
        context: Encoded,
        answers: Int[Array, "answers length"],
        answer_mask: Bool[Array, "answers length"],
        top: int,
    ) -> tuple[Int[Array, "batch top"], Float[Array, "batch top"], Float[Array, "batch top"]]:
        """The `top` answers of likeliest first word for each row of the context.

        Returns their numbers, log p of their first word and log p of all their words. What every
        answer begins with ([CLS], [DEC]) is given and counts nowhere.
        """
        batch = context.tokens.shape[0]
        start = jnp.broadcast_to(answers[:1, :1], (batch, 1))
        first = jax.nn.log_softmax(self(start, None, context)[:, 0])[:, answers[:, 1]]
        first, chosen = jax.lax.top_k(first, top)
        text, mask = answers[chosen.reshape(-1)], answer_mask[chosen.reshape(-1)]
        logits = self(text, mask, context.take(jnp.repeat(jnp.arange(batch), top)))
        words = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), text[:, 1:, None], axis=-1)
        whole = jnp.where(mask[:, 1:], words[..., 0], 0).sum(axis=-1)
        return chosen, first, whole.reshape(batch, top)


def _key_mask(mask: Bool[Array, "batch length"] | None) -> Bool[Array, "batch 1 length"] | None:
    return None if mask is None else jnp.asarray(mask)[:, None, :]
