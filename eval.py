"""Score a checkpoint: retrieval, image-text matching, question answering.

    python eval.py --checkpoint=runs/mine --config=configs/evaluate/retrieval.py --output=scores
    python eval.py --checkpoint=runs/mine@best --config=configs/evaluate/vqa.py --output=scores

The checkpoint is a workdir of train.py (its latest checkpoint, or with @STEP or @best another one)
or the folder of one checkpoint. The model, the tokenizer and the data come from the checkpoint's
own config; the evaluation's data.source, data.root, data.split and data.size override them. The
output folder gets report.json (`metrics`, their `units`, examples) and the examples' pictures;
`python -m mmjax.evaluation.report --help` merges reports and draws them as a page.
"""

from pathlib import Path

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
from mmjax.models import ModelConfig
from mmjax.sharding import check_batch_size, make_mesh
from mmjax.training.checkpoints import find_checkpoint, load_assets, load_parameters
from mmjax.training.state import abstract_params, graph_of

CONFIG = commandline.define_config("The evaluation, a file in configs/evaluate/.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A workdir, WORKDIR@STEP, WORKDIR@best.")
OUTPUT = flags.DEFINE_string("output", None, "The report's folder, made if absent.")


def evaluate(config: ConfigDict, checkpoint: str, output: Path) -> dict[str, float]:
    """Score a checkpoint, write the report, and return the metrics."""
    mesh = make_mesh(**config.mesh)
    check_batch_size(config.batch_size, mesh)
    folder = find_checkpoint(checkpoint)
    with jax.set_mesh(mesh):
        subject, trained, model = load_subject(str(folder), config, mesh)
        evaluation = Evaluation.open(config, evaluation_data(config, trained["data"]), model)
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
            config=configuration.from_dict(config.to_dict()).to_dict(),
        )
        print(format_table(result.metrics, result.units))
        logging.info("Wrote %s.", path)
    return result.metrics


def load_subject(
    checkpoint: str, config: ConfigDict, mesh: Mesh
) -> tuple[Subject, ConfigDict, ModelConfig]:
    """The model in a checkpoint, with the config it was trained with."""
    assets = load_assets(checkpoint)
    trained = configuration.from_dict(assets["config"])
    model = configuration.model_config(trained.model)
    subject = Subject(
        graph=graph_of(model),
        params=load_parameters(checkpoint, abstract_params(model, mesh), ema=config.ema),
        mesh=mesh,
        tokenizer=TextTokenizer.from_json(assets["tokenizer"]),
        batch_size=config.batch_size,
        compiled={},
    )
    return subject, trained, model


def main() -> None:
    """Check the flags and evaluate."""
    if CONFIG.value is None or not CHECKPOINT.value or not OUTPUT.value:
        raise InputError("give --checkpoint, --config and --output. See --help.")
    evaluate(CONFIG.value, CHECKPOINT.value, Path(OUTPUT.value))


if __name__ == "__main__":
    commandline.run(main)
