import json
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)

from diffusers_rcfd import CFDDistillationConfig, CFDDistillationTrainer, RCFDPipeline, load_image_data, losses
from diffusers_rcfd.distillation.ladder import ddim_target
from diffusers_rcfd.distillation.terms import spread
from diffusers_rcfd.models.denoiser import NETWORK_CALLS, Denoiser
from diffusers_rcfd.models.feature_classifier import FeatureClassifierOutput
from diffusers_rcfd.trainers.distillation import Guides
from tests.toys import golden, parameters, tiny_classifier, tiny_teacher, tiny_unet, toy_student, toy_teacher


@pytest.fixture(scope="module")
def digits():
    return load_image_data(max_images=64)


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(1)
    return tiny_classifier()


def trainer(folder, digits, teacher=None, classifier=None, student=None, **options):
    defaults = {
        "student_steps": [2, 1],
        "max_train_steps": [2],
        "train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "checkpointing_steps": 1,
    }
    config = CFDDistillationConfig(output_dir=str(folder), **(defaults | options))
    return CFDDistillationTrainer(teacher or tiny_teacher(), classifier, config, digits, student)


def begin(run):
    """The first rung at its start."""
    return run.begin_rung(0, run.teacher, run.freeze_guides())


def batch_of(run, stage, size=8, seed=0, **extra):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand((size, 1, 8, 8), generator=generator) * 2 - 1
    return {"images": images} | run.draw(stage, size, generator) | extra


def terms_of(run, stage, batch):
    """The loss of a batch, which has one pair."""
    (pair,) = run.pairs(stage, batch)
    return run.compute_loss(stage, pair)


class Toy(torch.nn.Module):
    """A closed-form network with one scale as its weight: another kind of network is one row."""

    config = tiny_unet().config

    def __init__(self, network):
        super().__init__()
        self.network, self.scale = network, torch.nn.Parameter(torch.ones(()))

    def forward(self, z, t):
        return self.scale * self.network(z, t)


@pytest.fixture
def toy_networks(monkeypatch):
    monkeypatch.setitem(NETWORK_CALLS, Toy, lambda network, z, t, labels: network(z, t))


@pytest.mark.parametrize("objective", ["pd", "rcfd"])
@pytest.mark.parametrize("N", [512, 4, 2, 1])
def test_golden_loss_through_the_trainer(N, objective, tmp_path, digits, toy_networks):
    """From clean images, noise and steps to loss and gradient, with the golden networks in place of U-Nets."""
    data = golden("distillation")
    run = trainer(tmp_path, digits, classifier=tiny_classifier(), student_steps=[N], objective=[objective],
                  temperature=[0.85], regularization_weight=[0.003], entropy_ratio=[0.5])  # fmt: skip
    stage = begin(run)
    stage.teacher = Denoiser(Toy(toy_teacher), stage.scheduler)
    stage.model = Toy(toy_student)

    def classify(x):
        features = torch.relu(x.flatten(1) @ data["W"].T)
        return type("Output", (), {"features": features, "logits": features @ data["V"].T})

    stage.guides = Guides(classify, None)
    batch = {"images": data["x0"], "noise": data[f"N{N}_noise"], "k": data[f"N{N}_t"] * N // 1024,
             "flip": torch.zeros(6, dtype=torch.bool)}  # fmt: skip
    terms = terms_of(run, stage, batch)
    terms["loss"].backward()
    # At N = 512 the golden target carries 1.3e-4 of its own rounding (see test_targets).
    tolerance = 2e-3 if N == 512 else 1e-5
    if objective == "pd":
        expected = {"loss": data[f"N{N}_pd_both"]}, data[f"N{N}_pd_both_grad"]
    else:
        *values, gradient = data[f"N{N}_rcfd_tau0.85_beta0.003_gamma0.5"]
        expected = dict(zip(("loss", "feature_kl", "entropy", "diversity"), values, strict=True)), gradient
    for name, value in expected[0].items():
        assert terms[name].item() == pytest.approx(value.item(), rel=tolerance)
    assert stage.model.scale.grad.item() == pytest.approx(expected[1].item(), rel=tolerance)


