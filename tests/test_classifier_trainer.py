import json

import pytest
import torch

from diffusers_rcfd import ClassifierConfig, ClassifierTrainer, FeatureClassifier, load_image_data
from tests.toys import parameters, tiny_classifier


def config(folder, **options):
    defaults = {
        "max_train_steps": 60,
        "train_batch_size": 64,
        "learning_rate": 2e-3,
        "optimizer": "adamw",
        "random_flip": False,
        "random_crop_padding": 1,
        "logging_steps": 20,
        "checkpointing_steps": 30,
    }
    return ClassifierConfig(output_dir=str(folder), **(defaults | options))


@pytest.mark.parametrize("optimizer, learning_rate", [("adamw", 2e-3), ("sgd", 0.05)])
def test_learns_real_digits_and_reports_held_out_accuracy(tmp_path, optimizer, learning_rate):
    torch.manual_seed(0)
    digits = load_image_data()
    options = config(tmp_path, optimizer=optimizer, learning_rate=learning_rate)
    trainer = ClassifierTrainer(tiny_classifier(), options, digits)
    assert len(trainer.eval_dataset) == round(0.1 * 1797) and len(trainer.train_dataset) == 1797 - 180
    before = trainer.evaluate()
    classifier = trainer.train()
    assert before < 0.3 < 0.8 < trainer.accuracy <= 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["held_out_accuracy"] == trainer.accuracy and 0 <= lines[0]["accuracy"] <= 1
    saved = FeatureClassifier.from_pretrained(tmp_path)
    assert torch.equal(parameters(saved), parameters(classifier)) and not classifier.training
    trainer.classifier = saved
    assert trainer.evaluate() == trainer.accuracy


def test_mixed_precision(tmp_path):
    options = config(tmp_path, mixed_precision="bf16", max_train_steps=2)
    classifier = ClassifierTrainer(tiny_classifier(), options, load_image_data(max_images=100)).train()
    assert parameters(classifier).dtype == torch.float32


def test_resumed_run_is_bit_identical(tmp_path):
    """Batch norm's running statistics and the optimizer carry over."""
    digits = load_image_data(max_images=200)

    def run(folder, fail_at=None, **options):
        torch.manual_seed(0)
        options = config(folder, train_batch_size=16, max_train_steps=10, checkpointing_steps=4, **options)
        trainer = ClassifierTrainer(tiny_classifier(), options, digits)
        compute_loss = trainer.compute_loss

        def interrupt(stage, batch):
            if trainer.state.step == fail_at:
                raise KeyboardInterrupt
            return compute_loss(stage, batch)

        trainer.compute_loss = interrupt
        return trainer.train()

    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "resumed", fail_at=6)
    run(tmp_path / "resumed", resume_from_checkpoint="latest")
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


def test_data_without_fitting_labels(tmp_path):
    with pytest.raises(ValueError, match=r"class labels in 0\.\.9 for it, got no classes"):
        ClassifierTrainer(tiny_classifier(), config(tmp_path), load_image_data(label_column="", max_images=99))
    with pytest.raises(ValueError, match=r"class labels in 0\.\.4 for it, got 10 classes"):
        ClassifierTrainer(tiny_classifier(num_classes=5), config(tmp_path), load_image_data(max_images=99))


def test_step_that_is_not_finite_leaves_the_running_statistics_alone(tmp_path):
    """Batch norm sees an image that is infinite before anyone can tell."""
    trainer = ClassifierTrainer(
        tiny_classifier(), config(tmp_path, max_train_steps=2, logging_steps=2), load_image_data()
    )
    compute_loss, seen = trainer.compute_loss, []

    def poison(stage, batch):
        seen.append([buffer.clone() for buffer in trainer.classifier.buffers() if buffer.is_floating_point()])
        return compute_loss(
            stage, batch | {"images": batch["images"] / 0 if trainer.state.step == 1 else batch["images"]}
        )

    trainer.compute_loss = poison
    trainer.train()
    after = [buffer for buffer in trainer.classifier.buffers() if buffer.is_floating_point()]
    assert all(torch.equal(old, new) for old, new in zip(seen[1], after, strict=True))
    assert not all(torch.equal(old, new) for old, new in zip(seen[0], after, strict=True))
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["skipped_steps"] == 1
