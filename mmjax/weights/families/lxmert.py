"""LXMERT: LxmertModel, …ForQuestionAnswering, …ForPreTraining; and airsplay/lxmert's own files."""

from collections.abc import Mapping
from typing import Any

from mmjax.models.lxmert import Lxmert, LxmertConfig
from mmjax.models.regions import StreamConfig
from mmjax.weights.families import bert
from mmjax.weights.families.vit import read_labels, write_labels
from mmjax.weights.family import Family, Source
from mmjax.weights.keys import ACTIVATIONS, Fixed, Key, read_keys, write_keys
from mmjax.weights.names import Table, modules, under

# Epsilons and the row of padding are no keys: they are 1e-12 and 0, as StreamConfig's are.
TEXT_KEYS = (
    Key("vocab_size", "vocabulary_size", 30522),
    Key("hidden_size", "width", 768),
    Key("l_layers", "depth", 9),
    Key("num_attention_heads", "heads", 12),
    Key("intermediate_size", "mlp_width", 3072),
    Key("hidden_act", "activation", "gelu", ACTIVATIONS),
    Key("hidden_dropout_prob", "dropout", 0.1),
    Key("max_position_embeddings", "max_length", 512),
    Key("type_vocab_size", "types", 2),
)
KEYS = (
    Key("r_layers", "region_depth", 5),
    Key("x_layers", "fusion_depth", 5),
    Key("visual_feat_dim", "region_width", 2048),
    Fixed("visual_pos_dim", 4),
)
OBJECTS = Key("num_object_labels", "region_objects", 1600)
ATTRIBUTES = Key("num_attr_labels", "region_attributes", 400)
ANSWERS = Key("num_qa_labels", "answers", 9500)

FUSION_LAYER: Table = (
    *modules(
        {
            "cross/attention/query": "visual_attention.att.query",
            "cross/attention/key": "visual_attention.att.key",
            "cross/attention/value": "visual_attention.att.value",
            "cross/attention/out": "visual_attention.output.dense",
            "cross/norm": "visual_attention.output.LayerNorm",
            "text_mlp/up": "lang_inter.dense",
            "text_mlp/down": "lang_output.dense",
            "text_mlp/norm": "lang_output.LayerNorm",
            "image_mlp/up": "visn_inter.dense",
            "image_mlp/down": "visn_output.dense",
            "image_mlp/norm": "visn_output.LayerNorm",
        }
    ),
    *under(modules(bert.SELF_ATTENTION), "text_self/", "lang_self_att."),
    *under(modules(bert.SELF_ATTENTION), "image_self/", "visn_self_att."),
)
ENCODER: Table = (
    *under(bert.EMBEDDINGS, "text_embeddings/", "embeddings."),
    *under(bert.LAYER, "text_blocks/layers/", "encoder.layer.{n}."),
    *under(bert.LAYER, "region_blocks/layers/", "encoder.r_layers.{n}."),
    *under(FUSION_LAYER, "fusion/blocks/layers/", "encoder.x_layers.{n}."),
    *modules(
        {
            "region_embeddings/features": "encoder.visn_fc.visn_fc",
            "region_embeddings/features_norm": "encoder.visn_fc.visn_layer_norm",
            "region_embeddings/box": "encoder.visn_fc.box_fc",
            "region_embeddings/box_norm": "encoder.visn_fc.box_layer_norm",
            "fusion/text_pooler": "pooler.dense",
        }
    ),
)
PRETRAINING: Table = (
    *under(bert.MASKED_LANGUAGE, "masked_language/", "cls.predictions."),
    *modules(
        {
            "matching/classifier": "cls.seq_relationship",
            "region_head/transform": "obj_predict_head.transform.dense",
            "region_head/norm": "obj_predict_head.transform.LayerNorm",
            "region_head/objects": "obj_predict_head.decoder_dict.obj",
            "region_head/attributes": "obj_predict_head.decoder_dict.attr",
            "region_head/features": "obj_predict_head.decoder_dict.feat",
        }
    ),
)
ANSWERING: Table = modules(
    {
        "answering/hidden": "logit_fc.0",
        "answering/norm": "logit_fc.2",
        "answering/classifier": "logit_fc.3",
    }
)


