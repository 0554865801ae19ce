"""Every operation against numpy, and what is drawn at random."""

import collections

import numpy as np
import pytest
from PIL import Image

from mmjax.data.image import Augment, load_image
from mmjax.data.randaugment import OPERATIONS, rand_augment
from mmjax.errors import InputError

SIDE = 64
STEPS = np.arange(SIDE) * 3.0 + 20  # linear, so that interpolation is exact


def noise(seed=0, low=0, high=256):
    return np.random.default_rng(seed).integers(low, high, (SIDE, SIDE, 3), np.uint8)


def apply(name, pixels, strength):
    changed = OPERATIONS[name](Image.fromarray(pixels), strength)
    assert changed.mode == "RGB"
    assert changed.size == (SIDE, SIDE)
    return np.asarray(changed)


def slope(axis):
    """A grey picture that grows along x (1) or y (0) by 3 a pixel."""
    values = np.broadcast_to(STEPS[:, None] if axis == 0 else STEPS, (SIDE, SIDE))
    return np.repeat(values[..., None], 3, axis=-1).astype(np.uint8)


def test_identity():
    np.testing.assert_array_equal(apply("identity", noise(), 0.7), noise())


def test_auto_contrast_stretches_every_channel():
    pixels = noise(low=60, high=120) + np.array([0, 20, 40], np.uint8)
    low, high = pixels.min((0, 1)).astype(float), pixels.max((0, 1)).astype(float)
    expected = (pixels - low) * 255 / (high - low)
    np.testing.assert_allclose(apply("auto_contrast", pixels, -0.7), expected, atol=1)


def test_equalize_makes_every_value_as_common():
    pixels = (noise() // 4 + 60).astype(np.uint8)
    changed = apply("equalize", pixels, 0.7)
    for channel in range(3):
        counts = np.bincount(pixels[..., channel].ravel(), minlength=256)
        below = np.cumsum(counts) - counts
        step = (counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
        expected = np.minimum((below + step // 2) // step, 255)[pixels[..., channel]]
        np.testing.assert_array_equal(changed[..., channel], expected)


@pytest.mark.parametrize(("strength", "factor"), [(0.7, 1.36), (-0.7, 1.36), (0.0, 0.1)])
def test_brightness(strength, factor):
    expected = np.minimum(noise() * factor, 255)
    np.testing.assert_allclose(apply("brightness", noise(), strength), expected, atol=1)


@pytest.mark.parametrize("strength", [0.2, -1.0])
def test_sharpness_moves_away_from_the_smoothed_picture(strength):
    pixels = noise().astype(float)
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    smooth = sum(
        kernel[i, j] * pixels[i : SIDE - 2 + i, j : SIDE - 2 + j]
        for i in range(3)
        for j in range(3)
    )
    factor = 0.1 + 1.8 * abs(strength)
    expected = np.clip(smooth + factor * (pixels[1:-1, 1:-1] - smooth), 0, 255)
    changed = apply("sharpness", noise(), strength)
    np.testing.assert_allclose(changed[1:-1, 1:-1], expected, atol=2)


def assert_moved(changed, x, y, axis):
    """The pixel in the middle of the result comes from (x, y) of the slope, or from outside."""
    place = x if axis == 1 else y
    within = (x >= 1) & (x <= SIDE - 2) & (y >= 1) & (y <= SIDE - 2)
    outside = (x < -1) | (x > SIDE) | (y < -1) | (y > SIDE)
    np.testing.assert_allclose(
        changed[within], (3 * place + 20)[within, None] + np.zeros(3), atol=1
    )
    assert (changed[outside] == 128).all()
    assert within.mean() > 0.5


Y, X = np.mgrid[0:SIDE, 0:SIDE].astype(float)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("strength", [0.7, -1.0])
def test_shear(axis, strength):
    """About the upper left corner, which is half a pixel from the middle of the first one."""
    factor = 0.3 * strength
    assert_moved(apply("shear_x", slope(axis), strength), X - factor * (Y + 0.5), Y, axis)
    assert_moved(apply("shear_y", slope(axis), strength), X, Y - factor * (X + 0.5), axis)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("strength", [0.7, -1.0])
def test_translate(axis, strength):
    assert_moved(apply("translate_x", slope(axis), strength), X - 10 * strength, Y, axis)
    assert_moved(apply("translate_y", slope(axis), strength), X, Y - 10 * strength, axis)
    assert (apply("translate_x", slope(axis), 1.0)[:, :9] == 128).all()
    assert (apply("translate_y", slope(axis), -1.0)[-9:] == 128).all()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("strength", [0.7, -1.0])
def test_rotate(axis, strength):
    """Counterclockwise about the middle; y runs down."""
    angle, middle = np.deg2rad(30 * strength), (SIDE - 1) / 2
    x, y = X - middle, Y - middle
    from_x = middle + np.cos(angle) * x - np.sin(angle) * y
    from_y = middle + np.sin(angle) * x + np.cos(angle) * y
    assert_moved(apply("rotate", slope(axis), strength), from_x, from_y, axis)


def test_the_draw_decides_everything():
    results = [rand_augment(noise(), np.random.default_rng(seed), 2, 7) for seed in range(12)]
    for seed, result in enumerate(results):
        again = rand_augment(noise(), np.random.default_rng(seed), 2, 7)
        np.testing.assert_array_equal(again, result)
        assert (result.shape, result.dtype) == ((SIDE, SIDE, 3), np.uint8)
    assert len({result.tobytes() for result in results}) > 5


def test_operations_and_signs_are_drawn_evenly_and_half_are_carried_out(monkeypatch):
    counts = collections.Counter()

    def counted(name):
        def operation(picture, strength):
            counts[name] += 1
            counts["positive"] += strength == 0.7
            counts["negative"] += strength == -0.7
            return picture

        return operation

    for name in list(OPERATIONS):
        monkeypatch.setitem(OPERATIONS, name, counted(name))
    rand_augment(noise(), np.random.default_rng(0), 4000, 7)
    positive, negative = counts.pop("positive"), counts.pop("negative")
    assert positive + negative == counts.total()
    assert 1900 < counts.total() < 2100
    assert 900 < positive < 1100
    assert counts.keys() == OPERATIONS.keys()
    assert min(counts.values()) > 140
    assert max(counts.values()) < 260


def test_pictures_are_changed_in_training_alone():
    augment = Augment(randaugment=(2, 7))
    plain = load_image(noise(), "a", SIDE, augment=augment)
    np.testing.assert_array_equal(plain, noise())
    changed = [
        (load_image(noise(), "a", SIDE, augment=augment, rng=np.random.default_rng(seed)) != plain)
        for seed in range(20)
    ]
    assert 5 < sum(difference.any() for difference in changed) < 20


@pytest.mark.parametrize("counts", [(-1, 7), (2, 11), (2, -1), (2,)])
def test_impossible_numbers_are_refused(counts):
    with pytest.raises(InputError, match=r"data\.randaugment .* from 0 to 10"):
        Augment(randaugment=counts)
