"""Pictures of scenes show what the scene graph says, and regions describe it."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mmjax.data import scenes
from mmjax.data.scenes import Scenes, draw, make_scene, pixel_box
from mmjax.errors import InputError


@pytest.mark.parametrize("image_size", [64, 97, 224])
def test_pictures_show_every_object_in_its_box(image_size):
    for number in range(30):
        scene = make_scene("train", number)
        empty = draw(type(scene)(scene.split, 0, number, (), scene.background), image_size)
        whole = draw(scene, image_size)
        assert whole.shape == (image_size, image_size, 3)
        assert whole.dtype == np.uint8
        assert empty.min() > 190  # light
        for thing in scene.objects:
            alone = draw(
                type(scene)(scene.split, 0, number, (thing,), scene.background), image_size
            )
            rows, columns = np.nonzero(np.abs(alone.astype(int) - empty).max(-1) > 12)
            drawn = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            box = np.array(pixel_box(thing, image_size))
            assert box.min() >= 0
            assert box.max() <= image_size
            assert np.abs(drawn - box).max() <= max(1, image_size // 64), (thing, drawn, box)
            left, top, right, bottom = box
            np.testing.assert_array_equal(
                whole[top:bottom, left:right], alone[top:bottom, left:right]
            )


def test_objects_lie_apart():
    for number in range(300):
        for a, b in itertools.combinations(make_scene("train", number).objects, 2):
            apart = max(abs(a.x - b.x), abs(a.y - b.y))
            assert apart >= (a.extent + b.extent) / 2
            assert apart > 0.1


def test_regions_describe_the_objects():
    for number in range(50):
        record = Scenes("train", 50, image_size=128, regions=True)[number]
        things = make_scene("train", number).objects
        count = len(things)
        assert record["region_mask"].tolist() == [i < count for i in range(scenes.MAX_OBJECTS)]
        labels = [scenes.REGION_LABELS[label] for label in record["region_labels"][:count]]
        assert labels == record["tags"] == [thing.shape for thing in things]
        attributes = record["region_attributes"][:count]
        assert [scenes.REGION_ATTRIBUTES[i] for i in attributes] == [t.color for t in things]
        soft = record["region_distributions"]
        np.testing.assert_allclose(soft[:count].sum(-1), 1, rtol=1e-6)
        assert (soft[:count].argmax(-1) == record["region_labels"][:count]).all()
        assert (soft[:count].max(-1) < 0.99).all()
        boxes = record["boxes"]
        assert (boxes[:count, :2] < boxes[:count, 2:]).all()
        centers = (boxes[:count, :2] + boxes[:count, 2:]) / 2
        np.testing.assert_allclose(centers, [(t.x, t.y) for t in things], atol=1 / 128)
        for key in ("boxes", "regions", "region_distributions"):
            assert record[key].dtype == np.float32
            assert not record[key][count:].any()
            assert np.isfinite(record[key]).all()


def test_region_features_tell_the_attributes():
    source = Scenes("train", 200, regions=True)
    features, shapes, colors = [], [], []
    for index in range(len(source)):
        record = source[index]
        features.append(record["regions"][record["region_mask"]])
        shapes.append(record["region_labels"][record["region_mask"]])
        colors.append(record["region_attributes"][record["region_mask"]])
    x = np.concatenate(features)
    for target in (np.concatenate(shapes), np.concatenate(colors)):
        weights = np.linalg.lstsq(x[:400], np.eye(8)[target[:400]], rcond=None)[0]
        assert ((x[400:] @ weights).argmax(-1) == target[400:]).mean() > 0.99


def test_blank_regions_are_like_those_of_a_scene():
    blank, record = scenes.blank_regions(), Scenes("test", 1, regions=True)[0]
    assert len(blank) == 6
    for name, value in blank.items():
        assert (value.shape, value.dtype) == (record[name].shape, record[name].dtype)
        assert name == "region_mask" or not value.any()
    assert blank["region_mask"].tolist() == [True, False, False, False]


@pytest.mark.parametrize(("image_size", "grid"), [(64, 8), (97, 7), (224, 14)])
def test_codes_tell_what_most_of_a_patch_shows(image_size, grid):
    """Found again in the picture: a pixel belongs to the object whose removal changes it."""
    seen, gaps = set(), []
    for number in range(20):
        codes = Scenes("train", 20, image_size=image_size, code_grid=grid)[number]["image_codes"]
        assert (codes.shape, codes.dtype) == ((grid**2,), np.int32)
        scene = make_scene("train", number)
        empty = draw(type(scene)(scene.split, 0, number, (), scene.background), image_size)
        shares = {0: 1 - _share(draw(scene, image_size), empty, grid)}
        for thing in scene.objects:
            alone = type(scene)(scene.split, 0, number, (thing,), scene.background)
            code = 1 + scenes.COLORS.index(thing.color) * 6 + scenes.SHAPES.index(thing.shape)
            shares[code] = _share(draw(alone, image_size), empty, grid)
        largest = np.max(list(shares.values()), axis=0)
        gaps += [largest[patch] - shares[code][patch] for patch, code in enumerate(codes.tolist())]
        seen |= set(codes.tolist())
    # Anti-aliased edges, a pixel wide, count as the object here.
    assert max(gaps) < 0.4
    assert np.mean(np.array(gaps) > 0) < 0.03
    assert len(seen) > 15
    assert max(seen) < scenes.IMAGE_CODES == 49


def _share(picture, empty, grid):
    """The share of every patch where two pictures differ."""
    differs = (np.abs(picture.astype(int) - empty).max(-1) > 4).astype(float)
    band = np.arange(len(differs)) * grid // len(differs)
    counts = np.zeros((grid, grid))
    np.add.at(counts, (band[:, None], band[None, :]), differs)
    sizes = np.bincount(band)
    return (counts / (sizes[:, None] * sizes)).ravel()


@pytest.mark.parametrize("grid", [-1, 65])
def test_impossible_grids_are_refused(grid):
    with pytest.raises(InputError, match=f"code_grid={grid}"):
        Scenes("train", 3, code_grid=grid)


def test_the_sheet_is_written(tmp_path):
    command = [sys.executable, "-m", "mmjax.data.scenes", f"--output={tmp_path}", "--count=5"]
    subprocess.run(command, check=True, timeout=60)
    sheet = np.array(Image.open(tmp_path / "scenes.png").convert("L"))
    assert sheet.shape[1] > 1000
    assert sheet.std() > 10
