"""The keys of a run. A recipe (`configs/`) starts from `train_config()` and changes what differs.

Every key that exists stands here with its meaning and its default.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict, FieldReference

from mmjax.errors import InputError, near_misses
from mmjax.models import MODELS
from mmjax.objectives import OBJECTIVES, Adversarial, Masking
from mmjax.schema import build, section


def train_config() -> ConfigDict:
    """A run of train.py, with defaults. Lengths of time are in steps, a step is a global batch."""
    config = ConfigDict()
    config.seed = 0  # of initial values, shuffling, augmentation, masking and dropout
    config.total_steps = 1000
    config.batch_size = 64  # examples a step, over all devices of all processes
    # What to take parameters from: a workdir, a checkpoint or a folder of public weights; or one
    # for each part of the model, {'image': FOLDER, 'text': FOLDER}.
    config.init_from = FieldReference("", field_type=object)
    config.question_only = False  # train blind on grey pictures: the baseline for questions

    config.data = _data()
    # image.image_size 0: data.image_size; text.vocabulary_size 0: the tokenizer's; answers (): the
    # data's, where an objective needs them.
    config.model = model_section(image={"image_size": 0})
    # Every objective with its options (`docs/objectives.md`). A weight of 0 is off.
    config.objectives = ConfigDict({name: section(cls) for name, cls in OBJECTIVES.items()})
    config.adversarial = ConfigDict(section(Adversarial))  # perturbed inputs; 0 steps: off
    config.teacher = ConfigDict({"checkpoint": ""})  # another model, for the `*_distillation`s
    config.masking = ConfigDict(section(Masking))  # what is hidden where something is to be guessed
    config.optimizer = ConfigDict(
        {
            "name": "adamw",  # or 'sgd'
            "learning_rate": 1e-4,
            "b1": 0.9,
            "b2": 0.98,
            "epsilon": 1e-8,
            "first_moment": "float32",  # AdamW's, as it is stored: or 'bfloat16', half the memory
            "weight_decay": 0.02,
            "clip_norm": 1.0,  # of the whole gradient; 0: off
            "accumulate": 1,  # slices that a batch is walked in
            # Its state and the average are split over mesh.data too (ZeRO-1); false: a copy each.
            "sharded": True,
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
            "warn_after": 500,  # steps that something must have gone wrong for before it is told
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
            "task": "captions",  # or 'questions', 'statements'
            "root": "",  # the folder of a data set that comes as files
            "split": "train",
            "size": 0,  # the first so many records; 0: all (of scenes 20,000, or 1,000 to evaluate)
            "image_size": 224,  # pixels a side
            "text_length": 40,  # tokens, [CLS] and [SEP] included
            "vocabulary": "",  # a WordPiece vocab.txt; '': trained on the training texts
            "vocabulary_size": 4000,  # of a trained vocabulary, at most
            "crop_scale": 1.0,  # the least share of the area that a random crop keeps; 1: no crop
            "flip": False,  # mirror half of the pictures (not those whose text says left or right)
            # Operations a picture, and their magnitude of 10: (2, 7) in ALBEF.
            "randaugment": (0, 0),
            "regions": False,  # scenes: boxes, features and labels, as a detector finds them
            "tags": False,  # scenes: labels of regions, '[CLS] text [SEP] tags [SEP]' (Oscar)
            "false_tags": False,  # captions: half of the tags are another picture's; `label` tells
            # Captions: a second one, half of the time another picture's; `label` tells.
            "second_caption": False,
            "code_grid": 0,  # scenes: what each of so many patches a side shows, as a code; 0: none
            "prompt": "",  # captions: words before every one, as 'a picture of'
            "answer_length": 0,  # questions: tokens of written answers, [CLS] and [SEP] included
            "answer_count": 1,  # the best so many answers are written
            "end_token": True,  # a text ends in [SEP]; ALBEF's do not
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
        ("log.warn_after", 1),
        ("optimizer.accumulate", 1),
        ("data.text_length", 3),
        ("data.threads", 0),
        ("data.workers", 0),
        ("data.code_grid", 0),
        ("data.answer_count", 1),
        ("eval.every", 0),
        *((f"objectives.{name}.weight", 0) for name in config.objectives),
    ):
        value = _at(config, key)
        if value < least:
            raise InputError(f"{key} is {value}; it is at least {least}.")
    if config.data.answer_length == 1:
        raise InputError("data.answer_length is 1; an answer has [CLS] and [SEP]: 2 or more, or 0.")
    if config.checkpoint.best_metric and not config.eval.every:
        raise InputError(
            f"checkpoint.best_metric is {config.checkpoint.best_metric!r}, but nothing is "
            "evaluated during training: set eval.every."
        )


def _at(config: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def model_section(kind: str = "vision_language", **changes: Any) -> ConfigDict:
    """`config.model` for one of `mmjax.models.MODELS`, with the fields in `changes` set.

    A recipe gives the changes of parts as dicts: `model_section('lxmert', text={'size': 'base'})`.
    """
    return ConfigDict({"kind": kind, **section(_model_class(kind), changes)})


def model_config(config: Mapping[str, Any]) -> Any:
    """The dataclass of `config.model`, named sizes filled in."""
    values = dict(config)
    return build(_model_class(values.pop("kind", "vision_language")), values, "model")


def _model_class(kind: str) -> type:
    if kind not in MODELS:
        raise InputError(f"model.kind is {kind!r}.{near_misses(kind, MODELS)}")
    return MODELS[kind][0]


def to_json(config: ConfigDict) -> str:
    """A resolved config as text, tuples as lists."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def save(config: ConfigDict, path: epath.Path) -> None:
    """Write the resolved config beside a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(config) + "\n")
