"""VisualBERT in `transformers`, VisualBertModel and its heads; and uclanlp/visualbert's own files.

Both decide by a name, not by tensors, what a classifier is for. Of their heads the attention of
phrases to regions (Flickr30k Entities) is not supported.
"""

from typing import Any

from mmjax.errors import InputError
from mmjax.models.regions import StreamConfig
from mmjax.models.visualbert import VisualBert, VisualBertConfig
from mmjax.weights.families import bert
from mmjax.weights.families.vit import read_labels, write_labels
from mmjax.weights.family import Family, Source
from mmjax.weights.keys import ACTIVATIONS, Key, read_keys, write_keys
from mmjax.weights.names import Entry, Table, modules, under

TEXT_KEYS = (
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
    Key("pad_token_id", "padding", 1, null=-1),
)
KEYS = (
    Key("visual_embedding_dim", "region_width", 512),
    Key("bypass_transformer", "bypass", False),
)

_ANSWERING = "VisualBertForQuestionAnswering"
_REASONING = "VisualBertForVisualReasoning"
_CHOICE = "VisualBertForMultipleChoice"

PRETRAINING: Table = (
    *under(bert.MASKED_LANGUAGE, "masked_language/", "cls.predictions."),
    *modules({"next_sentence": "cls.seq_relationship"}),
)


def _encoder(position: str, kind: str, features: str) -> Table:
    """All below the heads; what embeds regions is named otherwise by either code."""
    regions = {"position_embedding": position, "type_embedding": kind, "features": features}
    return (
        *under(bert.EMBEDDINGS, "text_embeddings/", "embeddings."),
        *under(modules(regions), "region_embeddings/", "embeddings."),
        *under(bert.LAYER, "fusion/blocks/layers/", "encoder.layer.{n}."),
        *under(bert.LAYER, "top/", "additional_layer."),
        *modules({"fusion/pooler": "pooler.dense"}),
    )


def _read(source: Source) -> VisualBertConfig:
    json, origin = source.json, source.origin
    return VisualBertConfig(
        text=StreamConfig(**read_keys(TEXT_KEYS, json, origin)),
        **read_keys(KEYS, json, origin),
        masked_language=source.has("cls.predictions.bias"),
        next_sentence=source.has("cls.seq_relationship.weight"),
        **(_read_classifier(source) if source.has("cls.weight") else {}),
    )


def _read_classifier(source: Source) -> dict[str, Any]:
    """What the classifier is for: the tensors of three classes have the same names."""
    kinds = source.json.get("architectures") or ["no class"]
    if _ANSWERING in kinds:
        return {"answers": read_labels(source.json)}
    if _REASONING in kinds:
        return {"labels": read_labels(source.json)}
    if _CHOICE in kinds:
        return {"labels": ("choice",)}
    raise InputError(
        f"{source.origin}: architectures names {', '.join(kinds)}, but the weights have a "
        f"classifier, which is that of {_ANSWERING}, {_REASONING} or {_CHOICE}: name the class."
    )


def _write(config: VisualBertConfig) -> dict[str, Any]:
    kind = "VisualBertForPreTraining" if config.masked_language else "VisualBertModel"
    labels: dict[str, Any] = {}
    if config.answers:
        kind, labels = _ANSWERING, write_labels(config.answers)
    elif len(config.labels) == 1:
        kind = _CHOICE
    elif config.labels:
        kind, labels = _REASONING, write_labels(config.labels)
    return {
        "architectures": [kind],
        "model_type": "visual_bert",
        **write_keys(TEXT_KEYS, config.text),
        **write_keys(KEYS, config),
        **labels,
    }


def _is_member(config: VisualBertConfig) -> bool:
    return (
        bert.is_encoder(config.text)
        and config.text.pooler
        and config.masked_language == config.next_sentence
        and bool(config.answers or config.labels) + config.masked_language < 2
    )


def _table(config: VisualBertConfig) -> Table:
    encoder = _encoder(
        "visual_position_embeddings", "visual_token_type_embeddings", "visual_projection"
    )
    has_head = config.answers or config.labels or config.masked_language
    return (
        *under(encoder, "", "visual_bert." if has_head else ""),
        *PRETRAINING,
        Entry("answering", "cls"),
        Entry("classifier", "cls"),
    )


def _original_table(config: VisualBertConfig) -> Table:
    encoder = _encoder("position_embeddings_visual", "token_type_embeddings_visual", "projection")
    return (
        *under(encoder, "", "bert."),
        *PRETRAINING,
        Entry("answering", "classifier"),
        Entry("classifier", "classifier"),
    )


_DECODER = "cls.predictions.decoder.weight"
_DECODER_BIAS = "cls.predictions.decoder.bias"

FAMILY = Family(
    name="visual_bert",
    model=VisualBert,
    config=VisualBertConfig,
    table=_table,
    read=_read,
    write=_write,
    is_member=_is_member,
    prefix="visual_bert.",
    tied={
        _DECODER: "visual_bert.embeddings.word_embeddings.weight",
        _DECODER_BIAS: "cls.predictions.bias",
    },
    unused=bert.UNUSED,
)
# The published files hold the whole under one more `bert.`.
ORIGINAL = Family(
    name="visualbert-original",
    model=VisualBert,
    config=VisualBertConfig,
    table=_original_table,
    prefix="bert.",
    tied=dict.fromkeys((_DECODER, "bert." + _DECODER), "bert.embeddings.word_embeddings.weight"),
)
