"""ALIGN (Jia et al. 2021): EfficientNet-B7 and BERT-large, a contrast over noisy pairs.

From the paper (sections 4 and 5.1): label smoothing 0.1, a learnt temperature that starts at 1,
the text's first token with a linear map to 640 dimensions, 289 px crops of pictures of 346 px,
texts of 64 tokens, batch 16,384, rate 1e-3, 10,000 warm-up steps, linear decay over 1.2 million
steps, weight decay 1e-5.
Ours: AdamW, where the paper has LAMB; a vocabulary of 32,000 (100,000 there); batch norms keep
their statistics (docs/decisions.md), so start from public weights: init_from = {'image': FOLDER}.

Data: set data.source and data.root (docs/guides/adding_a_data_set.md).
"""

from configs.sizes import sized
from mmjax.config import model_section, train_config


def get_config(arg=None):
    config = train_config()
    config.total_steps = 1_200_000
    config.batch_size = 16_384
    config.data.image_size = 289
    config.data.text_length = 64
    config.data.vocabulary_size = 32_000
    config.data.crop_scale = 0.7
    config.data.flip = True
    config.model = model_section(
        "two_tower",
        image={"kind": "efficientnet", "size": "b7", "dtype": "bfloat16", "remat": "full"},
        text={"size": "large", "max_length": 64, "dtype": "bfloat16", "remat": "full"},
        contrastive={"width": 640, "project_image": False, "text_token": True, "temperature": 1.0},
    )
    config.objectives.contrastive.update(weight=1.0, smoothing=0.1)
    config.optimizer.update(learning_rate=1e-3, weight_decay=1e-5)
    config.optimizer.schedule.update(kind="linear", warmup_steps=10_000)
    config.optimizer.bounds = ((".*/temperature", (0.01, 10.0)),)
    config.checkpoint.every = 5_000
    return sized(config, arg, adapt)


def adapt(config):
    # Four stages instead of seven; the vector of a picture is 32 wide, as that of a text.
    config.model.image.update(
        **{"width_coefficient": 1.0, "depth_coefficient": 1.0, "unroll": True},
        **{"base_widths": (8, 16, 24, 32), "base_depths": (1, 1, 1, 1), "kernels": (3, 3, 3, 3)},
        **{"strides": (1, 2, 2, 2), "expansions": (1, 2, 2, 2)},
    )
    # A batch is learnt by heart in no time from a low temperature and with hard labels.
    config.model.contrastive.update(width=32, temperature=0.07)
    config.objectives.contrastive.smoothing = 0.0
