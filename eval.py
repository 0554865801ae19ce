"""Score a checkpoint: retrieval, image-text matching, question answering.

    python eval.py --checkpoint=runs/mine --config=configs/evaluate/retrieval.py --output=scores
    python eval.py --checkpoint=runs/mine@best --config=configs/evaluate/vqa.py --output=scores

The checkpoint is a workdir of train.py (its latest checkpoint, or with @STEP or @best another one)
or the folder of one checkpoint. The model, the tokenizer and the data come from the checkpoint's
own config; the evaluation's data.source, data.root, data.split and data.size override them. The
output folder gets report.json (`metrics`, their `units`, examples), the examples' pictures and, for
questions, answers.json with every answer;
`python -m mmjax.evaluation.report --help` merges reports and draws them as a page.
"""

import json
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mmjax import commandline
from mmjax import config as configuration
from mmjax.data.tokenizer import TextTokenizer
from mmjax.errors import InputError
from mmjax.evaluation.encoding import Subject
from mmjax.evaluation.report import format_table, write_report
from mmjax.evaluation.suite import Evaluation, evaluation_data
from mmjax.folders import is_remote
from mmjax.sharding import check_batch_size, make_mesh
from mmjax.training.checkpoints import find_checkpoint, load_assets, load_parameters
from mmjax.training.state import abstract_params, graph_of


def evaluate(config: ConfigDict, checkpoint: str, output: Path) -> dict[str, float]:
    """Score a checkpoint, write the report, and return the metrics."""
    mesh = make_mesh(**config.mesh)
    check_batch_size(config.batch_size, mesh)
    folder = find_checkpoint(checkpoint)
    with jax.set_mesh(mesh):
        subject, trained, model = load_subject(str(folder), config, mesh)
        # Keys that are younger than the checkpoint have their default.
        data = {**configuration.train_config().data.to_dict(), **trained["data"]}
        data = evaluation_data(config.to_dict(), data)
        evaluation = Evaluation.open(config.to_dict(), data, model)
        if not evaluation.runs:
            raise InputError("the config asks for no evaluation: set retrieval.run, or another.")
        question_only = None
        if config.vqa.question_only:
            question_only, _, blind = load_subject(config.vqa.question_only, config, mesh)
            if blind.answers != model.answers:
                raise InputError(
                    f"vqa.question_only: {config.vqa.question_only} answers from another list than "
                    f"{checkpoint}; train both on the same questions."
                )
        result = evaluation.score(subject, output, question_only)
    if jax.process_index() == 0:
        path = write_report(
            output,
            result,
            checkpoint=checkpoint,
            step=int(folder.name),
            config=json.loads(configuration.to_json(config)),
        )
        print(format_table(result.metrics, result.units))
        logging.info("Wrote %s.", path)
    return result.metrics


def load_subject(
    checkpoint: str, config: ConfigDict, mesh: Mesh
) -> tuple[Subject, dict[str, Any], Any]:
    """The model in a checkpoint, with the config it was trained with."""
    assets = load_assets(checkpoint)
    trained = assets["config"]
    model = configuration.model_config(trained["model"])
    ema = config.ema and trained["optimizer"]["ema_decay"] > 0
    subject = Subject(
        graph=graph_of(model),
        params=load_parameters(checkpoint, abstract_params(model, mesh), ema=ema),
        mesh=mesh,
        tokenizer=TextTokenizer.from_json(assets["tokenizer"]),
        batch_size=config.batch_size,
        question_only=trained["question_only"],
        compiled={},
    )
    return subject, trained, model


def report_folder(output: str) -> Path:
    """The folder that is meant; pictures and pages are written to disks alone."""
    if is_remote(output):
        raise InputError(
            f"--output is {output}: reports are written to a disk. Name a folder of process 0, and "
            "copy it where it is to stay."
        )
    return Path(output)


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "A workdir, WORKDIR@STEP, WORKDIR@best.", required=True)
    flags.DEFINE_string("output", None, "The report's folder, made if absent.", required=True)
    commandline.run(
        lambda config: evaluate(config, flags.FLAGS.checkpoint, report_folder(flags.FLAGS.output))
    )
