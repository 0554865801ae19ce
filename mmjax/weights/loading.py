"""From what lies on disk to a model: `load`, and what it does step by step."""

import dataclasses
import difflib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmjax import config as configuration
from mmjax import schema
from mmjax.errors import InputError, near_misses
from mmjax.json_files import read_json
from mmjax.models import build_model
from mmjax.models.model import Model
from mmjax.processing import load_pixels
from mmjax.rules import by_path, path_name
from mmjax.training.checkpoints import load_assets, load_parameters
from mmjax.weights.families import FAMILIES, openai_clip
from mmjax.weights.family import Family, Source
from mmjax.weights.files import Tensors, open_tensors
from mmjax.weights.hub import resolve
from mmjax.weights.names import Pair, pairs_of

CONFIG = "config.json"
PIXELS = "mmjax_pixels"  # key of config.json, where no processor stands beside it: mean, deviation


def load(
    source: str | Path,
    *,
    family: str = "",
    config: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    vocab_size: int | None = None,
    strict: bool = True,
) -> Model:
    """A model with its weights.

    Args:
      source: a Hugging Face folder (`config.json` and weights), its Hub name
        (`hf://openai/clip-vit-base-patch32`, optional `@revision`), one of our own checkpoints
        (WORKDIR, WORKDIR@STEP, WORKDIR@best), or, with `family`, a file of weights.
      family: the family of an original checkpoint, which carries no config.
      config: the fields of that family's config dataclass (`docs/models.md`).
      image_size: for another resolution, pixels a side; position embeddings are resized.
      vocab_size: for another vocabulary; rows of the word table are cut, or added as their mean.
      strict: refuse weights that do not fit exactly. With False, parameters that the source lacks
        stay at their initial value and tensors that the model lacks are left; both are logged.

    Raises:
      InputError: the source cannot be read, is of no known family, contradicts its config, or does
        not fit: one message with every missing, unexpected and misshapen tensor.
    """
    for name, size in (("image_size", image_size), ("vocab_size", vocab_size)):
        if size is not None and (type(size) is not int or size < 1):
            raise InputError(f"{name} is {size!r}; it is one whole number above 0.")
    opened = open_source(source, family=family, config=config)
    resized = {"image_size": image_size, "vocabulary_size": vocab_size}
    resized = {name: size for name, size in resized.items() if size is not None}
    if isinstance(opened, Model):
        if resized:
            raise InputError(
                f"{source} is a checkpoint of ours, which train.py resizes: set "
                "model.image.image_size and init_from there."
            )
        return opened
    for name, size in resized.items():
        opened = dataclasses.replace(opened, config=_with_field(opened.config, name, size))
    return opened.build(strict=strict, resize=bool(resized))


@dataclasses.dataclass(frozen=True)
class Opened:
    """Weights on disk, of which the description has been read and the weights have not."""

    family: Family
    config: Any
    tensors: Tensors

    def build(self, *, strict: bool = True, resize: bool = False) -> Model:
        """The model with these weights; see `load`."""
        abstract = self.family.abstract(self.config)
        pairs = pairs_of(self.family.table(self.config), abstract)
        wanted, there = sum(pair.count for pair in pairs), len(self.tensors)
        if wanted > 10 * there + 1000:  # a billion layers take long to name one by one
            raise InputError(
                f"{self.tensors.origin}: the config asks for {wanted:,} tensors and there are "
                f"{there:,}."
            )
        matched = Matched(pairs, self, resize)
        matched.check(strict)
        fresh = {}
        if matched.missing:
            model = self.family.model(self.config, nnx.Rngs(0))
            fresh = by_path(nnx.to_pure_dict(nnx.state(model)))
        values = matched.read(fresh)
        tree = jax.tree_util.tree_map_with_path(lambda path, _: values[path_name(path)], abstract)
        return _with_parameters(self.family.model, self.config, tree, self.family.name)


