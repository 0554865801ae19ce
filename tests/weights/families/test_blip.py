"""BLIP beside a recorded run of its original code, and what its files in `transformers` need."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mmjax
from mmjax.decoding import GenerationConfig
from mmjax.errors import InputError
from mmjax.models.bert import BertConfig
from mmjax.models.blip import Blip, BlipConfig
from mmjax.models.vit import ViTConfig
from mmjax.objectives.captioning import Captioning
from mmjax.objectives.masked_language import word_loss
from mmjax.rules import by_path
from mmjax.weights.families.blip import FAMILY
from mmjax.weights.family import Source
from tests.weights.families.distilled import (
    KEY,
    averaged,
    check_after,
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

ENCODER_TOKEN, DECODER_TOKEN = 121, 120  # [ENC] and [DEC] of the recorded run
TASKS = {
    "BlipForImageTextRetrieval": {"embedding_width": 6, "matching": True},
    "BlipForQuestionAnswering": {"decoder": "question"},
    "BlipForConditionalGeneration": {"encoder": False, "decoder": "image"},
}


@pytest.fixture(scope="module")
def recorded(shared):
    return Recorded(shared / "goldens" / "blip_pretrain_dev.npz")


def config_of(recorded, **heads):
    return {
        **encoders_of(recorded, words=2, types=0),
        "embedding_width": 16,
        "matching": True,
        "pair_token": ENCODER_TOKEN,
        **heads,
    }


@pytest.fixture(scope="module")
def model(recorded, tmp_path_factory):
    config = config_of(recorded, decoder="image", shared=True)
    return load(tmp_path_factory.mktemp("blip"), "blip-original", config, recorded.under("w/"))


@pytest.mark.parametrize(("alpha", "outputs"), [(0.4, 9), (0.0, 1)])
def test_pretraining(recorded, model, alpha, outputs, tmp_path):
    """The momentum model has no decoder."""
    config = config_of(recorded)
    before = load(tmp_path, "blip-original-momentum", config, recorded.under("w/"))
    online = load(tmp_path, "blip-original", config, without_decoder(recorded.under("w/")))
    teacher = averaged(online, before, recorded.config["momentum"])
    captioning = Captioning(smoothing=0.1, start_id=DECODER_TOKEN)

    def loss(model):
        features = training_features(model, teacher, recorded)
        ita, itm = contrast(features, recorded, alpha), match(features, recorded)
        lm = captioning(features, KEY)
        parts = {"ita": mean(ita), "itm": mean(itm), "lm": mean(lm)}
        found = outputs_of(features, ita, itm) | {"words": lm.scores[0]}
        return sum(parts.values()), (parts, found)

    value, (parts, found), gradient = run(model, loss)
    for name, part in {**parts, "total": value}.items():
        recorded.check(f"loss/alpha{alpha}/{name}", part)
    recorded.check_gradients(f"alpha{alpha}", gradient)
    assert check_outputs(recorded, f"alpha{alpha}", found) == outputs
    words = recorded[f"out/alpha{alpha}/decoder_logits"]
    assert_close(found["words"], words[:, :-1], OUTPUTS)
    check_after(recorded, teacher, found["memory"])


def test_each_function(recorded):
    """A constant is added to every negative's probability."""
    check_functions(recorded, "alpha0.4", alpha=0.4, added=1e-4)
    logits = jnp.array(recorded["out/alpha0.4/decoder_logits"][:, :-1])
    text, mask = (array[:, 1:] for array in texts(recorded))
    losses = word_loss(logits, text, smoothing=0.1)
    recorded.check("loss/alpha0.4/lm", losses.mean(where=mask))


def without_decoder(tensors):
    return {name: array for name, array in tensors.items() if "text_decoder" not in name}


