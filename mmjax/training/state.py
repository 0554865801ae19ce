"""The training state: all that a step needs from the one before it, and all that is saved."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from mmjax.models import ModelConfig, VisionLanguageModel
from mmjax.sharding import tree_shardings

Parameters = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Parameters and what goes with them, as plain nested dicts of arrays.

    There is no random key in it: randomness is folded from (seed, step, purpose) and the example.
    The step is also the data's position: the number of global batches consumed.
    """

    step: Int[Array, ""]
    params: Parameters
    opt_state: optax.OptState
    ema: Parameters | None


def graph_of(config: ModelConfig) -> nnx.GraphDef:
    """The model's structure without its parameters: what `nnx.merge` needs beside them."""
    return nnx.split(nnx.eval_shape(lambda: VisionLanguageModel(config, nnx.Rngs(0))))[0]


def init_params(config: ModelConfig, key: Key[Array, ""]) -> Parameters:
    """Fresh parameters."""
    return nnx.to_pure_dict(nnx.split(VisionLanguageModel(config, nnx.Rngs(key)))[1])


def abstract_params(config: ModelConfig, mesh: Mesh) -> Parameters:
    """Shapes, types and shardings of the parameters, without any memory behind them."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return _with_shardings(shapes, mesh)


def abstract_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, *, ema: bool
) -> TrainState:
    """The whole state's shapes, types and shardings."""
    return _with_shardings(jax.eval_shape(_initialise(config, optimizer, ema)), mesh)


def init_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    seed: int,
    ema: bool,
) -> TrainState:
    """A fresh state, born sharded: no device ever holds more than its part."""
    abstract = abstract_state(config, optimizer, mesh, ema=ema)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    initialise = jax.jit(_initialise(config, optimizer, ema, seed), out_shardings=shardings)
    return initialise()


def state_from_params(
    params: Parameters, optimizer: optax.GradientTransformation, mesh: Mesh, *, ema: bool
) -> TrainState:
    """A state at step 0 with given parameters."""
    params = jax.device_put(
        params, jax.tree.map(lambda x: x.sharding, _with_shardings(params, mesh))
    )
    build = _state_builder(optimizer, ema)
    abstract = _with_shardings(jax.eval_shape(build, params), mesh)
    return jax.jit(build, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))(params)


def _initialise(
    config: ModelConfig, optimizer: optax.GradientTransformation, ema: bool, seed: int = 0
) -> Callable[[], TrainState]:
    build = _state_builder(optimizer, ema)
    return lambda: build(init_params(config, jax.random.key(seed)))


def _state_builder(
    optimizer: optax.GradientTransformation, ema: bool
) -> Callable[[Parameters], TrainState]:
    def build(params: Parameters) -> TrainState:
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            ema=jax.tree.map(jnp.copy, params) if ema else None,
        )

    return build


def _with_shardings(tree: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        tree_shardings(tree, mesh),
    )
