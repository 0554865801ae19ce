"""Image-text matching with one pair an example, half of them false."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mmjax.errors import InputError, near_misses
from mmjax.models import Encoded, Fused
from mmjax.objectives.features import Features
from mmjax.objectives.loss import Loss, Sum, example_keys, purpose_key, weighted
from mmjax.objectives.matching import draw_evenly, loss_of_pairs
from mmjax.objectives.objective import Objective
from mmjax.objectives.partners import fetch
from mmjax.objectives.transport import transport_distance

SIDES = ("text", "image")


@dataclass(frozen=True)
class Pairing(Objective):
    """Does the text belong to the picture? With probability ½ one of them is another example's.

    Another's text in LXMERT (cross-modality matching), VisualBERT (which has two captions beside a
    picture, and replaces the second), VL-BERT and Oscar (which replaces the tags alone); another's
    picture in UNITER, ViLT and METER. ViLT and METER have exactly as many false pairs as true ones
    in a batch. A model that knows nothing has a loss of ln 2.

    With `transport`, words and regions of true pairs are drawn together, those of false ones apart.
    """

    replaces: str = "text"  # or 'image'
    transport: float = 0.0  # weight of the distance by optimal transport (UNITER, ViLT: 0.1)

    formula: ClassVar[str] = "−log p(match | pair) ± λ · distance of words and regions"
    source: ClassVar[str] = "Tan and Bansal 2019, LXMERT, 3.1.3; Chen et al. 2020, UNITER, 3.2"
    needs: ClassVar[tuple[str, ...]] = ("matcher",)
    compares_examples: ClassVar[bool] = True

    def check(self, name: str, model: Any) -> None:
        """It is one of two that is replaced."""
        super().check(name, model)
        if self.replaces not in SIDES:
            raise InputError(
                f"objectives.{name}.replaces is {self.replaces!r}."
                + near_misses(self.replaces, SIDES)
            )

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """An example that should be false and finds no other picture does not count."""
        image, text = features.image, features.text
        partner, labels, counted = draw_pairs(features, key)
        if self.replaces == "text":
            text = fetch(text, partner)
        else:
            image = fetch(image, partner)
        fused = features.fuse(image, text, "pairing")
        loss = loss_of_pairs("pairing", features.model.match(fused), labels, counted)
        if not self.transport:
            return loss
        distance = _distance(features.model, image, text, fused)
        total, weight = signed_distance(distance, labels, counted)
        metrics = loss.metrics | {"pairing/transport": (total, weight)}
        return replace(loss, total=loss.total + self.transport * total, metrics=metrics)


@dataclass(frozen=True)
class LabelledPairing(Objective):
    """Does all of the text belong to the picture? The data replace part of it, and say so.

    VisualBERT's second caption (`data.second_caption`) and Oscar's tags (`data.false_tags`) are
    another picture's half of the time; `label [B]` is 1 where they are not.
    """

    formula: ClassVar[str] = "−log p(match | picture, text with a part that may be another's)"
    source: ClassVar[str] = "Li et al. 2019, VisualBERT, 3.3; Li et al. 2020, Oscar, 3"
    needs: ClassVar[tuple[str, ...]] = ("matcher",)
    fields: ClassVar[tuple[str, ...]] = ("label",)

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Nothing is left to chance here."""
        logits, labels = features.model.match(features.fused), features.batch["label"] > 0
        return loss_of_pairs("labelled_pairing", logits, labels, features.batch["valid"])


def draw_pairs(
    features: Features, key: Key[Array, ""]
) -> tuple[Int[Array, " batch"], Bool[Array, " batch"], Bool[Array, " batch"]]:
    """Each example's partner, itself or one of another picture; whether it is true; and counts."""
    batch, index = features.batch, features.batch["index"]
    valid = batch["valid"]
    keys = example_keys(purpose_key(key, "true pairs"), index)
    labels = jax.vmap(jax.random.bernoulli)(keys)
    other, found = draw_evenly(batch, purpose_key(key, "false pairs"))
    return jnp.where(labels, jnp.arange(len(other)), other), labels, valid & (labels | found)


def signed_distance(
    distance: Float[Array, " pairs"], labels: Bool[Array, " pairs"], counted: Bool[Array, " pairs"]
) -> Sum:
    """Distances of true pairs less those of false ones, and the number of all pairs."""
    return weighted(jnp.where(labels, distance, -distance), counted)


def _distance(model: Any, image: Encoded, text: Encoded, fused: Fused) -> Float[Array, " pairs"]:
    regions, words = model.aligned(image, text)
    return transport_distance(fused.text_tokens, fused.image_tokens, words, regions)
