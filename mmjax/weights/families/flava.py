"""FLAVA in `transformers`: FlavaModel, and FlavaForPreTraining without the picture tokenizer."""

from typing import Any

from mmjax.layers import LayerConfig
from mmjax.models.bert import BertConfig
from mmjax.models.flava import Flava, FlavaConfig
from mmjax.models.vit import ViTConfig
from mmjax.weights.families import bert, meter, vit
from mmjax.weights.family import Family, Source
from mmjax.weights.keys import ACTIVATIONS, Fixed, Key, Keys, read_keys, write_keys
from mmjax.weights.names import Entry, Table, modules, under


def _layers(depth: int) -> tuple[Key, ...]:
    return (
        Key("hidden_size", "width", 768),
        Key("num_hidden_layers", "depth", depth),
        Key("num_attention_heads", "heads", 12),
        Key("intermediate_size", "mlp_width", 3072),
        Key("hidden_act", "activation", "gelu", ACTIVATIONS),
        Key("hidden_dropout_prob", "dropout", 0.0),
        Key("layer_norm_eps", "epsilon", 1e-12),
        Key("qkv_bias", "qkv_bias", True),
    )


IMAGE_KEYS: Keys = (
    *_layers(12),
    Key("image_size", "image_size", 224),
    Key("patch_size", "patch_size", 16),
    Fixed("num_channels", 3),
)
TEXT_KEYS = (
    *_layers(12),
    Key("vocab_size", "vocabulary_size", 30522),
    Key("type_vocab_size", "types", 2),
    Key("max_position_embeddings", "max_length", 512),
    Key("pad_token_id", "padding", 0, null=-1),
)
FUSION_KEYS = _layers(6)
# Keys of the parts whose fields are the whole's here.
OF_IMAGE = (Key("mask_token", "mask_token", True), Key("vocab_size", "codes", 8192))
OF_FUSION = (Key("use_cls_token", "class_token", True),)
OF_ALL = (Key("projection_dim", "embedding_width", 768),)


def _read(source: Source) -> FlavaConfig:
    json, origin = source.json, source.origin
    image, text, fusion = (
        (json.get(part) or {}, f"{origin}: {part}")
        for part in ("image_config", "text_config", "multimodal_config")
    )
    return FlavaConfig(
        image=ViTConfig(**read_keys(IMAGE_KEYS, *image), pooler=True),
        text=BertConfig(**read_keys(TEXT_KEYS, *text), norm="pre", pooler=True),
        fusion=LayerConfig(**read_keys(FUSION_KEYS, *fusion)),
        **read_keys(OF_IMAGE, *image),
        **read_keys(OF_FUSION, *fusion),
        **read_keys(OF_ALL, json, origin),
        pretraining=source.has("itm_head.seq_relationship.weight"),
    )


def _write(config: FlavaConfig) -> dict[str, Any]:
    return {
        "architectures": ["FlavaForPreTraining" if config.pretraining else "FlavaModel"],
        "model_type": "flava",
        "hidden_size": config.fusion.width,
        "init_codebook": False,
        **write_keys(OF_ALL, config),
        "image_config": {
            "model_type": "flava_image_model",
            **write_keys(IMAGE_KEYS, config.image),
            **write_keys(OF_IMAGE, config),
        },
        "text_config": {"model_type": "flava_text_model", **write_keys(TEXT_KEYS, config.text)},
        "multimodal_config": {
            "model_type": "flava_multimodal_model",
            **write_keys(FUSION_KEYS, config.fusion),
            **write_keys(OF_FUSION, config),
        },
    }


def _words(ours: str, theirs: str) -> Table:
    """A head of masked words."""
    return (
        Entry(ours + "bias", theirs + "decoder.bias", resize=bert.resize_rows),
        *under(meter.MASKED_LANGUAGE, ours, theirs),
    )


_CODES: Table = modules(
    {"transform": "transform.dense", "norm": "transform.LayerNorm", "decoder": "decoder"}
)


def _table(config: FlavaConfig) -> Table:
    prefix = "flava." if config.pretraining else ""
    encoders: Table = (
        Entry("image/mask_token", "image_model.embeddings.mask_token", leading=1),
        Entry("fusion/class_token", "multimodal_model.cls_token", leading=1),
        *under(bert.EMBEDDINGS, "text/embeddings/", "text_model.embeddings."),
        # All three have the layers of a ViT.
        *under(vit.ENCODER, "image/", "image_model."),
        *under(vit.ENCODER, "text/", "text_model."),
        *under(vit.ENCODER, "fusion/", "multimodal_model."),
        Entry("contrastive/logit_scale", "logit_scale"),
        *modules(
            {
                "fusion/image_projection": "image_to_mm_projection",
                "fusion/text_projection": "text_to_mm_projection",
                "contrastive/image_projection": "image_projection",
                "contrastive/text_projection": "text_projection",
            }
        ),
    )
    return (
        *under(encoders, "", prefix),
        *modules(
            {
                "matching/pooler": "itm_head.pooler.dense",
                "matching/classifier": "itm_head.seq_relationship",
            }
        ),
        *_words("masked_language/", "mmm_text_head."),
        *_words("masked_text_alone/", "mlm_head."),
        *under(_CODES, "masked_image/", "mmm_image_head."),
        *under(_CODES, "masked_image_alone/", "mim_head."),
    )


def _is_member(config: FlavaConfig) -> bool:
    widths = {config.image.width, config.text.width, config.fusion.width}
    return vit.is_encoder(config.image) and (not config.pretraining or len(widths) == 1)


_HEADS = ("mim_head", "mlm_head", "mmm_image_head", "mmm_text_head")

FAMILY = Family(
    name="flava",
    model=Flava,
    config=FlavaConfig,
    table=_table,
    read=_read,
    write=_write,
    is_member=_is_member,
    prefix="flava.",
    tied={f"{head}.bias": f"{head}.decoder.bias" for head in _HEADS},
    unused=(*bert.UNUSED, r"image_codebook\..*"),
)
