"""What sits on top of the features: one small module for each thing that is predicted.

The last layer of each computes in float32 whatever the model does: scores rounded to bfloat16 would
tie, and 3.14 is as near as they get.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mmjax.layers import ACTIVATIONS, embedding, layer_norm, linear
from mmjax.models.bert import BertConfig, BertEmbeddings


@dataclass(frozen=True)
class ContrastiveConfig:
    """How the vectors of two encoders are compared. The defaults are CLIP's, but for its biases."""

    width: int = 512  # of the space they meet in
    project_image: bool = True  # false: the encoder's vector as it is
    project_text: bool = True
    text_token: bool = False  # the text's first token (ALIGN), not its pooled vector
    bias: bool = True  # of the projections
    logit_bias: bool = False  # a learnt number added to every similarity (SigLIP)
    scale: bool = True  # false: cosines as they are (BLIP in `transformers`)
    factor: float = 1 / 0.07  # where a learnt factor starts, which is stored as its log (SigLIP 10)
    # Where a learnt number to divide by starts (ALIGN 1, ALBEF 0.07); 0: the log of a factor.
    temperature: float = 0.0


class ContrastiveHead(nnx.Module):
    """Projections of both pooled vectors onto one unit sphere, with a learnt scale.

    The scale is stored as its logarithm and starts at 1 / 0.07 (Radford et al. 2021, section 2.5);
    `optimizer.bounds` keeps it below 100 as there. ALIGN (Jia et al. 2021) stores a divisor.
    """

    def __init__(
        self, image_width: int, text_width: int, config: ContrastiveConfig, rngs: nnx.Rngs
    ):
        self.width = config.width

        def projection(inputs: int) -> nnx.LinearGeneral:
            return linear(inputs, config.width, "float32", rngs, config.bias)

        self.image_projection = projection(image_width) if config.project_image else None
        self.text_projection = projection(text_width) if config.project_text else None
        divides = config.scale and config.temperature > 0
        self.temperature: Any = (
            nnx.Param(jnp.asarray(config.temperature, jnp.float32)) if divides else None
        )
        self.logit_scale = (
            nnx.Param(jnp.log(jnp.asarray(config.factor, jnp.float32)))
            if config.scale and not divides
            else None
        )
        self.logit_bias = nnx.Param(jnp.asarray(-10.0)) if config.logit_bias else None

    def image(self, pooled: Float[Array, "*batch width"]) -> Float[Array, "*batch embedding"]:
        """Unit vectors of pictures, or of their tokens, float32."""
        return unit(self.project_image(pooled))

    def text(self, pooled: Float[Array, "*batch width"]) -> Float[Array, "*batch embedding"]:
        """Unit vectors of texts, or of their tokens, float32."""
        return unit(self.project_text(pooled))

    def project_image(
        self, pooled: Float[Array, "*batch width"]
    ) -> Float[Array, "*batch embedding"]:
        """Vectors of pictures before they are brought to unit length."""
        return pooled if self.image_projection is None else self.image_projection(pooled)

    def project_text(
        self, pooled: Float[Array, "*batch width"]
    ) -> Float[Array, "*batch embedding"]:
        """Vectors of texts before they are brought to unit length."""
        return pooled if self.text_projection is None else self.text_projection(pooled)

    def logits(
        self,
        images: Float[Array, "pictures embedding"],
        texts: Float[Array, "texts embedding"],
    ) -> Float[Array, "pictures texts"]:
        """Scaled similarities of unit vectors.

        At full float32 precision: a TPU would round the factors to bfloat16, and the scale makes
        tenths of a logit of that.
        """
        cosines = jnp.matmul(images, texts.T, precision=jax.lax.Precision.HIGHEST)
        return self.scale * cosines + self.offset

    def outputs(
        self,
        image_pooled: Float[Array, "pictures image_width"],
        text_pooled: Float[Array, "texts text_width"],
    ) -> dict[str, Array]:
        """What the head says of a batch, under Hugging Face's names."""
        images, texts = self.image(image_pooled), self.text(text_pooled)
        return {
            "image_embeds": images,
            "text_embeds": texts,
            "logits_per_image": self.logits(images, texts),
        }

    @property
    def scale(self) -> Float[Array, ""]:
        """What similarities are multiplied by."""
        if self.temperature is not None:
            return 1 / self.temperature[...]
        return jnp.ones(()) if self.logit_scale is None else jnp.exp(self.logit_scale[...])

    @property
    def offset(self) -> Float[Array, ""]:
        """What is added to them then."""
        return jnp.zeros(()) if self.logit_bias is None else self.logit_bias[...]


class MatchingHead(nnx.Module):
    """Does the text belong to the picture? Two logits, the second for yes."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.classifier = linear(width, 2, "float32", rngs)

    def __call__(self, pooled: Float[Array, "batch width"]) -> Float[Array, "batch 2"]:
        """Logits of no and yes, float32."""
        return self.classifier(pooled)


class MaskedLanguageHead(nnx.Module):
    """Scores of every word at every position, through the encoder's own word table.

    BERT's head (Devlin et al. 2019, appendix A.1): dense, activation, LayerNorm, tied table, bias.
    With `tied=False` (ViLT, METER, FLAVA) the head has a table of its own.
    """

    def __init__(self, width: int, text: BertConfig, dtype: str, rngs: nnx.Rngs, tied: bool = True):
        self.activation = text.activation
        self.transform = linear(width, text.width, dtype, rngs)
        self.norm = layer_norm(text.width, text.epsilon, dtype, rngs)
        self.decoder = (
            None if tied else embedding(text.vocabulary_size, text.width, "float32", rngs)
        )
        self.bias = nnx.Param(jnp.zeros(text.vocabulary_size))

    def __call__(
        self, tokens: Float[Array, "*batch width"], embeddings: BertEmbeddings
    ) -> Float[Array, "*batch words"]:
        """Logits of every word, float32."""
        x = self.norm(ACTIVATIONS[self.activation](self.transform(tokens)))
        scores = embeddings.logits(x) if self.decoder is None else self.decoder.attend(x)
        return scores + self.bias[...]


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


class MlpHead(nnx.Module):
    """Scores of a closed list: dense, activation, LayerNorm where it has an epsilon, dense."""

    def __init__(
        self,
        width: int,
        hidden: int,
        outputs: int,
        dtype: str,
        rngs: nnx.Rngs,
        activation: str = "gelu",
        epsilon: float = 0.0,  # 0: no LayerNorm
    ):
        self.activation = activation
        self.hidden = linear(width, hidden, dtype, rngs)
        self.norm = layer_norm(hidden, epsilon, dtype, rngs) if epsilon else None
        self.classifier = linear(hidden, outputs, "float32", rngs)

    def __call__(self, features: Float[Array, "*batch width"]) -> Float[Array, "*batch outputs"]:
        """Logits, float32."""
        x = ACTIVATIONS[self.activation](self.hidden(features))
        return self.classifier(x if self.norm is None else self.norm(x))


def unit(x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    """Vectors of length 1, float32."""
    x = x.astype(jnp.float32)
    # Inside the root, so that the gradient of a zero vector is finite.
    return x / jnp.sqrt(jnp.square(x).sum(axis=-1, keepdims=True) + 1e-12)
