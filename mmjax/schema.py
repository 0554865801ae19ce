"""Dataclasses from what JSON, recipes and command lines have, and back: plain mappings."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from mmjax.errors import InputError, near_misses


def build(cls: type, values: Mapping[str, Any], key: str) -> Any:
    """A (nested) dataclass from a mapping; unknown fields are errors that name near misses.

    Where a field may be one of several dataclasses, its `kind` says which: 'vit' for ViTConfig.
    """
    hints = typing.get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls)}
    for name in values:
        if name not in names:
            raise InputError(f"{key}.{name} is no key of {cls.__name__}.{near_misses(name, names)}")
    fields = {name: _as_type(hints[name], value, f"{key}.{name}") for name, value in values.items()}
    for field in dataclasses.fields(cls):
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in fields:
            raise InputError(f"{key}.{field.name} is missing; {cls.__name__} needs it.")
    return cls(**fields)


def describe(config: Any) -> dict[str, Any]:
    """A (nested) dataclass as a mapping that `build` reads."""
    hints = typing.get_type_hints(type(config))
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            kinds = _dataclasses(hints[field.name])
            kind = {"kind": _kind(type(value))} if len(kinds) > 1 else {}
            value = {**kind, **describe(value)}
        values[field.name] = value
    return values


def _as_type(hint: Any, value: Any, key: str) -> Any:
    """A field's value, from what JSON and command lines have: no tuples and no dataclasses."""
    if isinstance(value, Mapping) and (kinds := _dataclasses(hint)):
        values = dict(value)
        kind = values.pop("kind", _kind(kinds[0])) if len(kinds) > 1 else _kind(kinds[0])
        known = {_kind(cls): cls for cls in kinds}
        if kind not in known:
            raise InputError(f"{key}.kind is {kind!r}.{near_misses(str(kind), known)}")
        return build(known[kind], values, key)
    value = tuple(value) if isinstance(value, list) else value
    plain = _plain_types(hint)
    if plain and not isinstance(value, plain):
        expected = " or ".join(kind.__name__ for kind in plain)
        raise InputError(f"{key} is {value!r}, which is no {expected}.")
    return value


def _plain_types(hint: Any) -> tuple[type, ...]:
    """What a value must be an instance of; () where that is not as simple."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    alternatives = typing.get_args(hint) if is_union else (hint,)
    kinds = [typing.get_origin(kind) or kind for kind in alternatives]
    if not all(isinstance(kind, type) for kind in kinds):
        return ()
    return (*kinds, int) if float in kinds else tuple(kinds)


def _dataclasses(hint: Any) -> list[type[Any]]:
    """The dataclasses that a field may be."""
    kinds = typing.get_args(hint) or (hint,)
    return [cls for cls in kinds if isinstance(cls, type) and dataclasses.is_dataclass(cls)]


def _kind(cls: type) -> str:
    """The name of the file that a config stands in: 'vit', 'text_tower', 'bert'."""
    return cls.__module__.rpartition(".")[2]


def section(cls: type, changes: Mapping[str, Any] = types.MappingProxyType({})) -> dict[str, Any]:
    """The fields of a dataclass and their defaults as a mapping for `build`, some of them changed.

    Where a field is a dataclass itself, so are its changes a mapping; of several it may be, their
    `kind` chooses one. Unlike an instance, a section may lack what makes it valid: sizes are filled
    in when a run starts.
    """
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for name in changes:
        if name not in names:
            raise InputError(f"{cls.__name__} has no field {name}.{near_misses(name, names)}")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        value, kinds = changes.get(field.name, dataclasses.MISSING), _dataclasses(hints[field.name])
        if kinds and (value is dataclasses.MISSING or isinstance(value, Mapping)):
            value = _nested(field, kinds, {} if value is dataclasses.MISSING else value)
        elif value is dataclasses.MISSING:
            value = _default(field)
        values[field.name] = value
    return values


def _nested(
    field: dataclasses.Field[Any], kinds: list[type[Any]], changes: Mapping[str, Any]
) -> Any:
    """The section of a field that is a dataclass; its default's where it has one."""
    default, changes = _default(field), dict(changes)
    cls = kinds[0] if default is None else type(default)
    if (kind := changes.pop("kind", None)) is not None and len(kinds) > 1:
        known = {_kind(cls): cls for cls in kinds}
        if kind not in known:
            raise InputError(f"{field.name}.kind is {kind!r}.{near_misses(str(kind), known)}")
        cls, default = known[kind], default if type(default) is known[kind] else None
    elif kind is not None:
        changes["kind"] = kind  # a field of its own, as a fusion's
    values = section(cls, changes)
    if default is not None:
        values = _merged(describe(default), changes)
    return {"kind": _kind(cls), **values} if len(kinds) > 1 else values


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], value) if nested else value
    return merged


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if callable(field.default_factory) else None