class Matched:
    """A model's parameters and the tensors of a source, laid beside each other."""

    def __init__(self, pairs: Sequence[Pair], opened: Opened, resize: bool = False):
        self.pairs, self.opened = pairs, opened
        tensors, family = opened.tensors, opened.family
        self.tied = family.tied_in(opened.config)
        self.there = {name: self._find(name) for pair in pairs for name in pair.names}
        used = {name for name in self.there.values() if name}
        unused = [re.compile(pattern) for pattern in family.unused]
        self.missing = [name for name, there in self.there.items() if not there]
        self.unexpected = [
            name
            for name in tensors
            if name not in used
            and not self._is_tied(name)
            and not any(pattern.fullmatch(name) for pattern in unused)
        ]
        self.misshapen = [
            f"{there}: {list(tensors.shape(there))}, expected {list(pair.their_shape)}"
            for pair in pairs
            for there in map(self.there.__getitem__, pair.names)
            if there
            and tensors.shape(there) != pair.their_shape
            and not (resize and self._resizes(pair, tensors.shape(there)))
        ]

    def check(self, strict: bool) -> None:
        """Refuse what does not fit, or log it where that is allowed."""
        origin = self.opened.tensors.origin
        problems = (
            _listed("missing", _with_hints(self.missing, self.unexpected))
            + _listed("unexpected", _with_hints(self.unexpected, self.missing))
            + _listed("misshapen", self.misshapen)
        )
        if problems and (strict or self.misshapen):
            raise InputError(
                f"{origin}: the weights are not those of this {self.opened.family.name} model."
                + problems
                + ("" if self.misshapen else "\nstrict=False loads the rest and says what differs.")
            )
        if problems:
            logging.warning("%s: loaded with differences.%s", origin, problems)

    def read(self, fresh: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The parameters by path; what the source lacks, a layer or all, is taken from `fresh`."""
        values = {}
        for pair in self.pairs:
            initial: Any = fresh.get(pair.path)
            layers = [
                self._read(pair, there)
                if (there := self.there[name])
                else np.asarray(initial[i] if pair.stacked else initial)
                for i, name in enumerate(pair.names)
            ]
            values[pair.path] = np.stack(layers) if pair.stacked else layers[0]
        return values

    def _read(self, pair: Pair, name: str) -> np.ndarray:
        array = self.opened.tensors[name]
        if array.shape != pair.their_shape and pair.entry.resize is not None:
            leading = max(pair.entry.leading, 0)  # axes of 1 that the table is not told of
            table, wanted = array.reshape(array.shape[leading:]), pair.their_shape[leading:]
            array = pair.entry.resize(table, wanted).reshape(pair.their_shape).astype(np.float32)
        return pair.to_ours(array)

    def _resizes(self, pair: Pair, shape: tuple[int, ...]) -> bool:
        """Whether the entry can bring a tensor of this shape to ours: only its rows may differ."""
        return pair.entry.resize is not None and (
            len(shape) == len(pair.their_shape) and shape[1:][-1:] == pair.their_shape[1:][-1:]
        )

    def _find(self, name: str) -> str | None:
        """The name that a tensor has in the source.

        Some classes write a prefix, others do not; of tied tensors any may have been written.
        """
        prefix, tensors = self.opened.family.prefix, self.opened.tensors
        spellings = [name, prefix + name, name.removeprefix(prefix) if prefix else name]
        spellings += [copy for copy, target in self.tied.items() if target == name]
        return next((spelling for spelling in spellings if spelling in tensors), None)

    def _is_tied(self, name: str) -> bool:
        """Whether a tensor only repeats another one, as it should."""
        target = self.tied.get(name)
        there = self._find(target) if target else None
        if not there:
            return False
        tensors = self.opened.tensors
        if not np.array_equal(tensors[name], tensors[there]):
            raise InputError(
                f"{tensors.origin}: {name} differs from {there}, which it repeats in this family: "
                "a model with its own output table is not supported."
            )
        return True


def open_source(
    source: str | Path, *, family: str = "", config: Mapping[str, Any] | None = None
) -> Opened | Model:
    """What lies at `source`: weights of a family, or a model of our own from its checkpoint."""
    path = resolve(str(source))
    if config is not None and not isinstance(config, Mapping):
        raise InputError(f"config is {config!r}; it is a dict of fields.")
    if family and config is None and (path / CONFIG).is_file():
        raise InputError(f"{path} has a {CONFIG}, which says what it is: leave family= out.")
    if family:
        original = f"{family}-original"  # the name alone is that of its class in transformers
        chosen = _named(original if original in FAMILIES else family, f"family={family!r}")
        built = schema.build(chosen.config, dict(config or {}), "config")
        return Opened(chosen, built, open_tensors(path))
    if config is not None:
        raise InputError("config= describes an original checkpoint: give its family= as well.")
    if path.is_file():
        raise InputError(
            f"{path} is one file, and carries no config: give the folder with its config.json, or "
            "family= and config=."
        )
    published = any((path / name).exists() for name in (CONFIG, openai_clip.CONFIG))
    if published and not (path / "checkpoints").is_dir():  # a run's folder has a config.json too
        return _open_folder(path)
    return _load_checkpoint(str(source))


def _open_folder(folder: Path) -> Opened:
    # It may hold the same model for `transformers` too; the names tell whose weights these are.
    if (path := folder / openai_clip.CONFIG).exists():
        tensors = open_tensors(folder)
        if openai_clip.is_named_so(tensors):
            described = Source(read_json(path), list(tensors), str(path))
            config = _reading(openai_clip.read, described)
            return Opened(openai_clip.FAMILY, config, tensors)
    description = read_json(folder / CONFIG)
    origin = str(folder / CONFIG)
    # timm's config.json speaks of an architecture instead.
    kind = str(description.get("model_type") or "")
    kind = "timm" if not kind and "architecture" in description else kind
    family = _named(kind, f"{origin}: model_type {kind!r}")
    tensors = open_tensors(folder)
    if "mmjax" in description:
        config = schema.build(family.config, description["mmjax"], f"{origin}: mmjax")
    elif family.read is None:
        raise InputError(
            f"{origin} is not ours; original weights of {family.name} are loaded as a file, with "
            "family= and config=."
        )
    else:
        config = _reading(family.read, Source(description, list(tensors), origin))
    return Opened(family, _with_statistics(config, folder, description), tensors)


def _reading(read: Callable[[Source], Any], source: Source) -> Any:
    """What a family makes of a config.json; what its dataclasses refuse is told with the file."""
    try:
        return read(source)
    except InputError as error:
        if source.origin in str(error):
            raise
        raise InputError(f"{source.origin}: {error}") from None
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise InputError(f"{source.origin}: a value is not of its type: {error}.") from error


def _named(name: str, what: str) -> Family:
    if name not in FAMILIES:
        raise InputError(f"{what} is of no family that is known.{near_misses(name, FAMILIES)}")
    return FAMILIES[name]


def _load_checkpoint(source: str) -> Model:
    """A model of train.py, or one that `save_checkpoint` wrote."""
    assets = load_assets(source)
    if "family" in assets:
        family = _named(assets["family"], f"{source}: family")
        config = schema.build(family.config, assets["config"], f"{source}: config")
        return _with_parameters(family.model, config, load_parameters(source), family.name)
    config = configuration.model_config(assets["config"]["model"])
    ema = assets["config"]["optimizer"]["ema_decay"] > 0
    return _with_parameters(build_model, config, load_parameters(source, ema=ema))


def _with_parameters(
    model: Callable[..., Model], config: Any, params: Any, family: str = ""
) -> Model:
    graph = nnx.split(nnx.eval_shape(lambda: model(config, nnx.Rngs(0))))[0]
    loaded = nnx.merge(graph, jax.tree.map(jnp.asarray, params))
    loaded.family = family
    return loaded


def _with_field(config: Any, name: str, value: Any) -> Any:
    """The config with a field replaced, wherever in it that field is."""
    changed, found = _replace(config, name, value)
    if not found:
        raise InputError(f"this {type(config).__name__} has no {name} to change.")
    return changed


def _replace(config: Any, name: str, value: Any) -> tuple[Any, bool]:
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config, False
    names = [field.name for field in dataclasses.fields(config)]
    if name in names:
        return dataclasses.replace(config, **{name: value}), True
    parts = {part: _replace(getattr(config, part), name, value) for part in names}
    changes = {part: changed for part, (changed, found) in parts.items() if found}
    return dataclasses.replace(config, **changes), bool(changes)


def _with_statistics(config: Any, folder: Path, description: Mapping[str, Any]) -> Any:
    """The mean and deviation of pixels are the processor's, and uint8 pictures need them here."""
    try:
        pixels = load_pixels(folder, description)
    except InputError as error:
        logging.warning("uint8 pictures are normalised by defaults: %s", error)
        pixels = None
    statistics = pixels.statistics if pixels else description.get(PIXELS)
    for name, values in zip(("mean", "std"), statistics or (), strict=False):
        config = _replace(config, name, tuple(values))[0]
    return config


def _with_hints(names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Names, and beside each the nearest one on the other side of the difference."""
    hinted = []
    for name in names:
        close = difflib.get_close_matches(name, others, n=1, cutoff=0.8) if len(names) < 100 else []
        hinted.append(f"{name}  (there is {close[0]})" if close else name)
    return hinted


def _listed(title: str, lines: Sequence[str]) -> str:
    return "".join([f"\n{len(lines)} {title}:", *(f"\n  {line}" for line in lines)] * bool(lines))
