"""Masked region modelling (MRM): what hidden regions show, given the others and the text.

Every loss here is a mean over the regions that are asked for, as in UNITER. LXMERT's code divides
by all regions of the batch and multiplies by 1/0.15, the inverse of the share that it hides, which
is in expectation the same where it asks for hidden ones.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmjax.errors import InputError, near_misses
from mmjax.objectives.features import Features
from mmjax.objectives.loss import Loss, cross_entropy, weighted
from mmjax.objectives.objective import Objective


def squared_error(
    found: Float[Array, "*rows features"], target: Float[Array, "*rows features"]
) -> Float[Array, "*rows"]:
    """The mean of squared differences of each region (Chen et al. 2020, UNITER, section 3.2)."""
    return jnp.square(found - target).mean(axis=-1)


def smooth_l1(
    found: Float[Array, "*rows features"], target: Float[Array, "*rows features"]
) -> Float[Array, "*rows"]:
    """The same, half squared below 1 and linear from there (Girshick 2015, equation 3)."""
    distance = jnp.abs(found - target)
    return jnp.where(distance < 1, 0.5 * distance**2, distance - 0.5).mean(axis=-1)


def kl_divergence(
    logits: Float[Array, "*rows classes"], target: Float[Array, "*rows classes"]
) -> Float[Array, "*rows"]:
    """KL(target ‖ softmax) of each row, summed over the classes; 0 log 0 is 0."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return (jax.scipy.special.xlogy(target, target) - target * log_p).sum(axis=-1)


DISTANCES = {"squared": squared_error, "smooth_l1": smooth_l1}


@dataclass(frozen=True)
class _OfRegions(Objective):
    """What the model says of regions, under the first of `outputs` that it has."""

    outputs: ClassVar[tuple[str, ...]] = ()  # names of `score_regions`
    fields: ClassVar[tuple[str, ...]] = ("regions", "boxes", "region_mask")

    def check(self, name: str, model: Any) -> None:
        """The model has a head that says it."""
        super().check(name, model)
        heads = getattr(model, "region_heads", {})
        if not heads.keys() & set(self.outputs):
            raise InputError(
                f"objectives.{name} needs {' or '.join(self.outputs)} of masked regions, and what "
                f"the model says of them is: {', '.join(heads) or 'nothing'}. Set the key of "
                "config.model that adds the head, or take a model that has it."
            )

    def predict(self, features: Features) -> Float[Array, "batch regions _"]:
        """It of every region, in the pass that hides some."""
        said = features.model.score_regions(features.regions_masked.fused.image_tokens)
        return next(said[name] for name in self.outputs if name in said)


@dataclass(frozen=True)
class RegionFeatures(_OfRegions):
    """The detector's features of hidden regions: UNITER's MRFR, LXMERT's RoI-feature regression.

    UNITER takes the 'squared' distance, LXMERT 'smooth_l1'.
    """

    distance: str = "squared"  # or 'smooth_l1'

    formula: ClassVar[str] = "mean of (f̂ − f)², or of its smooth L1, over hidden regions"
    source: ClassVar[str] = (
        "Chen et al. 2020, UNITER, section 3.2; Tan and Bansal 2019, LXMERT, section 3.1.2"
    )
    outputs: ClassVar[tuple[str, ...]] = ("region_features",)

    def check(self, name: str, model: Any) -> None:
        """The distance is one of two."""
        super().check(name, model)
        if self.distance not in DISTANCES:
            raise InputError(
                f"objectives.{name}.distance is {self.distance!r}."
                + near_misses(self.distance, DISTANCES)
            )

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Which regions are hidden is `features.masking`'s."""
        distances = DISTANCES[self.distance](self.predict(features), features.batch["regions"])
        return Loss(*weighted(distances, features.regions_masked.chosen))


@dataclass(frozen=True)
class RegionLabels(_OfRegions):
    """What hidden regions are of: UNITER's MRC, and LXMERT's detected-label classification.

    `region_labels` count as the classes of the model's head do, below 0 where there is none;
    `region_labels_confidence [B,R]`, where the batch has it, weights them. LXMERT's code asks for
    all regions, hidden or not (`hidden=False`), and weights the loss by 1/0.15 nonetheless.
    """

    hidden: bool = True  # ask for hidden regions alone

    formula: ClassVar[str] = "−c log p(label | other regions, text), mean over hidden regions"
    source: ClassVar[str] = (
        "Chen et al. 2020, UNITER, section 3.2; Tan and Bansal 2019, LXMERT, section 3.1.2"
    )
    fields: ClassVar[tuple[str, ...]] = (*_OfRegions.fields, "region_labels")
    outputs: ClassVar[tuple[str, ...]] = ("region_logits", "object_logits")
    target: ClassVar[str] = "region_labels"

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Confidences weight the sum and not its weight, as in LXMERT."""
        batch, logits = features.batch, self.predict(features)
        labels = batch[self.target]
        confidence = batch.get(f"{self.target}_confidence", jnp.ones(labels.shape))
        asked = self._asked(features) & (labels >= 0)
        total, weight = weighted(confidence * cross_entropy(logits, labels), asked)
        metrics = {f"{self.target}/accuracy": weighted(logits.argmax(axis=-1) == labels, asked)}
        return Loss(total, weight, metrics, scores=(logits, asked.astype(jnp.float32)))

    def _asked(self, features: Features) -> Bool[Array, "batch regions"]:
        if self.hidden:
            return features.regions_masked.chosen
        return features.batch["region_mask"] & features.batch["valid"][:, None]


@dataclass(frozen=True)
class RegionAttributes(RegionLabels):
    """What hidden regions are like: LXMERT's attributes. All else as for labels."""

    source: ClassVar[str] = "Tan and Bansal 2019, LXMERT, published code"
    fields: ClassVar[tuple[str, ...]] = (*_OfRegions.fields, "region_attributes")
    outputs: ClassVar[tuple[str, ...]] = ("attribute_logits",)
    target: ClassVar[str] = "region_attributes"


@dataclass(frozen=True)
class RegionDistributions(_OfRegions):
    """What the detector thinks that hidden regions are of: UNITER's MRC-KL and VL-BERT's MRC.

    UNITER divides by the number of classes as well, which is a matter of the weight; VL-BERT's
    cross-entropy is this plus the entropy of the targets, which has no gradient. Regions whose
    target is zero everywhere, as the whole picture in VL-BERT, are not asked for.
    """

    formula: ClassVar[str] = "Σ q log(q / p), mean over hidden regions"
    source: ClassVar[str] = (
        "Chen et al. 2020, UNITER, section 3.2; Su et al. 2020, VL-BERT, section 3.3"
    )
    fields: ClassVar[tuple[str, ...]] = (*_OfRegions.fields, "region_distributions")
    outputs: ClassVar[tuple[str, ...]] = ("region_logits", "object_logits")

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Against the soft labels `region_distributions [B,R,C]`."""
        logits, targets = self.predict(features), features.batch["region_distributions"]
        asked = features.regions_masked.chosen & (targets.sum(axis=-1) > 0)
        total, weight = weighted(kl_divergence(logits, targets), asked)
        hit = logits.argmax(axis=-1) == targets.argmax(axis=-1)
        metrics = {"region_distributions/accuracy": weighted(hit, asked)}
        return Loss(total, weight, metrics, scores=(logits, asked.astype(jnp.float32)))
