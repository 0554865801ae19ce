"""BridgeTower in `transformers`: BridgeTowerModel and its heads.

The published models have one projection for all layers of the fusion and a plain bridge to each of
them; other arrangements are not supported.
"""

from typing import Any

from mmjax.errors import InputError
from mmjax.models.bert import BertConfig
from mmjax.models.bridgetower import BridgeTower, BridgeTowerConfig
from mmjax.models.fusion import CoAttentionConfig
from mmjax.models.vit import ViTConfig
from mmjax.weights.families import bert, meter, openai_clip, roberta
from mmjax.weights.families.vit import resize_positions
from mmjax.weights.family import Family, Source
from mmjax.weights.keys import ACTIVATIONS, Fixed, Key, read_keys, write_keys
from mmjax.weights.names import Entry, Table, modules, under

IMAGE_KEYS = (
    Key("hidden_size", "width", 768),
    Key("num_hidden_layers", "depth", 12),
    Key("layer_norm_eps", "epsilon", 1e-5),
    Key("image_size", "image_size", 288),
    Key("patch_size", "patch_size", 16),
    Fixed("num_channels", 3),
    Fixed("share_layernorm", True),
)
FUSION_KEYS = (
    Key("hidden_size", "width", 768),
    Key("num_hidden_layers", "depth", 6),
)
KEYS = (
    Key("layer_norm_eps", "epsilon", 1e-5),
    Key("hidden_act", "activation", "gelu", ACTIVATIONS),
    Fixed("share_cross_modal_transformer_layers", True),
    Fixed("share_link_tower_layers", False),
    Fixed("link_tower_type", "add"),
    Fixed("tie_word_embeddings", False),
)
# What the layers of the fusion take from those of the text encoder.
_OF_TEXT = ("heads", "mlp_width", "norm", "activation", "epsilon", "dropout")
# Where `transformers` starts the logit scale: at CLIP's ln(1 / 0.07). It has no default for it.
_LOGIT_SCALE = 2.6592

IMAGE: Table = (
    Entry("class_token", "embeddings.class_embedding", leading=-1),
    Entry("position_embedding", "embeddings.position_embedding.weight", resize=resize_positions),
    *modules(
        {"patch": "embeddings.patch_embedding", "embedding_norm": "ln_pre", "norm": "ln_post"}
    ),
    *openai_clip.BLOCKS,
)


def _stream(name: str) -> Table:
    """What the fusion has for one modality. Its first layer has no bridge."""
    layers, bridge = f"cross_modal_{name}_layers.", f"cross_modal_{name}_link_tower."
    return (
        *under(meter.stream(name), "first/", f"{layers}0."),
        *under(meter.stream(name), "rest/layers/fusion/", layers + "{n}.", first=1),
        Entry(f"rest/layers/{name}_bridge", bridge + "{n}.LayerNorm"),
        *modules({f"{name}_norm": f"cross_modal_{name}_layernorm"}),
    )


HEADS: Table = (
    *modules(
        {
            "matching/classifier": "itm_score.fc",
            "contrastive/image_projection": "itc_image_head.fc",
            "contrastive/text_projection": "itc_text_head.fc",
            "pair_projection": "itc_cross_modal_head.fc",
        }
    ),
    Entry("contrastive/logit_scale", "logit_scale"),
    *under(meter.MASKED_LANGUAGE, "masked_language/", "mlm_score."),
)


def _table(config: Any) -> Table:
    has_head = config.matching or config.masked_language or config.embedding_width
    body = (
        *under(IMAGE, "image/", "vision_model.visual."),
        *under(roberta.ENCODER, "text/", "text_model."),
        *under((*meter.FUSION, *_stream("text"), *_stream("image")), "fusion/", ""),
    )
    return (*under(body, "", FAMILY.prefix if has_head else ""), *HEADS)


def _read(source: Source) -> BridgeTowerConfig:
    json, origin = source.json, source.origin
    image_json = json.get("vision_config") or {}
    image = read_keys(IMAGE_KEYS, image_json, f"{origin}: vision_config")
    if image_json.get("remove_last_layer", False):
        image["depth"] -= 1
    text = roberta.read_encoder(
        json.get("text_config") or {},
        f"{origin}: text_config",
        pooler=source.has("text_model.pooler.dense.weight"),
    )
    fusion = read_keys(FUSION_KEYS, json, origin)
    if fusion["width"] != text.width:
        raise InputError(
            f"{origin}: hidden_size is {fusion['width']} and that of text_config {text.width}; "
            "they are one in this family."
        )
    contrastive = source.has("itc_cross_modal_head.fc.weight")
    if contrastive and not isinstance(json.get("contrastive_hidden_size"), int):
        raise InputError(
            f"{origin}: contrastive_hidden_size, the width of the contrastive heads, is missing."
        )
    return BridgeTowerConfig(
        image=ViTConfig(**image, activation="quick_gelu", patch_bias=False, embedding_norm=True),
        text=text,
        fusion=CoAttentionConfig(**fusion, **_of_text(text)),
        **read_keys(KEYS, json, origin),
        matching=source.has("itm_score.fc.weight"),
        masked_language=source.has("mlm_score.decoder.weight"),
        embedding_width=json["contrastive_hidden_size"] if contrastive else 0,
    )


def _of_text(text: BertConfig) -> dict[str, Any]:
    return {name: getattr(text, name) for name in _OF_TEXT}


def _write(config: Any) -> dict[str, Any]:
    heads = {
        "ForContrastiveLearning": config.embedding_width,
        "ForImageAndTextRetrieval": config.matching,
        "ForMaskedLM": config.masked_language,
    }
    kind = next((kind for kind, wanted in heads.items() if wanted), "Model")
    contrastive = {
        "contrastive_hidden_size": config.embedding_width,
        "logit_scale_init_value": _LOGIT_SCALE,
    }
    return {
        "architectures": [f"BridgeTower{kind}"],
        "model_type": "bridgetower",
        **write_keys(KEYS, config),
        **write_keys(FUSION_KEYS, config.fusion),
        "num_attention_heads": config.fusion.heads,
        "vision_config": {
            "model_type": "bridgetower_vision_model",
            **write_keys(IMAGE_KEYS, config.image),
        },
        "text_config": {
            "model_type": "bridgetower_text_model",
            **roberta.write_encoder(config.text),
        },
        **(contrastive if config.embedding_width else {}),
    }


def _is_member(config: Any) -> bool:
    image, text = config.image, config.text
    return (
        image.pool == "class_token"
        and image.embedding_norm
        and image.norm_tokens
        and not image.patch_bias
        and (image.norm, image.activation) == ("pre", "quick_gelu")
        and (image.heads, image.mlp_width) == (image.width // 64, 4 * image.width)
        and roberta.is_encoder(text)
        and all(getattr(config.fusion, name) == value for name, value in _of_text(text).items())
    )


FAMILY = Family(
    name="bridgetower",
    model=BridgeTower,
    config=BridgeTowerConfig,
    table=_table,
    read=_read,
    write=_write,
    is_member=_is_member,
    prefix="bridgetower.",
    unused=bert.UNUSED,
)
