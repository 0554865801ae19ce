"""Adversarial training: what the inputs are embedded as is perturbed to raise the loss (VILLA).

It goes around a training loss, whatever the model and the objectives. `adversarial_gradients` takes
the place of one `jax.value_and_grad`.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmjax.errors import InputError, near_misses
from mmjax.models.model import taken
from mmjax.models.vit import ViT
from mmjax.objectives.features import Features
from mmjax.objectives.loss import Loss
from mmjax.objectives.objective import Objective
from mmjax.sharding import constrain_batch

# What is perturbed in each pass of a step.
PASSES = {
    "text": (("text_shift",),),
    "image": (("image_shift",),),
    "both": (("text_shift", "image_shift"),),
    "alternate": (("text_shift",), ("image_shift",)),
}
NORMS = ("l2", "linf")

Shift = Float[Array, "batch _ _"]  # [batch, length, width]
Shifts = Mapping[str, Shift]  # what is added to embedded inputs, as `Features` takes them
# By objective the scores that its loss is made of, [..., classes], and each row's share in it.
Scores = Mapping[str, tuple[Float[Array, "..."], Float[Array, "..."]]]
# Parameters and shifts in; the loss, its scores, and whatever else is wanted of the clean pass.
LossOf = Callable[[Any, Shifts], tuple[Float[Array, ""], tuple[Scores, Any]]]


@dataclass(frozen=True)
class Adversarial:
    """Options of adversarial training: `config.adversarial`. The defaults are VILLA's for VQA.

    Gan et al. 2020, section 3 and algorithm 1; Zhu et al. 2020, FreeLB. The perturbations start at
    zero, as in VILLA's code. Objectives that choose negatives by their similarity choose anew for
    perturbed inputs.
    """

    formula: ClassVar[str] = "L(x + δ) + α (KL(p ‖ p_δ) + KL(p_δ ‖ p)), δ ← δ + η g / ‖g‖"
    source: ClassVar[str] = "Gan et al. 2020, VILLA, section 3 and algorithm 1"

    steps: int = 0  # passes against ever stronger perturbations in one update; 0: off
    # 'text', 'image', 'both' at once, or 'alternate': a pass against either in each step.
    modality: str = "text"
    norm: str = "l2"  # of an example's whole perturbation; or 'linf'
    text_step_size: float = 1e-3  # by how much a step moves the perturbation, in that norm
    image_step_size: float = 1e-3
    max_norm: float = 0.0  # of a perturbation; 0: none
    kl_weight: float = 1.5  # of the divergence from what is said of clean inputs

    def __post_init__(self) -> None:
        """Refuse unknown variants."""
        if self.modality not in PASSES:
            hint = near_misses(self.modality, PASSES)
            raise InputError(f"adversarial.modality is {self.modality!r}.{hint}")
        if self.norm not in NORMS:
            raise InputError(f"adversarial.norm is {self.norm!r}.{near_misses(self.norm, NORMS)}")

    @property
    def step_sizes(self) -> dict[str, float]:
        """By the names of what is perturbed."""
        sizes = {"text_shift": self.text_step_size, "image_shift": self.image_step_size}
        return {name: sizes[name] for names in PASSES[self.modality] for name in names}

    def check(self, model: Any) -> None:
        """Raise InputError where `model` (abstract) has no place for a perturbation."""
        for name in self.step_sizes:
            if name not in inspect.signature(_encoder(model, name)).parameters:
                raise InputError(
                    f"adversarial.modality is {self.modality!r}, and {type(model).__name__} takes "
                    f"no {name}: take another modality, or set adversarial.steps to 0."
                )


class AdversarialResult(NamedTuple):
    """Of one update. Losses and divergences are means over its steps."""

    gradients: Any  # of `loss` + kl_weight · `divergence`, by the parameters
    loss: Float[Array, ""]  # against perturbed inputs
    divergence: Float[Array, ""]  # of what is said of them from what is said of clean ones
    aux: Any  # of the clean pass


def adversarial_gradients(
    loss_of: LossOf, params: Any, shifts: Shifts, options: Adversarial
) -> AdversarialResult:
    """Gradients added up while the perturbations grow: one backward pass a step serves both.

    `shifts` are the perturbations of the first step, zero or drawn, by `options.step_sizes`' names.
    """
    slopes = jax.value_and_grad(
        partial(adversarial_loss, loss_of, options=options), argnums=(0, 1), has_aux=True
    )

    def step(carry, _):
        so_far, _, shifts = carry
        (_, (parts, aux)), (by_params, by_shifts) = slopes(params, shifts)
        so_far = jax.tree.map(jnp.add, so_far, (by_params, parts))
        shifts = {
            name: ascend(shift, by_shifts[name], options.step_sizes[name], options)
            for name, shift in shifts.items()
        }
        return (so_far, aux, shifts), None

    # A loop, and its sums from zeros: the program then holds one copy of the model.
    (_, (parts, aux)), (by_params, _) = jax.eval_shape(slopes, params, shifts)
    so_far, aux = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), ((by_params, parts), aux))
    carry = so_far, aux, dict(shifts)
    ((gradients, parts), aux, _), _ = jax.lax.scan(step, carry, length=options.steps)
    losses, divergences = (part.mean() / options.steps for part in parts)
    return AdversarialResult(gradients, losses, divergences, aux)


def adversarial_loss(
    loss_of: LossOf, params: Any, shifts: Shifts, options: Adversarial
) -> tuple[Float[Array, ""], tuple[tuple[Float[Array, " passes"], Float[Array, " passes"]], Any]]:
    """One step's share of the loss at given perturbations (Gan et al. 2020, section 3).

    Beside it each pass's own loss and divergence, and what `loss_of` has to say of the clean pass.
    The gradient goes through the scores of clean inputs too, as in VILLA's code.
    """
    _, (clean, aux) = loss_of(params, {})
    losses, divergences = [], []
    for names in PASSES[options.modality]:
        loss, (scores, _) = loss_of(params, {name: shifts[name] for name in names})
        losses.append(loss)
        divergences.append(divergence(clean, scores))
    parts = jnp.stack(losses), jnp.stack(divergences)
    total = (parts[0] + options.kl_weight * parts[1]).mean() / options.steps
    return total, (parts, aux)


def ascend(shift: Shift, gradient: Shift, step_size: float, options: Adversarial) -> Shift:
    """A step up the gradient, then back into the ball of `max_norm`, each example for itself."""
    # In float32 squares vanish below this. The original's 1e-8 would shorten the steps of a large
    # batch, in whose mean an example has a small gradient.
    length = jnp.maximum(_norm(gradient, options.norm), 1e-16)
    shift = shift + step_size * gradient / length
    if not options.max_norm:
        return shift
    if options.norm == "linf":
        return jnp.clip(shift, -options.max_norm, options.max_norm)
    return shift * jnp.minimum(1, options.max_norm / jnp.maximum(_norm(shift, "l2"), 1e-16))


def divergence(clean: Scores, perturbed: Scores) -> Float[Array, ""]:
    """Symmetric divergences of all scores, summed with the rows' shares in the loss."""
    terms = [
        (share * symmetric_kl(logits, perturbed[name][0])).sum()
        for name, (logits, share) in clean.items()
    ]
    return sum(terms, jnp.zeros(()))


