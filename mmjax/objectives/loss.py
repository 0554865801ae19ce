"""What an objective returns, and what draws its random numbers."""

import zlib
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

Sum = tuple[Float[Array, ""], Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Loss:
    """A sum over the global batch and its weight: sums add up over devices and micro-batches."""

    total: Float[Array, ""]
    weight: Float[Array, ""]
    metrics: dict[str, Sum] = field(default_factory=dict)  # likewise (sum, weight) by name
    # What the objective remembers for the next step, by name; see `Objective.memory`.
    memory: dict[str, Array] = field(default_factory=dict)
    # The scores that the loss was made of, [..., classes], and each row's weight. Adversarial
    # training keeps those of perturbed inputs near to those of clean ones.
    scores: tuple[Float[Array, "*rows classes"], Float[Array, "*rows"]] | None = None


def weighted(values: Shaped[Array, "*shape"], weights: Shaped[Array, "*shape"]) -> Sum:
    """The weighted sum of `values` and the sum of the weights."""
    weights = jnp.asarray(weights, jnp.float32)
    return (values * weights).sum(), weights.sum()


def cross_entropy(
    logits: Float[Array, "*rows classes"], labels: Int[Array, "*rows"]
) -> Float[Array, "*rows"]:
    """-log softmax at each row's label. A label below 0 is none: its row is not to be counted."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]


def purpose_key(key: Key[Array, ""], purpose: str) -> Key[Array, ""]:
    """A key for one named purpose of a step: never carried on, so nothing depends on an order."""
    return jax.random.fold_in(key, zlib.crc32(purpose.encode()) & 0x7FFFFFFF)


def example_keys(key: Key[Array, ""], index: Int[Array, " batch"]) -> Key[Array, " batch"]:
    """A key for each example, by its number in the data set: rows may be dealt out anyhow."""
    return jax.vmap(lambda number: jax.random.fold_in(key, number))(index)
