import numpy as np

from tests.cases.case import LAYERS, UNCOMMON_LAYERS, Case, texts


def _with_types(rng):
    inputs = texts(rng, batch=3)
    return inputs | {"text_type": np.broadcast_to(np.arange(7) > 2, (3, 7)).astype(np.int64)}


CASES = (
    Case(
        name="bert",
        recorded=True,
        kind="BertModel",
        config=lambda t: t.BertConfig(**LAYERS, vocab_size=20, max_position_embeddings=12),
        inputs=texts,
    ),
    Case(
        name="bert-types",
        kind="BertModel",
        config=lambda t: t.BertConfig(
            **UNCOMMON_LAYERS,
            vocab_size=20,
            max_position_embeddings=12,
            hidden_act="relu",
            layer_norm_eps=1e-6,
        ),
        inputs=_with_types,
    ),
    Case(
        name="bert-masked",
        recorded=True,
        kind="BertForMaskedLM",
        config=lambda t: t.BertConfig(
            **LAYERS, vocab_size=20, max_position_embeddings=12, hidden_act="gelu_new"
        ),
        inputs=texts,
    ),
    Case(
        name="bert-pretraining",
        kind="BertForPreTraining",
        config=lambda t: t.BertConfig(**LAYERS, vocab_size=20, max_position_embeddings=12),
        inputs=_with_types,
        # The masked words' scores have one name here, whatever stands beside them.
        outputs=lambda out: {("logits" if k == "prediction_logits" else k): out[k] for k in out},
    ),
)