def symmetric_kl(
    logits: Float[Array, "*rows classes"], others: Float[Array, "*rows classes"]
) -> Float[Array, "*rows"]:
    """KL(p ‖ q) + KL(q ‖ p) of two softmaxes, also where a loss takes the classes one by one."""
    log_p, log_q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (logits, others))
    return ((jnp.exp(log_p) - jnp.exp(log_q)) * (log_p - log_q)).sum(axis=-1)


def scores_of(
    objectives: Mapping[str, Objective],
    losses: Mapping[str, Loss],
    weights: Mapping[str, Float[Array, ""]],
) -> Scores:
    """The scores of the losses that have some, with each row's share in the sum of all losses.

    `weights` are the losses' weights in the whole batch.
    """
    return {
        name: (loss.scores[0], objectives[name].weight * loss.scores[1] / weights[name])
        for name, loss in losses.items()
        if loss.scores is not None
    }


def zero_shifts(options: Adversarial, model: Any, batch: Mapping[str, Array]) -> dict[str, Shift]:
    """No perturbation yet, as large as what `model` adds it to: regions, or embedded tokens."""
    features = Features(model, batch)

    def embedded(name):
        if name == "image_shift" and isinstance(getattr(model, "image", None), ViT):
            return model.image.embed(batch["image"])
        if name == "image_shift" and "regions" in taken(model.encode_image, batch):
            return batch["regions"]
        return _encoder(features, name)("shape alone").tokens

    shapes = {name: jax.eval_shape(partial(embedded, name)).shape for name in options.step_sizes}
    return {name: constrain_batch(jnp.zeros(shape)) for name, shape in shapes.items()}


def _encoder(of: Any, name: str) -> Callable[..., Any]:
    return of.encode_text if name == "text_shift" else of.encode_image


def _norm(x: Shift, norm: str) -> Float[Array, "batch 1 1"]:
    """Of each example's numbers together, padding included."""
    if norm == "linf":
        return jnp.abs(x).max(axis=(1, 2), keepdims=True)
    return jnp.sqrt(jnp.square(x).sum(axis=(1, 2), keepdims=True))
