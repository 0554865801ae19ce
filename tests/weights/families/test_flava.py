"""FLAVA's published file, which is that of its pre-training."""

import json

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import mmjax
from mmjax.errors import InputError
from mmjax.layers import LayerConfig
from mmjax.models.bert import BertConfig
from mmjax.models.flava import Flava, FlavaConfig
from mmjax.models.vit import ViTConfig
from tests.weights.families.recorded import assert_saved_whole

LAYERS = {"width": 12, "depth": 1, "heads": 3, "epsilon": 1e-12}
CONFIG = FlavaConfig(
    image=ViTConfig(**LAYERS, image_size=16, patch_size=8, pooler=True),
    text=BertConfig(**LAYERS, vocabulary_size=20, max_length=9, norm="pre", pooler=True),
    fusion=LayerConfig(**LAYERS),
    embedding_width=5,
    pretraining=True,
    codes=7,
)


@pytest.fixture
def published(tmp_path):
    """As an older version wrote it: biases of heads twice or under either name, and a tokenizer."""
    mmjax.save_huggingface(Flava(CONFIG, nnx.Rngs(0)), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["mlm_head.bias"] = tensors["mlm_head.decoder.bias"]
    tensors["mim_head.bias"] = tensors.pop("mim_head.decoder.bias")
    tensors["image_codebook.blocks.input.weight"] = np.ones((4, 3, 7, 7), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_the_tokenizer_of_pictures_is_left(published, tmp_path_factory):
    model = mmjax.load(published)
    assert model.config == CONFIG
    bias = load_file(published / "model.safetensors")["mim_head.bias"]
    np.testing.assert_array_equal(model.masked_image_alone.decoder.bias[...], bias)
    assert_saved_whole(model, tmp_path_factory.mktemp("again"))


def test_sizes_can_be_changed(published):
    model = mmjax.load(published, image_size=24, vocab_size=23)
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(1, 24, 24, 3)).astype(np.float32), rng.integers(0, 23, (1, 5))
    out = model(image=image, text=text)
    assert out["image_embeddings"].shape == (1, 10, 12)
    assert out["mmm_text_logits"].shape == (1, 5, 23)


def test_heads_of_other_widths_have_no_format(tmp_path):
    """`transformers` gives them the encoder's width, and lays them on the fusion."""
    wider = FlavaConfig(
        image=CONFIG.image,
        text=CONFIG.text,
        fusion=LayerConfig(width=24, depth=1, heads=3),
        pretraining=True,
    )
    with pytest.raises(InputError, match="no published format"):
        mmjax.save_huggingface(Flava(wider, nnx.Rngs(0)), tmp_path)


def test_the_description_names_the_class(published):
    described = json.loads((published / "config.json").read_text())
    assert described["architectures"] == ["FlavaForPreTraining"]
    assert described["image_config"]["vocab_size"] == 7
    assert not described["init_codebook"]
