"""OpenAI's names beside CLIPModel: the same weights under both."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import save_file

import mmjax
from tests.cases import compare
from tests.cases.case import Case, pictures, texts
from tests.parity import torch_side
from tests.records import keep

LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
AROUND = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "logit_scale": "logit_scale",
}


def original(model):
    """The weights of a CLIPModel under OpenAI's names."""
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    renamed = {theirs: weights[name] for name, theirs in AROUND.items()}
    renamed["visual.proj"] = weights["visual_projection.weight"].T
    renamed["text_projection"] = weights["text_projection.weight"].T
    for tower, prefix in (("vision_model", "visual."), ("text_model", "")):
        for n in range(getattr(model, tower).config.num_hidden_layers):
            here, there = f"{tower}.encoder.layers.{n}.", f"{prefix}transformer.resblocks.{n}."
            for leaf in ("weight", "bias"):
                parts = [weights[f"{here}self_attn.{part}_proj.{leaf}"] for part in "qkv"]
                renamed[f"{there}attn.in_proj_{leaf}"] = torch.cat(parts)
                for name, theirs in LAYER.items():
                    renamed[f"{there}{theirs}.{leaf}"] = weights[f"{here}{name}.{leaf}"]
    return {name: tensor.clone().contiguous() for name, tensor in renamed.items()}


def inputs(rng):
    """Texts that end in the largest id, 19, at different places."""
    pairs = {"image": pictures(rng, height=24, width=24), **texts(rng, batch=3, words=19)}
    pairs["text"][[0, 1, 2], [6, 3, 4]] = 19
    return pairs


def case(activation):
    return Case(
        name=f"open_clip-{activation}",
        kind="CLIPModel",
        config=lambda t: t.CLIPConfig(
            vision_config={
                "hidden_size": 24,
                "intermediate_size": 96,
                "num_hidden_layers": 3,
                "num_attention_heads": 3,
                "image_size": 24,
                "patch_size": 8,
                "hidden_act": activation,
            },
            text_config={
                "hidden_size": 16,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "vocab_size": 20,
                "max_position_embeddings": 7,
                "hidden_act": activation,
                "eos_token_id": 2,  # the end is the largest id
            },
            projection_dim=12,
        ),
        inputs=inputs,
    )


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_agrees_with_transformers(activation, tmp_path):
    clip = case(activation)
    theirs = torch_side.build(clip)
    described = {
        "embed_dim": 12,
        "vision_cfg": {
            "width": 24,
            "layers": 3,
            "head_width": 8,
            "image_size": 24,
            "patch_size": 8,
        },
        "text_cfg": {
            "width": 16,
            "layers": 2,
            "heads": 2,
            "vocab_size": 20,
            "context_length": 7,
        },
        **({"quick_gelu": True} if activation == "quick_gelu" else {}),
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": described}))
    theirs.config.save_pretrained(tmp_path)  # a config.json of the same model lies beside it
    save_file(original(theirs), tmp_path / "open_clip_model.safetensors")
    model = mmjax.load(tmp_path)
    assert model.family == "open_clip"

    batch = inputs(np.random.default_rng(0))
    found = compare.run(model, batch)
    differences = {
        name: float(np.abs(found[name] - value.detach().numpy()).max())
        for name, value in torch_side.outputs(clip, theirs, batch).items()
    }
    assert max(differences.values()) < 1e-4, differences
    keep(f"open_clip-{activation}", against=clip.kind, outputs=max(differences.values()))

    # With the weights of `transformers` in the same folder, those are read.
    theirs.save_pretrained(tmp_path)
    same = mmjax.load(tmp_path)
    assert same.family == "clip"
    jax.tree.map(np.testing.assert_array_equal, *(nnx.state(m) for m in (same, model)))


def test_becomes_a_clip_of_transformers(tmp_path):
    """LAION's weights for those who need a CLIPModel: only the family has to be named."""
    clip = case("gelu")
    theirs = torch_side.build(clip)
    theirs.save_pretrained(tmp_path / "theirs")
    model = mmjax.load(tmp_path / "theirs")
    model.family = "open_clip"
    mmjax.save_huggingface(model, tmp_path / "open_clip")
    model = mmjax.load(tmp_path / "open_clip")
    model.family = "clip"
    mmjax.save_huggingface(model, tmp_path / "clip")
    again = transformers.CLIPModel.from_pretrained(tmp_path / "clip")
    weights = dict(theirs.named_parameters())
    for name, value in again.named_parameters():
        assert torch.equal(value, weights[name]), name
