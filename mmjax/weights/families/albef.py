"""ALBEF's original checkpoints (github.com/salesforce/ALBEF), of every task."""

import re
from collections.abc import Mapping
from dataclasses import replace

from mmjax.models.albef import Albef, AlbefConfig
from mmjax.weights.families import bert, timm
from mmjax.weights.family import Family
from mmjax.weights.names import Entry, Table, modules, under

# A BERT layer with cross-attention, and a BERT decoder of such layers.
CROSS_LAYER: Table = (
    *bert.LAYER,
    *under(modules(bert.SELF_ATTENTION), "cross_attention/", "crossattention."),
)
CROSS_BERT: Table = (
    *under(bert.EMBEDDINGS, "embeddings/", "embeddings."),
    *under(CROSS_LAYER, "blocks/layers/", "encoder.layer.{n}."),
)
DECODER: Table = (
    *under(CROSS_BERT, "bert/", "bert."),
    *under(bert.MASKED_LANGUAGE, "head/", "cls.predictions."),
)


def tied_head(bert_model: str, head: str) -> dict[str, str]:
    """The tensors of a word head that repeat others: `bert_model` and `head` end in a dot."""
    return {
        f"{head}predictions.decoder.weight": f"{bert_model}embeddings.word_embeddings.weight",
        f"{head}predictions.decoder.bias": f"{head}predictions.bias",
    }


def _text(config: AlbefConfig) -> str:
    """The prefix of the text encoder: with its word head it is a BertForMaskedLM."""
    return "text_encoder.bert." if config.masked_language else "text_encoder."


def _fusion(config: AlbefConfig) -> Table:
    layer, first = _text(config) + "encoder.layer.{n}.", config.fusion_layer
    if config.pictures == 1:
        return under(CROSS_LAYER, "fusion/blocks/layers/", layer, first=first)
    return (
        *under(CROSS_LAYER, "fusion/blocks/layers/first/", layer, first=first, step=2),
        *under(CROSS_LAYER, "fusion/blocks/layers/second/", layer, first=first + 1, step=2),
    )


def _table(config: AlbefConfig) -> Table:
    return (
        *under(timm.ENCODER, "image/", "visual_encoder."),
        *under(bert.ENCODER, "text/", _text(config)),
        *_fusion(config),
        Entry("contrastive/temperature", "temp"),
        *modules(
            {
                "contrastive/image_projection": "vision_proj",
                "contrastive/text_projection": "text_proj",
                "matching/classifier": "itm_head",
                "pair_classifier/hidden": "cls_head.0",
                "pair_classifier/classifier": "cls_head.2",
                "text_assignment": "ta_head",
            }
        ),
        *under(bert.MASKED_LANGUAGE, "masked_language/", "text_encoder.cls.predictions."),
        *under(DECODER, "decoder/", "text_decoder."),
    )


def _tied(config: AlbefConfig) -> Mapping[str, str]:
    tied = tied_head("text_encoder.bert.", "text_encoder.cls.")
    tied |= tied_head("text_decoder.bert.", "text_decoder.cls.")
    if config.pictures == 2:
        layers = range(config.fusion_layer, 2 * config.text.depth - config.fusion_layer, 2)
        for n in layers:
            for leaf in ("key.weight", "key.bias", "value.weight", "value.bias"):
                name = _text(config) + "encoder.layer.{n}.crossattention.self." + leaf
                tied[name.format(n=n + 1)] = name.format(n=n)
    return tied


# The modules of which training keeps a moving average, its 'momentum model', as NAME_m.
_AVERAGED = "visual_encoder|text_encoder|text_decoder|vision_proj|text_proj|cls_head"
# Features of past batches, and where the next ones go.
_QUEUES = (r"(image|text|idx)_queue", r"queue_ptr|ptr_queue")


def momentum(family: Family) -> Family:
    """The momentum model of a family's checkpoints, as a model of its own."""

    def name_m(name: str) -> str:
        return re.sub(rf"^({_AVERAGED})\b", r"\1_m", name)

    def table(config):
        return tuple(replace(e, theirs=name_m(e.theirs)) for e in family.table(config))

    def tied(config):
        return {name_m(name): name_m(there) for name, there in family.tied_in(config).items()}

    return replace(
        family,
        name=f"{family.name}-momentum",
        table=table,
        tied=tied,
        unused=(rf"({_AVERAGED})\..*", *_QUEUES, *bert.UNUSED),
    )


# What training keeps beside the weights of the model.
TRAINING_STATE = (rf"({_AVERAGED})_m\..*", *_QUEUES)

FAMILY = Family(
    name="albef",
    model=Albef,
    config=AlbefConfig,
    table=_table,
    tied=_tied,
    unused=(*TRAINING_STATE, *bert.UNUSED),
)
MOMENTUM_FAMILY = momentum(FAMILY)
