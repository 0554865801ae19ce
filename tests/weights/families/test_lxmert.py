"""LXMERT beside a recorded run of its own code (airsplay/lxmert)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mmjax
from mmjax.errors import InputError
from mmjax.models.lxmert import Lxmert, LxmertConfig
from mmjax.models.regions import StreamConfig
from mmjax.objectives.loss import cross_entropy, weighted
from mmjax.objectives.masked_language import word_loss
from mmjax.objectives.masked_regions import smooth_l1
from mmjax.objectives.matching import matching_loss
from tests.cases.compare import run
from tests.weights.families.recorded import Recorded, assert_saved_whole, load, original_names

CONFIG = {
    "text": {
        "width": 48,
        "depth": 2,
        "heads": 4,
        "mlp_width": 80,
        "vocabulary_size": 120,
        "max_length": 12,
    },
    "region_depth": 1,
    "fusion_depth": 2,
    "region_width": 20,
    "answers": [f"answer {i}" for i in range(13)],
}
PRETRAINING = {
    "masked_language": True,
    "matching": True,
    "region_objects": 15,
    "region_attributes": 9,
    "region_features": True,
}
LOSSES = ("mask_lm", "matched", "obj", "attr", "feat", "qa", "total")
TIED = "cls.predictions.decoder.weight"


@pytest.fixture(scope="module")
def recorded(shared):
    return Recorded(shared / "goldens" / "lxmert_dev.npz")


@pytest.fixture(scope="module")
def model(recorded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lxmert")
    return load(folder, "lxmert-original", CONFIG | PRETRAINING, recorded.under("w/"))


def inputs_of(recorded, types="segment_ids", region_mask=False):
    inputs = {
        "text": recorded["in/input_ids"],
        "text_mask": recorded["in/input_mask"].astype(bool),
        "text_type": recorded[f"in/{types}"],
        "regions": recorded["in/feats"],
        "boxes": recorded["in/pos"],
    }
    if region_mask:
        inputs["region_mask"] = recorded["in/visual_attention_mask"].astype(bool)
    return {name: jnp.array(array) for name, array in inputs.items()}


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("nomask", {}),
        ("vmask", {"region_mask": True}),
        ("vmask_seg", {"region_mask": True, "types": "segment_ids_alt"}),
    ],
)
def test_features(recorded, model, variant, options):
    found = run(model, inputs_of(recorded, **options))
    recorded.check(f"out/{variant}/lang", found["language_output"])
    recorded.check(f"out/{variant}/visn", found["vision_output"])
    recorded.check(f"out/{variant}/pooled", found["pooled_output"])


def test_phases(recorded, model):
    inputs = inputs_of(recorded, region_mask=True)
    text = model.encode_text(inputs["text"], inputs["text_mask"])
    image = model.encode_image(inputs["regions"], inputs["boxes"], inputs["region_mask"])
    fused = model.fuse(image, text)
    recorded.check("out/vmask/layer1", text.tokens)
    recorded.check("out/vmask/r_layer0", image.tokens)
    recorded.check("out/vmask/x_layer1.lang", fused.text_tokens)
    recorded.check("out/vmask/x_layer1.visn", fused.image_tokens)
    recorded.check("out/vmask/pooled", fused.pooled)


def test_heads(recorded, model):
    found = run(model, inputs_of(recorded))
    recorded.check("out/heads/lang_scores", found["prediction_logits"])
    recorded.check("out/heads/matched_scores", found["cross_relationship_score"])
    recorded.check("out/heads/visn_obj", found["object_logits"])
    recorded.check("out/heads/visn_attr", found["attribute_logits"])
    recorded.check("out/heads/visn_feat", found["region_features"])
    recorded.check("out/heads/answer_scores", found["question_answering_score"])


def losses(outputs, recorded):
    """All of them, from the model's outputs; a label of -1 is none."""

    def given(name):
        return jnp.array(recorded[f"in/{name}"])

    def mean(losses, counted):
        total, weight = weighted(losses, counted)
        return total / weight

    def of_regions(losses, confidence):
        """Over all regions, times the inverse of the share that is masked."""
        return mean(losses * given(confidence), jnp.ones(losses.shape)) / 0.15

    words, matched, answers = given("lm_labels"), given("matched_label"), given("ans")
    matching = matching_loss(outputs["cross_relationship_score"], matched == 1)
    parts = {
        "mask_lm": mean(word_loss(outputs["prediction_logits"], words), words >= 0),
        "matched": matching.mean(),
        "obj": of_regions(cross_entropy(outputs["object_logits"], given("obj_labels")), "obj_conf"),
        "attr": of_regions(
            cross_entropy(outputs["attribute_logits"], given("attr_labels")), "attr_conf"
        ),
        "feat": of_regions(
            smooth_l1(outputs["region_features"], given("feat_target")), "feat_mask"
        ),
        "qa": mean(cross_entropy(outputs["question_answering_score"], answers), answers >= 0),
    }
    return parts | {"total": sum(parts.values())}


