"""Train a vision-language model: pre-training and fine-tuning are recipes of this one program.

    python train.py --config=configs/quickstart.py --workdir=runs/mine
    python train.py --config=configs/quickstart.py --workdir=runs/mine --config.batch_size=128

A recipe is a file in configs/; any of its keys is overridden by --config.KEY=VALUE. All keys with
their meaning and default stand in mmjax/config.py. The common ones:

    total_steps, batch_size (global), seed    init_from (a workdir to take parameters from)
    data.source, data.root, data.image_size   objectives.NAME.weight (0 is off)
    optimizer.learning_rate, .schedule.kind   mesh.data, mesh.fsdp, mesh.tensor
    eval.every, checkpoint.every              log.every, log.wandb_project, log.profile

The workdir gets config.json, tokenizer.json, parameters.txt, metrics.jsonl, tensorboard/ and
checkpoints/. Started again with the same workdir, a run resumes from its last checkpoint; Ctrl-C
and SIGTERM write one and stop. A workdir may lie in object storage, --workdir=gs://BUCKET/RUN.
Several processes make one run with --distributed (docs/scale.md).
"""

import sys
from contextlib import closing

import jax
from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict

from mmjax import commandline
from mmjax import config as configuration
from mmjax.data import load_source, make_transform
from mmjax.data.pipeline import Source, train_batches
from mmjax.errors import InputError
from mmjax.evaluation.encoding import Subject
from mmjax.evaluation.losses import mean_losses
from mmjax.evaluation.suite import Evaluation, evaluation_data
from mmjax.sharding import check_batch_size, make_mesh, to_device
from mmjax.training.checkpoints import Checkpointer, load_assets
from mmjax.training.interruption import Interruption
from mmjax.training.monitor import Monitor
from mmjax.training.optimizer import optimizer_table
from mmjax.training.program import Program
from mmjax.training.start import load_tokenizer, log_changes, parameter_counts, resolve, start_state
from mmjax.training.state import TrainState
from mmjax.training.step import make_eval_step


def train(config: ConfigDict, workdir: epath.Path) -> bool:
    """Run a recipe to its last step, from wherever the workdir is; False: a signal came before."""
    configuration.check(config)
    mesh = make_mesh(**config.mesh)
    check_batch_size(config.batch_size, mesh, accumulate=config.optimizer.accumulate)
    source = load_source(config.data.to_dict())
    with (
        jax.set_mesh(mesh),
        Interruption() as interruption,
        Checkpointer(workdir, **config.checkpoint) as checkpointer,
    ):
        resumed = checkpointer.latest_step() is not None
        tokenizer = load_tokenizer(config, source, workdir, resumed)
        config = resolve(config, tokenizer, source)
        if resumed:
            log_changes(load_assets(workdir)["config"], config)
        program = Program.build(config, tokenizer, mesh)
        evaluator = Evaluator(program) if config.eval.every else None
        state = start_state(config, program.contents, mesh, checkpointer)
        write_description(program, state, workdir)

        first_step, last_step = int(state.step), config.total_steps
        if first_step >= last_step:
            logging.info("Nothing to do: step %d of %d is done.", first_step, last_step)
            return True
        with closing(open_batches(program, source, first_step)) as batches:
            batch = to_device(next(batches), mesh)
            train_step, step_flops = program.compile_step(state, batch)
            with Monitor(
                config, workdir, first_step=first_step, records=len(source), flops=step_flops
            ) as monitor:
                for step in range(first_step + 1, last_step + 1):
                    state, metrics = train_step(state, batch)
                    if step < last_step:  # read the next batch while the devices work
                        with monitor.waiting():
                            batch = to_device(next(batches), mesh)
                    monitor.observe(step, metrics)

                    ends = step == last_step or bool(monitor.stop_reason)
                    ends = ends or interruption.requested(step)
                    evaluate_and_save(step, state, program, evaluator, checkpointer, monitor, ends)
                    if ends:
                        break
    if monitor.stop_reason:
        raise InputError(monitor.stop_reason)
    return step == last_step


