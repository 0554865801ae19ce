"""BERT in `transformers`: BertModel, BertForMaskedLM, BertForPreTraining."""

from typing import Any

import numpy as np

from mmjax.models.bert import BertConfig
from mmjax.models.encoders import TextModel, TextModelConfig
from mmjax.weights.family import Family, Source
from mmjax.weights.keys import ACTIVATIONS, Fixed, Key, read_keys, write_keys
from mmjax.weights.names import Entry, Table, modules, under

KEYS = (
    Key("vocab_size", "vocabulary_size", 30522),
    Key("hidden_size", "width", 768),
    Key("num_hidden_layers", "depth", 12),
    Key("num_attention_heads", "heads", 12),
    Key("intermediate_size", "mlp_width", 3072),
    Key("hidden_act", "activation", "gelu", ACTIVATIONS),
    Key("hidden_dropout_prob", "dropout", 0.1),
    Key("layer_norm_eps", "epsilon", 1e-12),
    Key("max_position_embeddings", "max_length", 512),
    Key("type_vocab_size", "types", 2),
    Key("pad_token_id", "padding", 0, null=-1),
    Fixed("position_embedding_type", "absolute"),
    Fixed("is_decoder", False),
    Fixed("add_cross_attention", False),
)


def resize_rows(table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A table of another number of words: cut, or filled up with the mean row (Hewitt 2021)."""
    missing = max(shape[0] - len(table), 0)
    mean = np.repeat(table.mean(axis=0, keepdims=True), missing, axis=0)
    return np.concatenate([table[: shape[0]], mean])


EMBEDDINGS: Table = (
    Entry("token_embedding", "word_embeddings", resize=resize_rows),
    *modules(
        {
            "position_embedding": "position_embeddings",
            "type_embedding": "token_type_embeddings",
            "norm": "LayerNorm",
        }
    ),
)

# A layer, and the parts that other families build theirs of.
SELF_ATTENTION = {
    "attention/query": "self.query",
    "attention/key": "self.key",
    "attention/value": "self.value",
    "attention/out": "output.dense",
    "norm": "output.LayerNorm",
}
LAYER: Table = (
    *under(modules(SELF_ATTENTION), "self_attention/", "attention."),
    *modules(
        {
            "mlp/up": "intermediate.dense",
            "mlp/down": "output.dense",
            "mlp/norm": "output.LayerNorm",
        }
    ),
)

ENCODER: Table = (
    *under(EMBEDDINGS, "embeddings/", "embeddings."),
    *under(LAYER, "blocks/layers/", "encoder.layer.{n}."),
    *modules({"pooler": "pooler.dense"}),
)

MASKED_LANGUAGE: Table = (
    *modules({"transform": "transform.dense", "norm": "transform.LayerNorm"}),
    Entry("bias", "bias", resize=resize_rows),
)

# Position numbers stored as if they were weights, by old versions.
UNUSED = (r".*position_ids", r".*token_type_ids")


def read_encoder(json: Any, origin: str, pooler: bool) -> BertConfig:
    """The encoder that a config.json, or a part of one, describes."""
    return BertConfig(**read_keys(KEYS, json, origin), pooler=pooler)


def write_encoder(config: BertConfig) -> dict[str, Any]:
    """The config.json, or the part of one, of an encoder."""
    return {"model_type": "bert", **write_keys(KEYS, config)}


def is_encoder(config: Any) -> bool:
    """Whether BertModel can be this encoder."""
    return isinstance(config, BertConfig) and config.norm == "post" and not config.first_position


def _read(source: Source) -> TextModelConfig:
    return TextModelConfig(
        text=read_encoder(source.json, source.origin, source.has("pooler.dense.weight")),
        masked_language=source.has("cls.predictions.bias"),
        next_sentence=source.has("cls.seq_relationship.weight"),
    )


def _write(config: TextModelConfig) -> dict[str, Any]:
    kind = "BertForMaskedLM" if config.masked_language else "BertModel"
    kind = "BertForPreTraining" if config.next_sentence else kind
    return {"architectures": [kind], **write_encoder(config.text)}


def _table(config: TextModelConfig) -> Table:
    prefix = "bert." if config.masked_language or config.next_sentence else ""
    return (
        *under(ENCODER, "text/", prefix),
        *under(MASKED_LANGUAGE, "masked_language/", "cls.predictions."),
        *modules({"next_sentence": "cls.seq_relationship"}),
    )


FAMILY = Family(
    name="bert",
    model=TextModel,
    config=TextModelConfig,
    table=_table,
    read=_read,
    write=_write,
    is_member=lambda config: is_encoder(config.text),
    prefix="bert.",
    tied={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    unused=UNUSED,
)
