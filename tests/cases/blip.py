import numpy as np

from tests.cases.case import LAYERS, UNCOMMON_LAYERS, Case, pictures, renamed, texts

TEXT = {"vocab_size": 20, "max_position_embeddings": 12, "bos_token_id": 18, "sep_token_id": 19}
IMAGE = {"image_size": 16, "patch_size": 8}
# Other heads, widths, depths, epsilons and activations; text and picture of different widths.
UNCOMMON = {
    "text_config": {**UNCOMMON_LAYERS, **TEXT, "hidden_act": "relu", "layer_norm_eps": 1e-5},
    "vision_config": {
        **LAYERS,
        "num_attention_heads": 4,
        "image_size": 24,
        "patch_size": 8,
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-3,
    },
    "image_text_hidden_size": 10,
}


def _config(**changes):
    parts = {
        "text_config": {**LAYERS, **TEXT},
        "vision_config": {**LAYERS, **IMAGE},
        "image_text_hidden_size": 12,
    }
    return lambda t: t.BlipConfig(**parts | changes)


def _pairs(rng, batch=2, **sizes):
    return {"image": pictures(rng, batch, **sizes), **texts(rng, batch)}


def _uncommon_pairs(rng):
    return _pairs(rng, batch=3, height=24, width=24)


def _captions(rng, **sizes):
    return _as_decoded(_pairs(rng, **sizes))


def _questions(rng, batch=2, **sizes):
    return _pairs(rng, batch, **sizes) | _as_decoded(texts(rng, batch, length=5))


def _as_decoded(inputs):
    names = {"text": "decoder_text", "text_mask": "decoder_mask"}
    return {names.get(name, name): array for name, array in inputs.items()}


def _caption_names(inputs):
    """There the only text of a captioning model is called as texts are everywhere."""
    ours = {"decoder_text": "text", "decoder_mask": "text_mask"}
    return renamed({ours.get(name, name): array for name, array in inputs.items()})


def _question_names(inputs):
    names = {"decoder_text": "decoder_input_ids", "decoder_mask": "decoder_attention_mask"}
    decoded = {name: inputs[name] for name in names}
    rest = {name: array for name, array in inputs.items() if name not in names}
    return renamed(rest) | renamed(decoded, names)


def _cosines(inputs):
    return renamed(inputs) | {"use_itm_head": np.asarray(False)}


def _with_logits(model, **arguments):
    """The class scores answers and returns no more of it than a loss."""
    seen = []
    hook = model.text_decoder.register_forward_hook(lambda *call: seen.append(call[-1].logits))
    outputs = model(**arguments)
    hook.remove()
    return {**outputs, "logits": seen[0]}


CASES = (
    Case(
        name="blip",
        recorded=True,
        kind="BlipForImageTextRetrieval",
        config=_config(),
        inputs=_pairs,
    ),
    Case(
        name="blip-uncommon",
        kind="BlipForImageTextRetrieval",
        config=_config(**UNCOMMON),
        inputs=_uncommon_pairs,
    ),
    Case(
        name="blip-contrastive",
        kind="BlipForImageTextRetrieval",
        config=_config(**UNCOMMON),
        inputs=_uncommon_pairs,
        theirs=_cosines,
        # Without its matching head the class gives cosines that name.
        outputs=lambda out: {"logits_per_image": out["itm_score"]},
    ),
    Case(
        name="blip-captioning",
        recorded=True,
        kind="BlipForConditionalGeneration",
        config=_config(),
        inputs=_captions,
        theirs=_caption_names,
    ),
    Case(
        name="blip-captioning-uncommon",
        kind="BlipForConditionalGeneration",
        config=_config(**UNCOMMON),
        inputs=lambda rng: _captions(rng, batch=3, height=24, width=24),
        theirs=_caption_names,
    ),
    Case(
        name="blip-answering",
        recorded=True,
        kind="BlipForQuestionAnswering",
        config=_config(),
        inputs=_questions,
        theirs=_question_names,
        call=_with_logits,
    ),
    Case(
        name="blip-answering-uncommon",
        kind="BlipForQuestionAnswering",
        # The decoder looks at the question with keys as wide as the picture's tokens.
        config=_config(
            **UNCOMMON
            | {
                "vision_config": {
                    **UNCOMMON["vision_config"],
                    "hidden_size": UNCOMMON_LAYERS["hidden_size"],
                }
            }
        ),
        inputs=lambda rng: _questions(rng, batch=3, height=24, width=24),
        theirs=_question_names,
        call=_with_logits,
    ),
)
