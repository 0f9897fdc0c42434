"""A loss and a source of pairs from outside the package: two functions, two registrations, and the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_rcfd import RCFDPipeline
from diffusers_rcfd.distillation.objectives import GUIDED_TERMS, needs_classifier, parse_terms
from diffusers_rcfd.distillation.terms import TERMS
from tests.test_examples import SMALL

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = '''
import sys

import torch

from diffusers_rcfd.cli.distill import main
from diffusers_rcfd.data.image_tensors import to_model_range
from diffusers_rcfd.distillation.pairs import Pair
from diffusers_rcfd.distillation.sources import SOURCES
from diffusers_rcfd.distillation.terms import TERMS, Term


def brightness(view):
    """The squared difference of the mean brightness, (B,)."""
    means = [image.flatten(1).mean(1) for image in (view.pair.x0, view.pair.x0_target)]
    return (means[0] - means[1]) ** 2


def denoising_pairs(student, teacher, rung, batch):
    """Two optimizer steps a batch, at the noisiest level: the teacher's x0, then the clean image."""
    scheduler, x0 = student.scheduler, batch["images"]
    t = torch.full((len(x0),), len(scheduler) - 1, device=x0.device)
    z_t = scheduler.add_noise(x0, batch["noise"], t)
    with torch.no_grad():
        targets = teacher(z_t, t), x0
    for target in targets:
        yield Pair(lambda: student(z_t, t), target, *scheduler.alpha_sigma(t, z_t))


TERMS["brightness"] = Term(brightness)
SOURCES["denoising"] = denoising_pairs
main(sys.argv[1:])
'''


def test_loss_and_source_from_outside_train_from_the_command_line(tmp_path):
    (tmp_path / "mine.py").write_text(SCRIPT)
    options = [*SMALL, "--output_dir", str(tmp_path / "run"), "--source", "denoising", "--student_steps", "2"]
    options += ["--terms", "brightness=2", "image=0.5", "--compare_with_pd", "False"]
    command = [sys.executable, str(tmp_path / "mine.py"), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/students/metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    for line in trained:
        assert line["loss"] == pytest.approx(2 * line["brightness"] + 0.5 * line["image"], rel=1e-5)
    assert RCFDPipeline.from_pretrained(tmp_path / "run/students/2-step").scheduler.config.num_inference_steps == 2


def test_terms_that_need_a_classifier_are_those_that_are_said_to():
    assert {name for name, term in TERMS.items() if term.needs == "classifier"} == set(GUIDED_TERMS)
    assert needs_classifier(parse_terms(["image=1", "feature_kl=0.5"])) and not needs_classifier({"l1": 1.0})
