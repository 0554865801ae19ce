"""What a name table does to a tensor, against numpy written out."""

import numpy as np
import pytest

from mmjax.errors import InputError
from mmjax.weights.names import Entry, fused_attention, modules, pairs_of, to_theirs, under

RNG = np.random.default_rng(0)
WIDTH, HEADS, DEPTH = 6, 3, 2


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def there_and_back(table, ours):
    """Their tensors; checked to come back as ours."""
    theirs = to_theirs(table, ours)
    for pair in pairs_of(table, ours):
        for name in pair.names:
            assert theirs[name].shape == pair.their_shape
        layers = [pair.to_ours(theirs[name]) for name in pair.names]
        found = np.stack(layers) if pair.stacked else layers[0]
        expected = ours
        for key in pair.path.split("/"):
            expected = expected[key]
        np.testing.assert_array_equal(found, expected)
    return theirs


def test_a_dense_layer_is_transposed():
    kernel, bias = draw(4, 5), draw(5)
    theirs = there_and_back(modules({"up": "fc1"}), {"up": {"kernel": kernel, "bias": bias}})
    np.testing.assert_array_equal(theirs["fc1.weight"], kernel.T)
    np.testing.assert_array_equal(theirs["fc1.bias"], bias)


def test_layers_are_stacked_from_the_first_on():
    kernel = draw(DEPTH, 4, 5)
    table = under(modules({"up": "fc1"}), "layers/", "layer.{n}.", first=6)
    theirs = there_and_back(table, {"layers": {"up": {"kernel": kernel}}})
    assert list(theirs) == ["layer.6.fc1.weight", "layer.7.fc1.weight"]
    np.testing.assert_array_equal(theirs["layer.7.fc1.weight"], kernel[1].T)
    assert pairs_of(table, {"layers": {"up": {"kernel": kernel}}})[0].title == (
        "layer.{6…7}.fc1.weight"
    )


def test_heads_are_split_off_the_outputs_and_merged_into_the_inputs():
    """q_proj(x).view(heads, head_width), and out_proj(heads.flatten())."""
    x, query = draw(WIDTH), draw(WIDTH, HEADS, WIDTH // HEADS)
    out = draw(HEADS, WIDTH // HEADS, WIDTH)
    table = modules({"attention/query": "q", "attention/out": "o"})
    theirs = there_and_back(
        table, {"attention": {"query": {"kernel": query}, "out": {"kernel": out}}}
    )
    heads = np.einsum("i,ihd->hd", x, query)
    np.testing.assert_allclose((theirs["q.weight"] @ x).reshape(HEADS, -1), heads, rtol=1e-5)
    expected = np.einsum("hd,hdo->o", heads, out)
    np.testing.assert_allclose(theirs["o.weight"] @ heads.reshape(-1), expected, rtol=1e-5)


@pytest.mark.parametrize("transpose", [True, False])
def test_query_key_and_value_share_a_tensor(transpose):
    """[3 × out, in] as in timm and torch's own attention, [in, 3 × out] as in GPT-2."""
    parts = {
        name: {
            "kernel": draw(DEPTH, WIDTH, HEADS, WIDTH // HEADS),
            "bias": draw(DEPTH, HEADS, WIDTH // HEADS),
        }
        for name in ("query", "key", "value")
    }
    table = fused_attention("attention", "layer.{n}.qkv", transpose=transpose)
    theirs = there_and_back(table, {"attention": parts})
    x = draw(WIDTH)
    weight, bias = theirs["layer.1.qkv.weight"], theirs["layer.1.qkv.bias"]
    found = (weight @ x if transpose else x @ weight) + bias
    expected = [
        np.einsum("i,ihd->hd", x, part["kernel"][1]) + part["bias"][1] for part in parts.values()
    ]
    np.testing.assert_allclose(found.reshape(3, HEADS, -1), np.stack(expected), rtol=1e-4)


def test_patches_are_convolutions_or_dense_layers():
    kernel, patch = draw(2, 4, 3, 5), draw(2, 4, 3)
    expected = np.einsum("pqc,pqco->o", patch, kernel)
    as_convolution = there_and_back([Entry("patch", "conv")], {"patch": {"kernel": kernel}})
    assert as_convolution["conv.weight"].shape == (5, 3, 2, 4)
    found = np.einsum("pqc,ocpq->o", patch, as_convolution["conv.weight"])
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    as_dense = there_and_back([Entry("patch", "fc", inputs=3)], {"patch": {"kernel": kernel}})
    np.testing.assert_allclose(as_dense["fc.weight"] @ patch.reshape(-1), expected, rtol=1e-4)


def test_single_parameters_and_their_extra_axes():
    token, scale = draw(1, WIDTH), np.float32(2.5)
    table = [
        Entry("token", "cls_token", leading=1),
        Entry("other", "class_embedding", leading=-1),
        Entry("scale", "logit_scale", leading=1),
    ]
    theirs = there_and_back(table, {"token": token, "other": token, "scale": scale})
    assert theirs["cls_token"].shape == (1, 1, WIDTH)
    assert theirs["class_embedding"].shape == (WIDTH,)
    assert theirs["logit_scale"].shape == (1,)


def test_an_index_in_both_names():
    ours = {"stages": {"0": {"norm": {"scale": draw(3)}}, "1": {"norm": {"scale": draw(4)}}}}
    theirs = there_and_back([Entry("stages/{s}/norm", "layers.{s}.LayerNorm")], ours)
    assert {n: a.shape for n, a in theirs.items()} == {
        "layers.0.LayerNorm.weight": (3,),
        "layers.1.LayerNorm.weight": (4,),
    }


def test_a_parameter_without_a_name_is_told():
    with pytest.raises(InputError, match="no name in the other format:\n  head/kernel"):
        pairs_of(
            modules({"up": "fc1"}), {"up": {"kernel": draw(2, 2)}, "head": {"kernel": draw(1)}}
        )
