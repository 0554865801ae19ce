"""What a user meets on the way from a folder to a model: sizes, differences, contradictions."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import mmjax
from mmjax.errors import InputError
from mmjax.models import VisionLanguageModel, resize_position_embedding
from mmjax.models.encoders import TextModel, TextModelConfig
from mmjax.models.model import _forward
from mmjax.rules import by_path
from mmjax.weights.families.bert import resize_rows
from mmjax.weights.family import Family
from mmjax.weights.files import open_tensors, write_safetensors
from mmjax.weights.loading import Matched, Opened
from mmjax.weights.names import Entry, pairs_of, to_theirs
from mmjax.weights.saving import save_checkpoint
from tests.models.reference import tiny_model

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.fixture
def folder(tmp_path):
    """A copy of a golden, to be damaged."""

    def copy(name, tensors=lambda tensors: tensors, **config):
        target = tmp_path / name
        shutil.copytree(GOLDENS / name, target)
        weights = target / "model.safetensors"
        save_file(tensors(load_file(weights)), weights)
        description = json.loads((target / "config.json").read_text()) | config
        (target / "config.json").write_text(json.dumps(description))
        return target

    return copy


def parameters(model):
    return by_path(nnx.to_pure_dict(nnx.state(model)))


def test_another_resolution_resizes_the_positions(folder):
    before = parameters(mmjax.load(GOLDENS / "vit"))["image/position_embedding"]
    model = mmjax.load(GOLDENS / "vit", image_size=24)
    after = parameters(model)["image/position_embedding"]
    np.testing.assert_array_equal(after, resize_position_embedding(np.asarray(before), 10))
    out = model(image=np.zeros((1, 24, 24, 3), np.float32))
    assert out["last_hidden_state"].shape[1] == 10


@pytest.mark.parametrize("words", [14, 26])
def test_another_vocabulary_cuts_or_fills_the_table(words):
    table = parameters(mmjax.load(GOLDENS / "bert-masked"))
    resized = parameters(mmjax.load(GOLDENS / "bert-masked", vocab_size=words))
    name = "text/embeddings/token_embedding/embedding"
    kept = min(words, 20)
    np.testing.assert_array_equal(resized[name][:kept], table[name][:kept])
    np.testing.assert_allclose(
        resized[name][kept:],
        np.broadcast_to(np.mean(table[name], axis=0), resized[name][kept:].shape),
        atol=1e-6,
    )
    assert resized["masked_language/bias"].shape == (words,)


def test_a_table_is_resized_as_it_lies_on_disk(tmp_path):
    """A dense layer there, [words, width], lies transposed here."""
    table = [Entry("head", "head", resize=resize_rows)]
    kernel, taller = np.arange(6.0).reshape(2, 3), np.zeros((2, 4))
    theirs = to_theirs(table, {"head": {"kernel": kernel}})
    write_safetensors(tmp_path / "model.safetensors", theirs)
    family = Family("some", TextModel, TextModelConfig, lambda config: table)
    opened = Opened(family, None, open_tensors(tmp_path))
    matched = Matched(pairs_of(table, {"head": {"kernel": taller}}), opened, resize=True)
    matched.check(strict=True)
    expected = np.concatenate([kernel, kernel.mean(axis=1, keepdims=True)], axis=1)
    np.testing.assert_allclose(matched.read({})["head/kernel"], expected)


def test_a_size_that_the_model_has_not_is_refused():
    with pytest.raises(InputError, match="no image_size"):
        mmjax.load(GOLDENS / "bert", image_size=32)


def test_every_difference_is_in_one_message(folder):
    def change(tensors):
        tensors["pooler.dense.wieght"] = tensors.pop("pooler.dense.weight")
        tensors["pooler.dense.bias"] = tensors["pooler.dense.bias"][:5]
        tensors["embeddings.wordembeddings.weight"] = tensors.pop(
            "embeddings.word_embeddings.weight"
        )
        tensors["encoder.layer.1.output.dense.bias"] = np.zeros(3, np.float32)
        return tensors

    # Without its weight there is no pooler, so its bias is unexpected.
    with pytest.raises(InputError) as error:
        mmjax.load(folder("bert", change))
    message = str(error.value)
    assert "1 missing" in message
    assert "embeddings.wordembeddings.weight  (there is" in message or (
        "embeddings.word_embeddings.weight  (there is embeddings.wordembeddings.weight)" in message
    )
    assert "3 unexpected" in message
    assert "pooler.dense.wieght" in message
    assert "encoder.layer.1.output.dense.bias: [3], expected [" in message
    assert "strict=False" not in message  # it does not help where shapes differ


def test_differences_can_be_allowed(folder, caplog):
    def change(tensors):
        del tensors["encoder.layer.1.output.dense.bias"]
        return tensors | {"head.weight": np.ones(2, np.float32)}

    path = folder("bert", change)
    with pytest.raises(InputError, match=r"head\.weight"):
        mmjax.load(path)
    model = mmjax.load(path, strict=False)
    assert "encoder.layer.1.output.dense.bias" in caplog.text
    assert "head.weight" in caplog.text
    found, whole = parameters(model), parameters(mmjax.load(GOLDENS / "bert"))
    bias = "text/blocks/layers/mlp/down/bias"
    np.testing.assert_array_equal(found[bias][0], whole[bias][0])  # the layer that is there
    assert not found[bias][1].any()  # the initial value of the one that is not
    np.testing.assert_array_equal(
        found["text/blocks/layers/mlp/up/bias"], whole["text/blocks/layers/mlp/up/bias"]
    )


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_prefix_that_some_classes_write_changes_nothing(folder, prefixed):
    """A BertModel's file read from a BertForMaskedLM's, and the other way round."""
    name = "bert" if prefixed else "bert-masked"

    def change(tensors):
        if prefixed:
            return {f"bert.{n}": a for n, a in tensors.items()}
        return {n.removeprefix("bert."): a for n, a in tensors.items()}

    expected, found = (
        parameters(mmjax.load(GOLDENS / name)),
        parameters(mmjax.load(folder(name, change))),
    )
    assert expected.keys() == found.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array)


def test_an_untied_output_table_is_refused(folder):
    def change(tensors):
        table = tensors["bert.embeddings.word_embeddings.weight"]
        return tensors | {"cls.predictions.decoder.weight": table + 1}

    with pytest.raises(InputError, match=r"cls\.predictions\.decoder\.weight differs"):
        mmjax.load(folder("bert-masked", change))


def test_another_size_of_a_checkpoint_of_ours_is_refused(tmp_path):
    save_checkpoint(mmjax.load(GOLDENS / "vit"), tmp_path / "run")
    with pytest.raises(InputError, match="checkpoint of ours"):
        mmjax.load(tmp_path / "run", image_size=32)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("vit", {"model_type": "vitt"}, "Did you mean vit"),
        ("vit", {"model_type": "zzz"}, "Known are"),
        ("vit", {"hidden_size": 32, "num_attention_heads": 4}, "misshapen"),
        ("vit", {"num_hidden_layers": 3}, "missing"),
        ("vit", {"num_hidden_layers": 1}, "unexpected"),
        ("vit", {"num_hidden_layers": 10**9}, "asks for 16,000,000,008 tensors and there are 40"),
        ("vit", {"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ("vit", {"num_channels": 1}, "num_channels is 1; only 3"),
        ("vit", {"hidden_size": "16"}, "hidden_size is '16'"),
        ("vit", {"num_attention_heads": 3}, "does not split into 3 heads"),
        ("vit", {"image_size": 17}, "no multiple"),
    ],
)
def test_a_config_that_contradicts_the_weights(folder, name, config, message):
    with pytest.raises(InputError, match=message):
        mmjax.load(folder(name, **config))


def test_nan_weights_are_refused(folder):
    def change(tensors):
        tensors["layernorm.weight"][0] = np.nan
        return tensors

    with pytest.raises(InputError, match=r"layernorm\.weight"):
        mmjax.load(folder("vit", change))


@pytest.mark.parametrize("nested", [False, True])
def test_uint8_pictures_are_normalised_as_the_processor_says(folder, nested):
    path = folder("vit")
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    described = {"image_mean": mean, "image_std": std}
    if nested:
        (path / "processor_config.json").write_text(json.dumps({"image_processor": described}))
    else:
        (path / "preprocessor_config.json").write_text(json.dumps(described))
    pixels = np.random.default_rng(0).integers(0, 256, size=(2, 16, 16, 3), dtype=np.uint8)
    model = mmjax.load(path)
    expected = model(image=((pixels / 255 - mean) / std).astype(np.float32))
    found = model(image=pixels)
    np.testing.assert_allclose(
        found["pooler_output"], expected["pooler_output"], atol=1e-5, rtol=1e-5
    )


def test_statistics_of_pixels_survive_being_written(folder, tmp_path):
    path = folder("vit")
    described = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    (path / "preprocessor_config.json").write_text(json.dumps(described))
    mmjax.save_huggingface(mmjax.load(path), tmp_path / "out")
    image = mmjax.load(tmp_path / "out").config.image
    np.testing.assert_allclose((image.mean, image.std), [*described.values()], rtol=1e-6)


def test_pixels_that_the_processor_leaves_alone(folder):
    path = folder("vit")
    described = {"image_mean": [0.1] * 3, "image_std": [0.2] * 3, "do_normalize": False}
    (path / "preprocessor_config.json").write_text(json.dumps(described))
    image = mmjax.load(path).config.image
    np.testing.assert_allclose((image.mean, image.std), [[0] * 3, [1] * 3], atol=1e-6)


def test_weights_of_another_code_base_are_written_for_transformers(tmp_path):
    model = mmjax.load(GOLDENS / "clip")
    model.family = "open_clip"
    mmjax.save_huggingface(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["CLIPModel"]
    assert mmjax.load(tmp_path).config == model.config


def test_classes_are_counted_where_they_have_no_names(folder):
    path = folder("vit-classifier")
    description = json.loads((path / "config.json").read_text())
    del description["id2label"]
    (path / "config.json").write_text(json.dumps(description | {"num_labels": 3}))
    assert mmjax.load(path).config.labels == ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (16, 32)}, "image_size is .16, 32.; it is one whole number"),
        ({"image_size": "32"}, "image_size is '32'"),
        ({"vocab_size": 20.0}, "vocab_size is 20.0"),
        ({"family": "vit"}, "leave family= out"),
        ({"family": "vit", "config": [1]}, "it is a dict of fields"),
        ({"family": "vit", "config": {"image": {"width": "x"}}}, "width is 'x', which is no int"),
        ({"family": "vit", "config": {"image": None}}, "config.image is None"),
        ({"family": "vit", "config": {}}, "config.image is missing"),
    ],
)
def test_arguments_of_the_wrong_type(options, message):
    with pytest.raises(InputError, match=message):
        mmjax.load(GOLDENS / "vit", **options)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("clip", {"text_config": "x"}),
        ("clip", {"vision_config": [1]}),
        ("vit", {"hidden_act": {}}),
        ("vit", {"model_type": ["vit"]}),
        ("vit-classifier", {"id2label": {"a": "b"}}),
        ("vit-classifier", {"id2label": {"0": "a", "2": "b"}}),
    ],
)
def test_values_of_config_json_of_the_wrong_type(folder, name, config):
    with pytest.raises(InputError, match=r"config\.json"):
        mmjax.load(folder(name, **config))


def test_inputs_that_would_be_taken_for_something_else():
    clip = mmjax.load(GOLDENS / "clip")
    with pytest.raises(InputError, match="image is int32: give uint8"):
        clip(image=np.zeros((1, 16, 16, 3), np.int32))
    with pytest.raises(InputError, match=r"text is int32 \[3\]: give token ids"):
        clip(text=np.array([1, 2, 3], np.int32))
    with pytest.raises(InputError, match="text is float32"):
        clip(text=np.ones((1, 3), np.float32))


def test_nothing_is_random_unless_asked_for():
    model = mmjax.load(GOLDENS / "bert")
    inputs = {"text": np.ones((1, 5), np.int32)}
    first, second = (model(**inputs, train=False)["pooler_output"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    noisy = model(**inputs, train=True, key=jax.random.key(0))["pooler_output"]
    assert np.abs(noisy - first).max() > 1e-3  # the file says dropout 0.1
    with pytest.raises(InputError, match="train=True"):
        model(**inputs, train=True)


def test_a_model_that_is_called_again_is_not_compiled_again():
    """Nor is another model of the same structure; inputs of another shape are."""
    short, long = np.ones((3, 7), np.int32), np.ones((3, 8), np.int32)
    models = [mmjax.load(GOLDENS / "bert") for _ in range(2)]
    before, programs = _forward._cache_size(), []
    for model, text in ((models[0], short), (models[0], 2 * short), (models[1], short),
                        (models[0], long)):  # fmt: skip
        model(text=text)
        programs.append(_forward._cache_size() - before)
    assert programs == [1, 1, 1, 2]


def test_unknown_and_missing_inputs_are_named():
    model = mmjax.load(GOLDENS / "bert")
    with pytest.raises(InputError, match=r"no input 'txet'\. Did you mean text"):
        model(txet=np.ones((1, 5), np.int32))
    with pytest.raises(InputError, match="needs the input 'text'"):
        model(text_mask=np.ones((1, 5), bool))


def test_a_checkpoint_of_ours_keeps_a_family_model(tmp_path):
    model = mmjax.load(GOLDENS / "siglip2")
    save_checkpoint(model, tmp_path / "run")
    again = mmjax.load(tmp_path / "run")
    assert type(again) is type(model)
    assert again.config == model.config
    assert again.family == "siglip2"
    for path, array in parameters(model).items():
        np.testing.assert_array_equal(parameters(again)[path], array)
    with pytest.raises(InputError, match="holds a checkpoint already"):
        save_checkpoint(model, tmp_path / "run")


def test_a_model_of_no_family_is_not_written():
    model = VisionLanguageModel(tiny_model(), nnx.Rngs(0))
    with pytest.raises(InputError, match="no published format"):
        mmjax.save_huggingface(model, "nowhere")


def test_a_model_made_here_is_written_as_its_family(tmp_path):
    config = mmjax.load(GOLDENS / "bert-masked").config
    model = TextModel(
        replace(config, next_sentence=True, text=replace(config.text, pooler=True)), nnx.Rngs(0)
    )
    mmjax.save_huggingface(model, tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    assert description["architectures"] == ["BertForPreTraining"]
    again = mmjax.load(tmp_path)
    text = jnp.ones((1, 5), jnp.int32)
    for name, value in model(text=text).items():
        np.testing.assert_allclose(again(text=text)[name], value, atol=1e-6)


def test_a_file_alone_says_what_is_lacking():
    with pytest.raises(InputError, match="carries no config"):
        mmjax.load(GOLDENS / "vit" / "model.safetensors")
    with pytest.raises(InputError, match="family= as well"):
        mmjax.load(GOLDENS / "vit" / "model.safetensors", config={"width": 3})
