"""Encoders and fusion in plain numpy, float64, written from the papers: what ours is held against.

Also the small things that several tests need: a tiny model, random parameters, a random batch.
"""

from collections.abc import Callable
from dataclasses import replace
from math import erf
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer
from tokenizers.models import WordPiece

from mmjax.data.tokenizer import SPECIAL_TOKENS, TextTokenizer
from mmjax.models import (
    BertConfig,
    CoAttentionConfig,
    FusionConfig,
    VisionLanguageConfig,
    ViTConfig,
)
from mmjax.rules import leaf_paths, path_name

Tree = dict[str, Any]

# ---- a tiny model, its parameters and its input


def tiny_model(**changes: Any) -> VisionLanguageConfig:
    """Width 32, two layers, 10 picture tokens; `text_remat='full'` changes one part's field."""
    layers = {"width": 32, "depth": 2, "heads": 4, "mlp_width": 64}
    parts = {
        "image": ViTConfig(**layers, image_size=24, patch_size=8),
        "text": BertConfig(**layers, vocabulary_size=40, max_length=16),
        "fusion": FusionConfig(**layers),
    }
    for name in [name for name in changes if name.partition("_")[0] in parts]:
        part, _, key = name.partition("_")
        parts[part] = replace(parts[part], **{key: changes.pop(name)})
    return VisionLanguageConfig(**parts, **{"embedding_width": 16, **changes})


def tiny_tokenizer() -> TextTokenizer:
    """Of `tiny_model`'s 40 words."""
    words = [*SPECIAL_TOKENS, *(f"word{i}" for i in range(5, 40))]
    return TextTokenizer(Tokenizer(WordPiece(dict(zip(words, range(40), strict=True)))), "tests")


def split(make: Callable[[], nnx.Module], seed: int = 0) -> tuple[nnx.GraphDef, Tree]:
    """The module's structure and parameters that leave nothing at 0 or 1."""
    graph, state = nnx.split(nnx.eval_shape(make))
    return graph, random_params(nnx.to_pure_dict(state), seed)


def random_params(abstract: Tree, seed: int = 0) -> Tree:
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path_name(path)
        noise = rng.normal(size=leaf.shape)
        if name.endswith("logit_scale"):
            value = np.asarray(1.5)
        elif name.endswith("/scale"):
            value = 1 + 0.2 * noise
        elif name.endswith("/bias"):
            value = 0.2 * noise
        else:
            value = 0.25 * noise
        return jnp.array(np.asarray(value, np.float32))

    return jax.tree_util.tree_map_with_path(draw, abstract)


def tiny_batch(model: VisionLanguageConfig, rows: int, length: int = 11, seed: int = 0) -> Tree:
    """Random pictures and texts: texts of several lengths, two rows of one picture, one invalid."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, length + 1, rows)
    lengths[0] = length
    mask = np.arange(length) < lengths[:, None]
    text = rng.integers(4, model.text.vocabulary_size, (rows, length))
    text[:, 0] = 1
    text[np.arange(rows), lengths - 1] = 2
    image_id = np.arange(100, 100 + rows)
    image_id[1] = image_id[0]
    valid = np.ones(rows, bool)
    valid[rows // 2] = False
    side = model.image.image_size
    batch = {
        "image": rng.integers(0, 256, (rows, side, side, 3)).astype(np.uint8),
        "text": np.where(mask, text, 0).astype(np.int32),
        "text_mask": mask,
        "image_id": image_id.astype(np.int32),
        "index": rng.permutation(1000)[:rows].astype(np.int32),
        "valid": valid,
        "substituted": np.zeros(rows, bool),
    }
    if model.answers:
        scores = rng.choice([0, 0, 0.3, 0.6, 1.0], (rows, len(model.answers)))
        batch["answer"] = scores.astype(np.float32)
    return batch


def assert_close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Leaf by leaf, relative to the largest entry of the expected leaf."""
    paths = leaf_paths(expected)
    for path, a, b in zip(paths, jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # (some gradients are zero but for rounding: the softmax does not see a key's bias)
        scale = max(np.abs(b).max(), 0.3)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=path)