def test_ladder_saves_every_rung_and_returns_the_last(tmp_path, digits, classifier):
    run = trainer(tmp_path, digits, classifier=classifier, student_steps=[4, 2, 1], objective=["pd", "cfd", "rcfd"],
                  sample_steps=2, num_sample_images=4)  # fmt: skip
    last = run.train()
    assert last.scheduler.config.num_inference_steps == 1
    for N in (4, 2, 1):
        student = RCFDPipeline.from_pretrained(tmp_path / f"{N}-step")
        assert student.scheduler.config.num_inference_steps == N
        student.set_progress_bar_config(disable=True)
        student()
    assert torch.equal(parameters(student.unet), parameters(last.unet))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("4-step", 1), ("4-step", 2), ("2-step", 1), ("2-step", 2), ("1-step", 1), ("1-step", 2)
    ]  # fmt: skip
    assert {"loss", "feature_kl", "entropy", "diversity"} <= lines[-1].keys() and "feature_kl" not in lines[0]
    assert lines[0]["learning_rate"] == lines[2]["learning_rate"] > 0  # the schedule begins anew
    assert len(list((tmp_path / "samples").iterdir())) == 3


def test_each_student_starts_from_its_teacher_and_leaves_it_alone(tmp_path, digits):
    teacher = tiny_teacher()
    before = parameters(teacher.unet).clone()
    run = trainer(tmp_path, digits, teacher, objective=["pd"])
    first = begin(run)
    assert torch.equal(parameters(first.model), before) and first.model is not teacher.unet
    assert all(parameter.requires_grad for parameter in first.model.parameters())
    run.train()
    assert torch.equal(parameters(teacher.unet), before)
    assert not any(parameter.requires_grad for parameter in teacher.unet.parameters())


def test_students_have_no_dropout(tmp_path, digits):
    run = trainer(tmp_path, digits, tiny_teacher(dropout=0.5), objective=["pd"])
    stage = begin(run)
    stage.model.train()
    batch = batch_of(run, stage)
    assert terms_of(run, stage, batch)["loss"] == terms_of(run, stage, batch)["loss"]
    assert stage.model.config.dropout == 0 and run.teacher.unet.config.dropout == 0.5


