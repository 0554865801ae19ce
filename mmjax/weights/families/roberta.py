"""RoBERTa in `transformers`: an encoder with BERT's names, and other positions.

Positions are counted from behind the number of the padding token, and padding itself stands there.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mmjax.models.bert import BertConfig
from mmjax.weights.families import bert
from mmjax.weights.keys import Key, Keys, read_keys, write_keys

# Those of the published models, which BridgeTowerTextConfig has too.
_DEFAULTS = {
    "vocab_size": 50265,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "pad_token_id": 1,
}
KEYS: Keys = tuple(
    replace(key, default=_DEFAULTS[key.theirs], null=None)
    if isinstance(key, Key) and key.theirs in _DEFAULTS
    else key
    for key in bert.KEYS
)

ENCODER = bert.ENCODER


def read_encoder(json: Mapping[str, Any], origin: str, pooler: bool) -> BertConfig:
    """The encoder that a part of a config.json describes."""
    fields = read_keys(KEYS, json, origin)
    return BertConfig(**fields, first_position=fields["padding"] + 1, pooler=pooler)


def write_encoder(config: BertConfig) -> dict[str, Any]:
    """What config.json says of an encoder."""
    return write_keys(KEYS, config)


def is_encoder(config: Any) -> bool:
    """Whether RobertaModel can be this encoder."""
    return (
        isinstance(config, BertConfig)
        and config.norm == "post"
        and config.first_position == config.padding + 1 > 0
    )
