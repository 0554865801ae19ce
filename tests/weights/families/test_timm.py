"""ViT under timm's names: the encoder of a recorded ALBEF, and folders as timm writes them."""

import json

import numpy as np
import pytest
from flax import nnx

import mmjax
from mmjax.errors import InputError
from mmjax.models import resize_position_embedding
from mmjax.models.encoders import ImageModel, ImageModelConfig
from mmjax.models.vit import ViTConfig
from mmjax.weights.families.timm import FAMILY
from mmjax.weights.family import Source
from mmjax.weights.files import write_safetensors
from mmjax.weights.names import to_theirs
from tests.weights.families.distilled import encoders_of, pictures
from tests.weights.families.recorded import Recorded, assert_saved_whole, load

RGB = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}


@pytest.fixture(scope="module")
def recorded(shared):
    return Recorded(shared / "goldens" / "albef_ve_dev.npz")


def test_a_recorded_encoder(recorded, tmp_path):
    weights = recorded.under("w/visual_encoder.")
    config = {"image": encoders_of(recorded)["image"]}
    model = load(tmp_path, "timm", config, weights)
    out = model(image=pictures(recorded))
    recorded.check("out/nodistill/image_embeds", out["last_hidden_state"])
    np.testing.assert_array_equal(out["pooler_output"], out["last_hidden_state"][:, 0])
    assert_saved_whole(model, tmp_path / "again")
    resized = mmjax.load(
        tmp_path / "weights.safetensors", family="timm", config=config, image_size=24
    )
    expected = resize_position_embedding(weights["pos_embed"][0], 10)
    np.testing.assert_array_equal(resized.image.position_embedding[...], expected)


def described(names=("head.weight",), **json):
    return FAMILY.read(Source(json, names, "config.json"))


def test_an_architecture_is_read():
    config = described(
        architecture="vit_small_patch32_384.augreg_in21k_ft_in1k",
        num_classes=2,
        label_names=["cat", "dog"],
        global_pool="token",
        pretrained_cfg={"input_size": [3, 384, 384], **RGB},
    )
    image = ViTConfig(size="S/32", image_size=(384, 384), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    assert config == ImageModelConfig(image, ("cat", "dog"))
    assert (image.width, image.heads, image.epsilon, image.activation) == (384, 6, 1e-6, "gelu")


def test_an_old_file_is_read():
    config = described(architecture="deit_tiny_patch16_224", num_classes=1000, **RGB)
    assert (config.image.width, config.image.heads) == (192, 3)
    assert (config.image.image_size, config.image.mean) == ((224, 224), (0.1, 0.2, 0.3))
    assert len(config.labels) == 1000


def test_a_headless_file_has_no_labels():
    assert described(names=(), architecture="vit_base_patch16_224", num_classes=1000).labels == ()


@pytest.mark.parametrize(
    ("json", "message"),
    [
        ({"architecture": "vit_base_patch16_clip_224"}, "architecture is 'vit_base_patch16_clip"),
        ({"architecture": "vit_bas_patch16_224"}, "Did you mean vit_base_patch16_224"),
        ({"architecture": "vit_base_patch16_224_miil"}, "architecture is"),
        ({}, "architecture is 'None'"),
        (
            {"architecture": "vit_base_patch16_224", "model_args": {"qkv_bias": False}},
            "only img_size is supported",
        ),
    ],
)
def test_other_architectures_are_refused(json, message):
    with pytest.raises(InputError, match=message):
        described(**json)


def test_a_folder_as_timm_writes_it(tmp_path):
    """What it says of size is right and what it lacks is told, without any weight being made."""
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 3}
    small = ImageModelConfig(
        ViTConfig(width=192, depth=1, heads=3, image_size=32, patch_size=16), ("a", "b", "c")
    )
    model = ImageModel(small, nnx.Rngs(0))
    weights = to_theirs(FAMILY.table(small), nnx.to_pure_dict(nnx.state(model)))
    write_safetensors(tmp_path / "model.safetensors", weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as error:
        mmjax.load(tmp_path)
    assert "blocks.11.norm1.weight" in str(error.value)
    assert "pos_embed: [1, 5, 192], expected [1, 197, 192]" in str(error.value)
    assert "unexpected" not in str(error.value)