@pytest.mark.parametrize("stop", [1, 3])
def test_resume_inside_a_rung_is_bit_identical(tmp_path, digits, classifier, stop):
    """Steps 0 and 1 are the first rung's, 2 to 3 the second's."""
    trainer(tmp_path / "whole", digits, classifier=classifier).train()
    run = trainer(tmp_path / "resumed", digits, classifier=classifier)
    compute_loss = run.compute_loss

    def interrupt(stage, pair):
        if run.state.global_step == stop:
            raise KeyboardInterrupt
        return compute_loss(stage, pair)

    run.compute_loss = interrupt
    with pytest.raises(KeyboardInterrupt):
        run.train()
    resumed = trainer(tmp_path / "resumed", digits, classifier=classifier, resume_from_checkpoint="latest")
    resumed.train()
    for rung in ("2-step", "1-step"):
        for name in (f"{rung}/unet/diffusion_pytorch_model.safetensors", f"{rung}/unet/config.json"):
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "resumed/metrics.jsonl").read_bytes()


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize("objective", ["pd", "rcfd"])
def test_training_lowers_the_loss_for_each_prediction_type(tmp_path, digits, classifier, prediction_type, objective):
    """A student that begins elsewhere, on noise levels where eps still says something of x0."""
    teacher = tiny_teacher(prediction_type=prediction_type, beta_schedule="linear")
    torch.manual_seed(5)
    run = trainer(tmp_path, digits, teacher, classifier, tiny_unet(), student_steps=[4], objective=[objective],
                  temperature=[1.0], regularization_weight=[1e-6])  # fmt: skip
    stage = begin(run)
    batch = batch_of(run, stage)
    batch["k"] = batch["k"].clamp(max=2)
    optimizer = torch.optim.Adam(stage.model.parameters(), 3e-3)
    values = []
    for _ in range(30):
        loss = terms_of(run, stage, batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.7 * values[0]
    assert stage.scheduler.config.prediction_type == prediction_type


def test_skipped_rungs_use_more_teacher_steps(tmp_path, digits):
    run = trainer(tmp_path, digits, student_steps=[4], teacher_steps=[8], objective=["pd"])
    stage = begin(run)
    scheduler, batch = stage.scheduler, batch_of(run, stage)
    assert stage.rung.teacher_steps == 8
    t = torch.tensor(scheduler.grid(4))[batch["k"]]
    z_t = scheduler.add_noise(batch["images"], batch["noise"], t)
    target = ddim_target(lambda z, t: run.teacher.unet(z, t).sample, scheduler, z_t, batch["k"], 4, 8)
    expected = losses.x0_loss(stage.model(z_t, t).sample, target, *scheduler.alpha_sigma(t, z_t)).mean()
    torch.testing.assert_close(terms_of(run, stage, batch)["loss"], expected)


def test_student_equal_to_its_target_takes_no_loss_and_no_gradient(tmp_path, digits, classifier):
    """One teacher step for each of the student's: the target is the teacher's own prediction."""
    for objective in ("pd", "cfd"):
        run = trainer(tmp_path, digits, None, classifier, student_steps=[4], teacher_steps=[1], objective=[objective],
                      temperature=[1.0])  # fmt: skip
        stage = begin(run)
        loss = terms_of(run, stage, batch_of(run, stage))["loss"]
        loss.backward()
        assert abs(loss.item()) < 1e-6
        assert max(parameter.grad.abs().max() for parameter in stage.model.parameters()) < 1e-4


def test_ablations_are_arguments(tmp_path, digits, classifier):
    def terms(**options):
        options = {"temperature": [0.9], "regularization_weight": [0.1], "entropy_ratio": [0.25]} | options
        run = trainer(tmp_path, digits, None, classifier, **options)
        stage = begin(run)
        return {name: value.item() for name, value in terms_of(run, stage, batch_of(run, stage)).items()}

    full = terms()
    parts = 0.1 * (0.25 * full["entropy"] + 0.75 * full["diversity"])
    assert full["loss"] == pytest.approx(full["feature_kl"] + parts)
    alone = terms(cfd_weight=0.0, entropy_ratio=[1.0])
    assert alone["loss"] == pytest.approx(0.1 * full["entropy"])
    alone = terms(cfd_weight=0.0, entropy_ratio=[0.0])
    assert alone["loss"] == pytest.approx(0.1 * full["diversity"])
    assert terms(objective=["cfd"])["loss"] == pytest.approx(full["feature_kl"])
    predictions = terms(distribution="predictions")["prediction_kl"]
    spatial = [terms(distribution="spatial", spatial_loss=loss, feature_stages=[1, -1]) for loss in ("l1", "kl")]
    assert (
        spatial[0]["entropy"] == pytest.approx(full["entropy"]) and spatial[0]["spatial"] != spatial[1]["spatial"] > 0
    )
    dual = terms(dual_temperature=True)["feature_kl"]
    assert len({round(value, 6) for value in (full["feature_kl"], predictions, dual)}) == 3
    assert terms(dual_temperature=True, temperature=[3.0])["feature_kl"] > 0
    mixture = terms(terms=["image=1", "feature_kl=0.5"])
    assert mixture["loss"] == pytest.approx(mixture["image"] + 0.5 * full["feature_kl"])
    assert mixture["image"] == pytest.approx(terms(objective=["pd"])["loss"])
    absolute = terms(objective=["l1"])
    assert absolute["loss"] == absolute["l1"] > 0


def test_class_conditional_ladder(tmp_path, digits, classifier):
    teacher = tiny_teacher(num_class_embeds=10)
    run = trainer(tmp_path, digits, teacher, classifier)
    last = run.train()
    last.set_progress_bar_config(disable=True)
    assert last(2, class_labels=[3, 4], output_type="pt").images.shape == (2, 1, 8, 8)
    run = trainer(tmp_path / "again", digits, teacher, classifier)
    stage = begin(run)
    batch = batch_of(run, stage, labels=torch.zeros(8, dtype=torch.int64))
    one, other = terms_of(run, stage, batch), terms_of(run, stage, batch | {"labels": batch["labels"] + 5})
    assert one["loss"] != other["loss"]


STOCK_SCHEDULERS = [
    DDPMScheduler(),
    DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", rescale_betas_zero_snr=True),
    PNDMScheduler(trained_betas=[1e-4 + 3e-5 * i for i in range(1000)], prediction_type="epsilon"),
    DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample", thresholding=True),
    DPMSolverSinglestepScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction"),
    EulerDiscreteScheduler(prediction_type="epsilon", num_train_timesteps=500),
]


@pytest.mark.parametrize("stock", STOCK_SCHEDULERS, ids=lambda stock: type(stock).__name__)
def test_any_stock_teacher(tmp_path, digits, classifier, stock):
    """Every objective on a saved class-conditional stock pipeline; its student keeps schedule and parametrisation."""
    torch.manual_seed(0)
    DDPMPipeline(tiny_unet(num_class_embeds=10), stock).save_pretrained(tmp_path / "stock")
    teacher = RCFDPipeline.from_pretrained(tmp_path / "stock")
    run = trainer(tmp_path / "run", digits, teacher, classifier, student_steps=[4, 2, 1],
                  objective=["pd", "cfd", "rcfd"], max_train_steps=[1])  # fmt: skip
    run.train()
    student = RCFDPipeline.from_pretrained(tmp_path / "run/1-step")
    assert not torch.equal(parameters(student.unet), parameters(teacher.unet))
    assert student.scheduler.config.prediction_type == stock.config.prediction_type
    alphas_cumprod = student.scheduler.alphas_cumprod.float()
    torch.testing.assert_close(alphas_cumprod, stock.alphas_cumprod, rtol=1e-3, atol=1e-6)
    student.set_progress_bar_config(disable=True)
    assert student(4, class_labels=[1, 2, 3, 4], output_type="pt").images.isfinite().all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"student_steps": [3]}, "`student_steps` must be a divisor of the teacher's 8 steps, got 3"),
        ({"student_steps": [16]}, "`student_steps` must be below the teacher's 8 steps, got 16"),
        ({"student_steps": [8]}, "`student_steps` must be below the teacher's 8 steps, got 8"),
        ({"student_steps": [2], "teacher_steps": [2]}, "`teacher_steps` must be 4, for 8 steps to become 2, got 2"),
        ({"student_steps": [2, 4]}, r"`student_steps` must be in falling order.*got \[2, 4\]"),
        ({"student_steps": [4, 4]}, "in falling order"),
        ({"student_steps": [4, 3]}, "each dividing the one before it"),
        ({"student_steps": [0]}, "`student_steps` must be positive integers"),
        ({"student_steps": [-4]}, "`student_steps` must be positive integers"),
        ({"objective": ["cfd"]}, "`classifier` must be given for the term 'feature_kl', got None"),
        ({"terms": ["toy=1"]}, r"`terms` must be of \('image', .*got 'toy'"),
        ({"terms": ["lpips=1"]}, "`lpips` must be given for the term 'lpips', got None"),
        ({"terms": ["image"]}, "`terms` must be of the form name=weight, .* got 'image'"),
        ({"terms": ["image=1", "image=2"]}, "each name once, .* got 'image=2'"),
        ({"terms": ["image=-1"]}, "with a weight of at least 0, got 'image=-1'"),
        ({"terms": ["image=0"]}, "one term or more with a weight above 0"),
        ({"source": "toy"}, r"`source` must be one of \('ladder',\), got 'toy'"),
    ],
)
def test_rungs_that_the_teacher_does_not_allow(tmp_path, digits, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, digits, tiny_teacher(8), **({"objective": ["pd"]} | options))


