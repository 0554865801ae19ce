"""Answers word by word: weights, padding, and the average as a teacher."""

from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.models import Encoded
from mmjax.models.albef import Albef, AlbefConfig
from mmjax.models.bert import BertConfig
from mmjax.models.vit import ViTConfig
from mmjax.objectives.answer_generation import AnswerGeneration
from mmjax.objectives.features import Features
from tests.models import reference

WORDS, QUESTIONS, ANSWERS, LENGTH = 20, 4, 3, 6
CLS, DEC = 2, 18
KEY = jax.random.key(0)


def fields(seed=0):
    """Up to three answers a question, of several lengths; unused places are empty, weight 0."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, LENGTH + 1, (QUESTIONS, ANSWERS))
    lengths[0, 2] = lengths[2, 1:] = 0
    text = rng.integers(4, 18, (QUESTIONS, ANSWERS, LENGTH)).astype(np.int32)
    text[..., 0] = CLS
    mask = np.arange(LENGTH) < lengths[..., None]
    weights = rng.choice([0.3, 0.6, 0.9, 1.0], (QUESTIONS, ANSWERS)).astype(np.float32)
    return {
        "answer_text": np.where(mask, text, 0),
        "answer_text_mask": mask,
        "answer_weight": np.where(lengths > 0, weights, 0),
        "valid": np.arange(QUESTIONS) != 3,
    }


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def expected_loss(given, logits, smoothing=0.0, teacher=None, alpha=0.0):
    """Answer by answer and word by word, with loops."""
    total = 0.0
    for b in np.flatnonzero(given["valid"]):
        for k in range(ANSWERS):
            count = given["answer_text_mask"][b, k].sum()
            for t in range(count - 1):
                q = np.full(WORDS, smoothing / WORDS)
                q[given["answer_text"][b, k, t + 1]] += 1 - smoothing
                if teacher is not None:
                    q = (1 - alpha) * q + alpha * np.exp(log_softmax(teacher[b, k, t]))
                word = -(q * log_softmax(logits[b, k, t])).sum()
                total += given["answer_weight"][b, k] * word
    return total / given["valid"].sum()


def stub(given, logits):
    """Features of a model that answers `logits` and records what it was given."""
    seen = {}

    def decode(context, decoder_text, decoder_mask, key):
        seen.update(context=context, text=np.asarray(decoder_text), mask=np.asarray(decoder_mask))
        return jnp.array(logits.reshape(-1, *logits.shape[2:]))

    rows = jnp.arange(QUESTIONS)
    context = Encoded(rows[:, None, None] + jnp.zeros(()), rows[:, None] > 1, rows[:, None] * 1.0)
    features = object.__new__(Features)
    features.model = SimpleNamespace(answer_context=lambda *parts: context, decode=decode)
    features.batch = {name: jnp.array(array) for name, array in given.items()}
    features.key = features.average = features.step = None
    features.__dict__.update(image=None, fused=None, text=None)
    return features, seen


def scores(seed):
    rng = np.random.default_rng(seed)
    return 2 * rng.normal(size=(QUESTIONS, ANSWERS, LENGTH - 1, WORDS)).astype(np.float32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("start_id", [-1, DEC])
def test_agrees_with_the_papers(smoothing, start_id):
    given, logits = fields(), scores(1)
    features, seen = stub(given, logits)
    loss = AnswerGeneration(smoothing=smoothing, start_id=start_id)(features, KEY)
    np.testing.assert_allclose(
        loss.total / loss.weight, expected_loss(given, logits, smoothing), rtol=1e-5
    )
    assert loss.weight == given["valid"].sum()
    # Every answer stands beside its own question.
    np.testing.assert_array_equal(seen["context"].pooled[:, 0], np.repeat(range(4), ANSWERS))
    text = given["answer_text"].reshape(-1, LENGTH)
    np.testing.assert_array_equal(seen["text"][:, 1:], text[:, 1:-1])
    assert start_id < 0 or (seen["text"][:, 0] == DEC).all()
    np.testing.assert_array_equal(
        seen["mask"], given["answer_text_mask"].reshape(-1, LENGTH)[:, :-1]
    )


@pytest.mark.parametrize(("step", "alpha"), [(0, 0.0), (5, 0.2), (50, 0.4)])
def test_the_average_teaches_every_word(step, alpha):
    given, logits, teacher = fields(), scores(1), scores(2)
    features, _ = stub(given, logits)
    features.average, features.step = stub(given, teacher)[0], jnp.array(step)
    loss = AnswerGeneration(distill=0.4, ramp_steps=10)(features, KEY)
    expected = expected_loss(given, logits, teacher=teacher, alpha=alpha)
    np.testing.assert_allclose(loss.total / loss.weight, expected, rtol=1e-5)
    plain = AnswerGeneration()(features, KEY)
    np.testing.assert_allclose(plain.total / plain.weight, expected_loss(given, logits), rtol=1e-5)


def test_the_accuracy_is_that_of_words_by_their_weights():
    given, logits = fields(), scores(1)
    targets = given["answer_text"][..., 1:]
    right = np.random.default_rng(4).random(targets.shape) < 0.5
    logits = np.where(right[..., None], 50 * np.eye(WORDS)[targets], logits).astype(np.float32)
    loss = AnswerGeneration()(stub(given, logits)[0], KEY)
    hits, weight = loss.metrics["answer_generation/accuracy"]
    weights = given["answer_weight"] * given["valid"][:, None]
    weights = weights[..., None] * given["answer_text_mask"][..., 1:]
    hit = logits.argmax(axis=-1) == targets
    np.testing.assert_allclose(weight, weights.sum(), rtol=1e-6)
    np.testing.assert_allclose(hits, (weights * hit).sum(), rtol=1e-6)


@cache
def albef():
    layers = {"width": 16, "heads": 2, "mlp_width": 20}
    config = AlbefConfig(
        image=ViTConfig(**layers, depth=1, image_size=16, patch_size=8),
        text=BertConfig(**layers, depth=2, vocabulary_size=WORDS, max_length=8),
        fusion_layer=1,
        decoder_depth=1,
    )
    return reference.split(lambda: Albef(config, nnx.Rngs(0)))


def test_padding_and_invalid_rows_change_neither_loss_nor_gradient():
    """Nor do the places of answers that nobody gave, of which not one token is visible."""
    graph, params = albef()
    rng, given = np.random.default_rng(3), fields()
    question = rng.integers(4, 18, (QUESTIONS, 7))
    question_mask = np.arange(7) < np.array([7, 4, 5, 7])[:, None]
    image = rng.normal(size=(QUESTIONS, 16, 16, 3)).astype(np.float32)

    @jax.jit
    def run(params, batch):
        def loss(params):
            loss = AnswerGeneration()(Features(nnx.merge(graph, params), batch), KEY)
            return loss.total / loss.weight

        return jax.value_and_grad(loss)(params)

    def batch(filler):
        counts = given["valid"][:, None]
        there = given["answer_text_mask"] & counts[..., None]
        fields = given | {
            "answer_text": np.where(there, given["answer_text"], filler),
            "text": np.where(question_mask & counts, question, filler),
            "text_mask": question_mask,
            "image": np.where(counts[..., None, None], image, filler),
        }
        return {name: jnp.array(array) for name, array in fields.items()}

    (loss, gradient), (other, other_gradient) = (run(params, batch(filler)) for filler in (0, 7))
    np.testing.assert_allclose(loss, other, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, other_gradient)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
