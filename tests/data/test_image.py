import io
import pickle

import numpy as np
import pytest
from PIL import Image

from mmjax.data.image import (
    Augment,
    BadRecord,
    decode_image,
    load_image,
    random_resized_crop,
    resize_image,
)
from mmjax.errors import InputError


def gradient(height, width):
    """A smooth picture: red runs along the width, green along the height."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1), 0 * x + 80]
    return np.stack(channels, axis=-1).astype(np.uint8)


def encode(picture, format="PNG", **options):
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def test_bytes_path_and_pixels_agree(tmp_path):
    pixels = gradient(20, 30)
    path = tmp_path / "a.png"
    path.write_bytes(encode(pixels))
    for image in (encode(pixels), path, pixels):
        decoded = decode_image(image, "a")
        assert decoded.dtype == np.uint8
        np.testing.assert_array_equal(decoded, pixels)


def test_exif_orientation_is_honoured():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown rotated by 90° clockwise
    upright = decode_image(encode(gradient(20, 30), exif=exif), "a")
    np.testing.assert_array_equal(upright, np.rot90(gradient(20, 30), -1))


def test_transparency_lies_on_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = [200, 0, 0, 255]
    decoded = decode_image(encode(rgba), "a")
    assert decoded[0, 0].tolist() == [200, 0, 0]
    assert decoded[1, 1].tolist() == [255, 255, 255]


def test_transparent_palette_lies_on_white():
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((0, 0), 1)
    decoded = decode_image(encode(picture, transparency=0), "a")
    assert decoded[0, 0].tolist() == [40, 50, 60]
    assert decoded[3, 3].tolist() == [255, 255, 255]


def test_grey_and_sixteen_bit_grey_become_rgb():
    grey = decode_image(encode(Image.new("L", (3, 2), 77)), "a")
    assert grey.shape == (2, 3, 3)
    assert (grey == 77).all()
    deep = Image.fromarray(np.full((2, 3), 77 * 256 + 5, np.uint16))
    assert (decode_image(encode(deep), "a") == 77).all()


def test_cmyk_jpeg_becomes_rgb():
    decoded = decode_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), "a")
    assert decoded[4, 4, 0] > 200
    assert decoded[4, 4, 1] < 60


def test_draft_keeps_at_least_the_size_asked_for():
    data = encode(gradient(480, 640), "JPEG", quality=95)
    assert decode_image(data, "a").shape == (480, 640, 3)
    small = decode_image(data, "a", min_size=112)
    assert small.shape == (120, 160, 3)
    reference = np.asarray(Image.fromarray(gradient(480, 640)).resize((160, 120)), np.float32)
    assert np.abs(small - reference).mean() < 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"this is text, not a picture", "of a format that is not known"),
        (encode(gradient(64, 64), "JPEG")[:700], "truncated"),
        (encode(gradient(64, 64))[:100], "cannot be decoded"),
    ],
)
def test_broken_picture_is_a_bad_record(data, reason):
    with pytest.raises(BadRecord, match=f"beach.jpg: .*{reason}"):
        decode_image(data, "beach.jpg")


def test_truncation_is_found_in_draft_mode_too():
    data = encode(gradient(480, 640), "JPEG")
    with pytest.raises(BadRecord, match="truncated"):
        decode_image(data[: len(data) // 2], "a", min_size=32)


def test_any_cut_of_a_file_is_a_bad_record():
    """Whatever a decoder raises on a broken file, the pipeline sees one kind of error."""
    for format in ("PNG", "GIF", "WEBP", "JPEG"):
        data = encode(gradient(40, 40), format)
        for length in range(1, len(data) - 40, 37):
            with pytest.raises(BadRecord):
                decode_image(data[:length], "a")


def test_absent_file_is_a_bad_record(tmp_path):
    with pytest.raises(BadRecord, match=r"a.jpg: the picture cannot be read: No such file"):
        decode_image(tmp_path / "a.jpg", "a.jpg")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_is_a_bad_record(monkeypatch):
    data = encode(gradient(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # below: a warning of Pillow's
    with pytest.raises(BadRecord, match=r"a: .*40 × 40 pixels are too many"):
        decode_image(data, "a")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # above twice: an error of Pillow's
    with pytest.raises(BadRecord, match="a: "):
        decode_image(data, "a")


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((4, 0, 3), np.uint8)],
)
def test_wrong_pixels_are_a_bad_record(pixels):
    with pytest.raises(BadRecord, match=r"uint8 \[height, width, 3\]"):
        decode_image(pixels, "a")


def test_bad_record_is_an_input_error_that_travels():
    again = pickle.loads(pickle.dumps(BadRecord("a.jpg", "empty")))
    assert isinstance(again, InputError)
    assert (again.name, again.reason, str(again)) == ("a.jpg", "empty", "a.jpg: empty")


def test_resize_takes_the_whole_picture():
    small = resize_image(gradient(64, 128), 16)
    assert small.shape == (16, 16, 3)
    # Pixel centres of a 16-grid over [0, 255]: the red channel runs over the whole width.
    np.testing.assert_allclose(small[8, :, 0], (np.arange(16) + 0.5) / 16 * 255, atol=2)
    same = gradient(16, 16)
    assert resize_image(same, 16) is same


def test_crop_areas_and_ratios_are_in_range():
    """The gradient tells, from a crop's extreme colours, which rectangle it was."""
    picture = gradient(256, 256)
    areas, aspects, lefts = [], [], []
    for i in range(200):
        crop = random_resized_crop(picture, 64, np.random.default_rng(i), scale=(0.3, 0.8))
        extent = np.ptp(crop.astype(np.float32), axis=(0, 1)) / 255 * 64 / 63
        areas.append(extent[0] * extent[1])
        aspects.append(extent[0] / extent[1])
        lefts.append(crop[:, 0, 0].mean())
    assert 0.27 < min(areas) < 0.4
    assert 0.7 < max(areas) < 0.83
    assert 0.72 < min(aspects) < 0.85
    assert 1.18 < max(aspects) < 1.38
    assert min(lefts) < 5
    assert max(lefts) > 60


