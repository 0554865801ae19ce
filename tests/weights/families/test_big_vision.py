"""big_vision's names: files laid out by hand as its Linen modules store them."""

import numpy as np
import pytest

import mmjax
from mmjax.errors import InputError

WIDTH, HEADS, MLP, DEPTH = 8, 2, 12, 2
LAYERS = {
    "width": WIDTH,
    "depth": DEPTH,
    "heads": HEADS,
    "mlp_width": MLP,
    "activation": "gelu_tanh",
    "epsilon": 1e-6,
}
RNG = np.random.default_rng(0)


def draw(*shape):
    return (0.3 * RNG.normal(size=shape)).astype(np.float32)


def attention(prefix):
    head = WIDTH // HEADS
    arrays = {}
    for name in ("query", "key", "value"):
        arrays[f"{prefix}/{name}/kernel"] = draw(WIDTH, HEADS, head)
        arrays[f"{prefix}/{name}/bias"] = draw(HEADS, head)
    return arrays | {
        f"{prefix}/out/kernel": draw(HEADS, head, WIDTH),
        f"{prefix}/out/bias": draw(WIDTH),
    }


def norm(prefix):
    return {f"{prefix}/scale": 1 + draw(WIDTH), f"{prefix}/bias": draw(WIDTH)}


def dense(prefix, inputs, outputs):
    return {f"{prefix}/kernel": draw(inputs, outputs), f"{prefix}/bias": draw(outputs)}


def mlp(prefix):
    return dense(f"{prefix}/Dense_0", WIDTH, MLP) | dense(f"{prefix}/Dense_1", MLP, WIDTH)


def encoder(prefix):
    arrays = norm(f"{prefix}/encoder_norm")
    for layer in range(DEPTH):
        block = f"{prefix}/encoderblock_{layer}"
        arrays |= norm(f"{block}/LayerNorm_0") | norm(f"{block}/LayerNorm_1")
        arrays |= attention(f"{block}/MultiHeadDotProductAttention_0") | mlp(f"{block}/MlpBlock_0")
    return arrays


def image(prefix, pooling):
    arrays = {
        f"{prefix}embedding/kernel": draw(4, 4, 3, WIDTH),
        f"{prefix}embedding/bias": draw(WIDTH),
    }
    arrays |= {f"{prefix}pos_embedding": draw(1, 4, WIDTH)} | encoder(f"{prefix}Transformer")
    if pooling:
        head = f"{prefix}MAPHead_0"
        arrays |= {f"{head}/probe": draw(1, 1, WIDTH)} | norm(f"{head}/LayerNorm_0")
        arrays |= attention(f"{head}/MultiHeadDotProductAttention_0") | mlp(f"{head}/MlpBlock_0")
    return arrays


