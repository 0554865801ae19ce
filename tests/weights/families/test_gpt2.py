"""GPT-2 and the captioner as they lie on disk, with what they generate by default."""

import json
import logging
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

import mmjax
from mmjax.decoding import GenerationConfig
from mmjax.errors import InputError
from mmjax.models.captioner import Captioner, CaptionerConfig
from mmjax.models.gpt2 import GPT2Config, LanguageModel, LanguageModelConfig
from mmjax.models.vit import ViTConfig
from mmjax.weights.files import open_tensors, write_safetensors
from tests.models import reference

TEXT = GPT2Config(width=8, depth=2, heads=2, mlp_width=12, vocabulary_size=9, max_length=7)
GENERATION = GenerationConfig(eos_token_id=3, num_beams=2, max_length=6, early_stopping="never")


def language_model(**generation):
    config = LanguageModelConfig(TEXT, replace(GENERATION, **generation))
    graph, params = reference.split(lambda: LanguageModel(config, nnx.Rngs(0)))
    return nnx.merge(graph, params)


def captioner():
    image = ViTConfig(width=12, depth=1, heads=3, image_size=8, patch_size=4, epsilon=1e-12)
    config = CaptionerConfig(image, TEXT, replace(GENERATION, decoder_start_token_id=1))
    graph, params = reference.split(lambda: Captioner(config, nnx.Rngs(0)))
    return nnx.merge(graph, params)


def edit(folder, name="config.json", **changes):
    described = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(described | changes))


def assert_same_parameters(found, expected):
    jax.tree.map(np.testing.assert_array_equal, nnx.state(found), nnx.state(expected))


@pytest.mark.parametrize("make", [language_model, captioner])
def test_what_is_written_is_read(make, tmp_path):
    model = make()
    mmjax.save_huggingface(model, tmp_path)
    again = mmjax.load(tmp_path)
    assert again.config == model.config
    assert_same_parameters(again, model)


def test_kernels_lie_as_here_with_query_key_and_value_in_one(tmp_path):
    model = captioner()
    mmjax.save_huggingface(model, tmp_path)
    tensors = open_tensors(tmp_path)
    layer = jax.tree.map(lambda x: x[1], nnx.to_pure_dict(nnx.state(model.text.blocks.layers)))
    for module, ours, names in (
        ("attn.c_attn", "self_attention", ("query", "key", "value")),
        ("crossattention.q_attn", "cross_attention", ("query",)),
        ("crossattention.c_attn", "cross_attention", ("key", "value")),
    ):
        parts = [layer[ours]["attention"][name] for name in names]
        found = tensors[f"decoder.transformer.h.1.{module}.weight"]
        kernels = [part["kernel"].reshape(8, 8) for part in parts]
        np.testing.assert_array_equal(found, np.concatenate(kernels, axis=1))
        biases = [part["bias"].ravel() for part in parts]
        np.testing.assert_array_equal(
            tensors[f"decoder.transformer.h.1.{module}.bias"], np.concatenate(biases)
        )


def test_openai_s_own_names_and_masks(tmp_path):
    """Without the prefix, with causal masks and the table of words a second time."""
    model = language_model()
    mmjax.save_huggingface(model, tmp_path)
    tensors = {name.removeprefix("transformer."): x for name, x in open_tensors(tmp_path).items()}
    tensors |= {f"h.{n}.attn.bias": np.tril(np.ones((1, 1, 7, 7), np.float32)) for n in range(2)}
    tensors |= {f"h.{n}.attn.masked_bias": np.array(-1e4, np.float32) for n in range(2)}
    tensors["lm_head.weight"] = tensors["wte.weight"]
    write_safetensors(tmp_path / "model.safetensors", tensors)
    assert_same_parameters(mmjax.load(tmp_path), model)
    tensors["lm_head.weight"] = tensors["wte.weight"] + 1
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(InputError, match=r"lm_head\.weight differs"):
        mmjax.load(tmp_path)


def test_another_vocabulary(tmp_path):
    model = language_model()
    mmjax.save_huggingface(model, tmp_path)
    table = mmjax.load(tmp_path, vocab_size=11).text.token_embedding.embedding[...]
    before = model.text.token_embedding.embedding[...]
    np.testing.assert_array_equal(table[:9], before)
    np.testing.assert_allclose(table[9:], np.tile(before.mean(axis=0), (2, 1)), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
        ({"add_cross_attention": True}, ["add_cross_attention is True"]),
        ({"activation_function": "gelu_ne"}, ["activation_function", "gelu_new"]),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused(changes, words, tmp_path):
    mmjax.save_huggingface(language_model(), tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(InputError) as error:
        mmjax.load(tmp_path)
    assert all(word in str(error.value) for word in (*words, "config.json")), str(error.value)


def test_a_captioner_of_other_parts_is_refused(tmp_path):
    mmjax.save_huggingface(captioner(), tmp_path)
    edit(tmp_path, encoder={"model_type": "donut-swin"})
    with pytest.raises(InputError, match=r"encoder\.model_type is 'donut-swin'.*'vit'"):
        mmjax.load(tmp_path)


def test_without_its_file_generation_is_read_from_the_config(tmp_path):
    """The model's own keys win over its decoder's."""
    mmjax.save_huggingface(captioner(), tmp_path)
    (tmp_path / "generation_config.json").unlink()
    decoder = json.loads((tmp_path / "config.json").read_text())["decoder"]
    decoder |= {"eos_token_id": 7, "bos_token_id": 5, "num_beams": 4}
    edit(tmp_path, decoder=decoder, eos_token_id=[3, 8], decoder_start_token_id=2)
    assert mmjax.load(tmp_path).config.generation == GenerationConfig(
        eos_token_id=(3, 8), bos_token_id=5, decoder_start_token_id=2, num_beams=4
    )


def test_generation_that_cannot_be_followed(tmp_path, caplog):
    mmjax.save_huggingface(language_model(), tmp_path)
    edit(tmp_path, "generation_config.json", no_repeat_ngram_size=3, bad_words_ids=None)
    with caplog.at_level(logging.WARNING):
        assert mmjax.load(tmp_path).config.generation == GENERATION
    assert "generation_config.json: no_repeat_ngram_size is 3" in caplog.text
    assert "bad_words_ids" not in caplog.text
    edit(tmp_path, "generation_config.json", top_p=2.0)
    with pytest.raises(InputError, match=r"generation_config\.json: .*top_p is 2\.0"):
        mmjax.load(tmp_path)
