"""Momentum distillation: part of a target is what the moving average of the model predicts."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmjax.objectives.features import Features
from mmjax.objectives.objective import Objective


@dataclass(frozen=True)
class MomentumDistilled(Objective):
    """An objective that can learn from the moving average as well (Li et al. 2021, section 3.3).

    Its loss is then (1 − α) · cross-entropy with the labels + α · cross-entropy with the average's
    probabilities. Without an average, in evaluation, α is 0.
    """

    distill: float = 0.0  # α, the average's share of the target
    ramp_steps: int = 0  # over which α grows from 0, linearly

    @property
    def needs_average(self) -> bool:
        """Only where it teaches."""
        return self.distill > 0

    def alpha(self, features: Features) -> Float[Array, ""]:
        """α at this step."""
        if features.average is None or features.step is None:
            return jnp.zeros(())
        return ramped(self.distill, features.step, self.ramp_steps)

    def distilled(
        self,
        losses: Float[Array, "*rows"],
        logits: Float[Array, "*rows classes"],
        features: Features,
        logits_of: Callable[[Features], Float[Array, "*rows classes"]],
    ) -> Float[Array, "*rows"]:
        """The mixture of `losses` and of what the average teaches by its logits."""
        if features.average is None or not self.distill:
            return losses  # it need not run
        soft = soft_cross_entropy(logits, logits_of(features.average))
        return mixed(losses, soft, self.alpha(features))


def ramped(alpha: float, step: Int[Array, ""], ramp_steps: int) -> Float[Array, ""]:
    """α as it grows from 0 at step 0 to its full value at `ramp_steps`."""
    return jnp.asarray(alpha * jnp.minimum(step / ramp_steps, 1) if ramp_steps else alpha)


def mixed(
    hard: Float[Array, "*rows"], soft: Float[Array, "*rows"], alpha: Float[Array, ""] | float
) -> Float[Array, "*rows"]:
    """(1 − α) hard + α soft (Li et al. 2021, equations 6 and 7)."""
    return (1 - alpha) * hard + alpha * soft


def soft_cross_entropy(
    logits: Float[Array, "*rows classes"], teacher: Float[Array, "*rows classes"]
) -> Float[Array, "*rows"]:
    """−Σ softmax(teacher) log softmax(logits); no gradient reaches the teacher.

    The papers write a Kullback-Leibler divergence. This, which their code computes, is larger by
    the teacher's entropy, and has the same gradient.
    """
    targets = jax.lax.stop_gradient(jax.nn.softmax(teacher.astype(jnp.float32)))
    return -(targets * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(axis=-1)
