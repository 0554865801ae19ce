"""Our flagship: ViT-B/16 at 256 px, BERT-base, and six co-attention layers a stream, from scratch.

The fusion is METER's (Dou et al. 2022, section 3.3: self-attention, then cross-attention, nothing
shared), the objectives are ALBEF's without its momentum model (Li et al. 2021, section 3.2):
contrastive, matching with hard negatives, masked language. No paper has exactly this model, so
there is no row to reproduce.

From METER: depth and width of the fusion, 10 % warm-up, AdamW with (0.9, 0.98), 100,000 steps.
From ALBEF: embedding width 256, temperature 0.07, 15 % of the words masked, 256 px, crops from
0.2, decay 0.02.
Ours: texts of 32 tokens (25 in ALBEF, 50 in METER), a vocabulary of 32,000; pre-norm layers and
bfloat16 throughout, which train from scratch without care; the mean of the patches in place of a
class token, because 256 of them fill a TPU's tiles and 257 do not; 16,384 pairs a step, at which
hard negatives of the whole global batch are hard, and a rate of 5e-4 for it.

Data: set data.source and data.root (docs/guides/adding_a_data_set.md).
"""

from configs.sizes import sized
from mmjax.config import model_section, train_config


def get_config(arg=None):
    config = train_config()
    config.total_steps = 100_000
    config.batch_size = 16_384
    config.data.image_size = 256
    config.data.text_length = 32
    config.data.vocabulary_size = 32_000
    config.data.crop_scale = 0.2
    config.data.flip = True
    layers = {"norm": "pre", "epsilon": 1e-6, "dtype": "bfloat16", "remat": "attention"}
    config.model = model_section(
        "vision_language",
        image={"size": "B/16", "image_size": 256, "pool": "mean", **layers},
        text={"size": "base", "max_length": 64, **layers},
        # Four times the encoders' rows: it stores less, and a v5e keeps a fifth of its HBM free.
        fusion={"width": 768, "depth": 6, **layers, "remat": "heads"},
        temperature=0.07,
    )
    config.objectives.contrastive.weight = 1.0
    config.objectives.matching.weight = 1.0
    config.objectives.masked_language.weight = 1.0
    config.optimizer.update(learning_rate=5e-4, b1=0.9, b2=0.98, weight_decay=0.02)
    config.optimizer.schedule.update(kind="linear", warmup_steps=10_000)
    config.optimizer.bounds = ((".*/temperature", (0.01, 0.5)),)
    config.checkpoint.every = 5_000
    return sized(config, arg)
