"""Contrastive learning against a moving average of the model and a queue of its features."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from mmjax.errors import InputError
from mmjax.objectives.contrastive import contrastive_metrics, info_nce
from mmjax.objectives.features import Features
from mmjax.objectives.folds import Hit, InfoNce, Taught
from mmjax.objectives.loss import Loss, weighted
from mmjax.objectives.momentum_distillation import MomentumDistilled, mixed, soft_cross_entropy
from mmjax.objectives.walk import Side

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
    compares_embeddings: ClassVar[bool] = True

    @property
    def needs_average(self) -> bool:
        """Always: it is what the batch is compared with."""
        return True

    def memory(self, model: Any, batch_size: int) -> dict[str, Array]:
        """An empty queue of Q / B batches: unit vectors by the average `[Q/B,B,E]`, and image ids.

        Batch by batch, so that every device keeps its own rows of each.
        """
        if self.queue_size < 1 or self.queue_size % batch_size:
            lower = self.queue_size // batch_size * batch_size
            near = f"{lower} or {lower + batch_size}" if lower > 0 else str(batch_size)
            raise InputError(
                f"objectives.momentum_contrastive.queue_size is {self.queue_size}, no multiple of "
                f"batch_size = {batch_size}, and every step replaces a whole batch; take {near}."
            )
        places = self.queue_size // batch_size, batch_size
        return {
            "image_queue": jnp.zeros((*places, model.contrastive.width)),
            "text_queue": jnp.zeros((*places, model.contrastive.width)),
            "image_id_queue": jnp.full(places, EMPTY, jnp.int32),
        }

    def prepare(self, features: Features, key: jax.Array) -> None:
        """Both ways, against the batch and the queue."""
        by_average = features.average is not None
        queues = features.memory.get("momentum_contrastive", {})
        for side, other in (("image", "text"), ("text", "image")):
            walk = features.walk(side, by_average)
            walk.ask("momentum_contrastive", InfoNce())
            if by_average:
                walk.ask("taught", Taught())
            if queues:
                walk.further = (_waiting(queues, other),)
        features.walk("image", by_average).ask("hit", Hit())

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Nothing is left to chance."""
        self.prepare(features, key)
        batch, valid = features.batch, features.batch["valid"]
        walks = [features.walk(side, features.average is not None) for side in ("image", "text")]
        losses = sum(walk.answer("momentum_contrastive") for walk in walks) / 2
        if features.average is not None:
            soft = sum(walk.answer("taught") for walk in walks) / 2
            losses = mixed(losses, soft, self.alpha(features))
        total, weight = weighted(losses, valid)
        vectors = features.image_embedding, features.text_embedding
        hit = walks[0].answer("hit")
        metrics = contrastive_metrics("momentum_contrastive", features, hit, *vectors)
        memory, queues = {}, features.memory.get("momentum_contrastive", {})
        if queues and features.step is not None:
            filled = queues["image_id_queue"] != EMPTY
            metrics["momentum_contrastive/queue_filled"] = weighted(filled, jnp.ones(filled.shape))
            average = features if features.average is None else features.average
            newest = {
                "image_queue": average.image_embedding,
                "text_queue": average.text_embedding,
                "image_id_queue": jnp.where(valid, batch["image_id"], EMPTY),
            }
            memory = {
                name: enqueue(queues[name], new, features.step) for name, new in newest.items()
            }
        scores = _all_logits(features, queues), valid.astype(jnp.float32)
        return Loss(total, weight, metrics, memory, scores)


def _all_logits(
    features: Features, queues: Mapping[str, Array]
) -> Float[Array, "batch candidates"]:
    """Of pictures with the texts of the batch and the queue: for adversarial training alone.

    Otherwise the compiler leaves them out.
    """
    texts = (features.average or features).text_embedding
    there = features.batch["valid"]
    if queues:
        queue, image_id = queues["text_queue"], queues["image_id_queue"]
        texts = jnp.concatenate([texts, queue.reshape(-1, queue.shape[-1])])
        there = jnp.concatenate([there, image_id.reshape(-1) != EMPTY])
    logits = features.model.contrastive.logits(features.image_embedding, texts)
    return jnp.where(there, logits, -1e30)


def _waiting(queues: Mapping[str, Array], side: str) -> Side:
    """What of one side waits in the queue, as candidates that are not of this batch."""
    vectors, image_id = (jnp.swapaxes(queues[f"{name}_queue"], 0, 1) for name in (side, "image_id"))
    image_id = image_id.reshape(-1)  # (rows of the batch first, so that devices keep theirs)
    none = jnp.full_like(image_id, -1)
    vectors = vectors.reshape(-1, vectors.shape[-1])
    return Side(vectors, image_id, image_id != EMPTY, example=none, row=none)


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
    queue: Shaped[Array, "batches batch ..."],
    newest: Shaped[Array, "batch ..."],
    step: Int[Array, ""],
) -> Shaped[Array, "batches batch ..."]:
    """The queue with the oldest batch replaced: the step says which it is."""
    return jax.lax.dynamic_update_index_in_dim(queue, newest, step % len(queue), axis=0)
