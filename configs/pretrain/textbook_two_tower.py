"""The two-tower model that tutorials teach: two encoders, and the cosine of their vectors.

A ViT and a BERT, each with a linear map into one space, a learnt temperature, and the symmetric
cross-entropy over a batch (Radford et al. 2021, figure 3). Small enough for one GPU.

Data: set data.source and data.root (docs/guides/adding_a_data_set.md).
"""

from configs.sizes import sized
from mmjax.config import model_section, train_config


def get_config(arg=None):
    config = train_config()
    config.total_steps = 20_000
    config.batch_size = 512
    config.data.update(image_size=224, text_length=32, crop_scale=0.5, flip=True)
    config.model = model_section(
        "two_tower",
        image={"size": "S/16", "image_size": 224, "dtype": "bfloat16"},
        text={"size": "small", "norm": "pre", "epsilon": 1e-6, "dtype": "bfloat16"},
        contrastive={"width": 256},
    )
    config.objectives.contrastive.weight = 1.0
    config.optimizer.update(learning_rate=5e-4, weight_decay=0.1)
    config.optimizer.schedule.warmup_steps = 1_000
    return sized(config, arg)
