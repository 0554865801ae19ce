"""python -m mmjax.predict: what users see of a model and a photograph."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import mmjax
from mmjax.config import model_config, model_section
from mmjax.errors import InputError
from mmjax.models import build_model
from mmjax.predict import abilities, predict

GOLDENS = Path(__file__).parent / "goldens"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat", "red", "two", "on", "in"]
PIXELS = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 16, "width": 16},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, size=(40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """A golden with a processor beside it."""

    def copy(name):
        target = tmp_path / name
        shutil.copytree(GOLDENS / name, target)
        (target / "preprocessor_config.json").write_text(json.dumps(PIXELS))
        (target / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
        (target / "vocab.txt").write_text("\n".join(WORDS + [f"w{i}" for i in range(8)]))
        return str(target)

    return copy


def test_texts_are_compared(folder, photo):
    path = folder("vision-text-dual-encoder")
    texts = ["a dog", "two cat on red"]
    lines = predict(path, image=photo, text=texts).splitlines()
    assert lines[0].split("  ") == ["score", "among these"]
    model, processor = mmjax.load(path), mmjax.load_processor(path)
    logits = np.asarray(model(**processor(image=[photo], text=texts))["logits_per_image"][0])
    shares = np.exp(logits) / np.exp(logits).sum()
    for line, logit, share, text in zip(lines[1:], logits, shares, texts, strict=True):
        assert line.split(maxsplit=3) == [f"{logit:.2f}", f"{100 * share:.1f}", "%", text]


def test_labels_need_a_picture_alone(folder, photo):
    lines = predict(folder("vit-classifier"), image=photo).splitlines()
    assert len(lines) == 3
    shares = [float(line.split()[0]) for line in lines]
    assert shares == sorted(shares, reverse=True)
    assert abs(sum(shares) - 100) < 0.2
    assert {line.split()[-1] for line in lines} == {"LABEL_0", "LABEL_1", "LABEL_2"}


def test_a_model_of_train_py_compares_and_judges(pretrained, photo):
    lines = predict(str(pretrained), image=photo, text=["a red ball"]).splitlines()
    assert lines[0].split("  ") == ["score", "belongs to it"]
    assert lines[1].endswith("%  a red ball")
    listed = predict(str(pretrained))
    assert "--text: compare the picture with texts" in listed
    assert "--question" not in listed


def test_a_model_of_regions_does_nothing_with_a_photograph():
    layers = {"width": 8, "depth": 1, "heads": 2}
    section = model_section(
        "two_tower",
        image={"kind": "region_encoder", "region_width": 4, **layers},
        text={"vocabulary_size": 12, **layers},
    )
    model = nnx.eval_shape(lambda: build_model(model_config(section.to_dict()), nnx.Rngs(0)))
    assert abilities(model) == {}


def test_what_a_model_cannot_do_is_told(folder, photo):
    path = folder("vit-classifier")
    with pytest.raises(InputError, match=r"nothing with --caption. It can:\n  --image alone"):
        predict(path, image=photo, caption=True)
    with pytest.raises(InputError, match=r"nothing with --image alone. It can:\n  --text"):
        predict(folder("vision-text-dual-encoder"), image=photo)


def test_as_a_command(folder, tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "mmjax.predict", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
            timeout=300,
        )

    path = folder("vit-classifier")
    listed = run(path)
    assert listed.returncode == 0, listed.stderr
    assert "choose one of 3 labels" in listed.stdout
    absent = run(path, "--image=nowhere.jpg")
    assert absent.returncode == 2
    assert "nowhere.jpg" in absent.stderr
    assert "Traceback" not in absent.stderr
