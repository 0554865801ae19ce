"""One training step: losses, gradients, update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from mmjax import platform
from mmjax.objectives import Features, Task
from mmjax.objectives.loss import Sum, purpose_key
from mmjax.rules import Rules
from mmjax.sharding import (
    batch_sharding,
    constrain_batch,
    constrain_over_data,
    gather_tables,
    replicated,
)
from mmjax.training.gradients import Batch, check_slices, gradients_of, metric_sums
from mmjax.training.optimizer import at_bounds
from mmjax.training.state import Parameters, TrainState

Metrics = dict[str, Array]

# By platform. On a CPU XLA would order operations so that many could run at once; a step's are
# large enough to share every core each, and ordered so they hold much more memory.
COMPILER_OPTIONS = {"cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}}


def make_train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    rates: Parameters,
    bounds: Rules = (),
    accumulate: int = 1,
    ema_decay: float = 0.0,
    sharded: bool = True,
) -> Callable[[TrainState, Batch, Parameters | None], tuple[TrainState, Metrics]]:
    """The pure function `state, batch, reference -> state, metrics`; see `compile_train_step`.

    `reference` are the parameters of the model that teaches, None where there is none. `rates` are
    the learning-rate factors: parameters at 0 get no gradient. `bounds` are watched here and kept
    by the optimizer. `sharded` says how the state is laid out (see `StateConfig`). With
    `accumulate` > 1 the batch is walked in that many slices and the update is that of the whole
    batch, exactly.

    Raises InputError where an objective compares the tokens of different examples: slices would
    change it.
    """
    check_slices(task, accumulate)
    # Where nobody learns from the average, as where it is for evaluation alone, it encodes nothing.
    teaches = any(objective.needs_average for objective in task.objectives.values())
    frozen = jax.tree.map(lambda rate: rate == 0, rates)

    def train_step(
        state: TrainState, batch: Batch, reference: Parameters | None = None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        batch = jax.tree.map(constrain_batch, dict(batch))

        def features_of(
            params: Parameters, rows: Batch, number: jax.Array | int, **context: Any
        ) -> Features:
            params = jax.tree.map(
                lambda leaf, is_frozen: jax.lax.stop_gradient(leaf) if is_frozen else leaf,
                params,
                frozen,
            )
            return task.features(
                nnx.merge(task.graph, params),
                rows,
                key,
                jax.random.fold_in(purpose_key(key, "dropout"), number),
                step=state.step,
                memory=state.memory,
                average=_merged(task.graph, gather_tables(state.ema)) if teaches else None,
                reference=_merged(task.reference, reference),
                **context,
            )

        gradients, loss, sums, memory = gradients_of(
            features_of, task, state.params, batch, accumulate
        )
        if sharded:
            gradients = constrain_over_data(gradients)
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "gradient_norm": optax.tree.norm(gradients),
            "parameter_norm": optax.tree.norm(params),
            "bad_records": batch["substituted"].sum(),
            **{name: total / jnp.maximum(weight, 1e-9) for name, (total, weight) in sums.items()},
            **at_bounds(bounds, params),
        }
        ema = state.ema
        if ema is not None:
            ema = optax.incremental_update(params, ema, 1 - ema_decay)
        for name, teacher in {"average": ema, "reference": reference}.items():
            if teacher is not None and _shapes(params) == _shapes(teacher):
                metrics[f"{name}/distance"] = _distance(params, teacher)
        return TrainState(state.step + 1, params, opt_state, ema, state.memory | memory), metrics

    return train_step


def make_eval_step(
    task: Task, reference: Parameters | None = None
) -> Callable[..., dict[str, Sum]]:
    """The pure function `model, batch -> (sum, weight)` of every loss and metric, no dropout.

    The masks and negatives it draws depend on the example alone, so that evaluations compare.
    Without the `reference`, what is learnt from it alone is left out.
    """

    def eval_step(model: Any, batch: Batch) -> dict[str, Sum]:
        batch = jax.tree.map(constrain_batch, dict(batch))
        teacher = _merged(task.reference, reference)
        features = task.features(model, batch, jax.random.key(0), reference=teacher)
        return metric_sums(task.losses(features))

    return eval_step


def compile_train_step(
    train_step: Callable[..., tuple[TrainState, Metrics]],
    state: TrainState,
    mesh: Mesh,
    reference: Parameters | None = None,
) -> Any:
    """`jax.jit` with the (abstract) arguments' own shardings, the state's memory donated."""
    shardings, teacher = (jax.tree.map(lambda x: x.sharding, tree) for tree in (state, reference))

    def under_mesh(
        state: TrainState, batch: Batch, reference: Parameters | None
    ) -> tuple[TrainState, Metrics]:
        # Without a mesh in force, `constrain_batch` would do nothing, and say nothing.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return train_step(state, batch, reference)

    return jax.jit(
        under_mesh,
        in_shardings=(shardings, batch_sharding(mesh), teacher),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=COMPILER_OPTIONS.get(platform.current()),
    )


def _merged(graph: nnx.GraphDef | None, params: Parameters | None) -> Any:
    return None if graph is None or params is None else nnx.merge(graph, params)


def _distance(params: Parameters, others: Parameters) -> jax.Array:
    """How far the parameters are from others, relative to their own norm."""
    difference = jax.tree.map(jnp.subtract, params, others)
    return optax.tree.norm(difference) / jnp.maximum(optax.tree.norm(params), 1e-9)


def _shapes(params: Parameters) -> Any:
    return jax.tree.map(jnp.shape, params)