def test_all_of_a_call(recorded, model):
    """One text serves all: it is begun by [CLS], by [ENC] beside a picture."""
    text, mask = texts(recorded)
    out = model(
        image=pictures(recorded),
        text=text,
        text_mask=mask,
        decoder_text=text.at[:, 0].set(DECODER_TOKEN),
        decoder_mask=mask,
    )
    variant = "out/alpha0.4"
    recorded.check(f"{variant}/image_embeds", out["last_hidden_state"])
    recorded.check(f"{variant}/image_feat", out["image_embeds"])
    recorded.check(f"{variant}/text_feat", out["text_embeds"])
    recorded.check(f"{variant}/fusion_pos", out["question_embeds"])
    recorded.check(f"{variant}/decoder_logits", out["logits"])
    np.testing.assert_allclose(out["itm_score"], recorded[f"{variant}/vl_output"][:4], atol=1e-5)
    scale = 1 / float(recorded["w/temp"])
    cosines = out["image_embeds"] @ out["text_embeds"].T
    np.testing.assert_allclose(out["logits_per_image"], scale * cosines, atol=1e-5)


def test_shared_weights_are_stored_once(recorded, model, tmp_path):
    assert_saved_whole(model, tmp_path / "again")
    weights, changed = recorded.under("w/"), "encoder.layer.1.crossattention.self.query.weight"
    config = config_of(recorded, decoder="image", shared=True)
    weights[f"text_decoder.bert.{changed}"] = weights[f"text_encoder.{changed}"] + 1
    with pytest.raises(InputError, match=f"{changed} differs from text_encoder.{changed}"):
        load(tmp_path, "blip-original", config, weights)
    # A decoder of its own has room for the difference.
    apart = load(tmp_path, "blip-original", {**config, "shared": False}, weights)
    found = by_path(nnx.to_pure_dict(nnx.state(apart)))
    shared = by_path(nnx.to_pure_dict(nnx.state(model)))
    assert len(found) > len(shared)
    query = "cross_attention/attention/query/kernel"
    decoder, encoder = (
        found[f"{part}/blocks/layers/{query}"] for part in ("text_decoder/bert", "text")
    )
    assert np.abs(decoder[0] - encoder[0]).max() == 0
    np.testing.assert_allclose(decoder[1] - encoder[1], 1, atol=1e-6)


def tiny(**task):
    layers = {"width": 8, "depth": 1, "heads": 2, "mlp_width": 12}
    return BlipConfig(
        image=ViTConfig(**layers, image_size=16, patch_size=8, epsilon=1e-5),
        text=BertConfig(**layers, vocabulary_size=20, max_length=9, types=0, padding=0),
        temperature=False,
        sees_padding=True,
        generation=GenerationConfig(bos_token_id=18, eos_token_id=19, pad_token_id=0),
        **task,
    )


@pytest.mark.parametrize("kind", TASKS)
def test_a_model_made_here_is_written_as_its_class(kind, tmp_path):
    model = Blip(tiny(**TASKS[kind]), nnx.Rngs(0))
    mmjax.save_huggingface(model, tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    assert description["architectures"] == [kind]
    assert description["text_config"]["sep_token_id"] == 19
    again = mmjax.load(tmp_path)
    assert again.config == model.config
    expected = nnx.to_pure_dict(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(again)), expected)


def test_what_no_class_there_is_becomes_an_original_file(tmp_path):
    """There is no place for a temperature in `transformers`."""
    config = tiny(**TASKS["BlipForImageTextRetrieval"])
    model = Blip(BlipConfig(**vars(config) | {"temperature": True}), nnx.Rngs(0))
    mmjax.save_huggingface(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "blip-original"
    assert float(mmjax.load(tmp_path).contrastive.scale) == pytest.approx(1 / 0.07)


def test_blip_model_is_refused_by_name():
    names = ["visual_projection.weight", "text_model.embeddings.word_embeddings.weight"]
    with pytest.raises(InputError, match=r"config\.json.*BlipModel, which is not supported"):
        FAMILY.read(Source({"model_type": "blip"}, names, "config.json"))
