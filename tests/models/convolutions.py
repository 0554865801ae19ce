"""Convolution and batch norm in plain numpy, float64: what ours are held against."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax.rules import path_name
from tests.models import reference

ACTIVATIONS = {
    "": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": reference.gelu,
}


def split(make: Callable[[], nnx.Module], seed: int = 0) -> tuple[nnx.GraphDef, reference.Tree]:
    """The module's structure and random parameters, variances positive."""
    graph, params = reference.split(make, seed)
    return graph, jax.tree_util.tree_map_with_path(
        lambda path, x: 0.5 + jnp.abs(x) if path_name(path).endswith("/var") else x, params
    )


def convolve(x: np.ndarray, kernel: np.ndarray, stride: int, before: int, after: int) -> np.ndarray:
    """Kernel [k, k, 1, C] is applied to each channel by itself, [k, k, C, O] to all."""
    x = np.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    size, depthwise = len(kernel), kernel.shape[2] == 1 and x.shape[3] > 1
    height, width = ((side - size) // stride + 1 for side in x.shape[1:3])
    out = np.zeros((len(x), height, width, kernel.shape[3]))
    for i, j in np.ndindex(height, width):
        window = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
        if depthwise:
            out[:, i, j] = (window * kernel[:, :, 0]).sum(axis=(1, 2))
        else:
            out[:, i, j] = np.einsum("bhwc,hwco->bo", window, kernel)
    return out


def normed_convolution(
    x: np.ndarray,
    p: reference.Tree,
    epsilon: float,
    activation: str = "",
    stride: int = 1,
    padding: tuple[int, int] | None = None,
) -> np.ndarray:
    """Convolution, stored statistics (Ioffe and Szegedy 2015, algorithm 2), activation."""
    kernel, norm = p["convolution"]["kernel"], p["norm"]
    before, after = padding or (len(kernel) // 2, len(kernel) // 2)
    x = convolve(x, kernel, stride, before, after)
    x = (x - norm["mean"]) / np.sqrt(norm["var"] + epsilon) * norm["scale"] + norm["bias"]
    return ACTIVATIONS[activation](x)


def layer(stack: reference.Tree, index: int) -> reference.Tree:
    """One layer's parameters out of a stage's."""
    if index == 0:
        return stack["first"]
    return jax.tree.map(lambda x: x[index - 1], stack["rest"]["layers"])
