import numpy as np
from einops import rearrange

from tests.cases.case import LAYERS, NAMES, UNCOMMON_LAYERS, Case, renamed, texts

_NAMES = NAMES | {
    "regions": "visual_embeds",
    "region_mask": "visual_attention_mask",
    "region_type": "visual_token_type_ids",
}
SMALL = {**LAYERS, "vocab_size": 20, "max_position_embeddings": 12, "visual_embedding_dim": 10}
UNCOMMON = {
    **SMALL,
    **UNCOMMON_LAYERS,
    "hidden_act": "relu",
    "layer_norm_eps": 1e-5,
    "type_vocab_size": 3,
    "pad_token_id": 0,
}


def _inputs(rng, batch=2, length=7, regions=4):
    features = rng.normal(size=(batch, regions, 10)).astype(np.float32)
    return {**texts(rng, batch=batch, length=length), "regions": features}


def _masked(rng):
    """More regions than words, padded in another row than the text, and types of both."""
    inputs = _inputs(rng, batch=4, length=6, regions=9)
    mask = np.ones((4, 9), bool)
    mask[1, 4:] = False
    return inputs | {
        "region_mask": mask,
        "text_type": np.broadcast_to(np.arange(6) % 3, (4, 6)).astype(np.int64),
        "region_type": np.broadcast_to(np.arange(9) // 4, (4, 9)).astype(np.int64),
    }


def _in_choices(inputs):
    """VisualBertForMultipleChoice takes the choices of a question on an axis of their own."""
    theirs = renamed(inputs, _NAMES)
    return {name: rearrange(x, "(b c) ... -> b c ...", c=2) for name, x in theirs.items()}


def _case(name, kind, config, inputs, **options):
    return Case(
        name=name,
        kind=kind,
        config=lambda t: t.VisualBertConfig(**config),
        inputs=inputs,
        **{"theirs": lambda inputs: renamed(inputs, _NAMES), **options},
    )


CASES = (
    _case("visualbert", "VisualBertModel", SMALL, _inputs),
    _case("visualbert-masked", "VisualBertModel", UNCOMMON, _masked),
    _case("visualbert-pretraining", "VisualBertForPreTraining", SMALL, _inputs),
    _case(
        "visualbert-answering",
        "VisualBertForQuestionAnswering",
        {**UNCOMMON, "num_labels": 5},
        _masked,
        recorded=True,
    ),
    _case("visualbert-reasoning", "VisualBertForVisualReasoning", SMALL, _inputs),
    _case(
        "visualbert-choices",
        "VisualBertForMultipleChoice",
        UNCOMMON,
        _masked,
        theirs=_in_choices,
        outputs=lambda out: {"logits": out["logits"].reshape(-1, 1)},
    ),
)
