"""ALBEF beside recorded runs of its original code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.nn import log_softmax, softmax

from mmjax.errors import InputError
from mmjax.models.albef import as_context
from tests.weights.families.distilled import (
    averaged,
    check_outputs,
    contrast,
    cross_entropy,
    encoders_of,
    pictures,
    soft_cross_entropy,
    texts,
    triples,
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
    [(0.4, ["distill_alpha0.4"]), (0.0, ["distill_alpha0.0", "nodistill"])],
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


def check(recorded, variants, model, loss):
    """A loss with its parts, what else was recorded, and the gradient; of variants that agree."""
    value, (parts, outputs), gradient = run(model, loss)
    for variant in variants:
        for name, part in {**parts, "total": value}.items():
            recorded.check(f"loss/{variant}/{name}", part)
        recorded.check_gradients(variant, gradient)
    return [check_outputs(recorded, variant, outputs) for variant in variants]


def match(model, seen, read, recorded):
    """The matching loss of the drawn pairs, and what is recorded of them."""
    images, rows, labels = triples(recorded)
    fused = model.fuse(seen.take(images), read.take(rows))
    logits, batch = model.matching(fused.pooled), len(seen.tokens)
    return cross_entropy(logits, labels).mean(), {
        "vl_embeddings": fused.pooled,
        "vl_output": logits,
        "fusion_pos": fused.text_tokens[:batch],
        "fusion_neg": fused.text_tokens[batch:],
    }


@task("pretrain")
@pytest.mark.parametrize(("alpha", "outputs"), [(0.4, 21), (0.0, 4)])
def test_pretraining(recorded, alpha, outputs, tmp_path):
    model = load_albef(recorded, tmp_path, "pretrain")
    teacher = load_teacher(recorded, tmp_path, "pretrain", model)
    image, (text, mask) = pictures(recorded), texts(recorded)
    masked = jnp.asarray(recorded["draw/mlm_input_ids"])
    labels = recorded["draw/mlm_labels"]

    def word_scores(model, seen):
        fused = model.fuse(seen, model.encode_text(masked, mask))
        return model.masked_language(fused.text_tokens, model.text.embeddings)

    def loss(model):
        seen, read = model.encode_image(image), model.encode_text(text, mask)
        ita, contrasted = contrast(
            model, teacher, seen, read, recorded, jnp.eye(len(text), 20), alpha
        )
        itm, matched = match(model, seen, read, recorded)
        logits, seen_m = word_scores(model, seen), teacher.encode_image(image)
        logits_m = word_scores(teacher, seen_m)
        hard = cross_entropy(logits, np.maximum(labels, 0))
        soft = soft_cross_entropy(logits, softmax(logits_m))
        mlm = ((1 - alpha) * hard + alpha * soft).mean(where=labels != -100)
        tokens = {"image_embeds": seen.tokens, "text_embeds": read.tokens}
        tokens |= {"image_embeds_m": seen_m.tokens, "mlm_logits": logits, "logits_m": logits_m}
        parts = {"mlm": mlm, "ita": ita, "itm": itm}
        return mlm + ita + itm, (parts, contrasted | matched | tokens)

    assert check(recorded, [f"alpha{alpha}"], model, loss) == [outputs]


@task("retrieval")
@DISTILLED
def test_retrieval(recorded, alpha, variants, tmp_path):
    model = load_albef(recorded, tmp_path, "retrieval")
    teacher = load_teacher(recorded, tmp_path, "retrieval", model)
    image, (text, mask) = pictures(recorded), texts(recorded)
    index = recorded["in/idx"].reshape(-1, 1)
    positives = index == np.concatenate([index.T, recorded["w/idx_queue"]], axis=1)
    positives = positives / positives.sum(axis=1, keepdims=True)

    def loss(model):
        seen, read = model.encode_image(image), model.encode_text(text, mask)
        ita, contrasted = contrast(model, teacher, seen, read, recorded, positives, alpha)
        itm, matched = match(model, seen, read, recorded)
        tokens = {"image_embeds": seen.tokens, "text_embeds": read.tokens}
        return ita + itm, ({"ita": ita, "itm": itm}, contrasted | matched | tokens)

    assert all(check(recorded, variants, model, loss))


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


@task("vqa")
@DISTILLED
def test_answers_to_questions(recorded, alpha, variants, tmp_path):
    model = load_albef(recorded, tmp_path, "vqa")
    teacher = load_teacher(recorded, tmp_path, "vqa", model)
    image, question = pictures(recorded), texts(recorded, "question_ids")
    answer, answer_mask = texts(recorded, "answer_ids")
    rows = np.repeat(np.arange(len(image)), recorded["in/k"])

    def decoded(model):
        """Every answer beside its question."""
        seen = model.encode_image(image)
        asked = as_context(model.fuse(seen, model.encode_text(*question)), question[1])
        return seen, asked, model.decode(asked.take(rows), answer, answer_mask)

    def loss(model):
        seen, asked, logits = decoded(model)
        _, asked_m, logits_m = decoded(teacher)
        hard = cross_entropy(logits[:, :-1], answer[:, 1:])
        soft = soft_cross_entropy(logits[:, :-1], softmax(logits_m[:, :-1]))
        mixed = (1 - alpha) * hard + alpha * soft
        losses = jnp.where(answer_mask[:, 1:], mixed, 0).sum(axis=1)
        outputs = {
            "image_embeds": seen.tokens,
            "question_output": asked.tokens,
            "question_states": asked.take(rows).tokens,
            "question_states_m": asked_m.take(rows).tokens,
            "answer_logits": logits,
            "logits_m": logits_m[:, :-1],
            "answer_loss_per_seq": losses,
        }
        return (recorded["in/weights"] * losses).sum() / len(image), ({}, outputs)

    assert min(check(recorded, variants, model, loss)) >= 5


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
    fused = model.fuse(model.encode_image(pictures(recorded)), model.encode_text(question, mask))
    top = int(recorded["in/k_test"])
    context = as_context(fused, mask)
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
        hard = cross_entropy(logits, targets).mean()
        soft = (log_softmax(logits) * softmax(logits_m)).sum(axis=1).mean()
        return 0.6 * hard - 0.4 * soft, ({}, {"prediction": logits, "prediction_m": logits_m})

    def plain(model):
        logits = scores(model)
        return cross_entropy(logits, targets).mean(), ({}, {"prediction": logits})

    assert check(recorded, ["distill_alpha0.4"], model, distilled) == [2]
    assert check(recorded, ["nodistill"], model, plain) == [1]


@task("pretrain_nlvr")
def test_text_assignment(recorded, tmp_path):
    model = load_albef(recorded, tmp_path, "pretrain_nlvr")
    image, (text, mask) = pictures(recorded), texts(recorded)
    first, second = (recorded[f"draw/image{i}_idx"] for i in (0, 1))

    def loss(model):
        inputs = {"image": image[first], "image_b": image[second]}
        logits = model(**inputs, text=text, text_mask=mask)["ta_logits"]
        return cross_entropy(logits, recorded["draw/labels"]).mean(), ({}, {"pred": logits})

    assert check(recorded, ["train"], model, loss) == [1]


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
