"""Masked language modelling (MLM) of the text, with the picture at hand."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mmjax.objectives.loss import Features, Loss, example_keys, weighted


def mask_tokens(
    text: Int[Array, "batch length"],
    maskable: Bool[Array, "batch length"],
    keys: Key[Array, " batch"],
    *,
    rate: float,
    mask_id: int,
    vocabulary_size: int,
) -> tuple[Int[Array, "batch length"], Bool[Array, "batch length"]]:
    """BERT's corruption (Devlin et al. 2019, section 3.1), each row drawn from its own key.

    A token is chosen with probability `rate`; of the chosen, 80 % become [MASK], 10 % a word drawn
    evenly from the vocabulary, 10 % stay. Returns the new text and where it was chosen.
    """

    def row(row_text, row_maskable, key):
        choose, kind, word = jax.random.split(key, 3)
        chosen = row_maskable & (jax.random.uniform(choose, row_text.shape) < rate)
        u = jax.random.uniform(kind, row_text.shape)
        words = jax.random.randint(word, row_text.shape, 0, vocabulary_size, row_text.dtype)
        corrupted = jnp.where(u < 0.8, mask_id, jnp.where(u < 0.9, words, row_text))
        return jnp.where(chosen, corrupted, row_text), chosen

    return jax.vmap(row)(text, maskable, keys)


def masked_language_objective(
    features: Features,
    key: jax.Array,
    *,
    rate: float,
    mask_id: int,
    special_ids: tuple[int, ...],
) -> Loss:
    """Cross-entropy of the words behind the masks, given the rest of the text and the picture."""
    model, batch = features.model, features.batch
    text, text_mask = batch["text"], batch["text_mask"]
    maskable = text_mask & ~jnp.isin(text, jnp.asarray(special_ids)) & batch["valid"][:, None]
    masked_text, chosen = mask_tokens(
        text,
        maskable,
        example_keys(key, batch["index"]),
        rate=rate,
        mask_id=mask_id,
        vocabulary_size=model.config.text.vocabulary_size,
    )
    encoded = model.encode_text(masked_text, text_mask, key=features.dropout_key("masked text"))
    fused = model.fuse(features.image, encoded, features.dropout_key("masked fusion"))
    logits = model.masked_language(fused.text_tokens, model.text.embeddings)
    total, weight = weighted(word_loss(logits, text), chosen)
    hit = logits.argmax(axis=-1) == text
    return Loss(total, weight, {"masked_language/accuracy": weighted(hit, chosen)})


def word_loss(
    logits: Float[Array, "batch length words"], text: Int[Array, "batch length"]
) -> Float[Array, "batch length"]:
    """Cross-entropy of each position's word."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(log_p, text[..., None], axis=-1)[..., 0]
