import json

import numpy as np
import pytest
from PIL import Image

from mmjax.errors import InputError
from mmjax.processing import load_processor
from mmjax.processing.families import FAMILIES, read_image_processor
from tests.data.test_image import encode, gradient

NEAREST, BOX = 0, 4


def processor(type_name="ViTImageProcessor", **config):
    return read_image_processor(config, type_name, "config")


def plain(type_name="ViTImageProcessor", **config):
    """Levels as they are: neither scaled nor normalised."""
    return processor(type_name, do_rescale=False, do_normalize=False, **config)


def shape(type_name, height, width, **config):
    return plain(type_name, **config)([gradient(height, width)])["image"].shape[1:3]


def test_levels_are_scaled_and_normalised():
    picture = np.full((5, 7, 3), [0, 51, 255], np.uint8)
    batch = processor(image_mean=[0.5, 0.2, 0.5], image_std=[0.5, 0.4, 0.25])([picture])
    assert batch.keys() == {"image"}
    assert batch["image"].shape == (1, 224, 224, 3)
    assert batch["image"].dtype == np.float32
    np.testing.assert_allclose(batch["image"][0, 100, 100], [-1, 0, 2], atol=1e-6)


def test_steps_are_left_out_where_the_config_says_so():
    picture = np.full((4, 4, 3), 51, np.uint8)
    assert (plain()([picture])["image"] == 51).all()
    scaled = processor(do_normalize=False)([picture])["image"]
    np.testing.assert_allclose(scaled, 0.2, atol=1e-7)
    normalised = processor(do_rescale=False, image_mean=1, image_std=25)([picture])["image"]
    np.testing.assert_allclose(normalised, 2)
    assert processor(do_resize=None)([picture])["image"].shape == (1, 4, 4, 3)


def test_filters_are_numbered_as_in_pillow():
    picture = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    averaged = plain(size=[4, 6], resample=BOX)([picture])["image"][0]
    blocks = picture.reshape(4, 2, 6, 2, 3).mean((1, 3))
    assert np.abs(averaged - blocks).max() <= 1  # rounded once along each axis
    enlarged = plain(size=[16, 24], resample=NEAREST)([picture])["image"][0]
    np.testing.assert_array_equal(enlarged, picture.repeat(2, axis=0).repeat(2, axis=1))


@pytest.mark.parametrize(
    ("have", "want", "rows"),
    [
        (7, 7, [0, 1, 2, 3, 4, 5, 6]),
        (7, 3, [2, 3, 4]),
        (7, 4, [1, 2, 3, 4]),
        (4, 7, [None, None, 0, 1, 2, 3, None]),
        (5, 7, [None, 0, 1, 2, 3, 4, None]),
        (1, 4, [None, None, 0, None]),
    ],
)
def test_centre_crop_and_its_margin(have, want, rows):
    picture = np.arange(1, have + 1, dtype=np.uint8)[:, None, None].repeat(5, 1).repeat(3, 2)
    crop = plain(do_resize=False, do_center_crop=True, crop_size={"height": want, "width": 5})
    expected = [0 if row is None else row + 1 for row in rows]
    assert crop([picture])["image"][0, :, 2, 0].tolist() == expected


@pytest.mark.parametrize(
    ("type_name", "config", "have", "expected"),
    [
        ("ViTImageProcessor", {"size": 20}, (30, 50), (20, 20)),
        ("ViTImageProcessor", {"size": {"shortest_edge": 20}}, (30, 50), (20, 33)),
        ("CLIPImageProcessor", {"size": 20, "do_center_crop": False}, (50, 31), (32, 20)),
        (
            "CLIPImageProcessor",
            {"size": {"shortest_edge": 20, "longest_edge": 30}, "do_center_crop": False},
            (30, 50),
            (18, 30),
        ),
        ("CLIPImageProcessor", {"size": 20, "crop_size": 16}, (50, 31), (16, 16)),
        ("SiglipImageProcessor", {}, (50, 31), (224, 224)),
        ("BlipImageProcessor", {}, (50, 31), (384, 384)),
        ("FlavaImageProcessor", {"size": 64}, (50, 31), (224, 224)),
        ("DeiTImageProcessor", {}, (50, 31), (224, 224)),
        ("ViltImageProcessor", {}, (480, 640), (384, 512)),
        ("ViltImageProcessor", {}, (640, 480), (512, 384)),
        ("ViltImageProcessor", {"size": 64}, (100, 300), (32, 96)),  # 106 at most: 35 × 106
        ("BridgeTowerImageProcessor", {}, (480, 640), (288, 288)),
        ("BridgeTowerImageProcessor", {"do_center_crop": False}, (480, 640), (288, 384)),
        ("ConvNextImageProcessor", {"size": 56}, (300, 200), (56, 56)),
        ("ConvNextImageProcessor", {}, (30, 20), (384, 384)),
        ("EfficientNetImageProcessor", {}, (30, 20), (346, 346)),
        ("EfficientNetImageProcessor", {"do_center_crop": True}, (30, 20), (289, 289)),
    ],
)
def test_sizes(type_name, config, have, expected):
    assert shape(type_name, *have, **config) == expected


