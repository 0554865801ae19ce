"""Visual question answering as classification over a closed list of answers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmjax.objectives.loss import Features, Loss, weighted


def soft_binary_cross_entropy(
    logits: Float[Array, "batch answers"], targets: Float[Array, "batch answers"]
) -> Float[Array, " batch"]:
    """Binary cross-entropy against soft scores, summed over answers (Teney et al. 2018, eq. 2).

    METER's and UNITER's "mean × number of answers" is the same sum.
    """
    return -(
        targets * jax.nn.log_sigmoid(logits) + (1 - targets) * jax.nn.log_sigmoid(-logits)
    ).sum(axis=-1)


def answering_objective(features: Features, key: jax.Array) -> Loss:
    """Score every answer for each question; the accuracy is the soft score of the best one."""
    model, batch = features.model, features.batch
    logits, targets = model.answering(features.fused.pooled), batch["answer"]
    total, weight = weighted(soft_binary_cross_entropy(logits, targets), batch["valid"])
    best = logits.argmax(axis=-1)
    score = jnp.take_along_axis(targets, best[:, None], axis=1)[:, 0]
    return Loss(total, weight, {"answering/accuracy": weighted(score, batch["valid"])})
