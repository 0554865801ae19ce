"""ALIGN (Jia et al. 2021): an EfficientNet and a BERT, a contrast over noisy pairs.

From the paper (sections 4.1 and 5): label smoothing 0.1, a learnt temperature that starts at 1,
BERT-large's first token with a linear map to the width of the picture's vector, 289 px crops of
pictures of 346 px, mirrored or not, texts of 64 tokens, batch 16,384, rate 1e-3, 10,000 warm-up
steps, linear decay over 1.2 million steps, weight decay 1e-5.
Ours: EfficientNet-B7, the largest that has public weights here and the largest but one of the
paper's ablation (section 6.1), so there is no row to reproduce: those of tables 1 to 5 have
EfficientNet-L2. B7's last stage is 640 wide. AdamW, where the paper has LAMB; a vocabulary of
32,000 (100,000 there); batch norms keep their statistics (docs/decisions.md), so start from
public weights: init_from = {'image': FOLDER}.

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
