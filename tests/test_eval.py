"""The scoring program, as a user runs it."""

import json
import shutil

import numpy as np
import pytest

import eval as scoring
import train
from mmjax.config import model_section
from mmjax.data.scenes import REGION_FEATURES
from mmjax.errors import InputError
from mmjax.training.checkpoints import find_checkpoint


def config_of(name):
    import importlib

    config = importlib.import_module(f"configs.evaluate.{name}").get_config()
    config.batch_size = 8
    config.data.update(split="test", size=20)
    return config.lock()


def test_captions_are_scored_both_ways(pretrained, tmp_path):
    config = config_of("retrieval")
    config.retrieval.update(rerank=5, examples=3)
    config.matching.examples = 4
    metrics = scoring.evaluate(config, str(pretrained), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["metrics"] == metrics
    assert set(report["units"]) == set(metrics)
    for direction in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            assert 0 <= metrics[f"retrieval/{direction}/R@{k}"] <= 100
            assert report["units"][f"retrieval/reranked/{direction}/R@{k}"] == "percent"
        assert metrics[f"retrieval/median_rank/{direction}"] >= 1
    assert metrics["retrieval/gallery_size"] == 20
    assert metrics["retrieval/captions"] == 100
    assert 0 <= metrics["itm/roc_auc"] <= 1
    assert metrics["itm/pairs"] == 200
    assert report["step"] == 4
    examples = report["examples"]
    assert len(examples["retrieval"]) == 3
    assert len(examples["matching"]) == len(examples["attention"]) == 4
    for example in examples["attention"]:
        maps = np.array(example["maps"])
        assert maps.shape == (len(example["tokens"]), 2, 2)
        assert (maps.sum(axis=(1, 2)) <= 1 + 1e-4).all()
        assert (tmp_path / "out" / example["picture"]).exists()


@pytest.mark.slow
def test_the_same_scores_whatever_the_batch_size(pretrained, tmp_path):
    config = config_of("retrieval")
    small = scoring.evaluate(config, str(pretrained), tmp_path / "a")
    config.batch_size = 24
    large = scoring.evaluate(config, str(pretrained), tmp_path / "b")
    assert small.keys() == large.keys()
    for name, value in small.items():
        assert large[name] == pytest.approx(value, abs=1e-4), name


def test_questions_are_scored_beside_a_blind_model(tiny_config, tmp_path):
    for objective in tiny_config.objectives.values():
        objective.weight = 0.0
    tiny_config.objectives.answering.weight = 1.0
    tiny_config.data.task = "questions"
    tiny_config.total_steps = 1
    train.train(tiny_config, tmp_path / "seeing")
    tiny_config.question_only = True
    train.train(tiny_config, tmp_path / "blind")
    config = config_of("vqa")
    config.vqa.question_only = str(tmp_path / "blind")
    config.vqa.examples = 5
    metrics = scoring.evaluate(config, str(tmp_path / "seeing"), tmp_path / "out")
    assert metrics["vqa/questions"] == 20
    assert {"vqa/accuracy", "vqa/question_only_accuracy", "vqa/accuracy/count"} < metrics.keys()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["units"]["vqa/accuracy"] == "percent"
    assert len(report["examples"]["vqa"]) == 5
    answers = json.loads((tmp_path / "out" / "answers.json").read_text())
    assert [row["question_id"] for row in answers] == list(range(20))
    # Alone, the blind model is scored on what it was trained on: the same grey pictures.
    config.vqa.question_only = ""
    alone = scoring.evaluate(config, str(tmp_path / "blind"), tmp_path / "alone")
    assert alone["vqa/accuracy"] == metrics["vqa/question_only_accuracy"]
    assert {"predicted", "question_only", "correct"} < report["examples"]["vqa"][0].keys()


def test_what_cannot_be_scored_is_refused(pretrained, tmp_path):
    config = config_of("retrieval")
    with pytest.raises(InputError, match="No checkpoint at"):
        scoring.evaluate(config, str(tmp_path / "nowhere"), tmp_path / "out")
    config.vqa.run = True
    with pytest.raises(InputError, match="merge the reports"):
        scoring.evaluate(config, str(pretrained), tmp_path / "out")
    config.retrieval.run = config.matching.run = False
    with pytest.raises(InputError, match=r"vqa needs a head .* model\.answers"):
        scoring.evaluate(config, str(pretrained), tmp_path / "out")
    config.vqa.run = False
    with pytest.raises(InputError, match="asks for no evaluation"):
        scoring.evaluate(config, str(pretrained), tmp_path / "out")


def test_two_towers_retrieve(tiny_config, tmp_path):
    """Whatever the key of the config that describes their contrastive head."""
    layers = {"width": 16, "heads": 2, "depth": 1}
    with tiny_config.unlocked():
        tiny_config.model = model_section(
            "two_tower",
            image={**layers, "image_size": 0, "patch_size": 32},
            text=layers,
            contrastive={"width": 8},
        )
    for name in ("matching", "masked_language"):
        tiny_config.objectives[name].weight = 0.0
    tiny_config.total_steps = 1
    train.train(tiny_config, tmp_path / "run")
    config = config_of("retrieval")
    config.retrieval.rerank = 0
    with pytest.raises(InputError, match=r"matching needs a head .* model\.matching"):
        scoring.evaluate(config, str(tmp_path / "run"), tmp_path / "out")
    config.matching.run = False
    metrics = scoring.evaluate(config, str(tmp_path / "run"), tmp_path / "out")
    assert metrics["retrieval/captions"] == 100
    config.retrieval.rerank = 2
    with pytest.raises(InputError, match=r"retrieval\.rerank needs a head .* model\.matching"):
        scoring.evaluate(config, str(tmp_path / "run"), tmp_path / "out")


def test_models_of_regions_answer_and_match(tiny_config, tmp_path):
    """They read other fields of the batch, and have no contrastive head."""
    with tiny_config.unlocked():
        tiny_config.model = model_section(
            "uniter",
            text={"width": 16, "heads": 2, "depth": 1},
            region_width=REGION_FEATURES,
            matching=True,
        )
    for objective in tiny_config.objectives.values():
        objective.weight = 0.0
    tiny_config.objectives.answering.weight = 1.0
    tiny_config.data.update(task="questions", regions=True)
    tiny_config.total_steps = 1
    train.train(tiny_config, tmp_path / "run")
    metrics = scoring.evaluate(config_of("vqa"), str(tmp_path / "run"), tmp_path / "vqa")
    assert metrics["vqa/questions"] == 20
    config = config_of("retrieval")
    with pytest.raises(InputError, match=r"retrieval needs a head .* model\.embedding_width"):
        scoring.evaluate(config, str(tmp_path / "run"), tmp_path / "out")
    config.retrieval.run = False
    metrics = scoring.evaluate(config, str(tmp_path / "run"), tmp_path / "matching")
    assert metrics["itm/pairs"] == 200
    assert 0 <= metrics["itm/roc_auc"] <= 1


def test_keys_that_a_checkpoint_is_too_old_for_have_their_default(pretrained, tmp_path):
    shutil.copytree(pretrained, tmp_path / "run")
    path = find_checkpoint(tmp_path / "run") / "assets" / "config.json"
    config = json.loads(path.read_text())
    for key in ("regions", "tags", "false_tags", "second_caption", "code_grid", "prompt"):
        del config["data"][key]
    path.write_text(json.dumps(config))
    scoring.evaluate(config_of("retrieval"), str(tmp_path / "run"), tmp_path / "out")
