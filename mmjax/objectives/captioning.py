"""Generation: the words of a caption one by one, from the picture, or also from how it begins."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mmjax.models import Encoded
from mmjax.objectives.features import Features
from mmjax.objectives.loss import Loss, example_keys, purpose_key, weighted
from mmjax.objectives.masked_language import word_loss
from mmjax.objectives.objective import Objective


@dataclass(frozen=True)
class Captioning(Objective):
    """Cross-entropy of every word of the caption, given those before it and the picture.

    BLIP (Li et al. 2022, section 3.2) smooths by 0.1, begins with its token [DEC], and trains
    captions with the prompt 'a picture of', which does not count; ViT-GPT2 has the defaults.
    """

    smoothing: float = 0.0  # of the labels
    start_id: int = -1  # the token that takes the place of the first; -1: none does
    prompt: str = ""  # words before those of every caption; they are given

    formula: ClassVar[str] = "−log p(wₜ | w₍<t₎, picture), mean over words"
    source: ClassVar[str] = "Vinyals et al. 2015, eq. 2; Li et al. 2022, BLIP, section 3.2"
    needs: ClassVar[tuple[str, ...]] = ("text_decoder",)

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Nothing is left to chance."""
        prompt = _tokens(features, self.prompt)
        text, mask = prompted(features.batch["text"], features.batch["text_mask"], prompt)
        logits = features.model.decode(
            features.model.caption_context(features.image),
            begun(text[:, :-1], self.start_id),
            mask[:, :-1],
            key=features.dropout_key("captioning"),
        )
        asked = jnp.arange(1, text.shape[1]) > len(prompt)
        counted = mask[:, 1:] & asked & features.batch["valid"][:, None]
        return loss_of_words("captioning", logits, text[:, 1:], counted, self.smoothing)


@dataclass(frozen=True)
class PrefixLanguage(Objective):
    """Cross-entropy of the second part of a caption, given its first part and the picture.

    The caption is cut anew in every step, anywhere between two of its tokens. Picture and first
    part are encoded and fused, every token seeing all others; the decoder looks at both, and begins
    with the caption's first token ([CLS], or `start_id`).
    """

    smoothing: float = 0.0  # of the labels
    start_id: int = -1  # the token that the decoder begins with; -1: the caption's first

    formula: ClassVar[str] = "−log p(wₜ | w₍<t₎, picture), mean over the words behind a drawn cut"
    source: ClassVar[str] = "Wang et al. 2022, SimVLM, section 3 (PrefixLM)"
    needs: ClassVar[tuple[str, ...]] = ("text_decoder",)

    def __call__(self, features: Features, key: jax.Array) -> Loss:
        """Where a caption is cut is drawn by example."""
        batch = features.batch
        text, mask = batch["text"], batch["text_mask"]
        keys = example_keys(purpose_key(key, "cut"), batch["index"])
        share = jax.vmap(jax.random.uniform)(keys)
        prefix_mask, rest, rest_mask = cut_captions(text, mask, share)
        prefix = features.encode_text("prefix", text_mask=prefix_mask)
        logits = features.model.decode(
            _both(features.image, prefix, features),
            begun(rest[:, :-1], self.start_id),
            rest_mask[:, :-1],
            key=features.dropout_key("prefix decoder"),
        )
        counted = rest_mask[:, 1:] & batch["valid"][:, None]
        return loss_of_words("prefix_language", logits, rest[:, 1:], counted, self.smoothing)


def prompted(
    text: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    prompt: Int[np.ndarray, " prompt"],
) -> tuple[Int[Array, "batch whole"], Bool[Array, "batch whole"]]:
    """Texts, and where they are tokens, with a prompt between their first token and the others."""
    words = jnp.broadcast_to(jnp.asarray(prompt, text.dtype), (len(text), len(prompt)))
    text = jnp.concatenate([text[:, :1], words, text[:, 1:]], axis=1)
    there = jnp.ones(words.shape, bool)
    return text, jnp.concatenate([mask[:, :1], there, mask[:, 1:]], axis=1)


def cut_captions(
    text: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    share: Float[Array, " batch"],
) -> tuple[Bool[Array, "batch length"], Int[Array, "batch length"], Bool[Array, "batch length"]]:
    """Where the first parts of texts are tokens; the second parts behind the first token; and mask.

    Of n tokens the first 1 + ⌊share · (n - 1)⌋ are the first part, for a share in [0, 1): all but
    at least one.
    """
    columns, count = jnp.arange(text.shape[1]), mask.sum(axis=1)
    cut = 1 + jnp.floor(share * (count - 1)).astype(jnp.int32)[:, None]
    # The first token, then what stands from the cut on.
    source = jnp.where(columns == 0, 0, columns + cut - 1)
    rest = jnp.take_along_axis(text, jnp.minimum(source, text.shape[1] - 1), axis=1)
    return mask & (columns < cut), rest, source < count[:, None]


def begun(text: Int[Array, "batch length"], start_id: int) -> Int[Array, "batch length"]:
    """Texts with `start_id` as their first token; as they are where it is negative."""
    return text if start_id < 0 else text.at[:, 0].set(start_id)


def loss_of_words(
    name: str,
    logits: Float[Array, "batch length words"],
    targets: Int[Array, "batch length"],
    counted: Bool[Array, "batch length"],
    smoothing: float,
) -> Loss:
    """The mean over words that count, with the share of those that were the likeliest."""
    total, weight = weighted(word_loss(logits, targets, smoothing), counted)
    metrics = {f"{name}/accuracy": weighted(logits.argmax(axis=-1) == targets, counted)}
    return Loss(total, weight, metrics, scores=(logits, counted.astype(jnp.float32)))


def _tokens(features: Features, prompt: str) -> Int[np.ndarray, " prompt"]:
    """The prompt's own tokens, without those around every text."""
    if not prompt:
        return np.zeros(0, np.int32)
    tokenizer = features.tokenizer
    ids, mask = tokenizer.encode(prompt, len(prompt) + 2)
    return ids[mask & ~np.isin(ids, [tokenizer.cls_id, tokenizer.sep_id])]


def _both(image: Encoded, prefix: Encoded, features: Features) -> Encoded:
    """Picture and prefix after their fusion, side by side."""
    fused = features.fuse(image, prefix, "prefix fusion")
    tokens = [fused.image_tokens, fused.text_tokens]
    masks = [
        jnp.ones(part.shape[:2], bool) if mask is None else mask
        for part, mask in zip(tokens, (image.mask, prefix.mask), strict=True)
    ]
    return Encoded(jnp.concatenate(tokens, axis=1), jnp.concatenate(masks, axis=1), fused.pooled)
