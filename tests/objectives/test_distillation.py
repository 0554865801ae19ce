"""Learning from what a teacher says: each loss in plain numpy, and what all of them promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmjax.errors import InputError
from mmjax.objectives import Features
from mmjax.objectives.distillation import (
    AnswerDistillation,
    MatchingDistillation,
    SimilarityDistillation,
    WordDistillation,
    binary_divergence,
    divergence,
    similarity_divergence,
)
from mmjax.objectives.feature_distillation import (
    AttentionDistillation,
    EmbeddingDistillation,
    RelationDistillation,
)
from mmjax.sharding import to_device
from tests.models.reference import assert_close, tiny_batch, tiny_model
from tests.objectives.fakes import WORDS, FakeModel, FakeTokenizer, batch_of, encoded
from tests.objectives.teaching import (
    ROWS,
    STUDENT,
    WIDE_TEACHER,
    Lesson,
    features_of,
    one_row_of_devices,
)

ALL = {
    "similarity_distillation": SimilarityDistillation(weight=1.0),
    "matching_distillation": MatchingDistillation(weight=1.0, temperature=2.0),
    "word_distillation": WordDistillation(weight=1.0, temperature=2.0),
    "answer_distillation": AnswerDistillation(weight=1.0),
    "embedding_distillation": EmbeddingDistillation(weight=1.0),
    "relation_distillation": RelationDistillation(weight=1.0, of=("image", "text", "fusion")),
    "attention_distillation": AttentionDistillation(weight=1.0),
}


def kullback_leibler(p, q):
    return (p * (np.log(p) - np.log(q))).sum(axis=-1)


def softmax(x):
    p = np.exp(x.astype(np.float64))
    return p / p.sum(axis=-1, keepdims=True)


def draw(*shape, seed=0):
    return (2 * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


# ---- the formulas


@pytest.mark.parametrize("temperature", [1.0, 4.0, 0.5])
def test_divergence_of_softmaxes(temperature):
    student, teacher = draw(3, 5, 7), draw(3, 5, 7, seed=1)
    found = divergence(jnp.array(student), jnp.array(teacher), temperature)
    expected = kullback_leibler(softmax(teacher / temperature), softmax(student / temperature))
    np.testing.assert_allclose(found, temperature**2 * expected, rtol=1e-4)


def test_the_gradient_is_student_less_teacher():
    """T (q − p): times T², it does not fade as 1/T² (Hinton et al. 2015, equation 2)."""
    student, teacher, temperature = draw(4, 6), draw(4, 6, seed=1), 3.0
    slopes = jax.grad(
        lambda s, t: divergence(s, t, temperature).sum(), argnums=(0, 1)
    )(jnp.array(student), jnp.array(teacher))  # fmt: skip
    expected = softmax(student / temperature) - softmax(teacher / temperature)
    np.testing.assert_allclose(slopes[0], temperature * expected, atol=1e-6)
    assert not np.asarray(slopes[1]).any()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_of_sigmoids(temperature):
    student, teacher = draw(5, 9), draw(5, 9, seed=1)
    found = binary_divergence(jnp.array(student), jnp.array(teacher), temperature)
    q, p = (1 / (1 + np.exp(-x.astype(np.float64) / temperature)) for x in (student, teacher))
    expected = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    np.testing.assert_allclose(found, temperature**2 * expected.sum(axis=1), rtol=1e-4)


def test_divergence_of_similarities_among_valid_rows():
    student, teacher = draw(6, 6), draw(6, 6, seed=1)
    valid = np.array([True, True, False, True, False, True])
    found = similarity_divergence(jnp.array(student), jnp.array(teacher), jnp.array(valid))
    q, p = (x[valid][:, valid] for x in (student, teacher))
    there = kullback_leibler(softmax(p), softmax(q))
    back = kullback_leibler(softmax(p.T), softmax(q.T))
    np.testing.assert_allclose(found[valid], (there + back) / 2, rtol=1e-4)


def test_large_scores_stay_finite():
    scores = jnp.array([[300.0, -300.0], [0.0, 0.0]])
    np.testing.assert_allclose(divergence(scores, scores[:, ::-1]), [600, 0])


# ---- what every objective promises


@pytest.fixture(scope="module")
def lesson():
    return Lesson(ALL)


@pytest.fixture(scope="module")
def taught(lesson):
    return lesson(tiny_batch(STUDENT, ROWS))


def test_a_teacher_that_agrees_teaches_nothing(lesson):
    (slopes, _), losses = lesson(tiny_batch(STUDENT, ROWS), seeds=(0, 0))
    for name, (total, weight, metrics) in losses.items():
        np.testing.assert_allclose(total / weight, 0, atol=2e-6, err_msg=name)
        for agreement, count in metrics.values():
            assert agreement == count > 0
    assert max(np.abs(x).max() for x in jax.tree.leaves(slopes)) < 2e-5


def test_another_teacher_does_and_is_not_taught_itself(taught):
    (slopes, backwards), losses = taught
    assert all(total / weight > 0.01 for total, weight, _ in losses.values())
    assert not any(x.any() for x in jax.tree.leaves(backwards))
    assert max(np.abs(x).max() for x in jax.tree.leaves(slopes)) > 0.01


def test_padding_and_invalid_rows_change_nothing(lesson, taught):
    batch = tiny_batch(STUDENT, ROWS)
    valid, mask = batch["valid"], batch["text_mask"]
    assert not valid.all()
    assert not mask[valid].all()
    batch["text"] = np.where(mask & valid[:, None], batch["text"], 7)
    batch["image"][~valid] = 9
    slopes, losses = lesson(batch)
    assert_close(losses, taught[1], 1e-6)
    assert_close(slopes, taught[0], 1e-6)


def test_a_batch_without_examples_costs_nothing(lesson):
    (slopes, _), losses = lesson({**tiny_batch(STUDENT, ROWS), "valid": np.zeros(ROWS, bool)})
    assert all(total == 0 == weight for total, weight, _ in losses.values())
    assert not any(x.any() for x in jax.tree.leaves(slopes))


def test_a_teacher_may_be_deeper_and_wider_and_have_more_heads():
    def losses():
        features = features_of(STUDENT, WIDE_TEACHER)
        return [objective(features, jax.random.key(0)).total for objective in ALL.values()]

    assert [x.shape for x in jax.eval_shape(losses)] == [()] * len(ALL)


def slopes_on(devices, objective):
    """The loss of pictures and texts that are vectors, and its slopes by the pictures."""
    batch = batch_of(ROWS, image=draw(ROWS, 6), text=draw(ROWS, 6, seed=1))
    batch["valid"] = jnp.arange(ROWS) != 5
    student, teacher = (
        FakeModel(
            matching=True,
            encode_image=lambda image, key=None, power=power: encoded(jnp.abs(image) ** power),
            match=lambda fused: fused.pooled[:, ::6],
        )
        for power in (1.0, 0.5)
    )

    def mean(image, batch):
        features = Features(student, {**batch, "image": image}, reference=teacher)
        loss = objective(features, jax.random.key(0))
        return loss.total / loss.weight, (loss.total, loss.weight)

    mesh = one_row_of_devices(devices)
    with jax.set_mesh(mesh):
        batch = to_device(jax.tree.map(np.asarray, batch), mesh)
        return jax.device_get(jax.jit(jax.grad(mean, has_aux=True))(batch["image"], batch))


@pytest.mark.parametrize(
    "objective",
    [
        SimilarityDistillation(),
        MatchingDistillation(),
        RelationDistillation(of=("image", "fusion")),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_examples_are_compared_across_devices(objective):
    assert objective.compares_examples
    expected, found = slopes_on(1, objective), slopes_on(8, objective)
    assert np.abs(expected[0]).max() > 1e-4
    assert_close(found, expected, 1e-6)


def test_only_words_of_the_vocabulary_are_guessed():
    """Tables may go on behind it, and a teacher's further; what they hold there does not count."""
    logits = draw(4, 9, 60), draw(4, 9, 60, seed=1)
    models = [
        FakeModel(masked_language=True, score_words=lambda tokens, x=x[..., :size]: jnp.array(x))
        for x, size in zip(logits, (WORDS + 2, 60), strict=True)
    ]
    text = np.full((4, 9), 7, np.int32)
    batch = batch_of(4, image=draw(4, 6), text=text, text_mask=np.ones((4, 9), bool))
    features = Features(models[0], batch, tokenizer=FakeTokenizer(), reference=models[1])
    loss = WordDistillation(temperature=2.0)(features, jax.random.key(0))
    chosen = np.asarray(features.words_masked.chosen)
    q, p = (softmax(x[..., :WORDS] / 2) for x in logits)
    np.testing.assert_allclose(loss.total, 4 * kullback_leibler(p, q)[chosen].sum(), rtol=1e-4)
    assert loss.weight == chosen.sum() > 0


