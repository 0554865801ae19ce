"""ViT and GPT-2 in `transformers`, the one writing about what the other sees.

VisionEncoderDecoderModel can be of any two models; these are those of the published captioner.
"""

from typing import Any

from mmjax.errors import InputError
from mmjax.models.captioner import Captioner, CaptionerConfig
from mmjax.models.gpt2 import GPT2Config
from mmjax.weights.families import gpt2, vit
from mmjax.weights.family import Family, Source
from mmjax.weights.generation import read_generation
from mmjax.weights.names import Table, modules, under

_PARTS = {"encoder": "vit", "decoder": "gpt2"}


def _read(source: Source) -> CaptionerConfig:
    for part, kind in _PARTS.items():
        if (found := (source.json.get(part) or {}).get("model_type")) != kind:
            raise InputError(
                f"{source.origin}: {part}.model_type is {found!r}; only {kind!r} is supported."
            )
    image, text = (source.json[part] for part in _PARTS)
    pooler = source.has("encoder.pooler.dense.weight")
    return CaptionerConfig(
        image=vit.read_encoder(image, f"{source.origin}: encoder", pooler),
        text=gpt2.read_decoder(text, f"{source.origin}: decoder", cross=True),
        generation=read_generation(source),
    )


def _write(config: Any) -> dict[str, Any]:
    return {
        "architectures": ["VisionEncoderDecoderModel"],
        "model_type": "vision-encoder-decoder",
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,  # of the two models with each other
        "encoder": vit.write_encoder(config.image),
        "decoder": {**gpt2.write_decoder(config.text, cross=True), "is_decoder": True},
    }


def _table(config: Any) -> Table:
    return (
        *under(vit.ENCODER, "image/", "encoder."),
        *under(gpt2.DECODER, "text/", "decoder.transformer."),
        *modules({"projection": "enc_to_dec_proj"}),
    )


FAMILY = Family(
    name="vision-encoder-decoder",
    model=Captioner,
    config=CaptionerConfig,
    table=_table,
    read=_read,
    write=_write,
    is_member=lambda config: vit.is_encoder(config.image) and isinstance(config.text, GPT2Config),
    tied={"decoder.lm_head.weight": "decoder.transformer.wte.weight"},
    unused=(*vit.FAMILY.unused, *gpt2.UNUSED),
)
