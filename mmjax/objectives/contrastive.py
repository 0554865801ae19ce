"""Image-text contrastive learning (ITC)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmjax.objectives.loss import Features, Loss, weighted


def info_nce(
    logits: Float[Array, "queries candidates"],
    positives: Bool[Array, "queries candidates"],
    valid: Bool[Array, " candidates"],
) -> Float[Array, " queries"]:
    """Cross-entropy of each query's softmax over the candidates (van den Oord et al. 2018, eq. 4).

    Several positives share the target evenly, as in ALBEF's retrieval loss (Li et al. 2021, section
    3.4). Invalid candidates take no part.
    """
    positives = positives & valid
    log_p = jax.nn.log_softmax(jnp.where(valid, logits, -1e30), axis=-1)
    share = positives / jnp.maximum(positives.sum(axis=-1, keepdims=True), 1)
    return -jnp.where(positives, share * log_p, 0).sum(axis=-1)


def contrastive_objective(features: Features, key: jax.Array) -> Loss:
    """Symmetric InfoNCE over the global batch (Radford et al. 2021, CLIP, figure 3).

    Rows that show the same picture (equal `image_id`) are positives of one another.
    """
    batch, logits = features.batch, features.similarity_logits
    valid = batch["valid"]
    positives = same_image(batch["image_id"])
    image_to_text = info_nce(logits, positives, valid)
    text_to_image = info_nce(logits.T, positives, valid)
    total, weight = weighted((image_to_text + text_to_image) / 2, valid)
    best = jnp.where(valid, logits, -jnp.inf).argmax(axis=-1)
    hit = jnp.take_along_axis(positives, best[:, None], axis=1)[:, 0]
    return Loss(
        total,
        weight,
        {
            "contrastive/accuracy": weighted(hit, valid),
            "contrastive/logit_scale": (features.model.contrastive.scale, jnp.ones(())),
        },
    )


def same_image(image_id: Int[Array, " batch"]) -> Bool[Array, "batch batch"]:
    """True where two rows of the batch show the same picture."""
    return image_id[:, None] == image_id[None, :]
