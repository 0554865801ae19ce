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
from mmjax.objectives import Loss, Task
from mmjax.objectives.adversarial import Shifts, adversarial_gradients, scores_of, zero_shifts
from mmjax.objectives.loss import Sum, purpose_key
from mmjax.rules import Rules
from mmjax.sharding import batch_sharding, constrain_batch, replicated
from mmjax.training.optimizer import at_bounds
from mmjax.training.state import Memory, Parameters, TrainState

Batch = Mapping[str, Array]
Metrics = dict[str, Array]


def make_train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    rates: Parameters,
    bounds: Rules = (),
    accumulate: int = 1,
    ema_decay: float = 0.0,
) -> Callable[[TrainState, Batch, Parameters | None], tuple[TrainState, Metrics]]:
    """The pure function `state, batch, reference -> state, metrics`; see `compile_train_step`.

    `reference` are the parameters of the model that teaches, None where there is none. `rates` are
    the learning-rate factors: parameters at 0 get no gradient. `bounds` are watched here and kept
    by the optimizer. With `accumulate` > 1 the batch is walked in that many slices and the update
    is that of the whole batch, exactly.

    Raises InputError where an objective compares the examples of a batch: slices would change it.
    """
    whole = [name for name, objective in task.objectives.items() if objective.compares_examples]
    if accumulate > 1 and whole:
        raise InputError(
            f"optimizer.accumulate = {accumulate}: {' and '.join(whole)} compare every example of "
            "the global batch with the others, and slices of it would have fewer negatives, which "
            "is another loss. Set optimizer.accumulate to 1 and lower batch_size, raise the number "
            "of devices, or set model.*.remat to 'full' to save memory."
        )
    if accumulate > 1 and task.adversarial.steps:
        raise InputError(
            f"optimizer.accumulate is {accumulate} and adversarial.steps {task.adversarial.steps}: "
            "adversarial training walks the batch as a whole. Set one of them off."
        )
    frozen = jax.tree.map(lambda rate: rate == 0, rates)

    def train_step(
        state: TrainState, batch: Batch, reference: Parameters | None = None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        batch = jax.tree.map(constrain_batch, dict(batch))

        def losses_of(
            params: Parameters, slice_: Batch, number: jax.Array, shifts: Shifts | None = None
        ) -> dict[str, Loss]:
            params = jax.tree.map(
                lambda leaf, is_frozen: jax.lax.stop_gradient(leaf) if is_frozen else leaf,
                params,
                frozen,
            )
            return task.losses(
                nnx.merge(task.graph, params),
                slice_,
                key,
                jax.random.fold_in(purpose_key(key, "dropout"), number),
                step=state.step,
                memory=state.memory,
                average=_merged(task.graph, state.ema),
                reference=_merged(task.reference, reference),
                shifts=shifts,
            )

        if task.adversarial.steps:
            outcome = _adversarial_gradients(losses_of, task, state.params, batch)
        else:
            outcome = _gradients(losses_of, task, state.params, batch, accumulate)
        gradients, loss, sums, memory = outcome
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
        return metric_sums(task.losses(model, batch, jax.random.key(0), reference=teacher))

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
    )


def _gradients(
    losses_of: Callable[[Parameters, Batch, jax.Array], dict[str, Loss]],
    task: Task,
    params: Parameters,
    batch: Batch,
    accumulate: int,
) -> tuple[Parameters, jax.Array, dict[str, Sum], Memory]:
    """Gradients of the whole batch's loss, the loss, the sums of every metric, and what is kept.

    `losses_of(params, slice of the batch, number of the slice)`.
    """

    def loss_of(params, slice_, number, weights):
        losses = losses_of(params, slice_, number)
        memory = {name: loss.memory for name, loss in losses.items() if loss.memory}
        loss = task.total(losses, weights or _weights(losses))
        return loss, (metric_sums(losses), memory)

    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    if accumulate == 1:
        (loss, (sums, memory)), gradients = value_and_grad(params, batch, jnp.asarray(0), None)
        return gradients, loss, sums, memory

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
        (loss, (sums, _)), gradients = value_and_grad(params, *part, weights)
        return jax.tree.map(jnp.add, carry, (gradients, loss, sums)), None

    # From zeros, not from the first slice: the program then holds one copy of the model.
    part = jax.tree.map(lambda x: x[0], walk)
    shapes = jax.eval_shape(value_and_grad, params, *part, weights)
    (loss, (sums, _)), gradients = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (gradients, loss, sums), _ = jax.lax.scan(add, (gradients, loss, sums), walk)
    return gradients, loss, sums, {}  # (what is remembered compares examples, see above)


def _adversarial_gradients(
    losses_of: Callable[..., dict[str, Loss]], task: Task, params: Parameters, batch: Batch
) -> tuple[Parameters, jax.Array, dict[str, Sum], Memory]:
    """The same under perturbations; sums and memory are those of the clean pass."""

    def loss_of(params, shifts):
        losses = losses_of(params, batch, jnp.asarray(0), shifts)
        weights = _weights(losses)
        memory = {name: loss.memory for name, loss in losses.items() if loss.memory}
        scores = scores_of(task.objectives, losses, weights)
        return task.total(losses, weights), (scores, (metric_sums(losses), memory))

    shifts = zero_shifts(task.adversarial, nnx.merge(task.graph, params), batch)
    result = adversarial_gradients(loss_of, params, shifts, task.adversarial)
    sums, memory = result.aux
    sums["adversarial/loss"] = (result.loss, jnp.ones(()))
    sums["adversarial/divergence"] = (result.divergence, jnp.ones(()))
    loss = result.loss + task.adversarial.kl_weight * result.divergence
    return result.gradients, loss, sums, memory


def metric_sums(losses: Mapping[str, Loss]) -> dict[str, Sum]:
    """(sum, weight) of every loss and metric, by name."""
    sums: dict[str, Any] = {}
    for name, loss in losses.items():
        sums[f"{name}/loss"] = (loss.total, loss.weight)
        sums |= loss.metrics
    return sums


def _weights(losses: Mapping[str, Loss]) -> dict[str, jax.Array]:
    return {name: jnp.maximum(loss.weight, 1e-9) for name, loss in losses.items()}


def _merged(graph: nnx.GraphDef | None, params: Parameters | None) -> Any:
    return None if graph is None or params is None else nnx.merge(graph, params)


def _distance(params: Parameters, others: Parameters) -> jax.Array:
    """How far the parameters are from others, relative to their own norm."""
    difference = jax.tree.map(jnp.subtract, params, others)
    return optax.tree.norm(difference) / jnp.maximum(optax.tree.norm(params), 1e-9)


def _shapes(params: Parameters) -> Any:
    return jax.tree.map(jnp.shape, params)
