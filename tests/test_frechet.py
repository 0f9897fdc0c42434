"""The Frechet term: values and gradients against closed forms, parts against the whole, and what it refuses."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_rcfd.losses.frechet import (
    FrechetLoss,
    FrechetMoments,
    FrechetQueue,
    Moments,
    PrincipalComponents,
    build_space,
    compute_moments,
    distance_and_gradient,
    frechet,
    pixels,
)

ROOT = Path(__file__).parents[1]


def gaussian(n, size, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
    return scale * torch.randn(n, size, generator=generator, dtype=torch.float64) @ mixing + 0.1 * seed


def distance_by_autograd(features, real):
    """L of a batch without memory, by the matrix root of torch's own eigendecomposition, differentiable."""
    mean, covariance = features.mean(0), torch.cov(features.T, correction=0)
    values, vectors = torch.linalg.eigh(real.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace_of_root = torch.linalg.eigvalsh(root @ covariance @ root).sqrt().sum()
    return (mean - real.first).square().sum() + covariance.trace() + real.covariance.trace() - 2 * trace_of_root


def test_gradient_closed_form_of_a_linear_generator():
    """x = W n with n whitened: S = W W^T, and for W and S_r diagonal L is the sum of (w_i - r_i)^2."""
    noise = gaussian(200, 5, seed=1)
    noise = noise - noise.mean(0)
    noise = torch.linalg.solve_triangular(torch.linalg.cholesky(noise.T @ noise / len(noise)), noise.T, upper=False).T
    w = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5], dtype=torch.float64, requires_grad=True)
    shift = torch.full((5,), 0.3, dtype=torch.float64, requires_grad=True)
    r = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)  # the last one singular
    real = Moments(torch.zeros(5, dtype=torch.float64), torch.diag(r**2))

    features = noise * w + shift
    loss = frechet(features, compute_moments(features), real)
    loss.backward()
    torch.testing.assert_close(loss, ((w - r) ** 2).sum() + 5 * 0.3**2)
    torch.testing.assert_close(w.grad, 2 * (w.detach() - r))
    torch.testing.assert_close(shift.grad, torch.full_like(shift, 2 * 0.3))


def test_value_and_gradient_equal_those_of_the_formula_for_covariances_that_do_not_commute():
    real = compute_moments(gaussian(300, 12, seed=2))
    features = gaussian(80, 12, seed=3).requires_grad_()
    loss = frechet(features, compute_moments(features), real)
    (found,) = torch.autograd.grad(loss, features)
    expected_loss = distance_by_autograd(features, real)
    (expected,) = torch.autograd.grad(expected_loss, features)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(found, expected)


def test_value_is_that_of_the_metric():
    from diffusers_rcfd.evaluation.metrics import frechet_distance

    one, two = gaussian(100, 9, seed=1), gaussian(100, 9, seed=2)
    loss = distance_and_gradient(compute_moments(one), compute_moments(two))[0]
    moments = [(x.numpy().mean(0), np.cov(x.numpy(), rowvar=False, bias=True)) for x in (one, two)]
    assert loss.item() == pytest.approx(frechet_distance(*moments[0], *moments[1]), rel=1e-9)


def test_gradient_through_the_running_moments_is_divided_by_the_share_of_the_batch():
    real, start = compute_moments(gaussian(300, 6, seed=2)), compute_moments(gaussian(300, 6, seed=3))
    features = gaussian(40, 6, seed=4).requires_grad_()
    memory = FrechetMoments(real, start, decay=0.9)
    (found,) = torch.autograd.grad(frechet(features, memory.include(features), real), features)

    mean = 0.9 * start.first + 0.1 * features.mean(0)
    second = 0.9 * start.second + 0.1 * features.T @ features / 40
    covariance = second - torch.outer(mean, mean)
    product = torch.linalg.eigvals(covariance @ real.covariance).real
    loss = (mean - real.first).square().sum() + covariance.trace() - 2 * product.sqrt().sum()
    (expected,) = torch.autograd.grad(loss, features)
    torch.testing.assert_close(found, expected / 0.1)


def test_a_queue_has_the_moments_of_its_last_images_and_the_gradient_of_the_batch():
    real, images = compute_moments(gaussian(300, 6, seed=2)), gaussian(100, 6, seed=3)
    queue = FrechetQueue(real, images)
    for seed in range(4, 8):
        features = gaussian(30, 6, seed=seed)
        images = torch.cat([images[30:], features])
        expected = compute_moments(images)
        included = queue.include(features)
        queue.update(features)
        for student in (included, queue.student):
            torch.testing.assert_close(student.first, expected.first)
            torch.testing.assert_close(student.second, expected.second)
    whole = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(frechet(whole, compute_moments(whole), real), whole)
    part = features.clone().requires_grad_()
    (found,) = torch.autograd.grad(frechet(part, queue.student, real), part)
    torch.testing.assert_close(found, expected[-30:] * 100 / 30)
    with pytest.raises(ValueError, match="`features` must be a batch of at most 100, as the queue, got 101"):
        queue.update(gaussian(101, 6, seed=1))


