"""Pre-training in minutes on a laptop: ViT + BERT-style encoder + co-attention on drawn scenes.

The objectives are those of ALBEF (Li et al. 2021) without momentum distillation: contrastive,
matching with hard negatives, masked language. Sizes, rate and steps are chosen for two CPU cores.
"""

from mmjax.config import train_config


def get_config(arg=None):
    config = train_config()
    config.total_steps = 560
    config.batch_size = 64
    config.data.image_size = 64
    config.data.text_length = 24
    width = {"width": 96, "heads": 3, "norm": "pre", "epsilon": 1e-6, "unroll": True}
    config.model.image.update(**width, depth=3, patch_size=16)
    config.model.text.update(**width, depth=3, max_length=40)
    config.model.fusion.update(**width, depth=2)
    config.model.embedding_width = 64
    config.objectives.contrastive.weight = 1.0
    config.objectives.matching.weight = 1.0
    config.objectives.masked_language.weight = 1.0
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule.warmup_steps = 40
    config.checkpoint.every = 280
    config.eval.data.size = 256
    config.eval.every = 280
    config.eval.losses = True
    return config
