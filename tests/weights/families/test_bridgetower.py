"""What of a BridgeTower's config is read; tests/parity holds the rest against `transformers`."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import mmjax
from mmjax.errors import InputError
from mmjax.models.bert import BertConfig
from mmjax.models.bridgetower import BridgeTower, BridgeTowerConfig
from mmjax.models.fusion import CoAttentionConfig
from mmjax.models.vit import ViTConfig

LAYERS = {"width": 64, "heads": 4, "mlp_width": 20, "epsilon": 1e-5, "dropout": 0.1}
CONFIG = BridgeTowerConfig(
    image=ViTConfig(
        width=64,
        depth=2,
        image_size=16,
        patch_size=8,
        patch_bias=False,
        embedding_norm=True,
        activation="quick_gelu",
        epsilon=1e-5,
    ),
    text=BertConfig(
        **LAYERS,
        depth=2,
        vocabulary_size=20,
        max_length=9,
        first_position=2,
        padding=1,
        types=1,
    ),
    fusion=CoAttentionConfig(**LAYERS, depth=2, norm="post"),
    matching=True,
    masked_language=True,
    embedding_width=6,
)


@pytest.fixture(scope="module")
def model():
    return BridgeTower(CONFIG, nnx.Rngs(0))


@pytest.fixture
def folder(model, tmp_path):
    """A file with all heads, as some of the published ones are."""
    mmjax.save_huggingface(model, tmp_path)
    return tmp_path


def test_all_heads_of_a_file_are_read(model, folder):
    again = mmjax.load(folder)
    assert again.config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))


def test_names_are_those_of_transformers(folder):
    names = load_file(folder / "model.safetensors").keys()
    body = "bridgetower."
    for name in (
        f"{body}vision_model.visual.transformer.resblocks.1.attn.in_proj_weight",
        f"{body}text_model.encoder.layer.1.output.LayerNorm.weight",
        f"{body}cross_modal_text_layers.0.crossattention.self.query.weight",
        f"{body}cross_modal_image_layers.1.intermediate.dense.bias",
        f"{body}cross_modal_image_link_tower.0.LayerNorm.weight",
        f"{body}cross_modal_text_layernorm.bias",
        "mlm_score.decoder.weight",
        "itm_score.fc.weight",
        "itc_cross_modal_head.fc.weight",
        "logit_scale",
    ):
        assert name in names
    assert not any("link_tower.1." in name for name in names)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"link_tower_type": "interpolate"}, ["link_tower_type", "'interpolate'", "'add'"]),
        ({"share_link_tower_layers": True}, ["share_link_tower_layers", "True"]),
        ({"share_cross_modal_transformer_layers": False}, ["share_cross_modal", "False"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings"]),
        ({"vision_config": {"share_layernorm": False}}, ["vision_config", "share_layernorm"]),
        ({"text_config": {"pad_token_id": None}}, ["text_config", "pad_token_id", "None"]),
        ({"hidden_size": 32}, ["hidden_size is 32", "64"]),
        ({"num_hidden_layers": 3}, ["3 layers", "2 (image)"]),
        ({"contrastive_hidden_size": None}, ["contrastive_hidden_size"]),
        ({"vision_config": {"remove_last_layer": True}}, ["1 (image)", "2 (text)"]),
    ],
    ids=str,
)
def test_other_arrangements_are_refused(change, words, folder):
    path = folder / "config.json"
    described = json.loads(path.read_text())
    for name, value in change.items():
        described[name] = {**described[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(described))
    with pytest.raises(InputError) as error:
        mmjax.load(folder)
    assert all(word in str(error.value) for word in words), str(error.value)
