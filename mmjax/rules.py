"""Rules, not annotations: ordered (path pattern, value) pairs laid over a tree.

One mechanism serves learning rates, weight decay, freezing, bounds and sharding: the first pattern
that matches a leaf's whole path gives its value, and every leaf must match one.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from mmjax.errors import InputError

Rules = Sequence[tuple[str, Any]]


def leaf_paths(tree: Any) -> list[str]:
    """The path of every leaf, in the tree's order, keys joined by slashes."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def by_path(tree: Any) -> dict[str, Any]:
    """Leaves by their path."""
    return dict(zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True))


def path_name(path: Iterable[Any]) -> str:
    """'params/text/layers/query/kernel' of a JAX key path, whatever containers it runs through."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def apply_rules(rules: Rules, tree: Any, *, key: str) -> Any:
    """The tree of the values that `rules` give its leaves. `key` is where the rules were set."""
    compiled = [(_compile(pattern, key), value) for pattern, value in rules]

    def value_of(path, _leaf):
        name = path_name(path)
        for pattern, value in compiled:
            if pattern.fullmatch(name):
                return value
        raise InputError(
            f"{key}: no pattern matches {name!r}; end the list with a pattern for the rest, '.*'."
        )

    return jax.tree_util.tree_map_with_path(value_of, tree)


def check_used(rules: Rules, tree: Any, *, key: str) -> None:
    """Refuse a pattern that a user wrote and that matches nothing: it is misspelt."""
    paths = leaf_paths(tree)
    for pattern, _ in rules:
        compiled = _compile(pattern, key)
        if not any(compiled.fullmatch(path) for path in paths):
            shown = "\n  ".join(paths[:12])
            raise InputError(
                f"{key}: the pattern {pattern!r} matches no parameter. It is a regular expression "
                f"for a whole path; the paths begin with\n  {shown}"
            )


def table(tree: Any, columns: dict[str, Any], describe: Callable[[Any], str] = str) -> str:
    """Leaves as aligned lines: path, shape, and each column's value for it."""
    rows = [("parameter", "shape", *columns)]
    values = [jax.tree.leaves(column, is_leaf=lambda x: x is None) for column in columns.values()]
    for index, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
        shape = "×".join(map(str, leaf.shape)) or "scalar"
        rows.append((path_name(path), shape, *(describe(column[index]) for column in values)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _compile(pattern: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"{key}: {pattern!r} is no regular expression: {error}.") from None
