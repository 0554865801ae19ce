"""Plan a run on a TPU pod, without a TPU: does it fit, how long does it take, what does it cost.

    python -m mmjax.plan --config=configs/pretrain/siglip_b16.py --topology=v5e:16x16
    python -m mmjax.plan --config=configs/pretrain/siglip_b16.py --topology=v5e:2x2 \
        --config.batch_size=512 --schedules --price_per_chip_hour=1.2

The recipe's own training step is compiled for the topology by libtpu (pip install 'mmjax[plan]'),
which takes minutes and no data. --config.KEY=VALUE overrides as in train.py. docs/plan.md tells
how to read what is printed.
"""

import json
import sys
import tempfile
from pathlib import Path

import jax
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from mmjax import commandline
from mmjax.plan.compiler import compile_step
from mmjax.plan.plan import read
from mmjax.plan.report import format_plan, format_trials
from mmjax.plan.schedules import read_schedules, record_schedules
from mmjax.plan.search import search
from mmjax.plan.topology import find_topology

flags.DEFINE_string(
    "topology", None, "The pod, GENERATION:SHAPE in chips: v5e:16x16, v5p:4x4x4.", required=True
)
flags.DEFINE_bool("json", False, "Print JSON and nothing else.")
flags.DEFINE_bool("schedules", False, "Add the floor by the kernels' schedules: more minutes.")
flags.DEFINE_bool("search", False, "Where it does not fit: compile the changes that may help.")
flags.DEFINE_string("save_hlo", None, "Where to write the optimised program.")
flags.DEFINE_string("save_plan", None, "Where to keep the plan: NAME writes NAME.json, NAME.txt.")
flags.DEFINE_float("price_per_chip_hour", None, "To price the run by.", lower_bound=0)


def main(config: ConfigDict) -> None:
    """Compile, read, print."""
    options = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")  # whatever is in this machine is left alone
    jax.config.update("jax_enable_compilation_cache", False)
    with tempfile.TemporaryDirectory() as folder:
        if options.schedules:
            record_schedules(Path(folder))
        topology = find_topology(options.topology)
        logging.info("Compiling for %d chips; this takes minutes.", topology.chips)
        step = compile_step(config, topology)
        schedules = read_schedules(Path(folder))
    if options.save_hlo:
        Path(options.save_hlo).write_text(step.text)
    plan = read(step, schedules)
    title = config_flags.get_config_filename(options["config"])
    text = format_plan(plan, title, options.price_per_chip_hour)
    if options.save_plan:
        Path(f"{options.save_plan}.json").write_text(json.dumps(plan.as_json(), indent=2) + "\n")
        Path(f"{options.save_plan}.txt").write_text(text + "\n")
    print(json.dumps(plan.as_json()) if options.json else text)
    if options.search and not plan.fits:
        trials = format_trials(search(config, len(topology.devices), sys.argv[1:]))
        print("\n" + trials, file=sys.stderr if options.json else sys.stdout)


if __name__ == "__main__":
    commandline.run(main)
