"""ALBEF beside recorded runs of its original code."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mmjax.errors import InputError
from mmjax.objectives.answer_generation import AnswerGeneration, answer_loss
from mmjax.objectives.features import Features
from mmjax.objectives.masked_language import MaskedLanguage, word_loss
from mmjax.objectives.momentum_distillation import mixed, soft_cross_entropy
from tests.weights.families.distilled import (
    KEY,
    averaged,
    batch_of,
    check_after,
    check_average,
    check_functions,
    check_outputs,
    contrast,
    encoders_of,
    match,
    mean,
    outputs_of,
    pictures,
    texts,
    training_features,
)
from tests.weights.families.recorded import (
    OUTPUTS,
    Recorded,
    assert_close,
    assert_saved_whole,
    load,
    run,
)

TASKS = {
    "pretrain": {"embedding_width": 16, "matching": True, "masked_language": True},
    "retrieval": {"embedding_width": 16, "matching": True},
    "vqa": {"decoder_depth": 2},
    "nlvr": {"pictures": 2, "labels": ["false", "true"]},
    "ve": {"labels": ["entailment", "neutral", "contradiction"]},
    "pretrain_nlvr": {"pictures": 2, "embedding_width": 16, "text_assignment": True},
}
# By the share of the teacher in the targets; without one nothing differs from a share of 0.
DISTILLED = pytest.mark.parametrize(
    ("alpha", "variants"),
    [
        (0.4, ["distill_alpha0.4"]),
        pytest.param(0.0, ["distill_alpha0.0", "nodistill"], marks=pytest.mark.slow),
    ],
    ids=["distilled", "plain"],
)
MOMENTUM = 0.995  # where the original does not make it a setting


@pytest.fixture
def recorded(request, shared):
    """The run of a task, which the test names."""
    return Recorded(shared / "goldens" / f"albef_{request.param}_dev.npz")


def task(name):
    return pytest.mark.parametrize("recorded", [name], indirect=True, ids=[name])


def load_albef(recorded, folder, name, family="albef"):
    """The model, or the momentum model, of a run."""
    config = {**encoders_of(recorded), **TASKS[name], "fusion_layer": 2}
    return load(folder, family, config, recorded.under("w/"))


def load_teacher(recorded, folder, name, model):
    """The momentum model after its update."""
    before = load_albef(recorded, folder, name, "albef-momentum")
    return averaged(model, before, recorded.config.get("momentum", MOMENTUM))


class Found(NamedTuple):
    """What was compared of a run's outputs, and the outputs."""

    count: int
    outputs: dict


def check(recorded, variants, model, loss):
    """A loss with its parts, what else was recorded, and the gradient; of variants that agree."""
    value, (parts, outputs), gradient = run(model, loss)
    for variant in variants:
        for name, part in {**parts, "total": value}.items():
            recorded.check(f"loss/{variant}/{name}", part)
        recorded.check_gradients(variant, gradient)
    counts = [check_outputs(recorded, variant, outputs) for variant in variants]
    return Found(counts[0], outputs)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array(labels))


@task("pretrain")
@pytest.mark.parametrize(("alpha", "outputs"), [(0.4, 12), (0.0, 0)])
def test_pretraining(recorded, alpha, outputs, tmp_path):
    model = load_albef(recorded, tmp_path, "pretrain")
    teacher = load_teacher(recorded, tmp_path, "pretrain", model)
    drawn = (
        jnp.array(recorded["draw/mlm_input_ids"]),
        jnp.array(recorded["draw/mlm_labels"] != -100),
    )

    def loss(model):
        features = training_features(model, teacher, recorded)
        for read in (features, features.average):
            read.__dict__["_masked_text"] = drawn
        ita, itm = contrast(features, recorded, alpha), match(features, recorded)
        mlm = MaskedLanguage(distill=alpha)(features, KEY)
        outputs = outputs_of(features, ita, itm) | {
            "mlm_logits": mlm.scores[0],
            "logits_m": MaskedLanguage()(features.average, KEY).scores[0],
        }
        parts = {"mlm": mean(mlm), "ita": mean(ita), "itm": mean(itm)}
        return sum(parts.values()), (parts, outputs)

    found = check(recorded, [f"alpha{alpha}"], model, loss)
    assert found.count == outputs
    check_after(recorded, teacher, found.outputs["memory"])


@task("retrieval")
@DISTILLED
def test_retrieval(recorded, alpha, variants, tmp_path):
    model = load_albef(recorded, tmp_path, "retrieval")
    teacher = load_teacher(recorded, tmp_path, "retrieval", model)

    def loss(model):
        features = training_features(
            model, teacher, recorded, image_id=jnp.array(recorded["in/idx"], jnp.int32)
        )
        ita, itm = contrast(features, recorded, alpha), match(features, recorded)
        parts = {"ita": mean(ita), "itm": mean(itm)}
        return sum(parts.values()), (parts, outputs_of(features, ita, itm))

    found = check(recorded, variants, model, loss)
    check_after(recorded, teacher, found.outputs["memory"])


