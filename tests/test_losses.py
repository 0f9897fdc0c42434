import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from diffusers_rcfd import RCFDScheduler, losses
from diffusers_rcfd.distillation.objectives import OBJECTIVES, Weights
from tests.toys import golden, toy_teacher

STUDENT_STEPS = (512, 4, 2, 1)
SETTINGS = ((1.0, 0.0, 0.0), (0.9, 0.0, 0.0), (0.95, 0.003, 0.75), (0.85, 0.003, 0.5))


@pytest.mark.parametrize("weighting", ["both", "x", "eps"])
@pytest.mark.parametrize("N", STUDENT_STEPS)
def test_golden_progressive_distillation(N, weighting):
    data = golden("distillation")
    scale = torch.ones((), requires_grad=True)
    target = data[f"N{N}_x_target"]
    alpha, sigma = RCFDScheduler().alpha_sigma(data[f"N{N}_t"], target)
    loss = losses.x0_loss(scale * data[f"N{N}_x_student"], target, alpha, sigma, weighting).mean()
    loss.backward()
    assert loss.item() == pytest.approx(data[f"N{N}_pd_{weighting}"].item(), rel=1e-5)
    assert scale.grad.item() == pytest.approx(data[f"N{N}_pd_{weighting}_grad"].item(), rel=1e-5)


@pytest.mark.parametrize("tau, beta, gamma", SETTINGS)
@pytest.mark.parametrize("N", STUDENT_STEPS)
def test_golden_rcfd(N, tau, beta, gamma):
    data = golden("distillation")
    scale = torch.ones((), requires_grad=True)

    def classify(x):
        features = F.relu(x.flatten(1) @ data["W"].T)
        return features, features @ data["V"].T

    student, logits = classify(scale * data[f"N{N}_x_student"])
    teacher, _ = classify(data[f"N{N}_x_target"])
    cfd = losses.feature_kl(student, teacher, tau).mean()
    entropy, diversity = losses.entropy(logits).mean(), losses.diversity(logits)
    terms = {"feature_kl": cfd, "entropy": entropy, "diversity": diversity}
    weights = OBJECTIVES["rcfd"](Weights(beta=beta, gamma=gamma))
    total = sum(weights[name] * term for name, term in terms.items())
    total.backward()
    expected = data[f"N{N}_rcfd_tau{tau}_beta{beta}_gamma{gamma}"]
    actual = torch.stack([total, cfd, entropy, diversity, scale.grad]).detach().double()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


def test_golden_base_loss():
    data = golden("distillation")
    scheduler, x0, t = RCFDScheduler(), data["x0"], data["base_t"]
    z_t = scheduler.add_noise(x0, data["base_noise"], t)
    loss = losses.x0_loss(toy_teacher(z_t, t), x0, *scheduler.alpha_sigma(t, x0)).mean()
    assert loss.item() == pytest.approx(data["base_both"].item(), rel=1e-5)


def test_closed_form_truncated_snr_is_the_larger_of_both_errors():
    scheduler, t = RCFDScheduler(), torch.tensor([3, 300, 512, 700, 1000])
    x0, x0_pred, eps = torch.randn((3, 5, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha, sigma = scheduler.alpha_sigma(t, x0)
    z = alpha * x0 + sigma * eps
    eps_pred = (z - alpha * x0_pred) / sigma
    of_x0, of_eps = ((a - b).square().flatten(1).mean(1) for a, b in ((x0_pred, x0), (eps_pred, eps)))
    torch.testing.assert_close(losses.x0_loss(x0_pred, x0, alpha, sigma), torch.maximum(of_x0, of_eps))


def test_closed_form_kl_of_two_classes():
    student, teacher = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0.0, math.log(2.0)]])
    # teacher / tau with tau = 1/2 is the distribution 1/5, 4/5; the student's is 1/4, 3/4
    expected = 0.2 * math.log(0.2 / 0.25) + 0.8 * math.log(0.8 / 0.75)
    assert losses.feature_kl(student, teacher, 0.5).item() == pytest.approx(expected, rel=1e-5)
    # with both sharpened the student's is 1/10, 9/10, and the loss carries tau^2
    expected = 0.25 * (0.2 * math.log(0.2 / 0.1) + 0.8 * math.log(0.8 / 0.9))
    assert losses.dual_temperature_kl(student, teacher, 0.5).item() == pytest.approx(expected, rel=1e-5)