def test_convnext_keeps_a_share_of_the_resized_picture():
    """At 0.875 the crop of 56 is from a shortest edge of 64: an eighth of the picture is lost."""
    ramp = np.linspace(0, 255, 128).astype(np.uint8)[:, None, None].repeat(128, 1).repeat(3, 2)
    cropped = plain("ConvNextImageProcessor", size=56, crop_pct=0.875)([ramp])["image"][0, :, 0, 0]
    assert 255 / 16 - 3 < cropped[0] < 255 / 16 + 3
    assert 255 * 15 / 16 - 3 < cropped[-1] < 255 * 15 / 16 + 3
    warped = plain("ConvNextImageProcessor", size=384)([ramp])["image"][0, :, 0, 0]
    assert warped[0] < 2
    assert warped[-1] > 253


def test_efficientnet_shifts_and_divides_twice():
    picture = np.full((3, 3, 3), 204, np.uint8)
    config = {"size": 4, "image_mean": 0.5, "image_std": 0.5}
    once = processor("EfficientNetImageProcessor", **config, include_top=False)([picture])
    np.testing.assert_allclose(once["image"], 0.6, atol=1e-6)
    twice = processor("EfficientNetImageProcessor", **config)([picture])
    np.testing.assert_allclose(twice["image"], 1.2, atol=1e-6)
    shifted = processor(
        "EfficientNetImageProcessor",
        size=4,
        rescale_factor=1 / 127.5,
        rescale_offset=True,
        do_normalize=False,
        include_top=False,
    )
    np.testing.assert_allclose(shifted([picture])["image"], 0.6, atol=1e-6)


def test_pictures_are_padded_to_the_largest_of_their_batch():
    vilt = plain("ViltImageProcessor", size=32, size_divisor=8)
    batch = vilt([np.full((40, 60, 3), 9, np.uint8), np.full((60, 40, 3), 7, np.uint8)])
    assert batch["image"].shape == (2, 48, 48, 3)
    for image, mask, (height, width), level in zip(
        batch["image"], batch["image_mask"], [(32, 48), (48, 32)], [9, 7], strict=True
    ):
        expected = np.zeros((48, 48), bool)
        expected[:height, :width] = True
        np.testing.assert_array_equal(mask, expected)
        assert (image[mask] == level).all()
        assert (image[~mask] == 0).all()


def test_centre_crops_need_no_mask():
    assert "image_mask" not in processor("BridgeTowerImageProcessor")([gradient(300, 400)])


def test_any_picture_becomes_rgb_on_white():
    small = plain(do_resize=False)
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = [200, 10, 0, 255]
    found = small([Image.fromarray(rgba)])["image"][0]
    assert found[0, 0].tolist() == [200, 10, 0]
    assert found[1, 1].tolist() == [255, 255, 255]
    assert (small([Image.new("L", (3, 2), 77)])["image"] == 77).all()
    assert (small([Image.new("1", (3, 2), 1)])["image"] == 255).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)])
def test_pictures_one_pixel_wide(size):
    found = plain(size=6)([np.full((*size, 3), 42, np.uint8)])["image"]
    assert (found == 42).all()
    assert found.shape == (1, 6, 6, 3)