def assert_same(one: Any, two: Any) -> None:
    """Leaf by leaf, to the bit."""
    jax.tree.map(np.testing.assert_array_equal, one, two)


# ---- the papers


def layer_norm(x: np.ndarray, p: Tree, epsilon: float) -> np.ndarray:
    """Ba et al. 2016."""
    deviation = np.sqrt(x.var(axis=-1, keepdims=True) + epsilon)
    return (x - x.mean(axis=-1, keepdims=True)) / deviation * p["scale"] + p["bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    """X · Φ(x), exactly (Hendrycks and Gimpel 2016)."""
    return x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2)))


def softmax(scores: np.ndarray) -> np.ndarray:
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def dense(x: np.ndarray, p: Tree) -> np.ndarray:
    return x @ p["kernel"] + p["bias"]


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """One example and one head: [Q, d], [K, d], [K, d], [Q or 1, K] -> [Q, d]."""
    scores = q @ k.T / np.sqrt(q.shape[-1])
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    return softmax(scores) @ v


def multi_head(x: np.ndarray, context: np.ndarray, p: Tree, mask: np.ndarray | None) -> np.ndarray:
    """Vaswani et al. 2017, section 3.2.2: example by example, head by head. `mask` is [B, K]."""
    out = np.zeros((*x.shape[:2], p["out"]["bias"].shape[-1])) + p["out"]["bias"]
    for b in range(len(x)):
        for h in range(p["query"]["kernel"].shape[1]):
            q, k, v = (
                source[b] @ p[name]["kernel"][:, h] + p[name]["bias"][h]
                for name, source in (("query", x), ("key", context), ("value", context))
            )
            head = attend(q, k, v, None if mask is None else mask[b][None, :])
            out[b] += head @ p["out"]["kernel"][h]
    return out


def attention_sublayer(x, context, p, mask, config):
    """Residual attention; a pre-norm layer normalises the other stream by its own LayerNorm too."""
    if config.norm == "post":
        attended = multi_head(x, x if context is None else context, p["attention"], mask)
        return layer_norm(x + attended, p["norm"], config.epsilon)
    normed = layer_norm(x, p["norm"], config.epsilon)
    other = None if context is None else layer_norm(context, p["context_norm"], config.epsilon)
    return x + multi_head(normed, normed if other is None else other, p["attention"], mask)


def mlp_sublayer(x, p, config):
    if config.norm == "post":
        hidden = dense(gelu(dense(x, p["up"])), p["down"])
        return layer_norm(x + hidden, p["norm"], config.epsilon)
    normed = layer_norm(x, p["norm"], config.epsilon)
    return x + dense(gelu(dense(normed, p["up"])), p["down"])


def in_float64(params: Tree) -> Tree:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def layers_of(stack: Tree, depth: int) -> list[Tree]:
    """The parameters of each layer, unstacked."""
    return [jax.tree.map(lambda x, i=i: x[i], stack["layers"]) for i in range(depth)]


def vit(params: Tree, image: np.ndarray, config: ViTConfig) -> tuple[np.ndarray, np.ndarray]:
    """Dosovitskiy et al. 2021, section 3.1: tokens and the pooled vector."""
    p = in_float64(params)
    image = np.asarray(image, np.float64)
    size, side = config.patch_size, config.image_size // config.patch_size
    patches = np.stack(
        [
            image[:, r * size : (r + 1) * size, c * size : (c + 1) * size].reshape(len(image), -1)
            for r in range(side)
            for c in range(side)
        ],
        axis=1,
    )
    patch = {**p["patch"], "kernel": p["patch"]["kernel"].reshape(-1, config.width)}
    x = dense(patches, patch)
    if config.pool == "class_token":
        x = np.concatenate([np.tile(p["class_token"], (len(x), 1, 1)), x], axis=1)
    x = x + p["position_embedding"]
    for layer in layers_of(p["blocks"], config.depth):
        x = attention_sublayer(x, None, layer["self_attention"], None, config)
        x = mlp_sublayer(x, layer["mlp"], config)
    x = layer_norm(x, p["norm"], config.epsilon)
    if config.pool == "class_token":
        return x, x[:, 0]
    if config.pool == "mean":
        return x, x.mean(axis=1)
    query = np.tile(p["pooling"]["query"], (len(x), 1, 1))
    pooled = multi_head(query, x, p["pooling"]["attention"], None)
    return x, mlp_sublayer(pooled, p["pooling"]["mlp"], config)[:, 0]


def bert(
    params: Tree,
    text: np.ndarray,
    mask: np.ndarray,
    config: BertConfig,
    types: np.ndarray | int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Devlin et al. 2019, section 3, and the published code's embedding LayerNorm."""
    p = in_float64(params)
    tables = p["embeddings"]
    x = tables["token_embedding"]["embedding"][text]
    x = x + tables["position_embedding"]["embedding"][: text.shape[1]]
    x = x + tables["type_embedding"]["embedding"][np.broadcast_to(types, text.shape)]
    x = layer_norm(x, tables["norm"], config.epsilon)
    for layer in layers_of(p["blocks"], config.depth):
        x = attention_sublayer(x, None, layer["self_attention"], mask, config)
        x = mlp_sublayer(x, layer["mlp"], config)
    if config.norm == "pre":
        x = layer_norm(x, p["norm"], config.epsilon)
    return x, x[:, 0]


def co_attention(
    params: Tree,
    image: np.ndarray,
    text: np.ndarray,
    text_mask: np.ndarray,
    config: CoAttentionConfig,
    image_class_token: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """METER (Dou et al. 2022, section 3.3) and LXMERT (Tan and Bansal 2019, section 2.3)."""
    p = in_float64(params)
    if config.project:
        image, text = dense(image, p["image_projection"]), dense(text, p["text_projection"])
    if config.token_types:
        text = text + p["type_embedding"]["embedding"][0]
        image = image + p["type_embedding"]["embedding"][1]
    for layer in layers_of(p["blocks"], config.depth):
        cross_image = layer["cross" if config.share_cross else "image_cross"]
        cross_text = layer["cross" if config.share_cross else "text_cross"]
        if config.order == "self_first":
            new_image = attention_sublayer(image, None, layer["image_self"], None, config)
            new_text = attention_sublayer(text, None, layer["text_self"], text_mask, config)
            new_image = attention_sublayer(new_image, text, cross_image, text_mask, config)
            new_text = attention_sublayer(new_text, image, cross_text, None, config)
        else:
            new_image = attention_sublayer(image, text, cross_image, text_mask, config)
            new_text = attention_sublayer(text, image, cross_text, None, config)
            new_image = attention_sublayer(new_image, None, layer["image_self"], None, config)
            new_text = attention_sublayer(new_text, None, layer["text_self"], text_mask, config)
        image = mlp_sublayer(new_image, layer["image_mlp"], config)
        text = mlp_sublayer(new_text, layer["text_mlp"], config)
    if config.norm == "pre":
        image = layer_norm(image, p["image_norm"], config.epsilon)
        text = layer_norm(text, p["text_norm"], config.epsilon)
    pooled = np.tanh(dense(text[:, 0], p["text_pooler"]))
    if config.pool == "both":
        summary = image[:, 0] if image_class_token else image.mean(axis=1)
        pooled = np.concatenate([pooled, np.tanh(dense(summary, p["image_pooler"]))], axis=-1)
    return image, text, pooled


def assert_dropout_in_every_part(
    graph: nnx.GraphDef, params: Tree, inputs: dict[str, Any], pooled: str
) -> None:
    """A key draws dropout in both encoders, the fusion and the whole model; another, others."""

    @jax.jit
    def draw(params, key):
        model = nnx.merge(graph, params)
        text = inputs["text"], inputs["text_mask"]
        pair = model.encode_image(inputs["image"]), model.encode_text(*text)
        return (
            model.encode_image(inputs["image"], key).pooled,
            model.encode_text(*text, key=key).pooled,
            model.fuse(*pair, key).pooled,
            model(**inputs, train=True, key=key)[pooled],
        )

    once, again, other = (draw(params, jax.random.key(n)) for n in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, once, again)
    assert all(np.abs(a - b).max() > 0.01 for a, b in zip(once, other, strict=True))
