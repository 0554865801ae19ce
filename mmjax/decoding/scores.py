"""What is done to the scores of the next token before one is chosen."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmjax.decoding.config import GenerationConfig


def constrain(
    scores: Float[Array, "rows words"],
    text: Int[Array, "rows length"],
    at: Int[Array, ""],
    padding: Int[Array, " rows"],
    config: GenerationConfig,
) -> Float[Array, "rows words"]:
    """Scores of the token at column `at` of a text, under the constraints of `config`.

    Tokens that stand before, from the `padding` on, become less likely (Keskar et al. 2019, CTRL,
    section 4.1), and no text ends below `min_length`.
    """
    if config.repetition_penalty != 1:
        rows, columns = jnp.arange(len(text))[:, None], jnp.arange(text.shape[1])
        written = (columns < at) & (columns >= padding[:, None])
        seen = jnp.zeros(scores.shape, bool).at[rows, text].max(written)
        penalty = config.repetition_penalty
        scores = jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)
    if config.min_length and config.eos_token_id:
        ends = jnp.arange(scores.shape[1])[:, None] == jnp.array(config.eos_token_id)
        scores = jnp.where((at < config.min_length) & ends.any(axis=1), -jnp.inf, scores)
    return scores


def sharpen(
    scores: Float[Array, "rows words"], config: GenerationConfig
) -> Float[Array, "rows words"]:
    """Scores to draw from: unlikely tokens are left out.

    `top_k` is of Fan et al. 2018 (section 5.4), `top_p` of Holtzman et al. 2020 (section 3.1).
    """
    scores = scores / config.temperature
    if 0 < config.top_k < scores.shape[1]:
        least = jax.lax.top_k(scores, config.top_k)[0][:, -1:]
        scores = jnp.where(scores < least, -jnp.inf, scores)
    if config.top_p < 1:
        falling = -jnp.sort(-scores, axis=-1)
        probabilities = jax.nn.softmax(falling)
        # A token stays if those above it fall short of top_p: the likeliest always does.
        short = jnp.cumsum(probabilities, axis=-1) - probabilities < config.top_p
        least = jnp.min(jnp.where(short, falling, jnp.inf), axis=-1, keepdims=True)
        scores = jnp.where(scores < least, -jnp.inf, scores)
    return scores
