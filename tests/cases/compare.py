"""What a comparison compares: outputs, gradients of one scalar, weights written back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax.models.model import Model


def flat(outputs: Any, prefix: str = "") -> dict[str, Any]:
    """Nested outputs by dotted name."""
    leaves: dict[str, Any] = {}
    for name, value in outputs.items():
        if hasattr(value, "items"):
            leaves |= flat(value, f"{prefix}{name}.")
        elif value is not None:
            leaves[prefix + name] = value
    return leaves


def run(model: Model, inputs: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The outputs, under true float32 products."""
    with jax.default_matmul_precision("highest"):
        return flat(model(**inputs))


def cotangent(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights with which an output enters the scalar that gradients are taken of."""
    seed = sum(name.encode()) + 1000 * len(shape)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def gradients(model: Model, inputs: dict[str, np.ndarray], names: list[str]) -> Model:
    """The gradient of the outputs `names`, weighted at random, as a model of the same shape."""
    graph, state = nnx.split(model)

    def scalar(params):
        outputs = flat(nnx.merge(graph, params)(**inputs))
        return sum(jnp.vdot(outputs[n], cotangent(n, outputs[n].shape)) for n in names)

    with jax.default_matmul_precision("highest"):
        return nnx.merge(graph, jax.jit(jax.grad(scalar))(nnx.to_pure_dict(state)))