def _read(source: Source) -> LxmertConfig:
    json, origin = source.json, source.origin
    heads = {
        key.ours: read_keys([key], json, origin)[key.ours]
        for key, head in ((OBJECTS, "obj"), (ATTRIBUTES, "attr"))
        if source.has(f"decoder_dict.{head}.weight")
    }
    return LxmertConfig(
        text=StreamConfig(**read_keys(TEXT_KEYS, json, origin)),
        **read_keys(KEYS, json, origin),
        answers=_answers(json, origin) if source.has("answer_head.logit_fc.3.weight") else (),
        masked_language=source.has("cls.predictions.bias"),
        matching=source.has("cls.seq_relationship.weight"),
        region_features=source.has("decoder_dict.feat.weight"),
        **heads,
    )


def _answers(json: Mapping[str, Any], origin: str) -> tuple[str, ...]:
    """The answers by name where the file names them all, else by number: it need not."""
    count = read_keys([ANSWERS], json, origin)[ANSWERS.ours]
    labels = read_labels(json)
    return labels if len(labels) == count else tuple(f"LABEL_{i}" for i in range(count))


def _write(config: LxmertConfig) -> dict[str, Any]:
    kind = "LxmertForQuestionAnswering" if config.answers else "LxmertModel"
    description = {
        "architectures": ["LxmertForPreTraining" if config.masked_language else kind],
        "model_type": "lxmert",
        **write_keys(TEXT_KEYS, config.text),
        **write_keys(KEYS, config),
    }
    if config.answers:
        description |= {ANSWERS.theirs: len(config.answers), **write_labels(config.answers)}
    if config.masked_language:
        description |= _write_heads(config)
    return description


def _write_heads(config: LxmertConfig) -> dict[str, Any]:
    """Which of the heads of pre-training there are, and the sizes of those."""
    present = {
        "visual_obj_loss": bool(config.region_objects),
        "visual_attr_loss": bool(config.region_attributes),
        "visual_feat_loss": config.region_features,
    }
    sizes = [key for key in (OBJECTS, ATTRIBUTES) if getattr(config, key.ours)]
    return {
        "task_qa": bool(config.answers),
        "task_obj_predict": config.region_head,
        **present,
        **write_keys(sizes, config),
    }


def _is_member(config: LxmertConfig) -> bool:
    return (
        bert.is_encoder(config.text)
        and config.text.epsilon == 1e-12
        and config.text.padding == 0
        and config.masked_language == config.matching
        and (config.matching or not config.region_head)
    )


def _table(config: LxmertConfig) -> Table:
    prefix = "lxmert." if config.answers or config.masked_language else ""
    return (
        *under(ENCODER, "", prefix),
        *PRETRAINING,
        *under(ANSWERING, "", "answer_head."),
    )


def _original_table(config: LxmertConfig) -> Table:
    """The names of LXRTPretraining, or, for answers and nothing else, of the task's VQAModel."""
    task = config.answers and not config.masked_language
    return (
        *under(ENCODER, "", "lxrt_encoder.model.bert." if task else "bert."),
        *PRETRAINING,
        *under(ANSWERING, "", "" if task else "answer_head."),
    )


_DECODER = "cls.predictions.decoder.weight"

FAMILY = Family(
    name="lxmert",
    model=Lxmert,
    config=LxmertConfig,
    table=_table,
    read=_read,
    write=_write,
    is_member=_is_member,
    prefix="lxmert.",
    tied={_DECODER: "lxmert.embeddings.word_embeddings.weight"},
    unused=bert.UNUSED,
)
ORIGINAL = Family(
    name="lxmert-original",
    model=Lxmert,
    config=LxmertConfig,
    table=_original_table,
    tied={_DECODER: "bert.embeddings.word_embeddings.weight"},
)