@pytest.fixture(scope="module")
def gradients(recorded, model):
    """Those of all losses, along a first axis, and the losses."""
    graph, state = nnx.split(model)

    def all_losses(params):
        values = losses(nnx.merge(graph, params)(**inputs_of(recorded)), recorded)
        return jnp.stack([values[name] for name in LOSSES]), values

    return jax.jit(jax.jacrev(all_losses, has_aux=True))(nnx.to_pure_dict(state))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients(recorded, model, gradients, name):
    stacked, values = gradients
    recorded.check(f"loss/{name}", values[name])
    gradient = jax.tree.map(lambda x: x[LOSSES.index(name)], stacked)
    recorded.check_gradients(name, original_names(model, gradient))


def test_saved_under_the_original_names(recorded, model, tmp_path):
    names = original_names(model, nnx.to_pure_dict(nnx.state(model))).keys()
    assert names == recorded.under("w/").keys() - {TIED}
    assert_saved_whole(model, tmp_path)


def test_saved_under_the_names_of_transformers(recorded, model, tmp_path):
    config = CONFIG | PRETRAINING
    converted = load(tmp_path, "lxmert-original", config, recorded.under("w/"))
    converted.family = "lxmert"
    assert_saved_whole(converted, tmp_path)
    converted = mmjax.load(tmp_path)
    assert converted.family == "lxmert"
    found = run(converted, inputs_of(recorded))
    recorded.check("out/heads/answer_scores", found["question_answering_score"])
    recorded.check("out/heads/lang_scores", found["prediction_logits"])


def test_the_model_of_a_task(recorded, tmp_path):
    weights = {
        f"lxrt_encoder.model.bert.{name}": array
        for name, array in recorded.under("w/bert.").items()
    } | recorded.under("w/answer_head.")
    model = load(tmp_path, "lxmert-original", CONFIG, weights)
    found = run(model, inputs_of(recorded))
    recorded.check("out/heads/answer_scores", found["question_answering_score"])
    assert original_names(model, nnx.to_pure_dict(nnx.state(model))).keys() == weights.keys()


def test_a_decoder_of_its_own_is_refused(recorded, tmp_path):
    weights = recorded.under("w/")
    with pytest.raises(InputError, match="own output table"):
        load(
            tmp_path,
            "lxmert-original",
            CONFIG | PRETRAINING,
            weights | {TIED: np.zeros_like(weights[TIED])},
        )


def test_what_no_class_of_transformers_has_is_saved_under_the_original_names(tmp_path):
    text = StreamConfig(width=8, depth=1, heads=2, vocabulary_size=9, max_length=6)
    model = Lxmert(LxmertConfig(text=text, region_width=4, matching=True), nnx.Rngs(0))
    assert_saved_whole(model, tmp_path)
    assert mmjax.load(tmp_path).family == "lxmert-original"
