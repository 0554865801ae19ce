"""The gradient of a batch's loss: at once, slice by slice, or under perturbations."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from mmjax.errors import InputError
from mmjax.objectives import Features, Loss, Task
from mmjax.objectives.adversarial import adversarial_gradients, scores_of, zero_shifts
from mmjax.objectives.loss import Sum
from mmjax.training.state import Memory, Parameters

Batch = Mapping[str, Array]
# Of parameters, (a slice of) the batch, the slice's number, and what else `Features` may be given.
FeaturesOf = Callable[..., Features]
# The gradients, the loss, the sums of every metric, and what is remembered for the next step.
Outcome = tuple[Parameters, jax.Array, dict[str, Sum], Memory]


def gradients_of(
    features_of: FeaturesOf, task: Task, params: Parameters, batch: Batch, accumulate: int = 1
) -> Outcome:
    """Of the mean loss of the whole batch, which is walked in `accumulate` slices."""
    if task.adversarial.steps:
        return _adversarial(features_of, task, params, batch)
    if accumulate > 1:
        return _accumulated(features_of, task, params, batch, accumulate)

    def loss_of(params):
        losses = task.losses(features_of(params, batch, 0))
        return task.total(losses, _weights(losses)), (metric_sums(losses), _memory(losses))

    (loss, (sums, memory)), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
    return gradients, loss, sums, memory


def check_slices(task: Task, accumulate: int) -> None:
    """Raise InputError where an objective cannot be had from slices of a batch."""
    if accumulate == 1:
        return
    if task.adversarial.steps:
        raise InputError(
            f"optimizer.accumulate is {accumulate} and adversarial.steps {task.adversarial.steps}: "
            "adversarial training walks the batch as a whole. Set one of them off."
        )
    whole = [
        name
        for name, objective in task.objectives.items()
        if objective.compares_examples and not objective.compares_embeddings
    ]
    if whole:
        raise InputError(
            f"optimizer.accumulate = {accumulate}: {' and '.join(whole)} compare every example of "
            "the global batch with the others, token by token, and slices of it would have fewer "
            "negatives, which is another loss. Set optimizer.accumulate to 1 and lower batch_size, "
            "raise the number of devices, or set model.*.remat to 'full' to save memory."
        )


def metric_sums(losses: Mapping[str, Loss]) -> dict[str, Sum]:
    """(sum, weight) of every loss and metric, by name."""
    sums: dict[str, Any] = {}
    for name, loss in losses.items():
        sums[f"{name}/loss"] = (loss.total, loss.weight)
        sums |= loss.metrics
    return sums


def _accumulated(
    features_of: FeaturesOf, task: Task, params: Parameters, batch: Batch, accumulate: int
) -> Outcome:
    """Slice by slice, and yet that of the whole batch.

    What compares the examples of the batch does so by their embeddings. Those of all slices are
    computed first, and the loss's gradient by them; what each slice's embeddings owe to it is then
    part of the slice's own loss (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size
    under Memory Limited Setup", section 3).
    """
    comparing = [name for name, each in task.objectives.items() if each.compares_embeddings]
    others = [name for name in task.objectives if name not in comparing]
    # Interleaved slices, so that every device keeps its own rows in each of them.
    walk = jax.tree.map(lambda x: _slices(x, accumulate), dict(batch)), jnp.arange(accumulate)

    memory: Memory = {}
    sums: dict[str, Sum] = {}
    loss, gradients = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    owed = jnp.zeros((accumulate, 0))
    if comparing:
        embedded = jax.lax.map(lambda part: features_of(params, *part).embeddings, walk)
        embedded = jax.tree.map(_whole, embedded)
        found = _compared(features_of, task, comparing, params, batch, embedded)
        (loss, (sums, memory)), (gradients, of_embeddings) = found
        owed = jax.tree.map(lambda x: _slices(x, accumulate), of_embeddings)

    # Each sum is divided by its weight over the whole batch, so the weights come first. They do not
    # depend on the model: the compiler drops everything else from this walk.
    def weigh(part):
        return _weights(task.losses(features_of(params, *part), others))

    weights = jax.tree.map(lambda x: x.sum(axis=0), jax.lax.map(weigh, walk))

    def loss_of(params, part, owed):
        features = features_of(params, *part)
        losses = task.losses(features, others)
        loss = task.total(losses, weights)
        if not comparing:
            return loss, (loss, metric_sums(losses))
        debts = jax.tree.map(jnp.vdot, features.embeddings["own"], owed)
        return loss + sum(jax.tree.leaves(debts)), (loss, metric_sums(losses))

    def add(carry, parts):
        part, owed = parts
        gradients, (loss, sums) = jax.grad(loss_of, has_aux=True)(params, part, owed)
        return jax.tree.map(jnp.add, carry, (gradients, loss, sums)), None

    # From zeros, not from the first slice: the program then holds one copy of the model.
    first = jax.tree.map(lambda x: x[0], (walk, owed))
    shapes = jax.eval_shape(lambda *a: loss_of(*a)[1][1], params, *first)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (gradients, loss, of_slices), _ = jax.lax.scan(add, (gradients, loss, nothing), (walk, owed))
    return gradients, loss, sums | of_slices, memory


def _compared(features_of, task, comparing, params, batch, embedded):
    """Loss, metrics and memory of what compares; gradients by parameters and own embeddings."""

    def loss_of(params, own):
        features = features_of(params, batch, 0, embeddings=embedded | {"own": own})
        losses = task.losses(features, comparing)
        return task.total(losses, _weights(losses)), (metric_sums(losses), _memory(losses))

    return jax.value_and_grad(loss_of, (0, 1), has_aux=True)(params, embedded["own"])


def _slices(x: Array, count: int) -> Array:
    """[batch, ...] as [slices, rows, ...], every so many rows."""
    return jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1)


def _whole(x: Array) -> Array:
    """The batch again."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def _adversarial(features_of: FeaturesOf, task: Task, params: Parameters, batch: Batch) -> Outcome:
    """The same under perturbations; sums and memory are those of the clean pass."""

    def loss_of(params, shifts):
        losses = task.losses(features_of(params, batch, 0, shifts=shifts))
        weights = _weights(losses)
        scores = scores_of(task.objectives, losses, weights)
        return task.total(losses, weights), (scores, (metric_sums(losses), _memory(losses)))

    shifts = zero_shifts(task.adversarial, nnx.merge(task.graph, params), batch)
    result = adversarial_gradients(loss_of, params, shifts, task.adversarial)
    sums, memory = result.aux
    sums["adversarial/loss"] = (result.loss, jnp.ones(()))
    sums["adversarial/divergence"] = (result.divergence, jnp.ones(()))
    loss = result.loss + task.adversarial.kl_weight * result.divergence
    return result.gradients, loss, sums, memory


def _weights(losses: Mapping[str, Loss]) -> dict[str, jax.Array]:
    return {name: jnp.maximum(loss.weight, 1e-9) for name, loss in losses.items()}


def _memory(losses: Mapping[str, Loss]) -> Memory:
    return {name: loss.memory for name, loss in losses.items() if loss.memory}
