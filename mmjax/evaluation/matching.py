"""Image-text matching: does the model tell true pairs from random ones, and where does it look?"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmjax.errors import InputError
from mmjax.evaluation.encoding import Gallery, Pictures, Subject, match_pairs
from mmjax.evaluation.metrics import roc_auc
from mmjax.evaluation.report import Result


def score_matching(
    subject: Subject, gallery: Gallery, options: Mapping[str, Any]
) -> tuple[Result, list[tuple[int, int, bool, float]]]:
    """ROC-AUC and accuracy on every caption's own picture and one random other picture.

    Also returns the pairs: picture, caption, whether they belong together, and the probability.
    """
    texts = np.arange(len(gallery.text_id))
    own = gallery.positives.argmax(axis=0)
    if len(np.unique(gallery.image_id)) < 2:
        raise InputError("image-text matching needs at least two pictures to evaluate on.")
    rng = np.random.default_rng(options["seed"])
    others = (own + rng.integers(1, len(gallery.image_id), len(texts))) % len(gallery.image_id)
    # Rows of one picture listed twice are no negatives of each other.
    while (same := gallery.image_id[others] == gallery.text_id).any():
        others[same] = rng.integers(0, len(gallery.image_id), same.sum())
    images, captions = np.concatenate([own, others]), np.concatenate([texts, texts])
    labels = np.arange(len(images)) < len(own)
    log_odds = match_pairs(subject, gallery, images, captions)
    result = Result(
        {
            "itm/roc_auc": roc_auc(log_odds, labels),
            "itm/accuracy": 100 * float(((log_odds > 0) == labels).mean()),
            "itm/pairs": len(labels),
        },
        {"itm/roc_auc": "fraction", "itm/accuracy": "percent", "itm/pairs": "count"},
    )
    probability = 1 / (1 + np.exp(-log_odds.astype(np.float64)))
    pairs = [
        (int(image), int(text), bool(label), float(p))
        for image, text, label, p in zip(images, captions, labels, probability, strict=True)
    ]
    return result, pairs


def matching_examples(
    gallery: Gallery,
    pairs: list[tuple[int, int, bool, float]],
    pictures: Pictures,
    count: int,
) -> list[dict[str, Any]]:
    """`count` of the pairs, true and false ones in turn."""
    true, false = [p for p in pairs if p[2]], [p for p in pairs if not p[2]]
    chosen = [p for both in zip(true, false, strict=True) for p in both][:count]
    return [
        {
            "picture": pictures(gallery.image_row[image]),
            "caption": gallery.captions[text],
            "is_match": label,
            "probability": probability,
        }
        for image, text, label, probability in chosen
    ]


def attention_examples(
    subject: Subject, gallery: Gallery, pictures: Pictures, grid: tuple[int, int], count: int
) -> list[dict[str, Any]]:
    """Where the words of some captions look in their own picture.

    The text stream's cross-attention in the last fusion layer, averaged over heads; the weight on
    the picture's class token is left out, so a map sums to at most 1.
    """
    count = min(count, len(gallery.text_id), subject.batch_size)
    texts = np.linspace(0, len(gallery.text_id) - 1, subject.batch_size).astype(int)
    images = gallery.positives.argmax(axis=0)[texts]
    pair = {"image": gallery.image.take(images), "text": gallery.text.take(texts)}
    maps = subject.run("attention", _attention, pair)
    examples = []
    for row in np.linspace(0, len(texts) - 1, count).astype(int):
        caption = gallery.captions[texts[row]]
        ids, mask = subject.tokenizer.encode(caption, gallery.text.tokens.shape[1])
        patches = maps[row, :, -grid[0] * grid[1] :].reshape(-1, *grid)
        words = [i for i in np.flatnonzero(mask) if ids[i] not in subject.tokenizer.special_ids]
        examples.append(
            {
                "picture": pictures(gallery.image_row[images[row]]),
                "caption": caption,
                "tokens": subject.tokenizer.tokens(ids[words]),
                "maps": patches[words].round(5).tolist(),
            }
        )
    return examples


def _attention(model, pair):
    return model.fusion.attention_maps(pair["image"], pair["text"])[-1]
