"""Image-text matching (ITM) with hard negatives from the batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mmjax.models import Encoded
from mmjax.objectives.contrastive import same_image
from mmjax.objectives.loss import Features, Loss, purpose_key, weighted

NEGATIVES = ("hard", "random")


def pair_gumbel(
    key: Key[Array, ""], rows: Int[Array, " queries"], columns: Int[Array, " candidates"]
) -> Float[Array, "queries candidates"]:
    """Gumbel noise that belongs to a pair of examples, whatever rows of the batch they came in."""

    def bits(row, column):
        folded = jax.random.fold_in(jax.random.fold_in(key, row), column)
        return jax.random.key_data(folded)[0]

    pair_bits = jax.vmap(jax.vmap(bits, (None, 0)), (0, None))(rows, columns)
    # Odd multiples of 2⁻²⁴: float32 holds them exactly, and neither 0 nor 1 is among them.
    uniform = (pair_bits >> 9).astype(jnp.float32) * 2**-23 + 2**-24
    return -jnp.log(-jnp.log(uniform))


def sample_negatives(
    logits: Float[Array, "queries candidates"],
    allowed: Bool[Array, "queries candidates"],
    noise: Float[Array, "queries candidates"],
) -> tuple[Int[Array, " queries"], Bool[Array, " queries"]]:
    """One candidate a query, drawn from softmax(logits) over the allowed ones by Gumbel-max.

    Returns the candidates, and whether there was any to draw.
    """
    return jnp.where(allowed, logits + noise, -jnp.inf).argmax(axis=-1), allowed.any(axis=-1)


def matching_objective(features: Features, key: jax.Array, *, negatives: str = "hard") -> Loss:
    """Does the text belong to the picture? B true pairs, and 2 B false ones.

    Every picture gets one false text and every text one false picture, drawn from the softmax of
    the similarities over the global batch (Li et al. 2021, ALBEF, section 3.2), which makes similar
    pairs likely; `negatives='random'` draws evenly. The same picture, and so its other captions, is
    never a negative. With one true pair in three, a model that knows nothing has a loss of 0.6365.
    """
    model, batch = features.model, features.batch
    valid, index = batch["valid"], batch["index"]
    if negatives == "hard":
        # The draw is no path for gradients.
        similarity = jax.lax.stop_gradient(features.similarity_logits)
    else:
        similarity = jnp.zeros((len(valid), len(valid)), jnp.float32)
    allowed = ~same_image(batch["image_id"]) & valid[None, :] & valid[:, None]
    text_noise = pair_gumbel(purpose_key(key, "false texts"), index, index)
    image_noise = pair_gumbel(purpose_key(key, "false pictures"), index, index)
    false_text, has_text = sample_negatives(similarity, allowed, text_noise)
    false_image, has_image = sample_negatives(similarity.T, allowed, image_noise)

    image, text = features.image, features.text
    fused = model.fuse(
        _interleave(image, image, image.take(false_image)),
        _interleave(text, text.take(false_text), text),
        features.dropout_key("matching"),
    )
    logits = model.matching(fused.pooled)
    labels = jnp.arange(3 * len(valid)) % 3 == 0
    weights = jnp.stack([valid, has_text, has_image], axis=1).reshape(-1)
    total, weight = weighted(matching_loss(logits, labels), weights)
    return Loss(
        total,
        weight,
        {
            "matching/accuracy": weighted(logits.argmax(axis=-1) == labels, weights),
            "matching/positives": weighted(labels, weights),
        },
    )


def matching_loss(
    logits: Float[Array, "pairs 2"], labels: Bool[Array, " pairs"]
) -> Float[Array, " pairs"]:
    """Cross-entropy of two classes."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.where(labels, log_p[:, 1], log_p[:, 0])


def _interleave(*parts: Encoded) -> Encoded:
    """Rows in turn, so that true pairs stay on the device that holds them."""
    return jax.tree.map(
        lambda *arrays: jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:]), *parts
    )
