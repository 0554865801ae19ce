"""How embeddings lie on the unit sphere: what tells a collapsed model from a good one."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmjax.objectives.loss import Sum, weighted

# Of a larger batch the first so many rows are measured: a fair sample, since batches are shuffled,
# and a spectrum of this size takes a few milliseconds whatever the batch.
SAMPLE = 128


def effective_rank(
    vectors: Float[Array, "rows width"], valid: Bool[Array, " rows"]
) -> Float[Array, ""]:
    """exp(entropy) of the singular values' shares of their sum (Roy and Vetterli 2007).

    As a share of the largest that there can be, min(valid rows, width): 1 where the vectors use all
    directions alike, and 1/min(…) where all lie on one line. Singular values that float32 cannot
    tell from zero count as zero.
    """
    rows, width = vectors.shape
    x = jnp.where(valid[:, None], vectors, 0)
    squares = jnp.linalg.eigvalsh(jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST))
    noise = rows * jnp.finfo(squares.dtype).eps * squares[-1]
    singular = jnp.sqrt(jnp.where(squares > noise, squares, 0))
    shares = singular / jnp.maximum(singular.sum(), 1e-30)
    largest = jnp.clip(valid.sum(), 1, width)
    return jnp.exp(jax.scipy.special.entr(shares).sum()) / largest


def uniformity(
    vectors: Float[Array, "rows width"], pairs: Bool[Array, "rows rows"]
) -> Float[Array, ""]:
    """Log of the mean of exp(−2 ‖x − y‖²) over `pairs` (Wang and Isola 2020, section 4.1.2).

    0 where all vectors are one, and near −4 where they are spread evenly over many dimensions.
    """
    cosines = jnp.matmul(vectors, vectors.T, precision=jax.lax.Precision.HIGHEST)
    kernel = jnp.exp(-2 * (2 - 2 * cosines))
    return jnp.log(jnp.where(pairs, kernel, 0).sum() / jnp.maximum(pairs.sum(), 1))


def alignment(
    images: Float[Array, "rows width"], texts: Float[Array, "rows width"]
) -> Float[Array, " rows"]:
    """‖x − y‖² of each picture and its text (Wang and Isola 2020, section 4.1.1).

    0 where they are one, 2 where they have nothing to do with each other.
    """
    return jnp.square(images - texts).sum(axis=-1)


def geometry_metrics(
    images: Float[Array, "rows width"],
    texts: Float[Array, "rows width"],
    valid: Bool[Array, " rows"],
    image_id: Int[Array, " rows"],
) -> dict[str, Sum]:
    """The three measures of unit vectors as (sum, weight), for the eye: without gradients.

    Of rank and uniformity it is the worse one of pictures and texts: one modality that collapses is
    enough. Rows of the same picture are no pair of the uniformity.
    """
    images, texts = jax.lax.stop_gradient((images, texts))
    aligned = weighted(alignment(images, texts), valid)
    images, texts, valid, image_id = (x[:SAMPLE] for x in (images, texts, valid, image_id))
    pairs = valid[:, None] & valid & (image_id[:, None] != image_id)
    rank = jnp.minimum(effective_rank(images, valid), effective_rank(texts, valid))
    uniform = jnp.maximum(uniformity(images, pairs), uniformity(texts, pairs))
    rows, count = valid.sum().astype(jnp.float32), pairs.sum().astype(jnp.float32)
    return {
        "embeddings/effective_rank": (rank * rows, rows),
        "embeddings/uniformity": (jnp.where(count > 0, uniform, 0) * count, count),
        "embeddings/alignment": aligned,
    }
