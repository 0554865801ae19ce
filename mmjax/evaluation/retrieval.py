"""Image-text retrieval, both ways, by the embeddings and re-ranked by image-text matching."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from mmjax.errors import InputError
from mmjax.evaluation.encoding import Gallery, Pictures, Subject, match_pairs
from mmjax.evaluation.metrics import Direction, retrieval_metrics, retrieval_ranks
from mmjax.evaluation.report import Result

# Above every cosine, so that re-ranked candidates stay before the others.
_RERANKED = 1e4


def score_retrieval(subject: Subject, gallery: Gallery, options: Mapping[str, Any]) -> Result:
    """R@k and median ranks of image→text and text→image over the whole gallery.

    With `options['rerank']` = k, the best k by similarity are ordered anew by the matching head
    alone (ALBEF's rule, Li et al. 2021, section 3.4; BLIP adds the similarity), named
    `retrieval/reranked/…`.
    """
    similarity, positives = gallery.similarity, gallery.positives
    result = Result(
        {
            "retrieval/gallery_size": len(gallery.image_id),
            "retrieval/captions": len(gallery.text_id),
            "retrieval/bad_records": gallery.bad_records,
        },
        dict.fromkeys(
            ["retrieval/gallery_size", "retrieval/captions", "retrieval/bad_records"], "count"
        ),
    )
    result = result.merge(_both_ways(similarity, similarity.T, positives))
    if k := options["rerank"]:
        if k < 0:
            raise InputError(f"retrieval.rerank is {k}; it is a number of candidates, or 0.")
        images_first = _rerank(subject, gallery, similarity, k, images_are_queries=True)
        texts_first = _rerank(subject, gallery, similarity.T, k, images_are_queries=False)
        result = result.merge(_both_ways(images_first, texts_first, positives, reranked=True))
    return result


def _both_ways(
    image_to_text: Float[np.ndarray, "pictures captions"],
    text_to_image: Float[np.ndarray, "captions pictures"],
    positives: Bool[np.ndarray, "pictures captions"],
    reranked: bool = False,
) -> Result:
    directions: list[tuple[Direction, Any, Any]] = [
        ("image_to_text", image_to_text, positives),
        ("text_to_image", text_to_image, positives.T),
    ]
    result = Result({}, {})
    for direction, scores, relevant in directions:
        ranks = retrieval_ranks(scores, relevant)
        result = result.merge(Result(*retrieval_metrics(ranks, direction, reranked=reranked)))
    return result


def _rerank(
    subject: Subject,
    gallery: Gallery,
    similarity: Float[np.ndarray, "queries candidates"],
    k: int,
    *,
    images_are_queries: bool,
) -> Float[np.ndarray, "queries candidates"]:
    """The similarities, those of each query's best k replaced by matching scores above all."""
    k = min(k, similarity.shape[1])
    best = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    queries, candidates = np.repeat(np.arange(len(best)), k), best.reshape(-1)
    pairs = (queries, candidates) if images_are_queries else (candidates, queries)
    scores = similarity.astype(np.float64)
    scores[queries, candidates] = _RERANKED + match_pairs(subject, gallery, *pairs).astype(
        np.float64
    )
    return scores


def retrieval_examples(gallery: Gallery, pictures: Pictures, count: int) -> list[dict[str, Any]]:
    """For `count` captions, spread over the gallery: the five best pictures and the true rank."""
    scores, positives = gallery.similarity.T, gallery.positives.T
    chosen = np.linspace(0, len(scores) - 1, min(count, len(scores))).astype(int)
    ranks = retrieval_ranks(scores[chosen], positives[chosen])
    examples = []
    for text, rank in zip(chosen, ranks, strict=True):
        best = np.argsort(-scores[text], kind="stable")[:5]
        examples.append(
            {
                "caption": gallery.captions[text],
                "rank": int(rank),
                "picture": pictures(gallery.image_row[positives[text].argmax()]),
                "retrieved": [
                    {
                        "picture": pictures(gallery.image_row[image]),
                        "score": float(scores[text, image]),
                        "is_match": bool(positives[text, image]),
                    }
                    for image in best
                ],
            }
        )
    return examples
