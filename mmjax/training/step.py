"""One training step: losses, gradients, update."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from mmjax.errors import InputError
from mmjax.models import VisionLanguageModel
from mmjax.objectives import Loss, Objective, compute_losses, total_loss
from mmjax.objectives.loss import Sum, purpose_key
from mmjax.sharding import batch_sharding, constrain_batch, replicated
from mmjax.training.state import Parameters, TrainState

Batch = Mapping[str, Array]
Metrics = dict[str, Array]


def make_train_step(
    graph: nnx.GraphDef,
    objectives: tuple[Objective, ...],
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    rates: Parameters,
    accumulate: int = 1,
    ema_decay: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The pure function `state, batch -> state, metrics`; compile it with `compile_train_step`.

    `rates` are the learning-rate factors: parameters at 0 get no gradient. With `accumulate` > 1
    the batch is walked in that many slices and the update is that of the whole batch, exactly.

    Raises InputError where an objective compares the examples of a batch: slices would change it.
    """
    if accumulate > 1 and (whole := [o.name for o in objectives if o.whole_batch]):
        raise InputError(
            f"optimizer.accumulate = {accumulate}: {' and '.join(whole)} compare every example of "
            "the global batch with the others, and slices of it would have fewer negatives, which "
            "is another loss. Set optimizer.accumulate to 1 and lower batch_size, raise the number "
            "of devices, or set model.*.remat to 'full' to save memory."
        )
    frozen = jax.tree.map(lambda rate: rate == 0, rates)

    def losses_of(
        params: Parameters, batch: Batch, key: jax.Array, slice_number: jax.Array
    ) -> dict[str, Loss]:
        params = jax.tree.map(
            lambda leaf, is_frozen: jax.lax.stop_gradient(leaf) if is_frozen else leaf,
            params,
            frozen,
        )
        dropout_key = jax.random.fold_in(purpose_key(key, "dropout"), slice_number)
        return compute_losses(objectives, nnx.merge(graph, params), batch, key, dropout_key)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        batch = jax.tree.map(constrain_batch, dict(batch))
        gradients, loss, sums = _gradients(
            lambda params, slice_, number: losses_of(params, slice_, key, number),
            objectives,
            state.params,
            batch,
            accumulate,
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = optax.incremental_update(params, ema, 1 - ema_decay)
        metrics = {
            "loss": loss,
            "gradient_norm": optax.tree.norm(gradients),
            "parameter_norm": optax.tree.norm(params),
            "bad_records": batch["substituted"].sum(),
            **{name: total / jnp.maximum(weight, 1e-9) for name, (total, weight) in sums.items()},
        }
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    return train_step


def make_eval_step(
    objectives: tuple[Objective, ...],
) -> Callable[[VisionLanguageModel, Batch], dict[str, Sum]]:
    """The pure function `model, batch -> (sum, weight)` of every loss and metric, no dropout.

    The masks and negatives it draws depend on the example alone, so that evaluations compare.
    """

    def eval_step(model: VisionLanguageModel, batch: Batch) -> dict[str, Sum]:
        batch = jax.tree.map(constrain_batch, dict(batch))
        return metric_sums(compute_losses(objectives, model, batch, jax.random.key(0)))

    return eval_step


def compile_train_step(
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    state: TrainState,
    mesh: Mesh,
) -> Any:
    """`jax.jit` with the (abstract) state's own shardings, its memory donated to the next."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def under_mesh(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # Without a mesh in force, `constrain_batch` would do nothing, and say nothing.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return train_step(state, batch)

    return jax.jit(
        under_mesh,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def _gradients(
    losses_of: Callable[[Parameters, Batch, jax.Array], dict[str, Loss]],
    objectives: tuple[Objective, ...],
    params: Parameters,
    batch: Batch,
    accumulate: int,
) -> tuple[Parameters, jax.Array, dict[str, Sum]]:
    """Gradients of the whole batch's loss, the loss, and the sums of every metric.

    `losses_of(params, slice of the batch, number of the slice)`.
    """

    def loss_of(params, slice_, number, weights):
        losses = losses_of(params, slice_, number)
        return total_loss(objectives, losses, weights or _weights(losses)), metric_sums(losses)

    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    if accumulate == 1:
        (loss, sums), gradients = value_and_grad(params, batch, 0, None)
        return gradients, loss, sums

    # Interleaved slices, so that every device keeps its own rows in each of them.
    slices = jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1), batch
    )
    walk = (slices, jnp.arange(accumulate))
    # Each sum is divided by its weight over the whole batch, so the weights come first. They do not
    # depend on the model: the compiler drops everything else from this walk.
    weights_of_slices = jax.lax.map(lambda part: _weights(losses_of(params, *part)), walk)
    weights = jax.tree.map(lambda x: x.sum(axis=0), weights_of_slices)

    def add(carry, part):
        (loss, sums), gradients = value_and_grad(params, *part, weights)
        return jax.tree.map(jnp.add, carry, (gradients, loss, sums)), None

    # From zeros, not from the first slice: the program then holds one copy of the model.
    part = jax.tree.map(lambda x: x[0], walk)
    shapes = jax.eval_shape(value_and_grad, params, *part, weights)
    (loss, sums), gradients = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (gradients, loss, sums), _ = jax.lax.scan(add, (gradients, loss, sums), walk)
    return gradients, loss, sums


def metric_sums(losses: Mapping[str, Loss]) -> dict[str, Sum]:
    """(sum, weight) of every loss and metric, by name."""
    sums: dict[str, Any] = {}
    for name, loss in losses.items():
        sums[f"{name}/loss"] = (loss.total, loss.weight)
        sums |= loss.metrics
    return sums


def _weights(losses: Mapping[str, Loss]) -> dict[str, jax.Array]:
    return {name: jnp.maximum(loss.weight, 1e-9) for name, loss in losses.items()}
