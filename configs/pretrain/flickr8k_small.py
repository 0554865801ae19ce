"""Pre-training from scratch on Flickr8k's published layout, small enough for two CPU cores.

    train.py --config=configs/pretrain/flickr8k_small.py --config.data.root=FOLDER --workdir=DIR

FOLDER holds Flickr8k.token.txt, Flickr_8k.{train,dev}Images.txt and a folder of pictures. The
objectives are those of the quickstart. A few thousand photographs make no good model: this recipe
shows the path on real data (docs/results.md has what it gives on a sample).
"""

from configs import quickstart
from configs.sizes import sized


def get_config(arg=None):
    config = quickstart.get_config()
    config.total_steps = 300
    config.data.source = "flickr8k"
    config.data.image_size = 112
    config.data.text_length = 32
    config.data.vocabulary_size = 2000
    config.data.crop_scale = 0.5
    config.data.flip = True
    # Few pictures are learnt by heart within a few hundred steps: everything here holds that back.
    for part in ("image", "text", "fusion"):
        config.model[part].dropout = 0.1
    config.optimizer.learning_rate = 7e-4
    config.optimizer.weight_decay = 0.1
    config.optimizer.schedule.warmup_steps = 60
    config.eval.data.size = 0
    config.eval.every = 100
    return sized(config, arg)
