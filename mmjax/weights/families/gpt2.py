"""GPT-2 in `transformers`: GPT2LMHeadModel."""

from collections.abc import Mapping
from typing import Any

from mmjax.models.gpt2 import GPT2Config, LanguageModel, LanguageModelConfig
from mmjax.weights.families.bert import resize_rows
from mmjax.weights.family import Family, Source
from mmjax.weights.generation import read_generation
from mmjax.weights.keys import ACTIVATIONS, Fixed, Key, read_keys, write_keys
from mmjax.weights.names import Entry, Table, fused_attention, modules, under

KEYS = (
    Key("vocab_size", "vocabulary_size", 50257),
    Key("n_embd", "width", 768),
    Key("n_layer", "depth", 12),
    Key("n_head", "heads", 12),
    Key("n_inner", "mlp_width", None, null=0),
    Key("activation_function", "activation", "gelu_new", ACTIVATIONS),
    Key("resid_pdrop", "dropout", 0.1),
    Key("layer_norm_epsilon", "epsilon", 1e-5),
    Key("n_positions", "max_length", 1024),
    Fixed("scale_attn_weights", True),
    Fixed("scale_attn_by_inverse_layer_idx", False),
    Fixed("tie_word_embeddings", True),
)

_CROSS = "cross_attention/attention/"
_LAYER: Table = (
    *fused_attention("self_attention/attention", "attn.c_attn"),
    Entry(f"{_CROSS}key", "crossattention.c_attn", part=(0, 2)),
    Entry(f"{_CROSS}value", "crossattention.c_attn", part=(1, 2)),
    *modules(
        {
            "self_attention/norm": "ln_1",
            "self_attention/attention/out": "attn.c_proj",
            "cross_attention/norm": "ln_cross_attn",
            f"{_CROSS}query": "crossattention.q_attn",
            f"{_CROSS}out": "crossattention.c_proj",
            "mlp/norm": "ln_2",
            "mlp/up": "mlp.c_fc",
            "mlp/down": "mlp.c_proj",
        }
    ),
)
DECODER: Table = (
    Entry("token_embedding", "wte", resize=resize_rows),
    *modules({"position_embedding": "wpe", "norm": "ln_f"}),
    # Kernels are 1×1 convolutions there, [in, out].
    *under(_LAYER, "blocks/layers/", "h.{n}.", transpose=False),
)

# Causal masks stored as if they were weights, by old versions.
UNUSED = (r".*\.(attn|crossattention)\.(masked_)?bias",)


def read_decoder(json: Mapping[str, Any], origin: str, cross: bool) -> GPT2Config:
    """The decoder that a config.json, or a part of one, describes."""
    return GPT2Config(**read_keys((*KEYS, _crossing(cross)), json, origin))


def write_decoder(config: GPT2Config, cross: bool) -> dict[str, Any]:
    """The config.json, or the part of one, of a decoder."""
    return {"model_type": "gpt2", **write_keys((*KEYS, _crossing(cross)), config)}


def _crossing(cross: bool) -> Fixed:
    return Fixed("add_cross_attention", cross)


def _read(source: Source) -> LanguageModelConfig:
    return LanguageModelConfig(
        text=read_decoder(source.json, source.origin, cross=False),
        generation=read_generation(source),
    )


def _write(config: Any) -> dict[str, Any]:
    return {"architectures": ["GPT2LMHeadModel"], **write_decoder(config.text, cross=False)}


FAMILY = Family(
    name="gpt2",
    model=LanguageModel,
    config=LanguageModelConfig,
    table=lambda config: under(DECODER, "text/", "transformer."),
    read=_read,
    write=_write,
    prefix="transformer.",
    tied={"lm_head.weight": "transformer.wte.weight"},
    unused=UNUSED,
)