def evaluate_and_save(
    step: int,
    state: TrainState,
    program: Program,
    evaluator: "Evaluator | None",
    checkpointer: Checkpointer,
    monitor: Monitor,
    ends: bool,
) -> None:
    """What is due after a step; a checkpoint in any case where the run ends with it."""
    config, scores = program.config, None
    evaluates = evaluator is not None and (
        step % config.eval.every == 0 or step == config.total_steps
    )
    force = ends or (evaluates and bool(config.checkpoint.best_metric))
    if not evaluates and not checkpointer.due(step, force):
        return
    with monitor.pause():
        monitor.require_finite(step)
        try:
            if evaluator is not None and evaluates:
                scores = evaluator.score(state)
                monitor.scores(step, scores)
        finally:  # an evaluation that fails does not lose the steps before it
            failed = evaluates and scores is None
            checkpointer.save(step, state, program.assets, scores, force=force or failed)


def open_batches(program: Program, source: Source, first_step: int):
    """This process's rows of the training batches from `first_step` on."""
    config = program.config
    transform = make_transform(
        config.data.to_dict(),
        program.task.tokenizer,
        getattr(program.model, "answers", ()),
        augment=True,
        question_only=config.question_only,
    )
    return train_batches(
        source,
        transform,
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        start_step=first_step,
        threads=config.data.threads,
        workers=config.data.workers,
        on_bad_record=config.data.on_bad_record,
    )


class Evaluator:
    """The losses and the named evaluations of `config.eval`, on parameters as they are."""

    def __init__(self, program: Program):
        self.program, self.config = program, program.config.eval.to_dict()
        data = evaluation_data(self.config, program.config.data.to_dict())
        self.evaluation = Evaluation.open(self.config, data, program.model)
        check_batch_size(self.config["batch_size"], program.mesh, key="eval.batch_size")
        objectives = program.task.objectives.values()
        if self.config["losses"] and all(each.needs_reference for each in objectives):
            raise InputError(
                "eval.losses: every objective learns from the teacher alone, which evaluation has "
                "not. Set eval.losses=False, and score what the student is for."
            )
        if not (self.evaluation.runs or self.config["losses"]):
            raise InputError(
                "eval.every is set, but there is nothing to evaluate: set eval.losses, "
                "eval.retrieval.run, eval.matching.run or eval.vqa.run."
            )
        self.eval_step = make_eval_step(program.task)
        self.compiled: dict = {}

    def score(self, state: TrainState) -> dict[str, float]:
        """Metrics by name; of the moving average of the parameters where there is one."""
        program, evaluation = self.program, self.evaluation
        subject = Subject(
            graph=program.task.graph,
            params=state.params if state.ema is None else state.ema,
            mesh=program.mesh,
            tokenizer=program.task.tokenizer,
            batch_size=self.config["batch_size"],
            question_only=program.config.question_only,
            compiled=self.compiled,
        )
        scores = {}
        if self.config["losses"]:
            transform = make_transform(
                evaluation.data,
                program.task.tokenizer,
                getattr(program.model, "answers", ()),
                question_only=program.config.question_only,
            )
            scores = mean_losses(
                subject, self.eval_step, evaluation.source, transform, evaluation.data
            )
        return scores | evaluation.score(subject).metrics


def write_description(program: Program, state: TrainState, workdir: epath.Path) -> None:
    """The resolved config, the tokenizer, and what every parameter gets."""
    logging.info("%s", parameter_counts(state.params))
    if jax.process_index() == 0:
        configuration.save(program.config, workdir / "config.json")
        (workdir / "tokenizer.json").write_text(program.task.tokenizer.to_json())
        table = optimizer_table(program.config.optimizer.to_dict(), state.params)
        (workdir / "parameters.txt").write_text(table + "\n")


def main(config: ConfigDict) -> None:
    """Train, and tell a scheduler by the exit status whether to start the run again."""
    if not train(config, epath.Path(flags.FLAGS.workdir)):
        sys.exit(flags.FLAGS.interrupted_status)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The run's folder, made if absent.", required=True)
    flags.DEFINE_integer("interrupted_status", 0, "The exit status of a run stopped by a signal.")
    commandline.run(main)
