"""Contrastive learning against a moving average of the model and a queue of its features."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from mmjax.errors import InputError
from mmjax.objectives.contrastive import info_nce, similarity_metrics
from mmjax.objectives.features import Features
from mmjax.objectives.geometry import geometry_metrics
from mmjax.objectives.loss import Loss, weighted
from mmjax.objectives.momentum_distillation import MomentumDistilled, mixed, soft_cross_entropy

EMPTY = -1  # the image id of a place in the queue that holds nothing, as of a bad record


@dataclass(frozen=True)
class MomentumContrastive(MomentumDistilled):
    """Symmetric InfoNCE with many more negatives than a batch has (ALBEF, BLIP; after MoCo).

    Each side is compared with what the moving average makes of the other side of this batch and
    made of that of the batches before, which wait in a queue. Whatever shows the same picture
    (equal `image_id`) is a positive, in the queue as well. In evaluation there is no average and no
    queue: the loss is `Contrastive`'s.

    Places that have not been filled take no part. (ALBEF's random vectors in them do, as negatives,
    for the first `queue_size / batch_size` steps.)
    """

    distill: float = 0.4
    queue_size: int = 65536  # places for pairs, a multiple of the batch size

    formula: ClassVar[str] = (
        "½ Σ over both ways of (1 − α) InfoNCE(s x·[y′ ‖ queue]) "
        "+ α H(softmax(s x′·[y′ ‖ queue]), softmax(s x·[y′ ‖ queue]))"
    )
    source: ClassVar[str] = "Li et al. 2021, ALBEF, equations 1, 2 and 6"
    needs: ClassVar[tuple[str, ...]] = ("contrastive",)
    compares_examples: ClassVar[bool] = True

    @property
    def needs_average(self) -> bool:
        """Always: it is what the batch is compared with."""
        return True

    def memory(self, model: Any, batch_size: int) -> dict[str, Array]:
        """An empty queue: unit vectors by the average `[Q,E]`, and image ids `[Q]`."""
        if self.queue_size < 1 or self.queue_size % batch_size:
            lower = self.queue_size // batch_size * batch_size
            near = f"{lower} or {lower + batch_size}" if lower > 0 else str(batch_size)
            raise InputError(
                f"objectives.momentum_contrastive.queue_size is {self.queue_size}, no multiple of "
                f"batch_size = {batch_size}, and every step replaces a whole batch; take {near}."
            )
        shape = self.queue_size, model.contrastive.width
        return {
            "image_queue": jnp.zeros(shape),
            "text_queue": jnp.zeros(shape),
            "image_id_queue": jnp.full(self.queue_size, EMPTY, jnp.int32),
        }

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Nothing is left to chance."""
        batch, valid = features.batch, features.batch["valid"]
        average = features if features.average is None else features.average
        newest = {
            "image_queue": average.image_embedding,
            "text_queue": average.text_embedding,
            "image_id_queue": jnp.where(valid, batch["image_id"], EMPTY),
        }
        queues = features.memory.get("momentum_contrastive", {})
        candidates = {
            name: jnp.concatenate([new, queues[name]]) if queues else new
            for name, new in newest.items()
        }
        images, texts, image_id = candidates.values()
        there, positives = image_id != EMPTY, batch["image_id"][:, None] == image_id

        logits_of, alpha = features.model.contrastive.logits, self.alpha(features)
        image_to_text = logits_of(features.image_embedding, texts)
        teacher = logits_of(average.image_embedding, texts)
        of_images = momentum_nce(image_to_text, teacher, positives, there, alpha)
        text_to_image = logits_of(images, features.text_embedding).T
        teacher = logits_of(images, average.text_embedding).T
        of_texts = momentum_nce(text_to_image, teacher, positives, there, alpha)

        total, weight = weighted((of_images + of_texts) / 2, valid)
        metrics = similarity_metrics(
            "momentum_contrastive", features, image_to_text, positives, there
        )
        vectors = features.image_embedding, features.text_embedding
        metrics |= geometry_metrics(*vectors, valid, positives[:, : len(valid)])
        memory = {}
        if queues and features.step is not None:
            filled = queues["image_id_queue"] != EMPTY
            metrics["momentum_contrastive/queue_filled"] = weighted(filled, jnp.ones(filled.shape))
            memory = {
                name: enqueue(queues[name], new, features.step) for name, new in newest.items()
            }
        scores = jnp.where(there, image_to_text, -1e30), valid.astype(jnp.float32)
        return Loss(total, weight, metrics, memory, scores)


def momentum_nce(
    logits: Float[Array, "queries candidates"],
    teacher: Float[Array, "queries candidates"],
    positives: Bool[Array, "queries candidates"],
    there: Bool[Array, " candidates"],
    alpha: Float[Array, ""] | float,
) -> Float[Array, " queries"]:
    """Cross-entropy with α · softmax(teacher) + (1 − α) · positives (Li et al. 2021, equation 6).

    The positives share evenly, as in ALBEF's retrieval; candidates that are not `there` take no
    part.
    """
    hard = info_nce(logits, positives, there)
    soft = soft_cross_entropy(jnp.where(there, logits, -1e30), jnp.where(there, teacher, -1e30))
    return mixed(hard, soft, alpha)


def enqueue(
    queue: Shaped[Array, "places ..."],
    newest: Shaped[Array, "batch ..."],
    step: Int[Array, ""],
) -> Shaped[Array, "places ..."]:
    """The queue with the oldest batch replaced: the step says which of its places are next."""
    rows = len(newest)
    place = step % (len(queue) // rows) * rows
    return jax.lax.dynamic_update_slice_in_dim(queue, newest, place, axis=0)