@pytest.mark.parametrize(
    ("recorded", "variant"),
    [("pretrain", "alpha0.4"), ("retrieval", "distill_alpha0.4")],
    indirect=["recorded"],
)
def test_each_function(recorded, variant):
    check_functions(recorded, variant, alpha=0.4)


@task("retrieval")
def test_scores_of_all_pairs(recorded, tmp_path):
    model = load_albef(recorded, tmp_path, "retrieval")
    image, (text, mask) = pictures(recorded), texts(recorded)
    out = model(image=image, text=text, text_mask=mask)
    cosines = out["image_embeds"] @ out["text_embeds"].T
    recorded.check("out/eval/sims_matrix", cosines)
    assert_close(out["logits_per_image"], cosines / recorded["w/temp"], OUTPUTS)
    images, rows = np.divmod(np.arange(16), 4)
    pairs = model(image=image[images], text=text[rows], text_mask=mask[rows])
    matches = pairs["itm_logits"][:, 1].reshape(4, 4)
    recorded.check("out/eval/itm_score_image_text", matches)
    np.testing.assert_allclose(out["itm_logits"][:, 1], np.diag(matches), atol=1e-5)


def answers_of(recorded):
    """The fields of the answers, [B,K,L], and the places in [B,K] of those in the recorded list."""
    count = recorded["in/k"]
    question = np.repeat(np.arange(len(count)), count)
    place = question, np.concatenate([np.arange(k) for k in count])
    fields = {}
    for name, theirs in (
        ("text", "answer_ids"), ("text_mask", "answer_mask"), ("weight", "weights")
    ):  # fmt: skip
        array = recorded[f"in/{theirs}"]
        fields[f"answer_{name}"] = np.zeros(
            (len(count), count.max(), *array.shape[1:]), array.dtype
        )
        fields[f"answer_{name}"][place] = array
    fields["answer_text_mask"] = fields["answer_text_mask"].astype(bool)
    return {name: jnp.array(array) for name, array in fields.items()}, place


@task("vqa")
@DISTILLED
def test_answers_to_questions(recorded, alpha, variants, tmp_path):
    model = load_albef(recorded, tmp_path, "vqa")
    teacher = load_teacher(recorded, tmp_path, "vqa", model)
    fields, place = answers_of(recorded)
    batch = batch_of(recorded, "question_ids", **fields)

    def loss(model):
        features = Features(model, batch, average=teacher, step=jnp.array(3))
        answered = AnswerGeneration(distill=alpha)(features, KEY)
        taught = AnswerGeneration()(features.average, KEY)
        outputs = {
            "image_embeds": features.image.tokens,
            "question_output": features.fused.text_tokens,
            "question_states_m": features.average.fused.text_tokens[place[0]],
            "logits_m": taught.scores[0][place],
        }
        return mean(answered), ({}, outputs | {"answer_logits": answered.scores[0][place]})

    value, (_, outputs), gradient = run(model, loss)
    logits = outputs.pop("answer_logits")
    for variant in variants:
        recorded.check(f"loss/{variant}/total", value)
        recorded.check_gradients(variant, gradient)
        assert check_outputs(recorded, variant, outputs) >= 2
        assert_close(logits, recorded[f"out/{variant}/answer_logits"][:, :-1], OUTPUTS)
    check_average(recorded, teacher)


@task("vqa")
@pytest.mark.parametrize("alpha", [0.4, 0.0])
def test_the_loss_of_each_answer(recorded, alpha):
    out = recorded.under(f"out/distill_alpha{alpha}/")
    answer, mask = (array[:, 1:] for array in texts(recorded, "answer_ids"))
    logits, teacher = (jnp.array(out[name]) for name in ("answer_logits", "logits_m"))
    soft = soft_cross_entropy(logits[:, :-1], teacher)
    words = mixed(word_loss(logits[:, :-1], answer), soft, alpha)
    found = answer_loss(words[:, None], mask[:, None], jnp.ones((len(answer), 1)))
    recorded.check(f"out/distill_alpha{alpha}/answer_loss_per_seq", found)


@task("vqa")
def test_one_answer_to_each_question(recorded, tmp_path):
    model = load_albef(recorded, tmp_path, "vqa")
    question, mask = texts(recorded, "question_ids")
    first = np.cumsum(recorded["in/k"]) - recorded["in/k"]
    answer, answer_mask = (array[first] for array in texts(recorded, "answer_ids"))
    out = model(
        image=pictures(recorded),
        text=question,
        text_mask=mask,
        decoder_text=answer,
        decoder_mask=answer_mask,
    )
    recorded.check("out/nodistill/question_output", out["sequence_output"])
    expected = recorded["out/nodistill/answer_logits"][first]
    assert_close(out["logits"], expected, OUTPUTS)


