"""The captioner that tutorials teach: an encoder of pictures, a decoder of words, beam search.

A ViT whose tokens a Transformer decoder looks at (Vaswani et al. 2017; as a captioner, Vinyals et
al. 2015 with Transformers), trained on the next word with label smoothing 0.1, as the original
Transformer. It writes by beam search: python -m mmjax.predict WORKDIR --image=PHOTO --caption.

Data: set data.source and data.root (docs/guides/adding_a_data_set.md).
"""

from configs.sizes import sized
from mmjax.config import model_section, train_config


def get_config(arg=None):
    config = train_config()
    config.total_steps = 20_000
    config.batch_size = 256
    config.data.update(image_size=224, text_length=32, crop_scale=0.5, flip=True)
    config.model = model_section(
        "captioner",
        image={"size": "S/16", "image_size": 224, "dtype": "bfloat16"},
        text={
            **{"kind": "bert", "size": "small", "norm": "pre", "epsilon": 1e-6},
            **{"depth": 6, "dropout": 0.1, "dtype": "bfloat16"},
        },
        # [CLS], [SEP] and [PAD] of a vocabulary that is trained here.
        generation={
            **{"bos_token_id": 2, "eos_token_id": (3,), "pad_token_id": 0},
            **{"num_beams": 4, "max_length": 32},
        },
    )
    config.objectives.captioning.update(weight=1.0, smoothing=0.1)
    config.optimizer.update(learning_rate=5e-4, weight_decay=0.05)
    config.optimizer.schedule.warmup_steps = 1_000
    return sized(config, arg, adapt)


def adapt(config):
    config.objectives.captioning.smoothing = 0.0
