"""Recorded runs of original systems: their weights, inputs, outputs, losses and gradients.

The README beside the files explains every key.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

import mmjax
from mmjax.models.model import Model
from mmjax.weights.families import FAMILIES
from mmjax.weights.names import to_theirs
from tests.records import keep

OUTPUTS, GRADIENTS = 2e-5, 1e-4  # relative to the largest entry, as the README suggests
ROUNDING = 5e-7  # absolute: some gradients are zero but for it, as those of keys' biases

Arrays = dict[str, np.ndarray]


class Recorded:
    """One file of recordings."""

    def __init__(self, path: Path):
        self.case = path.stem.removesuffix("_dev") + "-original"
        self.arrays = np.load(path)
        config = self["cfg" if "cfg" in self.arrays else "config_json"]
        self.config: dict[str, Any] = json.loads(str(config))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def under(self, prefix: str, below: str = "") -> Arrays:
        """The arrays whose names begin with `prefix` and go on with `below`, without the first."""
        names = [name for name in self.arrays.files if name.startswith(prefix + below)]
        return {name.removeprefix(prefix): self.arrays[name] for name in names}

    def check(self, name: str, found: Any, where: Any = ...) -> None:
        """An output or a loss is the recorded one, at the positions `where`."""
        found, expected = np.asarray(found)[where], self[name][where]
        assert_close(found, expected, OUTPUTS, name)
        self._keep(outputs=np.abs(found - expected).max(initial=0) / max(1, np.abs(expected).max()))

    def check_gradients(self, tag: str, found: Arrays) -> None:
        """The gradient by every parameter is the recorded one, zero where none was recorded."""
        full, norms = self.under(f"grad/{tag}/"), self.under(f"gradnorm/{tag}/")
        assert norms
        assert not norms.keys() - found.keys()
        for name, gradient in found.items():
            norm = float(norms.get(name, 0))
            rounding = ROUNDING * gradient.size**0.5
            assert abs(np.linalg.norm(gradient) - norm) <= GRADIENTS * norm + rounding, (tag, name)
            if name in full:
                assert_close(gradient, full[name], GRADIENTS, f"{tag}: {name}")
            if norm > 1e-3:
                self._keep(gradients=abs(np.linalg.norm(gradient) - norm) / norm)

    def _keep(self, **differences: float) -> None:
        keep(self.case, against="recorded original", **differences)


def load(folder: Path, family: str, config: Mapping[str, Any], tensors: Arrays) -> Model:
    """The model of these weights, through a file."""
    # safetensors writes memory as it lies.
    tensors = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    save_file(tensors, folder / "weights.safetensors")
    return mmjax.load(folder / "weights.safetensors", family=family, config=config)


def original_names(model: Model, params: Any) -> Arrays:
    """A tree of the model's parameters, or of gradients by them, under the original names."""
    return to_theirs(FAMILIES[model.family].table(model.config), params)


def run(
    model: Model, loss: Callable[[Model], tuple[jax.Array, Any]]
) -> tuple[jax.Array, Any, Arrays]:
    """A loss, what else the function returns, and the gradient under the original names."""
    graph, state = nnx.split(model)
    function = jax.value_and_grad(lambda params: loss(nnx.merge(graph, params)), has_aux=True)
    (value, others), gradient = jax.jit(function)(nnx.to_pure_dict(state))
    return value, others, original_names(model, gradient)


def assert_close(found: Any, expected: Any, tolerance: float, name: str = "") -> None:
    """Relative to the largest entry of what is expected."""
    assert np.shape(found) == np.shape(expected), name
    atol = tolerance * np.abs(expected).max(initial=0) + ROUNDING
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol, err_msg=name)


def assert_saved_whole(model: Model, folder: Path) -> None:
    """Written and read again, the model is the same, parameter by parameter."""
    mmjax.save_huggingface(model, folder)
    again = mmjax.load(folder)
    assert again.config == model.config
    expected = nnx.to_pure_dict(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(again)), expected)