def test_rungs_beyond_the_schedule(tmp_path, digits):
    with pytest.raises(ValueError, match="at most T = 1024, got '1024"):
        trainer(tmp_path, digits, student_steps=[1024], objective=["pd"])


def test_classifier_student_and_images_that_do_not_fit(tmp_path, digits):
    with pytest.raises(ValueError, match="`classifier` must have at least 2 classes .* got 1"):
        trainer(tmp_path, digits, None, tiny_classifier(num_classes=1))
    trainer(tmp_path, digits, None, tiny_classifier(num_classes=1), objective=["cfd"])
    colour = tiny_teacher(in_channels=3, out_channels=3)
    with pytest.raises(ValueError, match=r"images of shape .* \(3, 8, 8\).*got \(1, 8, 8\)"):
        trainer(tmp_path, digits, colour, objective=["pd"])
    with pytest.raises(ValueError, match=r"`classifier` must take images of 3 channel\(s\), got one for 1"):
        trainer(tmp_path, load_image_data(channels=3, max_images=20), colour, tiny_classifier())
    with pytest.raises(
        ValueError, match="`student` must be a network with the teacher's sample_size=8, got 'sample_size=16'"
    ):
        trainer(tmp_path, digits, student=tiny_unet(sample_size=16), objective=["pd"])
    with pytest.raises(ValueError, match="`cfd_weight` must be above 0"):
        trainer(tmp_path, digits, None, tiny_classifier(), cfd_weight=0.0, regularization_weight=[0.0])


