import json

import pytest
import torch
from safetensors.torch import load_file

from diffusers_rcfd import CFDDistillationConfig, CFDDistillationTrainer, Evaluator, RCFDPipeline, load_image_data
from tests.toys import tiny_classifier, tiny_teacher

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def digits():
    return load_image_data(max_images=64)


@pytest.fixture(scope="module")
def evaluator(digits):
    torch.manual_seed(0)
    return Evaluator(tiny_classifier().eval(), digits, name="tiny", batch_size=64, cache_dir=False)


def trainer(folder, digits, evaluator, **overrides):
    options = {"student_steps": [2, 1], "objective": ["pd"], "max_train_steps": [6], "train_batch_size": 16,
               "learning_rate": 1e-2, "eval_steps": 2, "eval_num_images": 32, "checkpointing_steps": 1,
               "checkpoints_total_limit": 100}  # fmt: skip
    config = CFDDistillationConfig(str(folder), **(options | overrides))
    return CFDDistillationTrainer(tiny_teacher(4), None, config, digits, evaluator=evaluator)


def evaluations(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(line["stage"], line["step"]): line["FD(tiny)"] for line in lines if "FD(tiny)" in line}


def test_values_are_logged_and_the_best_weights_kept(tmp_path, digits, evaluator):
    trainer(tmp_path, digits, evaluator).train()
    found = evaluations(tmp_path)
    assert list(found) == [(f"{N}-step", step) for N in (2, 1) for step in (2, 4, 6)]
    for steps in (2, 1):
        best = RCFDPipeline.from_pretrained(tmp_path / f"best/{steps}-step")
        value = evaluator.evaluate_pipeline(best, 32, progress=False)["fd"]
        assert value == pytest.approx(min(found[f"{steps}-step", step] for step in (2, 4, 6)), rel=1e-5)
        last = RCFDPipeline.from_pretrained(tmp_path / f"{steps}-step")
        value = evaluator.evaluate_pipeline(last, 32, progress=False)["fd"]
        assert value == pytest.approx(found[f"{steps}-step", 6], rel=1e-5)
        saved = json.loads((tmp_path / "evaluation.json").read_text())[str(steps)]
        assert saved["metrics"]["fd"]["value"] == found[f"{steps}-step", 6]


@pytest.mark.parametrize("best_metric", ["fd", "is"])
def test_best_weights_as_the_result(tmp_path, digits, evaluator, best_metric):
    run = trainer(tmp_path, digits, evaluator, load_best_model_at_end=True, best_metric=best_metric)
    run.train()
    for steps in (2, 1):
        best, result = (load_file(tmp_path / folder / f"{steps}-step" / WEIGHTS) for folder in ("best", "."))
        assert all(torch.equal(best[name], result[name]) for name in best)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    label = {"fd": "FD(tiny)", "is": "IS(tiny)"}[best_metric]
    values = [line[label] for line in lines if line["stage"] == "1-step" and label in line]
    saved = json.loads((tmp_path / "evaluation.json").read_text())["1"]["metrics"][best_metric]["value"]
    assert saved == (min if best_metric == "fd" else max)(values)


def test_evaluation_changes_nothing_in_the_training(tmp_path, digits, evaluator):
    trainer(tmp_path / "with", digits, evaluator, ema_decay=0.5).train()
    trainer(tmp_path / "without", digits, evaluator, ema_decay=0.5, eval_steps=0).train()
    for steps in (2, 1):
        one, other = (load_file(tmp_path / folder / f"{steps}-step" / WEIGHTS) for folder in ("with", "without"))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_best_survives_a_resume(tmp_path, digits, evaluator):
    trainer(tmp_path / "whole", digits, evaluator, load_best_model_at_end=True).train()
    broken = trainer(tmp_path / "resumed", digits, evaluator, load_best_model_at_end=True)
    compute_loss = broken.compute_loss

    def interrupt(stage, batch):
        if broken.state.global_step == 5:
            raise KeyboardInterrupt
        return compute_loss(stage, batch)

    broken.compute_loss = interrupt
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    options = {"load_best_model_at_end": True, "resume_from_checkpoint": "latest"}
    trainer(tmp_path / "resumed", digits, evaluator, **options).train()
    assert evaluations(tmp_path / "whole") == evaluations(tmp_path / "resumed")
    for steps in (2, 1):
        one, other = (load_file(tmp_path / folder / f"{steps}-step" / WEIGHTS) for folder in ("whole", "resumed"))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_card_holds_the_evaluation(tmp_path, digits, evaluator):
    run = trainer(tmp_path, digits, evaluator)
    run.train()
    run.create_model_card(tmp_path / "1-step")
    card = (tmp_path / "1-step/README.md").read_text()
    value = json.loads((tmp_path / "evaluation.json").read_text())["1"]["metrics"]["fd"]["value"]
    assert "FD(tiny)" in card and f"{value:.2f}" in card


def test_evaluation_without_means(tmp_path, digits, evaluator):
    with pytest.raises(ValueError, match="`eval_steps` must be 0 without an `evaluator`, got 2"):
        trainer(tmp_path, digits, None)
    with pytest.raises(ValueError, match=r"`best_metric` must be one that the evaluator measures.*got 'kid'"):
        trainer(tmp_path, digits, evaluator, best_metric="kid")
    with pytest.raises(ValueError, match="`best_metric` must be one of .*got 'fid'"):
        trainer(tmp_path, digits, evaluator, best_metric="fid")
    with pytest.raises(ValueError, match="`load_best_model_at_end` must be False where `eval_steps` is 0"):
        trainer(tmp_path, digits, evaluator, load_best_model_at_end=True, eval_steps=0)