@task("vqa")
def test_ranked_answers(recorded, tmp_path):
    model = load_albef(recorded, tmp_path, "vqa")
    question, mask = texts(recorded, "question_ids")
    answers, answer_mask = texts(recorded, "answer_list_ids")
    seen, read = model.encode_image(pictures(recorded)), model.encode_text(question, mask)
    top = int(recorded["in/k_test"])
    context = model.answer_context(seen, model.fuse(seen, read), read)
    chosen, first, whole = model.decoder.rank(context, answers, answer_mask, top)
    np.testing.assert_array_equal(chosen, recorded["out/rank/first_stage_topk_ids"])
    recorded.check("out/rank/log_probs", jnp.stack([first, whole], axis=-1).reshape(-1, 2))
    ids, probabilities = model.rank_answers(context, answers, answer_mask, top)
    np.testing.assert_array_equal(ids, recorded["out/rank/topk_ids"])
    recorded.check("out/rank/topk_probs", probabilities)


@pytest.mark.parametrize(
    ("recorded", "name"), [("nlvr", "nlvr"), ("ve", "ve")], indirect=["recorded"]
)
def test_labels(recorded, name, tmp_path):
    model = load_albef(recorded, tmp_path, name)
    teacher = load_teacher(recorded, tmp_path, name, model)
    text, mask = texts(recorded)
    image, batch = pictures(recorded), len(text)
    second = {"image_b": image[batch:]} if name == "nlvr" else {}
    inputs = {"image": image[:batch], "text": text, "text_mask": mask, **second}
    targets = recorded["in/targets"]

    def scores(model):
        return model(**inputs)[f"{name}_logits"]

    def distilled(model):
        logits, logits_m = scores(model), scores(teacher)
        losses = mixed(cross_entropy(logits, targets), soft_cross_entropy(logits, logits_m), 0.4)
        return losses.mean(), ({}, {"prediction": logits, "prediction_m": logits_m})

    def plain(model):
        logits = scores(model)
        return cross_entropy(logits, targets).mean(), ({}, {"prediction": logits})

    assert check(recorded, ["distill_alpha0.4"], model, distilled).count == 2
    assert check(recorded, ["nodistill"], model, plain).count == 1


@task("pretrain_nlvr")
def test_text_assignment(recorded, tmp_path):
    model = load_albef(recorded, tmp_path, "pretrain_nlvr")
    image, (text, mask) = pictures(recorded), texts(recorded)
    first, second = (recorded[f"draw/image{i}_idx"] for i in (0, 1))

    def loss(model):
        inputs = {"image": image[first], "image_b": image[second]}
        logits = model(**inputs, text=text, text_mask=mask)["ta_logits"]
        return cross_entropy(logits, recorded["draw/labels"]).mean(), ({}, {"pred": logits})

    assert check(recorded, ["train"], model, loss).count == 1


@pytest.mark.parametrize(
    ("recorded", "name"), [(name, name) for name in TASKS], indirect=["recorded"], ids=TASKS
)
def test_written_and_read_again(recorded, name, tmp_path):
    assert_saved_whole(load_albef(recorded, tmp_path, name), tmp_path / "again")
    if any("_m." in tensor for tensor in recorded.under("w/")):
        momentum_model = load_albef(recorded, tmp_path, name, "albef-momentum")
        assert_saved_whole(momentum_model, tmp_path / "momentum")


@task("nlvr")
def test_what_a_file_repeats_is_compared(recorded, tmp_path):
    """Both layers of a pair have the keys and values of pictures in common."""
    layer = "text_encoder.encoder.layer.{}.crossattention.self.{}.weight"
    weights = recorded.under("w/")
    config = {**encoders_of(recorded), **TASKS["nlvr"], "fusion_layer": 2}
    plain = load(tmp_path, "albef", config, weights)
    own = {name: array for name, array in weights.items() if name != layer.format(5, "key")}
    without = load(tmp_path, "albef", config, own)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(without), nnx.state(plain))
    other = layer.format(5, "value")
    with pytest.raises(InputError, match=f"{other} differs from {layer.format(4, 'value')}"):
        load(tmp_path, "albef", config, weights | {other: weights[other] + 1})


@task("pretrain")
def test_a_file_of_another_task_says_what_is_unlike(recorded, tmp_path):
    config = {**encoders_of(recorded), **TASKS["vqa"], "fusion_layer": 2}
    with pytest.raises(InputError, match=r"missing(.|\n)*text_decoder(.|\n)*unexpected"):
        load(tmp_path, "albef", config, recorded.under("w/"))
    with pytest.raises(InputError, match=r"decoder_dept.*Did you mean decoder_depth"):
        load(tmp_path, "albef", {**config, "decoder_dept": 3}, recorded.under("w/"))
