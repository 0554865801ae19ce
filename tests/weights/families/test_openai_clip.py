"""The names of OpenAI and open_clip, on weights made up here."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import mmjax
from mmjax.errors import InputError
from mmjax.weights.families import openai_clip
from mmjax.weights.names import to_theirs

IMAGE = {"width": 24, "layers": 2, "head_width": 8, "image_size": 16, "patch_size": 8}
TEXT = {"width": 16, "layers": 3, "heads": 2, "vocab_size": 20, "context_length": 7}
MODEL = {"embed_dim": 10, "vision_cfg": IMAGE, "text_cfg": TEXT}
PIXELS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


def tower(width, layers):
    shapes = {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width),
        "mlp.c_proj.bias": (width,),
        **{f"ln_{n}.{leaf}": (width,) for n in (1, 2) for leaf in ("weight", "bias")},
    }
    return {
        f"transformer.resblocks.{n}.{name}": shape
        for n in range(layers)
        for name, shape in shapes.items()
    }


def state_dict():
    shapes = {
        "visual.class_embedding": (24,),
        "visual.positional_embedding": (5, 24),
        "visual.conv1.weight": (24, 3, 8, 8),
        **{
            f"visual.ln_{at}.{leaf}": (24,) for at in ("pre", "post") for leaf in ("weight", "bias")
        },
        **{f"visual.{name}": shape for name, shape in tower(24, 2).items()},
        "visual.proj": (24, 10),
        "token_embedding.weight": (20, 16),
        "positional_embedding": (7, 16),
        **tower(16, 3),
        "ln_final.weight": (16,),
        "ln_final.bias": (16,),
        "text_projection": (16, 10),
        "logit_scale": (),
    }
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(folder, model=MODEL, **more):
    described = {"model_cfg": model, "preprocess_cfg": PIXELS}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    save_file(state_dict() | more, folder / "open_clip_model.safetensors")
    return folder


def test_every_tensor_comes_to_its_place(tmp_path):
    model = mmjax.load(write(tmp_path, attn_mask=np.zeros((7, 7), np.float32)))
    theirs, ours = state_dict(), nnx.to_pure_dict(nnx.state(model))
    image, text, contrastive = ours["image"], ours["text"], ours["contrastive"]

    kernel = theirs["visual.conv1.weight"]
    np.testing.assert_array_equal(image["patch"]["kernel"], kernel.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(image["class_token"][0], theirs["visual.class_embedding"])
    np.testing.assert_array_equal(
        image["position_embedding"], theirs["visual.positional_embedding"]
    )
    np.testing.assert_array_equal(image["embedding_norm"]["scale"], theirs["visual.ln_pre.weight"])
    np.testing.assert_array_equal(image["norm"]["bias"], theirs["visual.ln_post.bias"])
    np.testing.assert_array_equal(
        text["token_embedding"]["embedding"], theirs["token_embedding.weight"]
    )
    np.testing.assert_array_equal(
        text["position_embedding"]["embedding"], theirs["positional_embedding"]
    )
    np.testing.assert_array_equal(text["norm"]["scale"], theirs["ln_final.weight"])
    np.testing.assert_array_equal(contrastive["image_projection"]["kernel"], theirs["visual.proj"])
    np.testing.assert_array_equal(
        contrastive["text_projection"]["kernel"], theirs["text_projection"]
    )
    np.testing.assert_array_equal(contrastive["logit_scale"], theirs["logit_scale"])

    for tower, prefix, layers, heads in ((image, "visual.", 2, 3), (text, "", 3, 2)):
        for n in range(layers):
            there = f"{prefix}transformer.resblocks.{n}."
            block = tower["blocks"]["layers"]
            attention = block["self_attention"]["attention"]
            width = theirs[there + "attn.in_proj_weight"].shape[1]
            for i, part in enumerate(("query", "key", "value")):
                rows = slice(i * width, (i + 1) * width)
                weight = theirs[there + "attn.in_proj_weight"][rows]
                bias = theirs[there + "attn.in_proj_bias"][rows]
                expected = weight.T.reshape(width, heads, -1)
                np.testing.assert_array_equal(attention[part]["kernel"][n], expected)
                np.testing.assert_array_equal(attention[part]["bias"][n], bias.reshape(heads, -1))
            out = theirs[there + "attn.out_proj.weight"].T.reshape(heads, -1, width)
            np.testing.assert_array_equal(attention["out"]["kernel"][n], out)
            for part, name in (("up", "c_fc"), ("down", "c_proj")):
                weight = theirs[f"{there}mlp.{name}.weight"]
                np.testing.assert_array_equal(block["mlp"][part]["kernel"][n], weight.T)
            np.testing.assert_array_equal(
                block["self_attention"]["norm"]["scale"][n], theirs[there + "ln_1.weight"]
            )
            np.testing.assert_array_equal(
                block["mlp"]["norm"]["scale"][n], theirs[there + "ln_2.weight"]
            )


def test_the_config_is_read(tmp_path):
    config = mmjax.load(write(tmp_path)).config
    assert (config.image.activation, config.text.activation) == ("gelu", "gelu")
    assert (config.image.epsilon, config.text.epsilon) == (1e-5, 1e-5)
    assert (config.image.mean, config.image.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    quick = mmjax.load(write(tmp_path, MODEL | {"quick_gelu": True})).config
    assert (quick.image.activation, quick.text.activation) == ("quick_gelu", "quick_gelu")


def test_a_file_with_a_config_of_ours_is_the_same_model(tmp_path):
    folder = mmjax.load(write(tmp_path))
    layer = {"epsilon": 1e-5, "activation": "gelu"}
    image = {"width": 24, "depth": 2, "heads": 3, "image_size": 16, "patch_size": 8}
    clip = {"patch_bias": False, "embedding_norm": True, "norm_tokens": False, **PIXELS}
    text = {"width": 16, "depth": 3, "heads": 2, "vocabulary_size": 20, "max_length": 7}
    file = mmjax.load(
        tmp_path / "open_clip_model.safetensors",
        family="open_clip",
        config={
            "image": {**image, **clip, **layer},
            "text": {"kind": "text_tower", **text, **layer, "pool": "largest"},
            "contrastive": {"width": 10, "bias": False},
        },
    )
    assert file.config == folder.config
    image = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    np.testing.assert_array_equal(
        file(image=image)["image_embeds"], folder(image=image)["image_embeds"]
    )


def test_weights_are_those_that_were_read_and_are_written_for_transformers(tmp_path):
    model = mmjax.load(write(tmp_path))
    params = nnx.to_pure_dict(nnx.state(model))
    names = to_theirs(openai_clip.FAMILY.table(model.config), params)
    assert names.keys() == state_dict().keys()
    for name, array in state_dict().items():
        np.testing.assert_array_equal(names[name], array, err_msg=name)
    mmjax.save_huggingface(model, tmp_path / "again")
    description = json.loads((tmp_path / "again" / "config.json").read_text())
    assert description["architectures"] == ["CLIPModel"]
    again = mmjax.load(tmp_path / "again")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(again)), params)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_cfg": {**IMAGE, "layers": [3, 4, 6, 3]}}, ["vision_cfg", "ResNets"]),
        ({"vision_cfg": {**IMAGE, "pool_type": "avg"}}, ["pool_type", "'avg'", "'tok'"]),
        ({"vision_cfg": {**IMAGE, "timm_model_name": "vit"}}, ["timm_model_name", "'vit'"]),
        ({"text_cfg": {**TEXT, "no_causal_mask": True}}, ["text_cfg", "no_causal_mask"]),
        ({"text_cfg": {**TEXT, "act_kwargs": {"approximate": "tanh"}}}, ["act_kwargs", "tanh"]),
        ({"text_cfg": {**TEXT, "heads": "two"}}, ["heads", "'two'"]),
        ({"custom_text": True}, ["custom_text"]),
        ({"quick_gelu": "yes"}, ["quick_gelu", "'yes'"]),
        ({"text_cfg": None}, ["model_cfg", "'text_cfg'"]),
        ({"vision_cfg": {**IMAGE, "width": 32}}, ["visual.class_embedding: [24], expected [32]"]),
    ],
    ids=str,
)
def test_other_models_are_refused(change, words, tmp_path):
    with pytest.raises(InputError) as error:
        mmjax.load(write(tmp_path, MODEL | change))
    assert all(word in str(error.value) for word in words), str(error.value)
