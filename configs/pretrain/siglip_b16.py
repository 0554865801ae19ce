"""SigLIP B/16 (Zhai et al. 2023): two towers, and the sigmoid of every pair's similarity.

From the paper (sections 4.2, 4.6, 4.7 and 4.9; table 3's row of B with 196 patches) and
big_vision: attention-pooled image tower at 224 px, 64 text tokens of a 32,000 vocabulary, the
last token stands for the text, both ways attention with tanh-GELU, output width 768; scale ln 10
and bias -10 at the start; batch 32,768; Adam with b2 0.95, rate 1e-3, clipping at 1, 20,000
warm-up steps; decay 1e-4, which big_vision does not multiply with the rate: 0.1 here.
Ours: the vocabulary is WordPiece, trained on the texts, where theirs is SentencePiece of C4; the
schedule is a cosine to 0 over 100,000 steps, a twelfth of that row's 40 billion pairs.

Data: set data.source and data.root (docs/guides/adding_a_data_set.md).
"""

from configs.sizes import sized
from mmjax.config import model_section, train_config


def get_config(arg=None):
    config = train_config()
    config.total_steps = 100_000
    config.batch_size = 32_768
    config.data.image_size = 224
    config.data.text_length = 64
    config.data.vocabulary_size = 32_000
    layers = {"activation": "gelu_tanh", "epsilon": 1e-6, "remat": "products", "unroll": True}
    config.model = model_section(
        "two_tower",
        image={
            "size": "B/16",
            "image_size": 224,
            "pool": "attention",
            "dtype": "bfloat16",
            **layers,
        },
        text={
            "kind": "text_tower",
            **{"width": 768, "depth": 12, "heads": 12, "max_length": 64, **layers},
            **{"causal": False, "pool": "last", "head": True},
        },
        contrastive={
            **{"width": 768, "project_image": False, "project_text": False},
            **{"logit_bias": True, "factor": 10.0},
        },
    )
    config.objectives.sigmoid_contrastive.weight = 1.0
    config.optimizer.update(learning_rate=1e-3, b2=0.95, weight_decay=0.1, clip_norm=1.0)
    config.optimizer.first_moment = "bfloat16"
    config.optimizer.schedule.update(kind="cosine", warmup_steps=20_000)
    config.checkpoint.every = 5_000
    return sized(config, arg)
