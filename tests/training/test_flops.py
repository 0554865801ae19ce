"""The counted FLOPs of a program."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.models import ViT, ViTConfig
from mmjax.objectives.folds import InfoNce
from mmjax.objectives.walk import walk
from mmjax.training import flops
from mmjax.training.flops import forward_flops, train_flops, utilisation
from tests.objectives.test_walk import arguments, on_devices


def vit_flops(config):
    def encode(params, image):
        return nnx.merge(graph, params)(image).pooled

    graph, params = nnx.split(nnx.eval_shape(lambda: ViT(config, nnx.Rngs(0))))
    side = config.image_size
    return forward_flops(encode, params, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))


def test_vit_base_is_counted_as_the_formula_says():
    """17.6 GFLOPs in the literature (Touvron et al. 2021) are multiply-adds: 35 GFLOPs here."""
    n, w, h, patches, inputs = 197, 768, 3072, 196, 16 * 16 * 3
    layer = 4 * n * w * w + 2 * n * n * w + 2 * n * w * h  # projections, attention, MLP
    multiply_adds = patches * inputs * w + 12 * layer
    assert round(multiply_adds / 1e9, 1) == 17.6
    assert vit_flops(ViTConfig(size="B/16")) == 2 * multiply_adds


@pytest.mark.parametrize(
    "change", [{"unroll": True}, {"remat": "full"}, {"remat": "dots"}], ids=str
)
def test_how_it_computes_does_not_count(change):
    config = ViTConfig(width=32, depth=3, heads=4, image_size=16, patch_size=8)
    assert vit_flops(replace(config, **change)) == vit_flops(config) > 0
    patches = 2 * 4 * (8 * 8 * 3) * 32
    six_layers = vit_flops(replace(config, depth=6, **change)) - patches
    assert six_layers == 2 * (vit_flops(config) - patches)


def test_products_of_every_kind():
    a, b = np.ones((4, 5), np.float32), np.ones((5, 6), np.float32)
    product = 2 * 4 * 5 * 6
    assert forward_flops(lambda a, b: a @ b, a, b) == product
    assert forward_flops(jax.jit(lambda a, b: jnp.tanh(a @ b) + 1), a, b) == product
    assert train_flops(lambda a, b: (a @ b).sum(), a, b) == 3 * product
    assert forward_flops(lambda a: a * 2 + jnp.sin(a), a) == 0
    batched = np.ones((3, 4, 5)), np.ones((3, 5, 6))
    assert forward_flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), *batched) == 3 * product
    assert forward_flops(lambda a, b: jax.lax.map(lambda x: x @ b, jnp.stack([a] * 7)), a, b) == (
        7 * product
    )
    assert forward_flops(jax.checkpoint(lambda a, b: a @ b), a, b) == product
    unused = forward_flops(lambda a, b: ((a @ b) @ b.T, a)[1], a, b)
    assert unused == 0
    branches = (lambda a, b: a @ b, lambda a, b: (a @ b) @ b.T @ b)
    assert forward_flops(lambda i, a, b: jax.lax.switch(i, branches, a, b), 0, a, b) == 3 * product

    @jax.custom_vjp
    def doubled(a, b):
        return 2 * (a @ b)

    doubled.defvjp(lambda a, b: (2 * (a @ b), (a, b)), lambda saved, g: (g @ b.T, a.T @ g))
    assert forward_flops(doubled, a, b) == product
    image, kernel = np.ones((2, 8, 8, 3), np.float32), np.ones((5, 5, 3, 7), np.float32)
    convolve = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert forward_flops(convolve, image, kernel) == 2 * (2 * 8 * 8 * 7) * (5 * 5 * 3)


def test_utilisation_needs_a_known_device(monkeypatch):
    assert utilisation(1e12, 1.0) is None  # a CPU
    monkeypatch.setitem(flops.PEAK_FLOPS, jax.devices()[0].device_kind, 1e12)
    np.testing.assert_allclose(utilisation(4e12, 2.0), 4e12 / 2 / (8 * 1e12))


@pytest.mark.parametrize("devices", [None, (1,), (8, 2), (8, 2, 2)], ids=str)
def test_a_walk_over_the_global_batch_counts_its_pairs(devices):
    """On any mesh: every picture with every text, once."""
    scale, rows, (texts, _) = arguments()

    def count():
        return forward_flops(lambda rows: walk(scale, rows, (texts,), (InfoNce(),)), rows)

    if devices is None:
        found = count()
    else:
        with on_devices(*devices):
            found = count()
    size, width = rows.vectors.shape
    assert found == 2 * size * size * width
