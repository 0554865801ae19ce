"""The keys of a run. A recipe (`configs/`) starts from `train_config()` and changes what differs.

Every key that exists stands here with its meaning and its default.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmjax.errors import InputError, near_misses
from mmjax.models import BertConfig, CoAttentionConfig, ModelConfig, ViTConfig


def train_config() -> ConfigDict:
    """A run of train.py, with defaults. Lengths of time are in steps, a step is a global batch."""
    config = ConfigDict()
    config.seed = 0  # of initial values, shuffling, augmentation, masking and dropout
    config.total_steps = 1000
    config.batch_size = 64  # examples a step, over all devices of all processes
    config.init_from = ""  # a workdir or checkpoint whose parameters to start from
    config.question_only = False  # train blind on grey pictures: the baseline for questions

    config.data = _data()
    config.model = ConfigDict(
        {
            "image": _defaults(ViTConfig, image_size=0),  # 0: data.image_size
            "text": _defaults(BertConfig),
            "fusion": _defaults(CoAttentionConfig),
            "embedding_width": 256,  # of the contrastive space; 0: no contrastive head
            "matching": True,  # an image-text matching head
            "masked_language": True,  # a masked-language head
            "answers": (),  # filled from the data's answer list when objectives need it
        }
    )
    config.objectives = ConfigDict(
        {  # a weight of 0 is off
            "contrastive": {"weight": 0.0},
            "matching": {"weight": 0.0, "negatives": "hard"},  # or 'random'
            "masked_language": {"weight": 0.0, "rate": 0.15},
            "answering": {"weight": 0.0},
        }
    )
    config.optimizer = ConfigDict(
        {
            "name": "adamw",  # or 'sgd'
            "learning_rate": 1e-4,
            "b1": 0.9,
            "b2": 0.98,
            "epsilon": 1e-8,
            "weight_decay": 0.02,
            "clip_norm": 1.0,  # of the whole gradient; 0: off
            "accumulate": 1,  # slices that a batch is walked in
            "ema_decay": 0.0,  # of an exponential moving average of the parameters; 0: none
            "schedule": {
                "kind": "cosine",  # 'cosine', 'linear', 'rsqrt' or 'constant'
                "warmup_steps": 100,
                "cooldown_steps": 0,  # the linear end of 'rsqrt' and 'constant'
                "end_fraction": 0.0,  # of the peak, at the last step
            },
            "rates": (),  # (path pattern, factor of the learning rate); 0 freezes
            "decays": (),  # (path pattern, weight decay), before the rule of no decay on vectors
            "bounds": ((".*/logit_scale", (0.0, math.log(100.0))),),  # (path pattern, (low, high))
        }
    )
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1: the devices left over
    config.checkpoint = ConfigDict(
        {
            "every": 1000,
            "keep": 1,  # the latest so many, beside the best
            "best_metric": "",  # as 'retrieval/image_to_text/R@1'; '': no best is kept
            "best_mode": "max",  # or 'min'
        }
    )
    config.eval = _evaluations()
    config.eval.every = 0  # 0: never
    config.eval.losses = False  # the objectives on the evaluation split
    config.log = ConfigDict(
        {
            "every": 10,
            "tensorboard": True,
            "wandb_project": "",  # log to Weights & Biases as well
            "profile": 0,  # trace so many steps, from the fifth on, into WORKDIR/profile
        }
    )
    return config


def evaluation_config() -> ConfigDict:
    """A run of eval.py: which evaluations, of which data, on which mesh."""
    config = _evaluations()
    config.ema = True  # score the moving average of the parameters, where there is one
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    return config


def _evaluations() -> ConfigDict:
    """What to score and on what. An empty `data` key takes the training run's, except the size."""
    config = ConfigDict()
    config.batch_size = 64
    config.data = ConfigDict({"source": "", "root": "", "split": "validation", "size": 0})
    config.retrieval = ConfigDict(
        {
            "run": False,
            "captions": 0,  # the first so many of every picture; 0: all
            "rerank": 0,  # re-rank the best so many by image-text matching; 0: do not
            "examples": 12,  # to draw in the report
        }
    )
    config.matching = ConfigDict({"run": False, "seed": 0, "examples": 12})
    config.vqa = ConfigDict(
        {
            "run": False,
            "question_only": "",  # the checkpoint of a model trained with question_only=True
            "examples": 24,
        }
    )
    return config


def _data() -> ConfigDict:
    return ConfigDict(
        {
            "source": "scenes",  # 'scenes' (drawn here) or 'flickr8k'
            "task": "captions",  # or 'questions'
            "root": "",  # the folder of a data set that comes as files
            "split": "train",
            "size": 0,  # the first so many records; 0: all (of scenes 20,000, or 1,000 to evaluate)
            "image_size": 224,  # pixels a side
            "text_length": 40,  # tokens, [CLS] and [SEP] included
            "vocabulary": "",  # a WordPiece vocab.txt; '': trained on the training texts
            "vocabulary_size": 4000,  # of a trained vocabulary, at most
            "crop_scale": 1.0,  # the least share of the area that a random crop keeps; 1: no crop
            "flip": False,  # mirror half of the pictures (not those whose text says left or right)
            "on_bad_record": "replace",  # or 'raise'
            "max_bad_fraction": 0.01,  # stop, after a checkpoint, when more were replaced
            "threads": 2,
            "workers": 0,  # processes that decode; 0: threads alone
        }
    )


def check(config: ConfigDict) -> None:
    """Refuse numbers that no run can have; what parts of the model need, they check themselves."""
    for key, least in (
        ("total_steps", 1),
        ("batch_size", 1),
        ("log.every", 1),
        ("optimizer.accumulate", 1),
        ("data.text_length", 3),
        ("data.threads", 0),
        ("data.workers", 0),
        ("eval.every", 0),
        *((f"objectives.{name}.weight", 0) for name in config.objectives),
    ):
        value = _at(config, key)
        if value < least:
            raise InputError(f"{key} is {value}; it is at least {least}.")
    if config.checkpoint.best_metric and not config.eval.every:
        raise InputError(
            f"checkpoint.best_metric is {config.checkpoint.best_metric!r}, but nothing is "
            "evaluated during training: set eval.every."
        )


def _at(config: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def model_config(config: Mapping[str, Any]) -> ModelConfig:
    """The dataclass of `config.model`, named sizes filled in."""
    return build(ModelConfig, config, "model")


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
    return cls.__name__.removesuffix("Config").lower()


def _defaults(cls: type, **fields: Any) -> ConfigDict:
    """A dataclass's fields and their defaults, some of them changed."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory() if callable(field.default_factory) else None
        values[field.name] = fields.pop(field.name, default)
    if fields:
        name = next(iter(fields))
        raise InputError(f"{cls.__name__} has no field {name}.{near_misses(name, values)}")
    return ConfigDict(values)


def to_json(config: ConfigDict) -> str:
    """A resolved config as text, tuples as lists."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def save(config: ConfigDict, path: Path) -> None:
    """Write the resolved config beside a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(config) + "\n")