def test_parts_of_a_batch_give_the_gradient_of_the_whole():
    real, start = compute_moments(gaussian(300, 6, seed=2)), compute_moments(gaussian(300, 6, seed=3))
    features = gaussian(40, 6, seed=4).requires_grad_()
    student = FrechetMoments(real, start).include(features)
    (expected,) = torch.autograd.grad(frechet(features, student, real), features)
    parts = [frechet(part, student, real) for part in features.split(10)]
    (found,) = torch.autograd.grad(sum(parts) / 4, features)
    torch.testing.assert_close(found, expected)
    assert {part.item() for part in parts} == {frechet(features, student, real).item()}


def test_singular_covariances_have_a_finite_gradient_that_descends():
    real = compute_moments(gaussian(20, 50, seed=1))  # rank 19 of 50
    features = gaussian(10, 50, seed=2).requires_grad_()  # rank 9
    optimizer = torch.optim.Adam([features], lr=0.03)
    values = []
    for _ in range(150):
        loss = frechet(features, compute_moments(features), real)
        optimizer.zero_grad()
        loss.backward()
        assert features.grad.isfinite().all()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.3 * values[0]

    collapsed = torch.ones(10, 50, dtype=torch.float64, requires_grad=True)  # no variance at all
    loss = frechet(collapsed, compute_moments(collapsed), real)
    expected = (1 - real.first).square().sum() + real.covariance.trace()
    assert loss.item() == pytest.approx(expected.item())
    (gradient,) = torch.autograd.grad(loss, collapsed)
    torch.testing.assert_close(gradient, 2 * (1 - real.first).expand(10, 50) / 10)

    constant = Moments(torch.zeros(50, dtype=torch.float64), torch.zeros(50, 50, dtype=torch.float64))
    assert frechet(features, compute_moments(features), constant).item() > 0


def test_mixed_precision_keeps_the_moments_in_float64():
    real, features = compute_moments(gaussian(300, 6, seed=2)), gaussian(40, 6, seed=3).bfloat16()
    expected = frechet(features.double(), compute_moments(features.double()), real)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student = compute_moments(features)
        assert student.second.dtype == torch.float64
        found = frechet(features.requires_grad_(), student, real)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert features.grad.dtype == torch.bfloat16 and features.grad.isfinite().all()


def test_memory_goes_on_bit_for_bit_from_its_state(tmp_path):
    real = compute_moments(gaussian(300, 6, seed=2))
    for memory in (FrechetMoments, FrechetQueue):
        start = gaussian(100, 6, seed=3)
        start = compute_moments(start) if memory is FrechetMoments else start
        first, second = memory(real, start), memory(real, start)
        first.update(gaussian(30, 6, seed=4))
        torch.save(first.state_dict(), tmp_path / "state.bin")
        second.load_state_dict(torch.load(tmp_path / "state.bin", weights_only=True))
        batch = gaussian(30, 6, seed=5)
        first.update(batch)
        second.update(batch)
        assert torch.equal(first.student.second, second.student.second)
    other = compute_moments(gaussian(300, 5, seed=2))
    with pytest.raises(ValueError, match="`pixels` must be of 5 dimensions, got 6"):
        FrechetMoments(other, other, space="pixels").load_state_dict(first.state_dict())


# Spaces


def images(n, seed=0):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_spaces_are_named_by_options():
    from tests.toys import tiny_classifier

    torch.manual_seed(0)
    classifier, real = tiny_classifier().eval(), images(300)
    assert torch.equal(build_space("pixels")(real), (real.double() + 1).flatten(1) / 2)
    assert torch.equal(build_space("features", classifier)(real[:4]), classifier(real[:4]).features)
    stage = classifier.spatial_features(real[:4], [0])[0]
    assert torch.equal(build_space("spatial:0", classifier)(real[:4]), stage.mean((2, 3)))
    assert build_space("spatial:-1", classifier)(real[:4]).ndim == 2
    components = build_space("components:5", real_images=real)
    assert components(real).shape == (300, 5)
    for name in ("pixel", "components", "components:x", "spatial", "features:1"):
        with pytest.raises(ValueError, match="`spaces` must be 'features', .*got '" + name):
            build_space(name, classifier, real)
    with pytest.raises(ValueError, match="`classifier` must be given for the space 'features'"):
        build_space("features")
    with pytest.raises(ValueError, match="`real_images` must be given"):
        build_space("components:3")
    with pytest.raises(ValueError, match="`num_components` must be at most 9, the rank of the pixels, got 10"):
        build_space("components:10", real_images=real[:10])


def test_principal_components_closed_form():
    wide, narrow = torch.eye(64)[3].view(1, 8, 8), torch.eye(64)[40].view(1, 8, 8)
    amounts = torch.linspace(-1, 1, 50).view(-1, 1, 1, 1)
    real = 0.8 * amounts * wide + 0.1 * amounts.flip(0).abs() * narrow
    space = PrincipalComponents(real, 2)
    covariance = compute_moments(space(real)).covariance
    torch.testing.assert_close(covariance, torch.diag(covariance.diagonal()), atol=1e-12, rtol=0)
    expected = pixels(0.8 * amounts * wide).var(0, correction=0).sum()
    torch.testing.assert_close(covariance[0, 0], expected)
    torch.testing.assert_close(space.directions.T @ space.directions, torch.eye(2, dtype=torch.float64))


