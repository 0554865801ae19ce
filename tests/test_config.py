"""Keys and values of a config."""

import json

import pytest

from mmjax import config as configuration
from mmjax.errors import InputError
from mmjax.models import VisionLanguageConfig


def model_values(**image):
    model = configuration.train_config().model.to_dict()
    model["image"].update(size="B/16", image_size=224, **image)
    model["text"].update(size="base", vocabulary_size=30522)
    model["fusion"].update(width=768, depth=6)
    return model


def test_named_sizes_fill_widths_and_explicit_ones_win():
    model = configuration.model_config(model_values())
    assert isinstance(model, VisionLanguageConfig)
    assert (model.image.width, model.image.depth, model.image.heads) == (768, 12, 12)
    assert (model.image.patch_size, model.text.mlp_width) == (16, 3072)
    assert configuration.model_config(model_values(depth=2)).image.depth == 2


def test_a_saved_config_builds_the_same_model():
    values = model_values()
    values["answers"] = ("yes", "no")
    assert configuration.model_config(json.loads(json.dumps(values))) == (
        configuration.model_config(values)
    )


def test_unknown_fields_name_near_misses():
    values = model_values()
    values["image"]["patchsize"] = 16
    with pytest.raises(InputError, match=r"model\.image\.patchsize .* Did you mean patch_size"):
        configuration.model_config(values)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("image", {"size": "XL/16"}, "image size 'XL/16' is unknown"),
        ("image", {"norm": "postt"}, "norm is 'postt'. Did you mean post"),
        ("text", {"size": "huge"}, "text size 'huge' is unknown"),
        ("fusion", {"width": 0}, "width is 0"),
        ("fusion", {"heads": 7}, "does not split into 7 heads"),
        ("fusion", {"remat": "ful"}, "Did you mean full"),
    ],
)
def test_impossible_models_are_refused(part, values, message):
    model = model_values()
    model[part].update(values)
    with pytest.raises(InputError, match=message):
        configuration.model_config(model)
