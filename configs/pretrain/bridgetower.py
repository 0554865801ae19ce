"""BridgeTower base (Xu et al. 2023): every fusion layer hears from the encoders' last layers.

From the paper (section 4 and appendix A; table 5, rows of the base model): CLIP's ViT-B/16 at
288 px, six cross-modal layers with a bridge from each of the last six layers of both encoders,
masked language and matching, texts of 50 tokens, batch 4,096, 100,000 steps, 10 % warm-up, linear,
AdamW with decay 0.01, rate 1e-5 for encoders and five times that for the rest.
Ours: BERT-base in place of RoBERTa, and what that brings, as in meter_b16.py.

init_from: 'image' CLIP ViT-B/16's public weights, 'text' a BERT's.
Data: set data.source and data.root (docs/guides/adding_a_data_set.md).
"""

from configs.pretrain import meter_b16
from configs.sizes import sized
from mmjax.config import model_section


def get_config(arg=None):
    config = meter_b16.get_config()
    layers = {"dtype": "bfloat16", "remat": "full"}
    clip = {"patch_bias": False, "embedding_norm": True, "activation": "quick_gelu"}
    config.model = model_section(
        "bridgetower",
        image={"size": "B/16", "image_size": 288, "epsilon": 1e-5, **clip, **layers},
        text={"size": "base", "padding": 0, "dropout": 0.1, **layers},
        fusion={
            **{"width": 768, "depth": 6, "norm": "post", "epsilon": 1e-5, "dropout": 0.1},
            **{"project": True, "token_types": True},
            **layers,
        },
        matching=True,
        masked_language=True,
    )
    return sized(config, arg, meter_b16.adapt)
