"""What sits on top of the features: one small module for each thing that is predicted.

The last layer of each computes in float32 whatever the model does: scores rounded to bfloat16 would
tie, and 3.14 is as near as they get.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mmjax.layers import ACTIVATIONS, layer_norm, linear
from mmjax.models.bert import BertConfig, BertEncoder


class ContrastiveHead(nnx.Module):
    """Projections of both pooled vectors onto one unit sphere, with a learnt scale.

    The scale is stored as its logarithm and starts at 1 / 0.07 (Radford et al. 2021, section 2.5);
    `optimizer.bounds` keeps it below 100 as there.
    """

    def __init__(self, image_width: int, text_width: int, width: int, rngs: nnx.Rngs):
        self.image_projection = linear(image_width, width, "float32", rngs)
        self.text_projection = linear(text_width, width, "float32", rngs)
        self.logit_scale = nnx.Param(jnp.log(jnp.asarray(1 / 0.07, jnp.float32)))

    def image(self, pooled: Float[Array, "batch width"]) -> Float[Array, "batch embedding"]:
        """Unit vectors of pictures, float32."""
        return _unit(self.image_projection(pooled))

    def text(self, pooled: Float[Array, "batch width"]) -> Float[Array, "batch embedding"]:
        """Unit vectors of texts, float32."""
        return _unit(self.text_projection(pooled))

    @property
    def scale(self) -> Float[Array, ""]:
        """What similarities are multiplied by."""
        return jnp.exp(self.logit_scale[...])


class MatchingHead(nnx.Module):
    """Does the text belong to the picture? Two logits, the second for yes."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.classifier = linear(width, 2, "float32", rngs)

    def __call__(self, pooled: Float[Array, "batch width"]) -> Float[Array, "batch 2"]:
        """Logits of no and yes, float32."""
        return self.classifier(pooled)


class MaskedLanguageHead(nnx.Module):
    """Scores of every word at every position, through the encoder's own word table.

    BERT's head (Devlin et al. 2019, appendix A.1): dense, GELU, LayerNorm, tied table, bias.
    """

    def __init__(self, width: int, text: BertConfig, dtype: str, rngs: nnx.Rngs):
        self.transform = linear(width, text.width, dtype, rngs)
        self.norm = layer_norm(text.width, text.epsilon, dtype, rngs)
        self.bias = nnx.Param(jnp.zeros(text.vocabulary_size))

    def __call__(
        self, tokens: Float[Array, "*batch width"], text_encoder: BertEncoder
    ) -> Float[Array, "*batch words"]:
        """Logits of every word, float32."""
        x = self.norm(ACTIVATIONS["gelu"](self.transform(tokens)))
        return text_encoder.logits(x) + self.bias[...]


class AnsweringHead(nnx.Module):
    """Scores of a closed list of answers: dense, LayerNorm, GELU, dense (METER's VQA head)."""

    def __init__(self, width: int, hidden: int, answers: int, dtype: str, rngs: nnx.Rngs):
        self.hidden = linear(width, hidden, dtype, rngs)
        self.norm = layer_norm(hidden, 1e-5, dtype, rngs)
        self.classifier = linear(hidden, answers, "float32", rngs)

    def __call__(self, pooled: Float[Array, "batch width"]) -> Float[Array, "batch answers"]:
        """Logits of every answer, float32."""
        x = ACTIVATIONS["gelu"](self.norm(self.hidden(pooled)))
        return self.classifier(x)


def _unit(x: Float[Array, "batch width"]) -> Float[Array, "batch width"]:
    x = x.astype(jnp.float32)
    # Inside the root, so that the gradient of a zero vector is finite.
    return x / jnp.sqrt(jnp.square(x).sum(axis=-1, keepdims=True) + 1e-12)
