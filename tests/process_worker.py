"""One of the processes of several training runs, made one after the other.

python -m tests.process_worker --jobs=JOBS.json [--coordinator=… --num_processes=… --process_id=…]

A job is {"workdir": …, "config": {key: value}} on top of the tiny flagship recipe under SGD without
momentum, decay or clipping: what a step takes from the parameters is RATE × the gradient.
"""

import json
from pathlib import Path

from absl import app, flags, logging
from etils import epath

import train
from configs.pretrain import coattention_b16
from mmjax import distributed

RATE = 2.0**-5
JOBS = flags.DEFINE_string("jobs", None, "The file that lists them.", required=True)


def recipe(changes):
    config = coattention_b16.get_config("tiny")
    config.batch_size = 8
    config.data.size = 64
    for part in (config.model.image, config.model.text, config.model.fusion):
        part.update(width=16, mlp_width=32, depth=1)
    config.optimizer.update(name="sgd", b1=0.0, learning_rate=RATE, clip_norm=0.0, ema_decay=0.5)
    config.log.update(every=1, tensorboard=False)
    config.checkpoint.update(every=1, keep=9)
    config.update_from_flattened_dict(changes)
    return config.lock()


def main(_):
    distributed.join_if_asked()
    with distributed.ending_together():
        for job in json.loads(Path(JOBS.value).read_text()):
            train.train(recipe(job["config"]), epath.Path(job["workdir"]))


if __name__ == "__main__":
    distributed.define_flags()
    logging.set_verbosity(logging.WARNING)
    app.run(main)
