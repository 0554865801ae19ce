"""ViLT beside recorded runs of its original code, and files of either kind that others wrote."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import mmjax
from mmjax.errors import InputError
from mmjax.models.vilt import FIRST_PICTURE, Vilt, ViltConfig
from mmjax.objectives.answering import soft_binary_cross_entropy
from mmjax.objectives.loss import cross_entropy
from mmjax.objectives.masked_language import word_loss
from mmjax.objectives.matching import matching_loss
from mmjax.objectives.pairing import signed_distance
from mmjax.objectives.ranking import ranking_loss
from mmjax.objectives.transport import transport_distance
from tests.weights.families.recorded import (
    OUTPUTS,
    Recorded,
    assert_close,
    assert_saved_whole,
    load,
    run,
)

TASKS = {
    "masked_language": True,
    "tied": False,
    "matching": True,
    "answers": [str(i) for i in range(11)],
    "labels": ["false", "true"],
    "modalities": 3,
}
SMALL = {"width": 12, "depth": 1, "heads": 2, "vocabulary_size": 20, "max_length": 9}


@pytest.fixture(scope="module")
def tasks(shared):
    return Recorded(shared / "goldens" / "vilt_dev.npz")


@pytest.fixture(scope="module")
def retrieval(shared):
    return Recorded(shared / "goldens" / "vilt_irtr_dev.npz")


@pytest.fixture(scope="module")
def model(tasks, tmp_path_factory):
    return load_vilt(tasks, tmp_path_factory.mktemp("vilt"), TASKS)


def load_vilt(recorded, folder, heads):
    theirs = recorded.config
    config = {
        "width": theirs["hidden_size"],
        "depth": theirs["num_layers"],
        "heads": theirs["num_heads"],
        "mlp_width": theirs["mlp_ratio"] * theirs["hidden_size"],
        "vocabulary_size": theirs["vocab_size"],
        "max_length": theirs["max_text_len"],
        "padding": 0,
        "image_size": theirs["image_size"],
        "patch_size": theirs["patch_size"],
        **heads,
    }
    return load(folder, "vilt-original", config, recorded.under("w/"))


def picture(recorded, name="image"):
    return recorded[f"in/{name}"].transpose(0, 2, 3, 1)


def pair(recorded, text="text_ids", image="image"):
    mask = recorded["in/text_masks"].astype(bool)
    return {
        "text": recorded[f"in/{text}"],
        "text_mask": mask,
        "image": picture(recorded, image),
    }


def check_states(recorded, out, prefix):
    length = recorded["in/text_ids"].shape[-1]
    tokens = out["last_hidden_state"]
    recorded.check(f"{prefix}/text_feats", tokens[:, :length])
    recorded.check(f"{prefix}/image_feats", tokens[:, length:])
    recorded.check(f"{prefix}/cls_feats", out["pooler_output"])


def test_pictures_of_one_size(tasks, model):
    check_states(tasks, model(**pair(tasks)), "out/infer")


def test_padded_pictures(tasks, model):
    inputs = pair(tasks, image="image_padded")
    mask = np.zeros(inputs["image"].shape[:3], bool)
    for row, (height, width) in zip(mask, tasks.config["padded_sizes"], strict=True):
        row[:height, :width] = True
    encoded = model.encode_image(jnp.array(inputs["image"]), jnp.array(mask))
    out = model(**inputs, image_mask=mask)["last_hidden_state"]
    prefix, length = "out/infer_padded", inputs["text"].shape[1]
    tasks.check(f"{prefix}/text_feats", out[:, :length])
    # There a picture's real patches come before the others, and its modality is added later.
    entering = encoded.tokens - model.modality_embedding(jnp.array(FIRST_PICTURE))
    for i, real in enumerate(np.asarray(encoded.mask)):
        count = real.sum()
        assert count == tasks[f"{prefix}/image_masks"][i].sum()
        for found, name in ((entering, "infer0/visual_embed"), (out[:, length:], "image_feats")):
            assert_close(found[i][real], tasks[f"{prefix}/{name}"][i, :count], OUTPUTS, name)


def matching_pictures(recorded):
    """A label of 0 puts another picture beside the text."""
    is_match = recorded["draw/itm_labels"][:, None, None, None] == 1
    return np.where(is_match, picture(recorded), picture(recorded, "false_image_0"))


def distances(model, recorded, out):
    """Of words from patches, by optimal transport."""
    inputs = {name: jnp.array(array) for name, array in pair(recorded).items()}
    patches, words = model.aligned(
        model.encode_image(inputs["image"]), model.encode_text(inputs["text"], inputs["text_mask"])
    )
    tokens = out["last_hidden_state"]
    length = words.shape[1]
    return transport_distance(tokens[:, :length], tokens[:, length:], words, patches)


def test_tasks_of_one_picture(tasks, model):
    variant = "mlm_itm_vqa"
    words, targets = tasks["in/text_labels_mlm"], jnp.array(tasks[f"out/{variant}/vqa_targets"])
    masked, matches = words != -100, jnp.array(tasks["draw/itm_labels"] == 1)

    def loss(model):
        passes = {
            "mlm": model(**pair(tasks, "text_ids_mlm")),
            "itm": model(**pair(tasks) | {"image": matching_pictures(tasks)}),
            "vqa": model(**pair(tasks)),
        }
        mlm, itm, vqa = (out[f"{name}_logits"] for name, out in passes.items())
        apart, count = signed_distance(
            distances(model, tasks, passes["itm"]), matches, jnp.ones(len(matches), bool)
        )
        losses = {
            "mlm": word_loss(mlm, jnp.where(masked, words, 0)).mean(where=masked),
            "itm": matching_loss(itm, matches).mean(),
            "itm_wpa": 0.1 * apart / count,
            "vqa": soft_binary_cross_entropy(vqa, targets).mean(),
        }
        return sum(losses.values()), (passes, losses)

    _, (passes, losses), gradient = run(model, loss)
    for i, name in enumerate(("mlm", "itm", "vqa")):
        out = passes[name]
        tasks.check(f"out/{variant}/{name}_logits", out[f"{name}_logits"])
        check_states(tasks, out, f"out/{variant}/infer{i}")
        assert "nlvr_logits" not in out
    for name, found in losses.items():
        tasks.check(f"loss/{variant}/{name}", found)
    tasks.check_gradients(variant, gradient)


def test_two_pictures(tasks, model):
    inputs = pair(tasks, image="image_0") | {"image_b": picture(tasks, "image_1")}

    def loss(model):
        out = model(**inputs)
        labels = jnp.array(tasks["in/nlvr2_answers"])
        return cross_entropy(out["nlvr_logits"], labels).mean(), out

    value, out, gradient = run(model, loss)
    tasks.check("out/nlvr2/nlvr2_logits", out["nlvr_logits"])
    check_states(tasks, out, "out/nlvr2/infer0")
    tasks.check("loss/nlvr2/nlvr2", value)
    tasks.check_gradients("nlvr2", gradient)


def test_retrieval(retrieval, tmp_path):
    model = load_vilt(retrieval, tmp_path, {"matching": True, "ranking": True})
    texts, masks = retrieval["in/text_ids"], retrieval["in/text_masks"].astype(bool)
    rows, choices, length = texts.shape
    inputs = {
        "text": texts.reshape(-1, length),
        "text_mask": masks.reshape(-1, length),
        "image": np.repeat(picture(retrieval), choices, axis=0),
    }

    def loss(model):
        out = model(**inputs)
        scores = out["rank_logits"].reshape(rows, choices)
        counts = jnp.ones((rows, choices - 1), bool)
        losses = ranking_loss(scores[:, 0], scores[:, 1:], counts)
        return losses.mean(), (out["pooler_output"], scores)

    value, (pooled, scores), gradient = run(model, loss)
    retrieval.check("out/irtr/cls_feats", pooled)
    retrieval.check("out/irtr/score", scores)
    retrieval.check("loss/irtr/irtr", value)
    retrieval.check_gradients("irtr", gradient)


def test_originals_are_saved_whole(model, tmp_path):
    assert_saved_whole(model, tmp_path)


def written(folder, **config):
    """A folder as `transformers` has it, and the model that it is of."""
    model = Vilt(
        ViltConfig(**SMALL, image_size=16, patch_size=8, epsilon=1e-12, **config), nnx.Rngs(0)
    )
    mmjax.save_huggingface(model, folder)
    return model


def answers(model):
    rng = np.random.default_rng(0)
    text, image = rng.integers(4, 20, (2, 5)), rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
    return model(text=text, image=image)


def test_words_may_be_scored_by_a_table_of_their_own(tmp_path):
    """The published weights have one, although `transformers` ties what it trains itself."""
    model = written(tmp_path, masked_language=True, tied=False)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "ViltForMaskedLM"
    ]
    tensors = load_file(tmp_path / "model.safetensors")
    assert "mlm_score.decoder.weight" in tensors
    tensors["mlm_score.bias"] = tensors.pop("mlm_score.decoder.bias")  # as old versions call it
    save_file(tensors, tmp_path / "model.safetensors")
    again = mmjax.load(tmp_path)
    assert again.config == model.config
    np.testing.assert_array_equal(answers(again)["logits"], answers(model)["logits"])


def test_another_vocabulary_changes_both_tables(tmp_path):
    written(tmp_path, masked_language=True, tied=False)
    model = mmjax.load(tmp_path, vocab_size=23)
    assert answers(model)["logits"].shape == (2, 5, 23)


def test_another_resolution_stretches_the_table(tmp_path):
    """A picture of that size then finds the positions that it had been given anyway."""
    model = written(tmp_path)
    larger = mmjax.load(tmp_path, image_size=40)
    assert larger.image_embeddings.position_embedding.shape == (26, 12)
    image = np.random.default_rng(0).normal(size=(2, 40, 40, 3)).astype(np.float32)
    expected = model.encode_image(jnp.array(image)).tokens
    np.testing.assert_allclose(larger.encode_image(jnp.array(image)).tokens, expected, atol=1e-6)


def test_classifiers_of_more_pictures_are_refused(tmp_path):
    written(tmp_path, labels=("no", "yes"), modalities=3)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_images": 3}))
    with pytest.raises(InputError, match="num_images is 3"):
        mmjax.load(tmp_path)
