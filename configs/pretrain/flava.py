"""FLAVA (Singh et al. 2022): encoders of pictures, of texts and of both, and five objectives.

From the paper (section 3 and appendix; nearest is FLAVA_MM, column 4 of table 4): three ViT-B/16
at 224 px, of 12, 12 and 6 layers, texts of 77 tokens, a global contrast, multimodal masked
modelling of words (15 %) and of picture codes (75 of 196 patches, in blocks), matching; batch
8,192, AdamW with decay 0.1, rate 1e-3, 10,000 warm-up steps, 150,000 steps in all.
Ours: pairs alone, where the paper mixes in pictures and texts of their own (their two objectives
are here too, on the pairs' halves); codes come from the data, where the paper takes DALL·E's
tokenizer.

Data: set data.source and data.root (docs/guides/adding_a_data_set.md). The batch's image_codes
are the source's.
"""

from configs.sizes import sized
from mmjax.config import model_section, train_config
from mmjax.data.scenes import IMAGE_CODES


def get_config(arg=None):
    config = train_config()
    config.total_steps = 150_000
    config.batch_size = 8_192
    config.data.update(image_size=224, text_length=77, code_grid=14)
    config.data.vocabulary_size = 30_522
    config.masking.update(patches=75 / 196, conditional=False)
    layers = {"norm": "pre", "epsilon": 1e-12, "dtype": "bfloat16", "remat": "full"}
    config.model = model_section(
        "flava",
        image={"size": "B/16", "image_size": 224, "pooler": True, **layers},
        text={"size": "base", "padding": 0, "pooler": True, **layers},
        fusion={"width": 768, "depth": 6, "heads": 12, **layers},
        pretraining=True,
        codes=8_192,
    )
    config.objectives.contrastive.weight = 1.0
    config.objectives.matching.update(weight=1.0, negatives="random")
    for name in ("masked_language", "masked_codes"):
        config.objectives[name].weight = 1.0
        config.objectives[f"{name}_alone"].weight = 1.0
    config.optimizer.update(learning_rate=1e-3, b2=0.999, weight_decay=0.1)
    config.optimizer.schedule.warmup_steps = 10_000
    config.checkpoint.every = 5_000
    return sized(config, arg, adapt)


def adapt(config):
    config.data.code_grid = 4
    config.model.codes = IMAGE_CODES
