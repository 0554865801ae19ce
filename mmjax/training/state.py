"""The training state: all that a step needs from the one before it, and all that is saved."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int, Key

from mmjax.models import build_model
from mmjax.sharding import tree_shardings

Parameters = dict[str, Any]
Memory = dict[str, dict[str, jax.Array]]  # of the objectives, by objective and name


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
    ema: Parameters | None  # the moving average of the parameters, which may teach as well
    memory: Memory = field(default_factory=dict)  # queues, and what else objectives remember


@dataclass(frozen=True)
class StateConfig:
    """What a state is made of: the model's config, the update rule, and what goes with them."""

    model: Any
    optimizer: optax.GradientTransformation
    ema: bool = False
    # Whether each device keeps a part of the optimizer's state and of the average alone, also where
    # it keeps all parameters (ZeRO, stage 1).
    sharded: bool = True
    memory: Callable[[], Memory] = dict  # at the start


def graph_of(config: Any) -> nnx.GraphDef:
    """The model's structure without its parameters: what `nnx.merge` needs beside them."""
    return _traced(config)[0]


def abstract_model(config: Any) -> Any:
    """The model with shapes in place of arrays."""
    return nnx.merge(*_traced(config))


@functools.lru_cache(maxsize=4)  # a run asks for it in many places
def _traced(config: Any) -> tuple[nnx.GraphDef, Parameters]:
    graph, state = nnx.split(nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def init_params(config: Any, key: Key[Array, ""]) -> Parameters:
    """Fresh parameters."""
    return nnx.to_pure_dict(nnx.split(build_model(config, nnx.Rngs(key)))[1])


def abstract_params(config: Any, mesh: Mesh) -> Parameters:
    """Shapes, types and shardings of the parameters, without any memory behind them."""
    return _with_shardings(_traced(config)[1], mesh)


def abstract_state(config: StateConfig, mesh: Mesh) -> TrainState:
    """The whole state's shapes, types and shardings."""
    state = jax.eval_shape(_state_builder(config), _traced(config.model)[1])
    return _state_with_shardings(config, state, mesh)


def init_state(config: StateConfig, mesh: Mesh, *, seed: int) -> TrainState:
    """A fresh state, born sharded: no device ever holds more than its part."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    build = _state_builder(config)
    return jax.jit(
        lambda: build(init_params(config.model, jax.random.key(seed))), out_shardings=shardings
    )()


def state_from_params(config: StateConfig, params: Parameters, mesh: Mesh) -> TrainState:
    """A state at step 0 with given parameters."""
    params = jax.device_put(
        params, jax.tree.map(lambda x: x.sharding, _with_shardings(params, mesh))
    )
    build = _state_builder(config)
    abstract = _state_with_shardings(config, jax.eval_shape(build, params), mesh)
    return jax.jit(build, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))(params)


def _state_builder(config: StateConfig) -> Callable[[Parameters], TrainState]:
    def build(params: Parameters) -> TrainState:
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=config.optimizer.init(params),
            ema=jax.tree.map(jnp.copy, params) if config.ema else None,
            memory=config.memory(),
        )

    return build


def _state_with_shardings(config: StateConfig, state: TrainState, mesh: Mesh) -> TrainState:
    laid_out = _with_shardings(state, mesh)
    if not config.sharded:
        return laid_out
    apart = _with_shardings(state, mesh, over_data=True)
    return replace(laid_out, opt_state=apart.opt_state, ema=apart.ema)


def _with_shardings(tree: Any, mesh: Mesh, over_data: bool = False) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        tree_shardings(tree, mesh, over_data=over_data),
    )
