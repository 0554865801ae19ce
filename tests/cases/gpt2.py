"""GPT-2, and ViT with a GPT-2 that writes about what it sees."""

from tests.cases.case import LAYERS, UNCOMMON_LAYERS, Case, pictures, renamed, texts

DECODER = {"vocab_size": 20, "n_positions": 12, "n_embd": 8, "n_layer": 2, "n_head": 2}
UNCOMMON_DECODER = {
    "vocab_size": 23,
    "n_positions": 10,
    "n_embd": 12,
    "n_layer": 1,
    "n_head": 3,
    "n_inner": 20,
    "activation_function": "relu",
    "layer_norm_epsilon": 1e-3,
}
IMAGE = {"image_size": 16, "patch_size": 8}
NAMES = {
    "image": "pixel_values",
    "decoder_text": "decoder_input_ids",
    "decoder_mask": "decoder_attention_mask",
}


def _captions(rng):
    text = texts(rng, batch=3)
    return {
        "image": pictures(rng, batch=3),
        "decoder_text": text["text"],
        "decoder_mask": text["text_mask"],
    }


def _captioner(name, image, text, **options):
    return Case(
        name=name,
        kind="VisionEncoderDecoderModel",
        config=lambda t: t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            t.ViTConfig(**image, **IMAGE), t.GPT2Config(**text)
        ),
        inputs=_captions,
        theirs=lambda inputs: renamed(inputs, NAMES),
        **options,
    )


CASES = (
    Case(
        name="gpt2",
        recorded=True,
        kind="GPT2LMHeadModel",
        config=lambda t: t.GPT2Config(**DECODER),
        inputs=texts,
    ),
    Case(
        name="gpt2-uncommon",
        kind="GPT2LMHeadModel",
        config=lambda t: t.GPT2Config(**UNCOMMON_DECODER),
        inputs=lambda rng: texts(rng, batch=3, length=10, words=23),
    ),
    _captioner("captioner", LAYERS, DECODER, recorded=True),
    _captioner("captioner-projection", UNCOMMON_LAYERS, UNCOMMON_DECODER),
)