def test_loss_moves_a_generator_in_every_space_that_has_weight():
    from tests.toys import tiny_classifier

    torch.manual_seed(0)
    classifier, real = tiny_classifier().eval().requires_grad_(False), images(400)
    spaces = {name: build_space(name, classifier, real) for name in ("features", "components:8", "pixels")}
    contrast, shift = torch.tensor(0.4, requires_grad=True), torch.tensor(-0.5, requires_grad=True)
    draw = lambda seed: contrast * images(100, seed) + shift  # noqa: E731
    loss = FrechetLoss(spaces, {"features": 1, "components:8": 2.0, "pixels": 0}, real, draw(1).detach(), decay=0.5)
    assert list(loss.moments) == ["features", "components:8", "pixels"]
    optimizer = torch.optim.Adam([contrast, shift], lr=0.05)
    values = []
    for seed in range(2, 32):
        features = loss.features(draw(seed))
        value = loss(features)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        before = loss.distances(features)
        loss.update(features)
        values.append(value.item())
    assert value.item() == pytest.approx(before["features"].item() + 2 * before["components:8"].item())
    parts = [{k: v[:50] for k, v in features.items()}, {k: v[50:] for k, v in features.items()}]
    whole = loss.include(features)
    assert [loss(part, whole).item() for part in parts] == pytest.approx([loss(features).item()] * 2, rel=1e-12)
    assert values[-1] < 0.2 * values[0] and contrast > 0.8 and abs(shift) < 0.1
    again = FrechetLoss(spaces, {"features": 1, "components:8": 2.0, "pixels": 0}, real, images(50), decay=0.5)
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again(features), loss(features))
    queue = FrechetLoss(spaces, {"features": 1, "components:8": 2.0, "pixels": 0}, real, images(120), queue=True)
    assert queue.moments["features"].queue.shape == (120, 96)
    with pytest.raises(ValueError, match="`spaces` must be"):
        again.load_state_dict({"features": {}})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"weights": {"pixels": 0.0}},
            r"`weights` must be at least 0, and one of them above 0, got \{'pixels': 0.0\}",
        ),
        ({"weights": {"pixels": -1.0}}, "`weights` must be at least 0"),
        ({"weights": {"features": 1.0}}, r"`weights` must be for \['pixels'\]"),
        ({"spaces": {}, "weights": {}}, "`weights` must be for"),
        ({"real_images": images(0)}, "`real_images` must be one image or more, got 'none'"),
        ({"student_images": images(0)}, "`student_images` must be one image or more"),
        ({"decay": 1.0}, r"`decay` must be in \[0, 1\), got 1.0"),
        ({"spaces": {"pixels": lambda x: x.flatten(1) * torch.nan}}, "`pixels` must be finite features, got 'NaN"),
        ({"spaces": {"pixels": lambda x: x}}, r"`pixels` must be features of shape \(B, D\)"),
    ],
)
def test_bad_arguments_are_an_error_that_names_them(options, words):
    defaults = {"spaces": {"pixels": pixels}, "weights": {"pixels": 1.0}}
    defaults |= {"real_images": images(100), "student_images": images(100)}
    with pytest.raises(ValueError, match=words):
        FrechetLoss(**defaults | options)


def test_too_few_real_images_warn_with_the_rank():
    start = compute_moments(pixels(images(100)))
    with pytest.warns(UserWarning, match="`pixels` has 64 dimensions and only 30 real images.*rank 29"):
        FrechetMoments(compute_moments(pixels(images(30))), start, space="pixels")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FrechetMoments(start, start, space="pixels")


# Several processes


def gradients(rank, processes):
    """Those of a linear generator, by the running average and the queue; each process has a part of every set."""
    generator = torch.nn.Linear(6, 6, bias=False, dtype=torch.float64)
    torch.nn.init.eye_(generator.weight)
    if processes > 1:
        generator = torch.nn.parallel.DistributedDataParallel(generator)
    real, start, batch = (gaussian(n, 6, seed=n)[rank::processes] for n in (240, 48, 24))
    found = []
    real = compute_moments(real)
    for memory in (FrechetMoments(real, compute_moments(start), decay=0.5), FrechetQueue(real, start)):
        features = generator(batch)
        generator.zero_grad()
        frechet(features, memory.include(features), real).backward()
        found.append(next(generator.parameters()).grad.clone())
    return torch.stack(found)


def test_two_processes_give_the_gradient_of_one(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", __name__, str(tmp_path)]
    runs = [subprocess.Popen([*command, str(rank)], cwd=ROOT, env=environment) for rank in (0, 1)]
    assert [run.wait() for run in runs] == [0, 0]
    expected = gradients(0, 1)
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.bin", weights_only=True), expected)


if __name__ == "__main__":
    from torch import distributed as dist

    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    torch.save(gradients(rank, 2), folder / f"{rank}.bin")
    dist.destroy_process_group()
