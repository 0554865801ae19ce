"""Retrieval and matching scores of a gallery, against brute force."""

import numpy as np
import pytest

from mmjax.evaluation import matching, retrieval
from mmjax.evaluation.encoding import Gallery
from mmjax.models import Encoded


def make_gallery(rng, image_id, text_id, width=6):
    def unit(rows):
        x = rng.normal(size=(rows, width)).astype(np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def encoded(rows):
        return Encoded(np.zeros((rows, 3, 2), np.float32), None, np.zeros((rows, 2), np.float32))

    return Gallery(
        image=encoded(len(image_id)),
        image_embedding=unit(len(image_id)),
        image_id=np.asarray(image_id),
        image_row=np.arange(len(image_id)),
        text=encoded(len(text_id)),
        text_embedding=unit(len(text_id)),
        text_id=np.asarray(text_id),
        captions=[f"caption {i}" for i in range(len(text_id))],
        bad_records=0,
    )


@pytest.mark.parametrize("k", [1, 4, 100])
def test_reranking_orders_the_best_k_by_matching_alone(monkeypatch, k):
    rng = np.random.default_rng(k)
    image_id = np.arange(12)
    text_id = np.repeat(image_id, 3)
    gallery = make_gallery(rng, image_id, text_id)
    log_odds = rng.normal(scale=5, size=(12, 36)).astype(np.float32)
    monkeypatch.setattr(
        retrieval, "match_pairs", lambda subject, gallery, images, texts: log_odds[images, texts]
    )
    result = retrieval.score_retrieval(None, gallery, {"rerank": k})
    similarity = gallery.image_embedding @ gallery.text_embedding.T
    for direction, scores, odds, ids, others in (
        ("image_to_text", similarity, log_odds, image_id, text_id),
        ("text_to_image", similarity.T, log_odds.T, text_id, image_id),
    ):
        ranks = {"": [], "reranked/": []}
        for query in range(len(scores)):
            order = sorted(range(len(others)), key=lambda j: -scores[query, j])
            best = sorted(order[:k], key=lambda j: -odds[query, j])
            for name, found in (("", order), ("reranked/", best + order[k:])):
                ranks[name].append(
                    next(i for i, j in enumerate(found, 1) if others[j] == ids[query])
                )
        for name, ours in ranks.items():
            for at in (1, 5, 10):
                assert result.metrics[f"retrieval/{name}{direction}/R@{at}"] == pytest.approx(
                    100 * np.mean(np.array(ours) <= at)
                )
            median = result.metrics[f"retrieval/{name}median_rank/{direction}"]
            assert median == np.median(ours)


def test_a_constant_model_scores_nothing(monkeypatch):
    gallery = make_gallery(np.random.default_rng(0), np.arange(8), np.arange(8))
    gallery.image_embedding[:] = gallery.text_embedding[:] = 0.5
    monkeypatch.setattr(
        retrieval, "match_pairs", lambda subject, gallery, images, texts: np.zeros(len(images))
    )
    metrics = retrieval.score_retrieval(None, gallery, {"rerank": 8}).metrics
    assert metrics["retrieval/image_to_text/R@1"] == 0
    assert metrics["retrieval/reranked/text_to_image/R@1"] == 0


def test_false_pairs_never_show_the_same_picture(monkeypatch):
    # Pictures 0 and 1 are one and the same: each other's captions are true of both.
    image_id = np.array([7, 7, 8, 9])
    gallery = make_gallery(np.random.default_rng(0), image_id, np.repeat(image_id, 50))
    seen = {}

    def match(subject, gallery, images, texts):
        seen["pairs"] = images, texts
        return (image_id[images] == gallery.text_id[texts]).astype(np.float32)

    monkeypatch.setattr(matching, "match_pairs", match)
    result, pairs = matching.score_matching(None, gallery, {"seed": 0})
    assert result.metrics["itm/roc_auc"] == 1.0
    assert result.metrics["itm/pairs"] == 400
    for image, text, label, _ in pairs:
        assert label == (image_id[image] == gallery.text_id[text])
