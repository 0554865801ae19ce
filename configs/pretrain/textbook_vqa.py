"""The VQA model that tutorials teach: two encoders, cross-attention, a classifier of answers.

A ViT and a BERT; the question's tokens look at the picture's in two layers of cross-attention,
and an MLP on both pooled vectors scores a closed list of answers (Teney et al. 2018, for the
loss).

Data: set data.source and data.root (docs/guides/adding_a_data_set.md). Its records are questions.
"""

from configs.sizes import sized
from mmjax.config import model_section, train_config


def get_config(arg=None):
    config = train_config()
    config.total_steps = 20_000
    config.batch_size = 256
    config.data.update(task="questions", image_size=224, text_length=24)
    layers = {"norm": "pre", "epsilon": 1e-6, "dtype": "bfloat16"}
    config.model = model_section(
        "vision_language",
        image={"size": "S/16", "image_size": 224, **layers},
        text={"size": "small", **layers},
        fusion={
            **{"kind": "cross_attention", "width": 512, "depth": 2, "heads": 8, "project": True},
            **layers,
        },
        embedding_width=0,
        matching=False,
        masked_language=False,
    )
    config.objectives.answering.weight = 1.0
    config.optimizer.update(learning_rate=5e-4, weight_decay=0.05)
    config.optimizer.schedule.warmup_steps = 1_000
    return sized(config, arg)