def test_collapsed_student_is_reported_once(tmp_path, digits, classifier):
    student = tiny_unet()
    torch.nn.init.zeros_(student.conv_out.weight)  # the same image from any noise
    options = {"objective": ["cfd"], "learning_rate": 1e-12}
    with pytest.warns(UserWarning, match="student of 2-step has collapsed by step 1: .* teacher's variety") as warned:
        trainer(tmp_path / "bad", digits, None, classifier, student, **options).train()
    assert len([warning for warning in warned if "collapsed" in str(warning.message)]) == 1
    lines = [json.loads(line) for line in (tmp_path / "bad/metrics.jsonl").read_text().splitlines()]
    assert [line["collapsed"] for line in lines[:2]] == [1, 1] and lines[0]["feature_variance_ratio"] < 0.01
    trainer(tmp_path / "good", digits, None, classifier, teacher_steps=[1], student_steps=[4], **options).train()
    lines = [json.loads(line) for line in (tmp_path / "good/metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["collapsed"] == 0
        assert line["feature_variance_ratio"] == pytest.approx(1, abs=1e-3)
        assert line["class_entropy_ratio"] == pytest.approx(1, abs=1e-3)


def test_student_of_one_class_is_told_by_its_predictions_closed_form():
    def output(logits):
        return FeatureClassifierOutput(logits=logits, features=torch.eye(4))

    certain = 50 * torch.nn.functional.one_hot(torch.arange(4), 4).float()
    ratios = spread(output(certain[:1].expand(4, 4)), output(certain))
    assert ratios["class_entropy_ratio"] == pytest.approx(1e-3 / (math.log(4) + 1e-3), rel=1e-4)
    assert ratios["feature_variance_ratio"] == 1
    halves = spread(output(certain[:2].repeat(2, 1)), output(certain))
    assert halves["class_entropy_ratio"] == pytest.approx(0.5, abs=1e-3)


def test_gradient_of_diversity_in_parts_is_that_of_the_whole_closed_form():
    logits = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    whole = losses.diversity(logits)
    (expected,) = torch.autograd.grad(whole, logits)
    mean = losses.log_mean_prediction(logits.detach())
    parts = [losses.diversity(part, mean) for part in logits.chunk(3)]
    (gradient,) = torch.autograd.grad(sum(parts) / 3, logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    assert all(part.item() == pytest.approx(whole.item(), rel=1e-12) for part in parts)
