"""The assembled model and its heads."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.errors import InputError
from mmjax.models import VisionLanguageModel
from mmjax.models.vit import normalise
from mmjax.rules import leaf_paths
from tests.models import reference
from tests.models.reference import dense, gelu, layer_norm, tiny_batch, tiny_model

FULL = tiny_model(answers=("yes", "no", "two"))
PROJECTED = tiny_model(
    text_width=24,
    text_heads=3,
    image_pool="mean",
    fusion_project=True,
    fusion_token_types=True,
    fusion_norm="post",
    answers=("yes", "no"),
)


def call(model, batch):
    graph, params = reference.split(lambda: VisionLanguageModel(model, nnx.Rngs(0)))
    inputs = {name: jnp.array(batch[name]) for name in ("image", "text", "text_mask")}
    run = jax.jit(lambda params, inputs: nnx.merge(graph, params)(**inputs))
    return params, run(params, inputs)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("model", [FULL, PROJECTED], ids=["equal_widths", "projected"])
def test_agrees_with_the_papers(model):
    batch = tiny_batch(model, rows=4)
    params, found = call(model, batch)
    p = reference.in_float64(params)
    pixels = np.asarray(normalise(jnp.array(batch["image"]), model.image.mean, model.image.std))
    image, image_pooled = reference.vit(p["image"], pixels, model.image)
    text, text_pooled = reference.bert(p["text"], batch["text"], batch["text_mask"], model.text)
    _, words, pooled = reference.co_attention(
        p["fusion"],
        image,
        text,
        batch["text_mask"],
        model.fusion,
        image_class_token=model.image.pool == "class_token",
    )
    image_embeds = unit(dense(image_pooled, p["contrastive"]["image_projection"]))
    text_embeds = unit(dense(text_pooled, p["contrastive"]["text_projection"]))
    head = p["masked_language"]
    hidden = layer_norm(gelu(dense(words, head["transform"])), head["norm"], model.text.epsilon)
    answering = p["answering"]
    answer_hidden = gelu(layer_norm(dense(pooled, answering["hidden"]), answering["norm"], 1e-5))
    expected = {
        "image_embeds": image_embeds,
        "text_embeds": text_embeds,
        "logits_per_image": np.exp(1.5) * image_embeds @ text_embeds.T,
        "pooled_output": pooled,
        "sequence_output": words,
        "itm_logits": dense(pooled, p["matching"]["classifier"]),
        "mlm_logits": hidden @ p["text"]["embeddings"]["token_embedding"]["embedding"].T
        + head["bias"],
        "vqa_logits": dense(answer_hidden, answering["classifier"]),
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(
            found[name], value, rtol=0, atol=1e-4 * max(1, np.abs(value).max()), err_msg=name
        )


def test_heads_that_are_not_asked_for_are_absent():
    model = tiny_model(embedding_width=0, matching=False, masked_language=False)
    params, found = call(model, tiny_batch(model, rows=2))
    assert set(params) == {"image", "text", "fusion"}
    assert set(found) == {"pooled_output", "sequence_output"}


def test_half_precision_keeps_scores_in_float32():
    half = {f"{part}_dtype": "bfloat16" for part in ("image", "text", "fusion")}
    batch = tiny_batch(FULL, rows=4)
    _, exact = call(FULL, batch)
    _, found = call(tiny_model(answers=FULL.answers, **half), batch)
    for name in ("logits_per_image", "itm_logits", "mlm_logits", "vqa_logits"):
        assert found[name].dtype == jnp.float32, name
        assert np.abs(found[name] - exact[name]).max() < 0.1 * np.abs(exact[name]).max(), name
    assert found["sequence_output"].dtype == jnp.bfloat16


def test_embeddings_of_zero_have_a_finite_gradient():
    graph, params = reference.split(lambda: VisionLanguageModel(FULL, nnx.Rngs(0)))
    params["contrastive"] = jax.tree.map(np.zeros_like, params["contrastive"])

    def loss(contrastive):
        head = nnx.merge(graph, {**params, "contrastive": contrastive}).contrastive
        return head.image(jnp.ones((2, 32))).sum()

    gradient = jax.grad(loss)(params["contrastive"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_fresh_parameters():
    """Kernels keep the scale of what passes through them; tables start small (BERT, ViT)."""
    p = jax.jit(lambda: nnx.to_pure_dict(nnx.split(VisionLanguageModel(FULL, nnx.Rngs(0)))[1]))()
    np.testing.assert_allclose(np.exp(p["contrastive"]["logit_scale"]), 1 / 0.07, rtol=1e-6)
    layers = p["text"]["blocks"]["layers"]
    attention, mlp = layers["self_attention"]["attention"], layers["mlp"]
    for kernel, inputs in (
        (attention["query"]["kernel"], 32),
        (attention["out"]["kernel"], 32),
        (mlp["up"]["kernel"], 32),
        (mlp["down"]["kernel"], 64),
        (p["image"]["patch"]["kernel"], 8 * 8 * 3),
    ):
        np.testing.assert_allclose(kernel.std(), inputs**-0.5, rtol=0.08)
    assert not np.array_equal(*mlp["up"]["kernel"])
    assert not np.array_equal(attention["query"]["kernel"], attention["key"]["kernel"])
    for table in (
        p["text"]["embeddings"]["token_embedding"]["embedding"],
        p["image"]["position_embedding"],
    ):
        assert 0.014 < table.std() < 0.022
    for path, leaf in zip(leaf_paths(p), jax.tree.leaves(p), strict=True):
        assert leaf.dtype == jnp.float32
        if path.endswith("bias"):
            assert not leaf.any(), path


def test_an_answer_named_twice_is_refused():
    with pytest.raises(InputError, match=r"model\.answers names an answer twice"):
        replace(FULL, answers=("yes", "no", "yes"))
