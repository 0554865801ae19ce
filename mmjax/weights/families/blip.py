"""BLIP: three classes of `transformers`, and the original checkpoints.

BlipForImageTextRetrieval, BlipForQuestionAnswering, BlipForConditionalGeneration;
github.com/salesforce/BLIP of pre-training, retrieval, question answering and captioning.
"""

from collections.abc import Mapping
from typing import Any

from mmjax.decoding import GenerationConfig
from mmjax.errors import InputError
from mmjax.models.bert import BertConfig
from mmjax.models.blip import Blip, BlipConfig
from mmjax.models.vit import ViTConfig
from mmjax.weights.families import bert, timm
from mmjax.weights.families.albef import CROSS_BERT, DECODER, TRAINING_STATE, momentum, tied_head
from mmjax.weights.families.vit import resize_positions
from mmjax.weights.family import Family, Source
from mmjax.weights.keys import ACTIVATIONS, Fixed, Key, read_keys, write_keys
from mmjax.weights.names import Entry, Table, fused_attention, modules, under

IMAGE_KEYS = (
    Key("hidden_size", "width", 768),
    Key("num_hidden_layers", "depth", 12),
    Key("num_attention_heads", "heads", 12),
    Key("intermediate_size", "mlp_width", 3072),
    Key("hidden_act", "activation", "gelu", ACTIVATIONS),
    Key("layer_norm_eps", "epsilon", 1e-5),
    Key("image_size", "image_size", 384),
    Key("patch_size", "patch_size", 16),
)
TEXT_KEYS = (
    Key("vocab_size", "vocabulary_size", 30524),
    Key("hidden_size", "width", 768),
    Key("num_hidden_layers", "depth", 12),
    Key("num_attention_heads", "heads", 8),
    Key("intermediate_size", "mlp_width", 3072),
    Key("hidden_act", "activation", "gelu", ACTIVATIONS),
    Key("hidden_dropout_prob", "dropout", 0.0),
    Key("layer_norm_eps", "epsilon", 1e-12),
    Key("max_position_embeddings", "max_length", 512),
    Key("pad_token_id", "padding", 0, null=-1),
    Fixed("is_decoder", True),
    Fixed("tie_word_embeddings", True),
)
# `generate` there ends at the separator, whatever is called the end of a text.
TOKEN_KEYS = (
    Key("bos_token_id", "bos_token_id", 30522),
    Key("sep_token_id", "eos_token_id", 102),
    Key("pad_token_id", "pad_token_id", 0, null=0),
)

IMAGE: Table = (
    Entry("class_token", "embeddings.class_embedding", leading=1),
    Entry(
        "position_embedding",
        "embeddings.position_embedding",
        leading=1,
        resize=resize_positions,
    ),
    *modules({"patch": "embeddings.patch_embedding", "norm": "post_layernorm"}),
    *fused_attention("blocks/layers/self_attention/attention", "encoder.layers.{n}.self_attn.qkv"),
    *under(
        modules(
            {
                "self_attention/norm": "layer_norm1",
                "self_attention/attention/out": "self_attn.projection",
                "mlp/norm": "layer_norm2",
                "mlp/up": "mlp.fc1",
                "mlp/down": "mlp.fc2",
            }
        ),
        "blocks/layers/",
        "encoder.layers.{n}.",
    ),
)
# All but the image encoder has the same names in the original code and in `transformers`.
_TEXT: Table = (
    *under(CROSS_BERT, "text/", "text_encoder."),
    *under(DECODER, "text_decoder/", "text_decoder."),
    Entry("contrastive/temperature", "temp"),
    *modules(
        {
            "contrastive/image_projection": "vision_proj",
            "contrastive/text_projection": "text_proj",
            "matching/classifier": "itm_head",
        }
    ),
)


def _read(source: Source) -> BlipConfig:
    if source.has("visual_projection.weight"):
        raise InputError(
            f"{source.origin}: these are the weights of a BlipModel, which is not supported; "
            "BlipForImageTextRetrieval, BlipForQuestionAnswering and BlipForConditionalGeneration "
            "are."
        )
    json, origin = source.json, source.origin
    image, text = (json.get(f"{part}_config") or {} for part in ("vision", "text"))
    encoder = any(name.startswith("text_encoder.") for name in source.names)
    decoder = any(name.startswith("text_decoder.") for name in source.names)
    looks_at = "question" if encoder else "image"
    projected = source.has("vision_proj.weight")
    return BlipConfig(
        image=ViTConfig(**read_keys(IMAGE_KEYS, image, f"{origin}: vision_config")),
        text=BertConfig(**read_keys(TEXT_KEYS, text, f"{origin}: text_config"), types=0),
        encoder=encoder,
        decoder=looks_at if decoder else "",
        embedding_width=json.get("image_text_hidden_size", 256) if projected else 0,
        temperature=False,
        sees_padding=True,
        matching=source.has("itm_head.weight"),
        generation=GenerationConfig(**read_keys(TOKEN_KEYS, text, f"{origin}: text_config")),
    )


def _write(config: BlipConfig) -> dict[str, Any]:
    kinds = {
        "": "BlipForImageTextRetrieval",
        "question": "BlipForQuestionAnswering",
        "image": "BlipForConditionalGeneration",
    }
    return {
        "architectures": [kinds[config.decoder]],
        "model_type": "blip",
        "image_text_hidden_size": config.embedding_width or 256,
        "vision_config": {
            "model_type": "blip_vision_model",
            **write_keys(IMAGE_KEYS, config.image),
        },
        "text_config": {
            "model_type": "blip_text_model",
            "encoder_hidden_size": config.image.width,
            **write_keys(TEXT_KEYS, config.text),
            "bos_token_id": config.generation.start,
            "sep_token_id": config.generation.eos_token_id[0],
        },
    }


def _is_member(config: BlipConfig) -> bool:
    """Whether one of the three classes is this model: they share nothing and keep no scale."""
    retrieves = bool(config.embedding_width) and config.matching and not config.temperature
    answers = config.decoder == "question" and config.image.width == config.text.width
    captions = config.decoder == "image" and not config.encoder
    has_head = config.embedding_width or config.matching
    return (
        config.pair_token < 0
        and not config.text.types
        and len(config.generation.eos_token_id) == 1
        and (retrieves if not config.decoder else (answers or captions) and not has_head)
    )


def _tied_original(config: BlipConfig) -> Mapping[str, str]:
    tied = tied_head("text_decoder.bert.", "text_decoder.cls.")
    if config.shared:
        shared = [entry.theirs for entry in CROSS_BERT if "self_attention" not in entry.ours]
        for n in range(config.text.depth):
            for leaf in ("weight", "bias"):
                names = [f"{name.replace('{n}', str(n))}.{leaf}" for name in shared]
                tied |= {f"text_decoder.bert.{name}": f"text_encoder.{name}" for name in names}
    return tied


FAMILY = Family(
    name="blip",
    model=Blip,
    config=BlipConfig,
    table=lambda config: (*under(IMAGE, "image/", "vision_model."), *_TEXT),
    read=_read,
    write=_write,
    is_member=_is_member,
    tied=tied_head("text_decoder.bert.", "text_decoder.cls."),
    unused=bert.UNUSED,
)
ORIGINAL = Family(
    name="blip-original",
    model=Blip,
    config=BlipConfig,
    table=lambda config: (*under(timm.ENCODER, "image/", "visual_encoder."), *_TEXT),
    tied=_tied_original,
    unused=(*TRAINING_STATE, *bert.UNUSED),
)
MOMENTUM_FAMILY = momentum(ORIGINAL)
