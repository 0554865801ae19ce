import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict, FieldReference

from mmjax.errors import InputError
from mmjax.training import initialisation
from mmjax.training.initialisation import merge_parameters, placed, starts


def tree(*, positions=4, head="head", fill=0.0):
    return {
        "encoder": {
            "kernel": np.full((3, 8), fill, np.float32),
            "positions": np.full((positions, 8), fill, np.float32),
        },
        head: {"kernel": np.full((8, 2), fill, np.float32)},
    }


def first_rows(path, array, shape):
    return np.resize(array, shape) if path.endswith("positions") else None


def test_takes_what_fits_and_reports_the_rest():
    merged, report = merge_parameters(tree(), tree(head="other", fill=1.0))
    assert report.loaded == ("encoder/kernel", "encoder/positions")
    assert (report.resized, report.left_initial) == ((), ("head/kernel",))
    assert report.unused == ("other/kernel",)
    assert jax.tree.map(lambda leaf: float(leaf.mean()), merged) == {
        "encoder": {"kernel": 1.0, "positions": 1.0},
        "head": {"kernel": 0.0},
    }
    assert "2 parameters loaded" in str(report)
    assert "head/kernel" in str(report)
    assert "other/kernel" in str(report)


def test_resizes_positions():
    merged, report = merge_parameters(tree(), tree(positions=9, fill=1.0), resize=first_rows)
    assert merged["encoder"]["positions"].shape == (4, 8)
    assert merged["encoder"]["positions"].all()
    assert report.resized == ("encoder/positions",)
    assert len(report.loaded) == 3


def test_keeps_the_type_and_sharding_of_the_model():
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    initial = {"kernel": jax.device_put(jnp.zeros((2, 16), jnp.bfloat16), sharding)}
    values = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    merged, _ = merge_parameters(initial, {"kernel": values})
    assert merged["kernel"].sharding == sharding
    np.testing.assert_array_equal(merged["kernel"], values.astype(jnp.bfloat16))


@pytest.mark.parametrize("resize", [None, first_rows, lambda path, array, shape: array])
def test_a_misshapen_parameter_is_named(resize):
    loaded = {**tree(), "head": {"kernel": np.zeros((8, 5), np.float32)}}
    with pytest.raises(InputError, match=r"head/kernel: \(8, 5\) loaded, \(8, 2\) configured"):
        merge_parameters(tree(), loaded, resize=resize)


def test_nothing_in_common_is_an_error():
    with pytest.raises(InputError, match=r"None of the parameters[\s\S]*model/encoder/kernel"):
        merge_parameters(tree(), {"model": tree()})


def test_a_part_goes_where_the_model_has_it():
    """A BERT of four layers into a reader of two and a fusion of one: its first, and its last."""
    layers = np.arange(4.0)[:, None] * np.ones((4, 8))
    bert = {"text": {"words": np.ones((5, 8)), "blocks": {"layers": {"kernel": layers}}}}
    initial = {
        "text": {"blocks": {"layers": {"kernel": np.zeros((2, 8))}}},
        "fusion": {"blocks": {"layers": {"kernel": np.zeros((1, 8))}}},
    }
    moves = (("text/blocks", "text/blocks"), ("text/blocks", "fusion/blocks@last"))
    found = placed(bert, moves, initial)
    assert found["text"]["blocks"]["layers"]["kernel"][:, 0].tolist() == [0, 1]
    assert found["fusion"]["blocks"]["layers"]["kernel"][:, 0].tolist() == [3]
    assert "words" not in found["text"]


def test_the_words_of_a_text_encoder_on_the_hub_come_with_it(monkeypatch, tmp_path):
    (tmp_path / "vocab.txt").touch()
    monkeypatch.setattr(initialisation, "resolve", lambda source, weights: tmp_path)
    image, text = starts({"image": "hf://owner/vit", "text": "hf://owner/bert"})
    assert image.vocabulary is None
    assert text.vocabulary == tmp_path / "vocab.txt"


def test_parts_are_found_in_a_resolved_config():
    config = ConfigDict({"init_from": FieldReference("", field_type=object)})
    config.init_from = {"image": "", "text": "hf://owner/bert"}
    (text,) = starts(config.copy_and_resolve_references().init_from)
    assert (text.part, text.folder) == ("text", "hf://owner/bert")
