"""Ordered path patterns over a tree."""

import re

import jax
import jax.numpy as jnp
import pytest

from mmjax.errors import InputError
from mmjax.rules import apply_rules, check_used, leaf_paths, table
from mmjax.training.state import TrainState

TREE = {
    "text": {"layers": {"mlp": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}},
    "image": {"class_token": jnp.ones((1, 4)), "scale": jnp.ones(())},
}


def test_paths_are_joined_by_slashes_in_the_trees_order():
    assert leaf_paths(TREE) == [
        "image/class_token",
        "image/scale",
        "text/layers/mlp/bias",
        "text/layers/mlp/kernel",
    ]
    state = TrainState(step=jnp.zeros(()), params={"a": jnp.ones(2)}, opt_state=(), ema=None)
    assert leaf_paths(state) == ["step", "params/a"]
    assert leaf_paths({"a": [1, (2, 3)]}) == ["a/0", "a/1/0", "a/1/1"]


def test_the_first_pattern_that_matches_the_whole_path_gives_the_value():
    values = apply_rules(
        [(".*/bias", "first"), ("text/.*", "second"), ("scale", "never"), (".*", "rest")],
        TREE,
        key="optimizer.rates",
    )
    assert values == {
        "text": {"layers": {"mlp": {"kernel": "second", "bias": "first"}}},
        "image": {"class_token": "rest", "scale": "rest"},
    }


def test_values_may_be_tuples():
    values = apply_rules([(".*", ("fsdp", None))], TREE, key="rules")
    assert values["image"]["scale"] == ("fsdp", None)


def test_every_leaf_must_match():
    with pytest.raises(
        InputError, match=r"optimizer\.decays: no pattern matches 'image/class_token"
    ):
        apply_rules([("text/.*", 1)], TREE, key="optimizer.decays")


def test_a_pattern_that_is_no_regular_expression_is_named():
    for function in (apply_rules, check_used):
        with pytest.raises(InputError, match=re.escape("optimizer.rates: '*/bias' is no regular")):
            function([("*/bias", 1)], TREE, key="optimizer.rates")


def test_a_pattern_that_matches_nothing_is_named_beside_the_paths():
    check_used([("text/.*", 1), (".*bias", 0)], TREE, key="optimizer.rates")
    with pytest.raises(InputError, match=r"'txet/\.\*' matches no parameter") as error:
        check_used([("text/.*", 1), ("txet/.*", 0)], TREE, key="optimizer.rates")
    assert "image/class_token" in str(error.value)
    with pytest.raises(InputError, match="whole path"):
        check_used([("text", 1)], TREE, key="optimizer.rates")


def test_the_table_shows_every_leaf():
    columns = {"rate": jax.tree.map(lambda _: 0.5, TREE), "decay": jax.tree.map(lambda _: 0, TREE)}
    lines = table(TREE, columns).splitlines()
    assert lines[0].split() == ["parameter", "shape", "rate", "decay"]
    assert lines[1].split() == ["image/class_token", "1×4", "0.5", "0"]
    assert lines[2].split() == ["image/scale", "scalar", "0.5", "0"]
    assert len({line.index("0.5") for line in lines[1:]}) == 1