def test_closed_form_entropy_and_diversity():
    uniform, one_hot = torch.zeros(4, 5), 1000 * torch.eye(5)
    torch.testing.assert_close(losses.entropy(uniform), torch.full((4,), math.log(5)))
    torch.testing.assert_close(losses.entropy(one_hot), torch.zeros(5))
    assert losses.diversity(uniform).item() == pytest.approx(-math.log(5))
    assert losses.diversity(one_hot).item() == pytest.approx(-math.log(5))  # each class once: as diverse as can be
    assert losses.diversity(one_hot[:1].expand(4, 5)).item() == pytest.approx(0, abs=1e-6)  # collapsed


def test_finite_with_one_hot_predictions():
    for logits in (1e4 * torch.eye(3), 1e4 * torch.eye(3)[:1].expand(3, 3)):
        logits = logits.clone().requires_grad_()
        (losses.entropy(logits).mean() + losses.diversity(logits)).backward()
        assert torch.isfinite(logits.grad).all()


def test_zero_loss_and_gradient_where_student_equals_target():
    features = torch.randn(3, 7, requires_grad=True)
    loss = losses.feature_kl(features, features.detach()).sum()
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6) and features.grad.abs().max() < 1e-6


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: losses.x0_loss(x.view(3, 1, 2, 3), y.view(3, 1, 2, 3), *_alpha_sigma()).sum(),
        lambda x, y: losses.feature_kl(x, y, 0.9).sum(),
        lambda x, y: losses.dual_temperature_kl(x, y, 1.7).sum(),
        lambda x, y: losses.entropy(x).sum(),
        lambda x, y: losses.diversity(x),
    ],
    ids=["x0_loss", "feature_kl", "dual_temperature_kl", "entropy", "diversity"],
)
def test_gradients_by_differences(loss):
    x, y = torch.randn((2, 3, 6), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.autograd.gradcheck(loss, (x.requires_grad_(), y))


def _alpha_sigma():
    return RCFDScheduler().alpha_sigma(torch.tensor([10, 500, 900]), torch.zeros(3, 1, 1, 1, dtype=torch.float64))


def test_unknown_weighting():
    with pytest.raises(ValueError, match="`weighting` must be 'both', 'x' or 'eps', got 'snr'"):
        losses.x0_weight(torch.ones(1), torch.ones(1), "snr")


def test_closed_form_spatial_losses():
    """Two positions, two channels: one position agrees in direction, the other is turned by a right angle."""
    student = torch.tensor([[3.0, 0.0], [0.0, 5.0]]).view(1, 2, 1, 2)
    teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]).view(1, 2, 1, 2)
    assert losses.spatial_l1(student, teacher).item() == pytest.approx((0 + 2) / 2)
    kl = [losses.feature_kl(student[..., i].flatten(1), teacher[..., i].flatten(1), 0.5) for i in range(2)]
    torch.testing.assert_close(losses.spatial_kl(student, teacher, 0.5), (kl[0] + kl[1]) / 2)
    scale = torch.rand(3, 1, 4, 4) + 0.5
    maps = torch.randn(3, 7, 4, 4)
    torch.testing.assert_close(losses.spatial_l1(scale * maps, maps), torch.zeros(3), rtol=0, atol=1e-5)


@given(t=st.integers(0, 1024), weighting=st.sampled_from(["both", "x", "eps"]), seed=st.integers(0, 2**32))
def test_student_equal_to_its_target_has_no_image_loss_and_no_gradient(t, weighting, seed):
    scheduler = RCFDScheduler(num_inference_steps=1)
    target = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    student = target.clone().requires_grad_()
    loss = losses.x0_loss(student, target, *scheduler.alpha_sigma(torch.full((3,), t), target), weighting)
    loss.sum().backward()
    assert loss.tolist() == [0] * 3 and student.grad.abs().max() == 0


@given(tau=st.floats(0.05, 10), scale=st.floats(0, 100), dimensions=st.integers(1, 64), seed=st.integers(0, 2**32))
def test_student_equal_to_its_teacher_has_no_feature_loss_and_no_gradient(tau, scale, dimensions, seed):
    """CFD where tau = 1, and the dual temperature at any tau; sums of probabilities are 1 to float32."""
    teacher = scale * torch.randn(3, dimensions, generator=torch.Generator().manual_seed(seed))
    for loss_of, temperature in ((losses.feature_kl, 1.0), (losses.dual_temperature_kl, tau)):
        student = teacher.clone().requires_grad_()
        loss = loss_of(student, teacher, temperature)
        loss.sum().backward()
        assert loss.tolist() == [0] * 3 and student.grad.abs().max() <= 1e-6 * max(1, temperature)