def test_files_are_shown_upright_and_pictures_as_they_are(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown rotated by 90° clockwise
    pixels = gradient(20, 30)
    encoded = encode(pixels, exif=exif)
    path = tmp_path / "photo.png"
    path.write_bytes(encoded)
    small = plain(do_resize=False)
    for picture in (encoded, path, str(path)):
        np.testing.assert_array_equal(small([picture])["image"][0], np.rot90(pixels, -1))
    np.testing.assert_array_equal(small([Image.open(path)])["image"][0], pixels)
    np.testing.assert_array_equal(small([pixels])["image"][0], pixels)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (b"no picture", r"image\[1\].*format"),
        (b"", r"image\[1\].*empty"),
        ("nowhere.png", r"image\[1\].*nowhere.png.*No such file"),
        (np.zeros((4, 4, 3), np.float32), r"image\[1\].*uint8"),
        (np.zeros((4, 4), np.uint8), r"image\[1\].*uint8"),
        (Image.new("RGB", (0, 5)), r"image\[1\].*no pixels"),
        (Image.new("F", (5, 5)), r"image\[1\].*range"),
        (3, r"image\[1\].*int"),
        (None, r"image\[1\].*NoneType"),
    ],
)
def test_what_is_no_picture(picture, message):
    with pytest.raises(InputError, match=message):
        processor()([gradient(3, 3), picture])


def test_truncated_picture(tmp_path):
    path = tmp_path / "cut.jpg"
    path.write_bytes(encode(gradient(60, 60), "JPEG")[:700])
    for picture in (path, Image.open(path)):
        with pytest.raises(InputError, match="decoded"):
            processor()([picture])


def test_pictures_too_narrow_to_resize():
    with pytest.raises(InputError, match=r"image\[0\]: 1 × 300 pixels are too narrow"):
        processor("ViltImageProcessor")([gradient(1, 300)])
    with pytest.raises(InputError, match=r"would make 224 × 11200000"):
        processor("CLIPImageProcessor")([gradient(1, 50_000)])


def test_pictures_that_do_not_fit_together():
    with pytest.raises(InputError, match=r"20 × 30, 30 × 20.*one at a time"):
        plain(do_resize=False)([gradient(20, 30), gradient(30, 20)])
    with pytest.raises(InputError, match="empty"):
        plain()([])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_comes_back(name):
    usual = FAMILIES[name]
    written = json.loads(json.dumps(usual.to_config()))
    assert read_image_processor(written, written["image_processor_type"], "config") == usual


@pytest.mark.parametrize(
    "spelled", ["CLIPFeatureExtractor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"]
)
def test_spellings_of_a_class(spelled):
    assert processor(spelled) == FAMILIES["CLIP"]


def test_an_old_config(tmp_path):
    config = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 40, "crop_size": 32}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | {"resample": 2}))
    pixels = load_processor(tmp_path).pixels
    assert pixels.size == {"shortest_edge": 40}
    assert pixels.crop_size == {"height": 32, "width": 32}
    assert pixels.resample == 2
    assert pixels.image_mean == FAMILIES["CLIP"].image_mean


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": 0}, "size: height is a whole number from 1"),
        ({"size": 10**6}, "size: height is a whole number from 1 to 8192"),
        ({"size": True}, "size"),
        ({"size": "224"}, "size is a number or an object"),
        ({"size": {"height": 3}}, "expected are height and width"),
        ({"size": {"longest_edge": 3}}, "expected are height and width"),
        ({"image_mean": [0.5, 0.5]}, "3 in all, not 2"),
        ({"image_std": [1, 1, 0]}, "image_std is above 0"),
        ({"image_std": [1, 1, float("nan")]}, "image_std is a number"),
        ({"rescale_factor": "1/255"}, "rescale_factor is a number"),
        ({"resample": 99}, "resample is a whole number from 0"),
        ({"do_resize": "yes"}, "do_resize is true or false"),
        ({"do_center_crop": True}, "no crop_size"),
        ({"do_pad": True}, "pads no pictures"),
    ],
)
def test_values_that_cannot_be_meant(config, message):
    with pytest.raises(InputError, match=f"config.*{message}"):
        processor(**config)


def test_unknown_families():
    with pytest.raises(InputError, match=r"'FooImageProcessor'.*CLIPImageProcessor"):
        processor("FooImageProcessor")
    with pytest.raises(InputError, match=r"NaFlex.*fixed resolution"):
        processor("Siglip2ImageProcessor")
