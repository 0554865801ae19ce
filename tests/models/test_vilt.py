"""ViLT: positions stretched over pictures of any size, and one stream of both modalities."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmjax.errors import InputError
from mmjax.models.vilt import Vilt, ViltConfig, stretch
from tests.models import reference

SMALL = ViltConfig(
    width=12,
    depth=2,
    heads=3,
    mlp_width=20,
    vocabulary_size=30,
    max_length=9,
    image_size=24,
    patch_size=8,
)
PAIRS = replace(SMALL, labels=("no", "yes"), modalities=3)


@cache
def model(config=SMALL):
    graph, params = reference.split(lambda: Vilt(config, nnx.Rngs(0)))
    return nnx.merge(graph, params)


def texts(batch=2, length=6):
    text = np.random.default_rng(0).integers(4, 30, (batch, length))
    mask = np.arange(length) < np.array([[length], [length - 2]])[:batch]
    return {"text": text, "text_mask": mask}


def pictures(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=(*shape, 3)).astype(np.float32)


def stretched(grid, height, width):
    """The definition, point by point."""
    rows, columns, _ = grid.shape
    out = np.zeros((height, width, grid.shape[2]))
    for i, j in np.ndindex(height, width):
        y = i * (rows - 1) / (height - 1) if height > 1 else 0
        x = j * (columns - 1) / (width - 1) if width > 1 else 0
        top, left = int(y), int(x)
        bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
        upper = (1 - x + left) * grid[top, left] + (x - left) * grid[top, right]
        lower = (1 - x + left) * grid[bottom, left] + (x - left) * grid[bottom, right]
        out[i, j] = (1 - y + top) * upper + (y - top) * lower
    return out


def test_positions_are_stretched_to_the_corners():
    grid = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    sizes = [(1, 1), (3, 4), (2, 7), (6, 1), (5, 6)]
    heights, widths = jnp.array(sizes).T
    # One compiled program for pictures of every size.
    found = jax.jit(stretch, static_argnums=3)(jnp.array(grid), heights, widths, (6, 7))
    for positions, (height, width) in zip(np.asarray(found), sizes, strict=True):
        np.testing.assert_allclose(
            positions[:height, :width], stretched(grid, height, width), atol=1e-6
        )
        assert not positions[height:].any()
        assert not positions[:, width:].any()


def test_stretched_positions_have_the_gradient_of_a_linear_map():
    """Every weight goes to some point of the table: the gradient of a sum counts the places."""

    def total(grid):
        sizes = jnp.array([4, 2]), jnp.array([5, 3])
        return stretch(grid, *sizes, (5, 6)).sum()

    gradient = jax.grad(total)(jnp.ones((3, 3, 1)))
    assert gradient.min() > 0
    np.testing.assert_allclose(gradient.sum(), 4 * 5 + 2 * 3, rtol=1e-6)


def test_padding_changes_nothing():
    """A picture among larger ones, a text among longer ones: as if they were alone."""
    small, words = pictures(1, 16, 8), texts(batch=1, length=4)
    alone = model()(image=small, **words)
    image = pictures(2, 24, 32)
    image[0, :16, :8] = small[0]
    image_mask = np.ones((2, 24, 32), bool)
    image_mask[0, 16:] = image_mask[0, :, 8:] = False
    text = np.full((2, 7), 5)
    text[0, :4] = words["text"][0]
    text_mask = np.ones((2, 7), bool)
    text_mask[0, 4:] = False
    batch = model()(image=image, image_mask=image_mask, text=text, text_mask=text_mask)
    np.testing.assert_allclose(batch["pooler_output"][:1], alone["pooler_output"], atol=2e-6)
    tokens = batch["last_hidden_state"][0]
    # Four words; behind all seven places of the text the class token, and patches four to a row.
    kept = tokens[jnp.array([0, 1, 2, 3, 7, 8, 12])]
    np.testing.assert_allclose(kept, alone["last_hidden_state"][0], atol=5e-6)


def test_a_mask_of_nothing_but_picture_is_no_mask():
    inputs = {"image": pictures(2, 16, 32), **texts()}
    masked = model()(**inputs, image_mask=np.ones((2, 16, 32), bool))
    np.testing.assert_allclose(
        masked["last_hidden_state"], model()(**inputs)["last_hidden_state"], atol=1e-6
    )


def test_bytes_are_normalised():
    image = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3)).astype(np.uint8)
    floats = (image.astype(np.float32) / 255 - 0.5) / 0.5
    as_bytes, as_floats = (model()(image=x, **texts())["pooler_output"] for x in (image, floats))
    np.testing.assert_allclose(as_bytes, as_floats, atol=1e-6)


def test_the_second_picture_is_told_from_the_first():
    first, second = pictures(2, 16, 16), pictures(2, 24, 8, seed=2)
    there = model(PAIRS)(image=first, image_b=second, **texts())["logits"]
    back = model(PAIRS)(image=second, image_b=first, **texts())["logits"]
    assert there.shape == (2, 2)
    assert np.abs(there - back).min() > 1e-3
    both = [
        model(PAIRS).fuse(
            model(PAIRS).encode_image(jnp.array(image), second=is_second),
            model(PAIRS).encode_text(*map(jnp.asarray, texts().values())),
        )
        for image, is_second in ((first, False), (second, True))
    ]
    pooled = jnp.concatenate([fused.pooled for fused in both], axis=-1)
    np.testing.assert_allclose(there, model(PAIRS).reasoning(pooled), atol=1e-6)


def test_scores_are_named_by_their_heads_where_there_are_several():
    config = replace(
        PAIRS, masked_language=True, matching=True, ranking=True, answers=("red", "blue", "two")
    )
    image = pictures(2, 24, 24)
    out = model(config)(image=image, image_b=image, **texts())
    shapes = {name: array.shape for name, array in out.items() if name.endswith("logits")}
    assert shapes == {
        "mlm_logits": (2, 6, 30),
        "itm_logits": (2, 2),
        "rank_logits": (2, 1),
        "vqa_logits": (2, 3),
        "nlvr_logits": (2, 2),
    }


def test_dropout_follows_the_key():
    config = replace(SMALL, dropout=0.5)
    inputs = {"image": pictures(2, 24, 24), **texts()}
    evaluated, one, same, other = (
        model(config)(**inputs, train=key is not None, key=key)["pooler_output"]
        for key in (None, *map(jax.random.key, (0, 0, 1)))
    )
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3
    np.testing.assert_allclose(evaluated, model()(**inputs)["pooler_output"], atol=1e-6)


def test_pictures_of_broken_patches_are_refused():
    with pytest.raises(InputError, match="20×24 pixels, where multiples of 8"):
        model()(image=pictures(2, 20, 24), **texts())


def test_a_second_picture_needs_its_head():
    image = pictures(2, 24, 24)
    with pytest.raises(InputError, match="no head for two pictures"):
        model()(image=image, image_b=image, **texts())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 20}, "image_size is 20"),
        ({"patch_size": 0}, "multiple of patch_size, 0"),
        ({"labels": ("no", "yes")}, "modalities is 2"),
    ],
)
def test_configs_that_cannot_be_built_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        replace(SMALL, **changes)