def normalised(x, arrays, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * arrays[f"{name}/scale"] + arrays[f"{name}/bias"]


def attended(x, context, arrays, name):
    q, k, v = (
        np.einsum("bld,dhe->blhe", y, arrays[f"{name}/{part}/kernel"])
        + arrays[f"{name}/{part}/bias"]
        for part, y in (("query", x), ("key", context), ("value", context))
    )
    scores = np.einsum("bqhe,bkhe->bhqk", q, k) / np.sqrt(WIDTH // HEADS)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    heads = np.einsum("bhqk,bkhe->bqhe", weights, v)
    return (
        np.einsum("bqhe,hed->bqd", heads, arrays[f"{name}/out/kernel"]) + arrays[f"{name}/out/bias"]
    )


def fed_forward(x, arrays, name):
    up = x @ arrays[f"{name}/Dense_0/kernel"] + arrays[f"{name}/Dense_0/bias"]
    up = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    return up @ arrays[f"{name}/Dense_1/kernel"] + arrays[f"{name}/Dense_1/bias"]


def encoded(x, arrays, prefix):
    for layer in range(DEPTH):
        block = f"{prefix}/encoderblock_{layer}"
        y = normalised(x, arrays, f"{block}/LayerNorm_0")
        x = x + attended(y, y, arrays, f"{block}/MultiHeadDotProductAttention_0")
        x = x + fed_forward(
            normalised(x, arrays, f"{block}/LayerNorm_1"), arrays, f"{block}/MlpBlock_0"
        )
    return normalised(x, arrays, f"{prefix}/encoder_norm")


def image_vector(pixels, arrays, prefix, pooling):
    patches = pixels.reshape(-1, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5)
    x = np.einsum("byxpqc,pqcd->byxd", patches, arrays[f"{prefix}embedding/kernel"])
    x = x.reshape(len(x), 4, WIDTH) + arrays[f"{prefix}embedding/bias"]
    x = encoded(x + arrays[f"{prefix}pos_embedding"], arrays, f"{prefix}Transformer")
    if not pooling:
        return x.mean(axis=1)
    head = f"{prefix}MAPHead_0"
    query = np.repeat(arrays[f"{head}/probe"], len(x), axis=0)
    x = attended(query, x, arrays, f"{head}/MultiHeadDotProductAttention_0")
    x = x + fed_forward(normalised(x, arrays, f"{head}/LayerNorm_0"), arrays, f"{head}/MlpBlock_0")
    return x[:, 0]


def text_vector(text, arrays):
    x = arrays["txt/Embed_0/embedding"][text] + arrays["txt/pos_embedding"]
    x = encoded(x, arrays, "txt/Encoder_0")[:, -1]
    return x @ arrays["txt/head/kernel"] + arrays["txt/head/bias"]


def save(arrays, path, prefix=""):
    np.savez(path, **{prefix + name: array for name, array in arrays.items()})
    return path


@pytest.mark.parametrize("pooling", [True, False], ids=["attention", "mean"])
def test_a_vit(tmp_path, pooling):
    arrays = image("", pooling) | dense("head", WIDTH, 3)
    config = {
        "image": LAYERS
        | {"image_size": 8, "patch_size": 4, "pool": "attention" if pooling else "mean"},
        "labels": ["a", "b", "c"],
    }
    path = save(arrays, tmp_path / "vit.npz")
    model = mmjax.load(path, family="big_vision", config=config)
    pixels = draw(2, 8, 8, 3)
    expected = image_vector(pixels.astype(np.float64), arrays, "", pooling)
    out = model(image=pixels)
    np.testing.assert_allclose(out["pooler_output"], expected, atol=1e-5)
    expected = expected @ arrays["head/kernel"] + arrays["head/bias"]
    np.testing.assert_allclose(out["logits"], expected, atol=1e-5)


TOWERS = {
    "image": {"kind": "vit", **LAYERS, "image_size": 8, "patch_size": 4, "pool": "attention"},
    "text": {
        "kind": "text_tower",
        **LAYERS,
        "vocabulary_size": 11,
        "max_length": 5,
        "causal": False,
        "pool": "last",
        "head": True,
    },
    "contrastive": {
        "width": WIDTH,
        "project_image": False,
        "project_text": False,
        "logit_bias": True,
    },
}


def test_two_towers(tmp_path):
    arrays = (
        image("img/", pooling=True) | encoder("txt/Encoder_0") | dense("txt/head", WIDTH, WIDTH)
    )
    arrays |= {"txt/Embed_0/embedding": draw(11, WIDTH), "txt/pos_embedding": draw(1, 5, WIDTH)}
    arrays |= {"t": np.array([2.0], np.float32), "b": np.array([-3.0], np.float32)}
    path = save(arrays, tmp_path / "siglip.npz", prefix="params/")
    model = mmjax.load(path, family="big_vision_two_towers", config=TOWERS)
    pixels, text = draw(2, 8, 8, 3), RNG.integers(0, 11, size=(3, 5))
    pictures = image_vector(pixels.astype(np.float64), arrays, "img/", True)
    texts = text_vector(text, arrays)
    pictures, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (pictures, texts))
    expected = np.exp(2.0) * pictures @ texts.T - 3.0
    found = model(image=pixels, text=text)["logits_per_image"]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_misspelt_field_of_the_config_is_named(tmp_path):
    path = save(image("", pooling=False), tmp_path / "vit.npz")
    with pytest.raises(InputError, match=r"config\.image\.image_sise .* Did you mean image_size"):
        mmjax.load(path, family="big_vision", config={"image": {"image_sise": 8}})
    with pytest.raises(InputError, match=r"config\.text\.kind is 'birt'\. Did you mean bert"):
        mmjax.load(path, family="big_vision_two_towers", config=TOWERS | {"text": {"kind": "birt"}})