def test_crop_of_a_strip_falls_back_to_its_centre():
    """No rectangle of half this picture's area has a ratio between 3/4 and 4/3."""
    crop = random_resized_crop(gradient(10, 400), 32, np.random.default_rng(0), scale=(0.5, 1))
    assert abs(crop[:, :, 0].astype(np.float32).mean() - 127) < 3
    assert np.ptp(crop[:, :, 0]) < 12
    assert np.ptp(crop[:, :, 1]) > 200


def test_crop_of_a_single_pixel():
    pixel = np.full((1, 1, 3), 9, np.uint8)
    assert (random_resized_crop(pixel, 4, np.random.default_rng(0)) == 9).all()


def test_without_rng_a_picture_is_only_resized():
    picture = gradient(40, 60)
    augment = Augment(crop_scale=0.2, flip=True)
    loaded = load_image(picture, "a", 16, augment=augment, may_flip=True)
    np.testing.assert_array_equal(loaded, resize_image(picture, 16))


def test_flips_half_of_the_pictures_that_may_be():
    picture = gradient(16, 16)

    def flipped(seed, may_flip):
        loaded = load_image(
            picture,
            "a",
            16,
            augment=Augment(flip=True),
            rng=np.random.default_rng(seed),
            may_flip=may_flip,
        )
        assert (loaded == picture).all() or (loaded == picture[:, ::-1]).all()
        return not (loaded == picture).all()

    assert 30 < sum(flipped(seed, may_flip=True) for seed in range(100)) < 70
    assert not any(flipped(seed, may_flip=False) for seed in range(100))


@pytest.mark.parametrize("crop_scale", [0.0, -1.0, 1.5])
def test_impossible_crop_is_refused(crop_scale):
    with pytest.raises(InputError, match=f"crop_scale .* not {crop_scale}"):
        Augment(crop_scale=crop_scale)