# ---- what cannot be


@pytest.mark.parametrize(
    ("objective", "teacher", "words"),
    [
        (SimilarityDistillation(), None, "config.teacher.checkpoint"),
        (SimilarityDistillation(), tiny_model(embedding_width=0), "no contrastive"),
        (WordDistillation(), tiny_model(masked_language=False), "no masked_language"),
        (MatchingDistillation(), tiny_model(matching=False), "no matching"),
        (
            AnswerDistillation(),
            tiny_model(answers=("no", "yes")),
            "the model among 4",
        ),
        (EmbeddingDistillation(), tiny_model(embedding_width=24), "16 here and 24 in the teacher"),
        (AttentionDistillation(), tiny_model(image_patch_size=12), "4 × 10 tokens"),
        (AttentionDistillation(), tiny_model(fusion_kind="merged"), "'fusion' cannot be compared"),
        (AttentionDistillation(), tiny_model(fusion_kind="none"), "the teacher over nothing"),
    ],
    ids=range(9),
)
def test_a_teacher_that_does_not_fit_is_refused(objective, teacher, words):
    def run():
        return objective(features_of(STUDENT, teacher), jax.random.key(0)).total

    with pytest.raises(InputError) as error:
        jax.eval_shape(run)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("objective", "changes", "words"),
    [
        (WordDistillation(temperature=0.0), {}, "temperature is 0.0"),
        (MatchingDistillation(temperature=-1.0), {}, "temperature is -1.0"),
        (MatchingDistillation(), {"embedding_width": 0}, "model.embedding_width"),
        (EmbeddingDistillation(), {"embedding_width": 0}, "no contrastive head"),
        (EmbeddingDistillation(of=()), {}, "of is empty"),
        (RelationDistillation(of=("imge",)), {}, "Did you mean image"),
        (AttentionDistillation(of=("fused",)), {}, "names 'fused'"),
    ],
    ids=range(7),
)
def test_options_that_cannot_be_are_refused(objective, changes, words):
    model = features_of(tiny_model(**changes), None).model
    with pytest.raises(InputError) as error:
        objective.check("mine", model)
    assert words in str(error.value)


def test_pictures_alone_ask_for_no_words():
    assert WordDistillation().teacher_reads
    assert not EmbeddingDistillation(of=("image_embedding",)).teacher_reads
    assert not AttentionDistillation(of=("image",)).teacher_reads
    assert AttentionDistillation(of=("image", "fusion")).teacher_reads
