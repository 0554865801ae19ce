import numpy as np

from tests.cases.case import NAMES, Case, renamed, texts

_NAMES = NAMES | {
    "regions": "visual_feats",
    "boxes": "visual_pos",
    "region_mask": "visual_attention_mask",
}
SMALL = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "l_layers": 2,
    "r_layers": 1,
    "x_layers": 2,
    "visual_feat_dim": 10,
    "vocab_size": 20,
    "max_position_embeddings": 12,
    "num_qa_labels": 5,
}
UNCOMMON = {
    **SMALL,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "l_layers": 1,
    "r_layers": 3,
    "x_layers": 1,
    "hidden_act": "relu",
    "type_vocab_size": 3,
    "num_attr_labels": 6,
    "visual_obj_loss": False,
}


def _regions(rng, batch=2, regions=5):
    corners = np.sort(rng.random((batch, regions, 2, 2)), axis=2)
    return {
        "regions": rng.normal(size=(batch, regions, 10)).astype(np.float32),
        "boxes": corners.reshape(batch, regions, 4).astype(np.float32),
    }


def _inputs(rng):
    return {**texts(rng), **_regions(rng)}


def _masked(rng):
    """Regions padded in another row than the text, and types."""
    inputs = {**texts(rng, batch=3, length=6), **_regions(rng, batch=3, regions=8)}
    mask = np.ones((3, 8), bool)
    mask[0, 5:] = False
    types = np.broadcast_to(np.arange(6) % 2, (3, 6)).astype(np.int64)
    return inputs | {"region_mask": mask, "text_type": types}


def _case(name, kind, config, inputs, **options):
    return Case(
        name=name,
        kind=kind,
        config=lambda t: t.LxmertConfig(**config),
        inputs=inputs,
        theirs=lambda inputs: renamed(inputs, _NAMES),
        **options,
    )


CASES = (
    _case("lxmert", "LxmertModel", SMALL, _inputs),
    _case("lxmert-masked", "LxmertModel", UNCOMMON, _masked),
    _case("lxmert-answering", "LxmertForQuestionAnswering", SMALL, _inputs, recorded=True),
    _case("lxmert-pretraining", "LxmertForPreTraining", SMALL, _masked),
    _case(
        "lxmert-pretraining-without-answers",
        "LxmertForPreTraining",
        {**UNCOMMON, "task_qa": False},
        _masked,
        # Without its head the class fills the place of the answers with some other number.
        outputs=lambda out: {k: out[k] for k in out if k != "question_answering_score"},
    ),
)
