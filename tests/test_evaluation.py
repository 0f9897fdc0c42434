"""Metrics against closed forms and torch-fidelity's own numbers, images against their seeds, and the evaluator."""

import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from diffusers_rcfd import EvaluationResult, Evaluator, FeatureClassifier, RCFDPipeline, RCFDScheduler
from diffusers_rcfd.evaluation.inception import INCEPTION_FILE, INCEPTION_URL, InceptionExtractor
from diffusers_rcfd.evaluation.metrics import (
    bootstrap_interval,
    fd_with_influence,
    frechet_and_gradient,
    frechet_distance,
    inception_score_with_influence,
    kid_with_blocks,
)
from diffusers_rcfd.evaluation.neighbours import draw_neighbours, find_neighbours
from diffusers_rcfd.evaluation.panel import Panel
from diffusers_rcfd.evaluation.pixels import PixelExtractor
from diffusers_rcfd.evaluation.sampling import generate_images, image_generator, initial_noise
from tests.toys import tiny_unet

SHAPE = (1, 8, 8)
ALL_METRICS = ("fd", "is", "kid", "precision", "recall")


class TinyClassifier(torch.nn.Module):
    """A classifier of 8x8 images with 6 features and 4 classes."""

    def __init__(self, seed=0, backbone="tiny"):
        super().__init__()
        self.config = SimpleNamespace(backbone=backbone)
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(6, 64, generator=generator) / 8)
        self.head = torch.nn.Parameter(torch.randn(4, 6, generator=generator))

    def forward(self, images):
        features = torch.tanh(images.flatten(1) @ self.weight.T)
        return SimpleNamespace(features=features, logits=features @ self.head.T)


class RandomImages(torch.utils.data.Dataset):
    """Uint8 images with the interface of ImageData."""

    name, fingerprint = "random", "random-images-1"

    def __init__(self, n, shape=SHAPE, seed=1):
        self.images, self.image_shape, self.reads = random_images(n, shape, seed), shape, 0

    def __len__(self):
        return len(self.images)

    def __getitems__(self, indices):
        self.reads += len(indices)
        return {"images": self.images[indices]}


def random_images(n, shape=SHAPE, seed=0):
    return torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def features_of(classifier, images):
    with torch.no_grad():
        return classifier(images.float() / 127.5 - 1)


def tiny_pipeline(**overrides):
    torch.manual_seed(0)
    scheduler = RCFDScheduler(num_train_timesteps=17, num_inference_steps=2)
    return RCFDPipeline(tiny_unet(**overrides).eval(), scheduler)


def evaluator(metrics=("fd", "is"), **options):
    options = {"cache_dir": False, "reference": RandomImages(70), "extractor": TinyClassifier()} | options
    return Evaluator(options.pop("extractor"), options.pop("reference"), metrics=metrics, **options)


def rotation(size, seed):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


# Frechet distance


@pytest.mark.parametrize("zeros", [0, 5], ids=["regular", "singular"])
def test_frechet_distance_closed_form_of_covariances_that_commute(zeros):
    rng, q = np.random.default_rng(0), rotation(40, 1)
    a, b = rng.uniform(0.1, 3, (2, 40))
    a[:zeros] = b[2 : 2 + zeros] = 0
    mu1, mu2 = rng.standard_normal((2, 40))
    expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    distance = frechet_distance(mu1, q @ np.diag(a) @ q.T, mu2, q @ np.diag(b) @ q.T)
    assert distance == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_closed_form_of_two_dimensions():
    sigma1, sigma2 = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.7], [-0.7, 3.0]])
    # For 2x2 matrices tr M^(1/2) = sqrt(tr M + 2 sqrt(det M)).
    product = sigma1 @ sigma2
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    expected = 1 + 4 + 3 + 4 - 2 * root
    assert frechet_distance([0, 0], sigma1, [1, 2], sigma2) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_closed_form_without_any_variance():
    zero = np.zeros((3, 3))
    assert frechet_distance(np.ones(3), zero, np.zeros(3), zero) == 3
    assert frechet_distance(np.ones(3), zero, np.zeros(3), np.eye(3)) == 6


def test_frechet_distance_equals_that_of_torch_fidelity():
    torch.manual_seed(0)
    mix = torch.randn(48, 48) / 7
    features1, features2 = torch.randn(400, 48) @ mix, 1.2 * torch.randn(300, 48) @ mix + 0.1
    one, two = fid_features_to_statistics(features1), fid_features_to_statistics(features2)
    expected = fid_statistics_to_metric(one, two, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(one["mu"], one["sigma"], two["mu"], two["sigma"]) == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_of_equal_rank_deficient_sets_is_zero():
    features = torch.randn(20, 100, generator=torch.Generator().manual_seed(0))
    s = fid_features_to_statistics(features.double())
    assert frechet_distance(s["mu"], s["sigma"], s["mu"], s["sigma"]) == pytest.approx(0, abs=1e-11)
    assert frechet_and_gradient(s["mu"], s["sigma"], s["mu"], s["sigma"])[2] == (19, 19)


def test_frechet_gradient_equals_finite_difference():
    rng = np.random.default_rng(0)
    sigma1, sigma2 = np.cov(rng.standard_normal((4, 50))), 2 * np.cov(rng.standard_normal((4, 50)))
    change = rng.standard_normal((4, 4))
    change += change.T
    mu, h = np.zeros(4), 1e-5
    p = frechet_and_gradient(mu, sigma1, mu, sigma2)[1]
    numeric = (
        frechet_distance(mu, sigma1 + h * change, mu, sigma2) - frechet_distance(mu, sigma1 - h * change, mu, sigma2)
    ) / (2 * h)
    assert np.sum((np.eye(4) - p @ p.T) * change) == pytest.approx(numeric, rel=1e-6)


@pytest.mark.parametrize(
    ("mu1", "sigma1", "words"),
    [
        (np.zeros(3), np.eye(3), r"`mu1, sigma1, mu2, sigma2`.*\(3,\), \(3, 3\), \(2,\), \(2, 2\)"),
        (np.zeros(2), np.array([[1.0, np.nan], [0, 1]]), "`sigma1`.*finite"),
        (np.zeros(2), np.array([[1.0, 0.5], [0, 1]]), "`sigma1`.*symmetric"),
        (np.zeros(2), np.diag([1.0, -0.1]), "`sigma1`.*positive semidefinite.*-0.1"),
        (np.array([0.0, np.nan]), np.eye(2), "`mu1`.*finite"),
    ],
    ids=["size", "nan", "asymmetric", "negative", "mean"],
)
def test_frechet_distance_rejects_what_is_no_gaussian(mu1, sigma1, words):
    with pytest.raises(ValueError, match=words):
        frechet_distance(mu1, sigma1, np.zeros(2), np.eye(2))


# Confidence intervals


def _draws(metric, n=600, repeats=150):
    """Value and interval of a metric on many independent sets of images, reference fixed."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((3, 3))
    reference = torch.from_numpy(rng.standard_normal((4000, 3)))
    for _ in range(repeats):
        x = torch.from_numpy(rng.standard_normal((n, 3)) @ mix + 0.5)
        if metric == "fd":
            value, contributions = fd_with_influence(x, np.zeros(3), np.eye(3), 4000, "FD")
        elif metric == "is":
            value, contributions = inception_score_with_influence(x, seed=0)
        else:
            value, contributions = kid_with_blocks(x, reference[torch.from_numpy(rng.permutation(4000)[:n])], seed=0)
        yield value, bootstrap_interval(value, contributions, seed=0, resamples=200)


@pytest.mark.parametrize(("metric", "repeats"), [("fd", 150), ("is", 150), ("kid", 12)])
def test_confidence_interval_is_as_wide_as_the_spread_of_repeated_draws(metric, repeats):
    values, intervals = zip(*_draws(metric, repeats=repeats, n=600 if metric != "kid" else 200), strict=True)
    widths = np.diff(intervals, axis=1) / (2 * 1.96)
    spread = np.std(values)
    assert np.mean(widths) == pytest.approx(spread, rel=0.2 if metric != "kid" else 0.6)
    assert all(low <= value <= high for value, (low, high) in zip(values, intervals, strict=True))


def test_bootstrap_interval_closed_form_of_a_proportion():
    hits = np.arange(10_000) < 2_000
    low, high = bootstrap_interval(0.2, hits, seed=0)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.2 * 0.8 / 10_000), rel=0.1)
    assert bootstrap_interval(0.2, hits, seed=0) == (low, high)


# Images


def test_noise_of_an_image_depends_on_seed_and_index_alone():
    whole = initial_noise(range(7), SHAPE, seed=3)
    torch.testing.assert_close(initial_noise([5, 2], SHAPE, seed=3), whole[[5, 2]], rtol=0, atol=0)
    torch.testing.assert_close(torch.randn(SHAPE, generator=image_generator(3, 5)), whole[5], rtol=0, atol=0)
    assert not torch.equal(initial_noise(range(7), SHAPE, seed=4), whole)
    assert initial_noise([], SHAPE).shape == (0, *SHAPE)


def test_images_of_different_seeds_share_no_generator():
    starts = sorted(image_generator(seed, 0).initial_seed() for seed in range(2000))
    gaps = np.diff([*starts, starts[0] + 2**32])
    assert gaps.min() > 50_000
    assert max(starts) < 2**32  # PyTorch's CPU generator ignores higher bits


def test_images_do_not_depend_on_batch_size_or_way_of_sampling():
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(desc="mine")
    whole = torch.cat(list(generate_images(pipeline, 7, seed=2, progress=False)))
    assert whole.shape == (7, *SHAPE) and whole.dtype == torch.uint8
    parts = [generate_images(pipeline, 7, seed=2, batch_size=2, indices=i, progress=False) for i in ([0, 1, 2], [6])]
    parts = torch.cat([batch for part in parts for batch in part])
    assert (parts.int() - whole[[0, 1, 2, 6]].int()).abs().max() <= 1  # a rounding of a rounding
    assert pipeline._progress_bar_config == {"desc": "mine"}

    sampler = lambda noise, labels: pipeline(batch_size=len(noise), latents=noise, output_type="pt").images  # noqa: E731
    sampled = torch.cat(list(generate_images(sampler, 7, seed=2, image_shape=SHAPE, progress=False)))
    assert torch.equal(sampled, whole)
    alone = pipeline(generator=image_generator(2, 4), output_type="pt").images.mul(255).round()
    assert (alone[0] - whole[4].float()).abs().max() <= 1


def test_class_conditional_models_get_balanced_or_given_labels():
    pipeline = tiny_pipeline(num_class_embeds=3)
    seen = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: seen.append(args[2].tolist()))
    list(generate_images(pipeline, 8, num_inference_steps=1, batch_size=5, progress=False))
    assert seen == [[0, 1, 2, 0, 1], [2, 0, 1]]
    seen.clear()
    labels = [2, 2, 1, 0]
    list(generate_images(pipeline, 4, num_inference_steps=1, class_labels=labels, indices=[1, 3], progress=False))
    assert seen == [[2, 0]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_images": 0}, "`num_images`.*at least 1, got 0"),
        ({"batch_size": True}, "`batch_size`.*got True"),
        ({"seed": -1}, "`seed`.*got -1"),
        ({"class_labels": "random"}, "`class_labels`.*'random'"),
        ({"class_labels": [0, 1]}, r"`class_labels`.*4 integers.*\(2,\)"),
        ({"class_labels": [0.0] * 4}, "`class_labels`.*4 integers"),
        ({"pipeline": lambda noise, labels: noise}, "`image_shape`"),
    ],
)
def test_generate_images_rejects_bad_arguments(options, words):
    options = {
        "pipeline": SimpleNamespace(image_shape=SHAPE, unet=tiny_unet(), num_classes=None),
        "num_images": 4,
    } | options
    with pytest.raises(ValueError, match=words):
        generate_images(**options)


def test_floats_are_rounded_to_the_nearest_level():
    levels = random_images(4).clamp(1, 254)
    for shift in (-0.4, 0.4):
        sampled = generate_images(lambda *_, s=shift: (levels + s) / 255, 4, image_shape=SHAPE, progress=False)
        assert torch.equal(next(sampled), levels)


def test_labels_for_an_unconditional_pipeline_are_an_error():
    with pytest.raises(ValueError, match="class_labels"):
        list(generate_images(tiny_pipeline(), 2, class_labels=[0, 1], progress=False))


# The evaluator


def test_values_equal_those_of_torch_fidelity_on_the_same_features():
    classifier, reference, images = TinyClassifier(), RandomImages(70), random_images(50)
    result = evaluator(ALL_METRICS, batch_size=16, reference=reference, extractor=classifier).evaluate(images)
    assert not classifier.training  # batch statistics would make the value depend on the batch
    one, two = features_of(classifier, images), features_of(classifier, reference.images)
    statistics = [fid_features_to_statistics(x.features) for x in (one, two)]
    kid = kid_features_to_metric(one.features, two.features, kid_subset_size=50, rng_seed=0, verbose=False)
    prc = prc_features_to_metric(one.features, two.features, verbose=False)
    fid = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    isc = isc_features_to_metric(one.logits, rng_seed=0)["inception_score_mean"]
    assert result["fd"] == pytest.approx(fid, rel=1e-4)
    assert result["is"] == pytest.approx(isc, rel=1e-5)
    assert result["kid"] == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-4, abs=1e-7)
    assert (result["precision"], result["recall"]) == (prc["precision"], prc["recall"])
    assert list(result.metrics) == list(ALL_METRICS)
    for metric in result.metrics.values():
        low, high = metric.confidence_interval
        assert low < metric.value < high


def test_result_says_what_was_measured():
    result = evaluator(ALL_METRICS, name="resnet18-fashion", seed=5).evaluate(random_images(40))
    assert isinstance(result, EvaluationResult)
    labels = [metric.label for metric in result.metrics.values()]
    assert labels == [f"{short}(resnet18-fashion)" for short in ("FD", "IS", "KID", "precision", "recall")]
    stored = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert stored == result.to_dict()
    assert {k: v for k, v in stored.items() if k not in ("metrics", "reference_key")} == {
        "num_images": 40,
        "seed": 5,
        "extractor": "resnet18-fashion",
        "reference": "random",
        "num_reference_images": 70,
        "role": None,
        "accuracy": None,
    }
    assert stored["metrics"]["fd"] == {
        "label": "FD(resnet18-fashion)",
        "value": result["fd"],
        "confidence_interval": list(result.metrics["fd"].confidence_interval),
    }
    assert "FD(resnet18-fashion)" in str(result) and "FID" not in str(result)


def test_batches_floats_and_tensor_give_the_same_values():
    images = random_images(30)
    expected = evaluator().evaluate(images)
    assert evaluator().evaluate(iter(images.split(11)))["fd"] == pytest.approx(expected["fd"], rel=1e-5)
    assert evaluator().evaluate(images.float() / 255)["is"] == pytest.approx(expected["is"], rel=1e-6)


def test_equal_sets_have_distance_zero_and_full_precision():
    reference = RandomImages(40)
    result = evaluator(("fd", "precision", "recall"), reference=reference).evaluate(reference.images)
    assert result["fd"] == pytest.approx(0, abs=1e-9)
    assert result["precision"] == result["recall"] == 1


def test_inception_score_needs_no_reference():
    result = evaluator("is", reference=None).evaluate(random_images(20))
    assert result.reference is None and result["is"] > 1
    with pytest.raises(ValueError, match="`reference`.*'fd'"):
        evaluator("fd", reference=None)


def test_evaluate_pipeline_evaluates_its_images():
    pipeline, measure = tiny_pipeline(), evaluator(batch_size=8, seed=7)
    result = measure.evaluate_pipeline(pipeline, 20, num_inference_steps=1, progress=False)
    images = generate_images(pipeline, 20, num_inference_steps=1, batch_size=8, seed=7, progress=False)
    assert result == measure.evaluate(images)
    assert result.num_images == 20 and result.seed == 7
    other = measure.evaluate_pipeline(pipeline, 20, num_inference_steps=1, seed=8, progress=False)
    assert other["fd"] != result["fd"] and other.seed == 8
    sampler = lambda noise, labels: noise.clamp(0, 1)  # noqa: E731
    assert measure.evaluate_pipeline(sampler, 20, progress=False).num_images == 20


def test_works_with_a_feature_classifier():
    torch.manual_seed(0)
    config = {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1]}
    classifier = FeatureClassifier("resnet18", num_classes=4, in_channels=1, small_stem=True, backbone_config=config)
    measure = evaluator(extractor=classifier, batch_size=8)
    result = measure.evaluate(random_images(20))
    assert result.metrics["fd"].label == "FD(resnet18)"


# Cache


def test_cache_file_of_a_long_name(tmp_path):
    reference = RandomImages(70)
    reference.name = "/long" * 80
    evaluator(reference=reference, name="x" * 300, cache_dir=tmp_path).evaluate(random_images(40))
    assert len(list(tmp_path.iterdir())) == 1


def test_reference_statistics_are_read_from_the_cache(tmp_path):
    first, second = RandomImages(70), RandomImages(70)
    expected = evaluator(ALL_METRICS, reference=first, cache_dir=tmp_path).evaluate(random_images(40))
    assert first.reads == 70
    assert evaluator(ALL_METRICS, reference=second, cache_dir=tmp_path).evaluate(random_images(40)) == expected
    assert second.reads == 0
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


@pytest.mark.parametrize("change", ["weights", "data", "size", "name"])
def test_cache_is_missed_by_another_data_set_size_or_extractor(tmp_path, change):
    expected = evaluator(cache_dir=tmp_path).evaluate(random_images(40))
    reference = RandomImages(60 if change == "size" else 70)
    if change == "data":
        reference.fingerprint = "other"
    classifier = TinyClassifier(seed=1 if change == "weights" else 0, backbone="other" if change == "name" else "tiny")
    result = evaluator(reference=reference, extractor=classifier, cache_dir=tmp_path).evaluate(random_images(40))
    assert reference.reads == len(reference)
    assert result.reference_key != expected.reference_key
    assert len(list(tmp_path.iterdir())) == 2


def test_cache_without_features_is_completed_when_they_are_needed(tmp_path):
    evaluator("fd", cache_dir=tmp_path).evaluate(random_images(40))
    for reads in (70, 0):
        reference = RandomImages(70)
        evaluator("kid", reference=reference, cache_dir=tmp_path).evaluate(random_images(40))
        assert reference.reads == reads


def test_cache_of_another_size_is_an_error_and_a_torn_one_is_replaced(tmp_path):
    from safetensors.torch import load_file, save_file

    expected = evaluator(cache_dir=tmp_path).evaluate(random_images(40))
    (path,) = tmp_path.iterdir()
    save_file(load_file(path) | {"num_images": torch.tensor(69)}, path)
    with pytest.raises(ValueError, match="`reference` must be of 70 images.*69 images"):
        evaluator(cache_dir=tmp_path).evaluate(random_images(40))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="unreadable"):
        assert evaluator(cache_dir=tmp_path).evaluate(random_images(40)) == expected
    assert evaluator(cache_dir=tmp_path).evaluate(random_images(40)) == expected


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="could not be cached"):
        evaluator(cache_dir=tmp_path / "file" / "folder").evaluate(random_images(40))


# Statistics from files


@pytest.mark.parametrize("name", ["reference.npz", "reference.pt"])
def test_statistics_of_the_reference_are_written_and_read(tmp_path, name):
    first = evaluator("fd")
    expected = first.evaluate(random_images(40))
    first.save_reference_statistics(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]

    alone = evaluator(("fd", "is"), reference=None, reference_statistics=tmp_path / name)
    result = alone.evaluate(random_images(40))
    assert result.metrics["fd"] == expected.metrics["fd"]
    assert result.reference == "reference" and result.reference_key != expected.reference_key
    assert result.num_reference_images == (70 if name.endswith("npz") else None)

    reference = RandomImages(70)
    both = evaluator("fd", reference=reference, reference_statistics=tmp_path / name)
    assert both.evaluate(random_images(40)).metrics["fd"] == expected.metrics["fd"] and reference.reads == 0
    kid = evaluator(("fd", "kid"), reference=reference, reference_statistics=tmp_path / name)
    assert kid.evaluate(random_images(40))["fd"] == expected["fd"] and reference.reads == 70
    with pytest.raises(ValueError, match="`reference` must be a data set for the metrics"):
        evaluator("kid", reference=None, reference_statistics=tmp_path / name)


def test_statistics_of_torch_fidelity_are_read(tmp_path):
    features = features_of(TinyClassifier(), RandomImages(70).images).features
    torch.save(fid_features_to_statistics(features), tmp_path / "digits-stat-fid-2048.pt")
    given = evaluator("fd", reference=None, reference_statistics=tmp_path / "digits-stat-fid-2048.pt")
    assert given.evaluate(random_images(40))["fd"] == pytest.approx(
        evaluator("fd").evaluate(random_images(40))["fd"], rel=1e-4
    )


def test_statistics_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("small.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez("odd.npz", mu=np.zeros(6), sigma=np.eye(5))
    np.savez("nan.npz", mu=np.zeros(6), sigma=np.full((6, 6), np.nan))
    np.savez("other.npz", mean=np.zeros(6))
    Path("evil.pt").write_bytes(pickle.dumps({"mu": Unpickled(), "sigma": 0}, protocol=2))
    options = {"metrics": "fd", "reference": None}
    classifier = TinyClassifier()
    classifier.num_features = 6
    for file, words in (
        ("small.npz", "must be of 6 dimensions, as the features of tiny, got 5"),
        ("odd.npz", r"must be of shapes \(D,\) and \(D, D\), got \(\(6,\), \(5, 5\)\)"),
        ("nan.npz", "must be finite"),
        ("other.npz", "must hold 'mu' and 'sigma', got 'other.npz'"),
        ("evil.pt", "must hold 'mu' and 'sigma', got 'evil.pt'"),
    ):
        with pytest.raises(ValueError, match=f"`reference_statistics` {words}"):
            evaluator(extractor=classifier, reference_statistics=file, **options)
    assert not Path("unpickled").exists()
    with pytest.raises(FileNotFoundError, match="`reference_statistics` must be a file, got 'absent.npz'"):
        evaluator(reference_statistics="absent.npz", **options)
    late = evaluator(reference_statistics="small.npz", **options)  # of an extractor that does not tell its size
    with pytest.raises(ValueError, match="`reference_statistics` must be of 6 dimensions, as the features of tiny"):
        late.evaluate(random_images(20))
    with pytest.raises(ValueError, match="`path` must be a name that ends in '.npz' or '.pt', got 'x.txt'"):
        evaluator("fd").save_reference_statistics("x.txt")


# Nearest real neighbours


def test_copies_are_nearer_to_real_images_than_new_ones(tmp_path):
    real, held_out, new = random_images(300, seed=1), random_images(200, seed=2), random_images(200, seed=3)
    found = find_neighbours(new, real, held_out)
    assert found.ratio == pytest.approx(1, abs=0.05) and found.share_of_copies < 0.05
    difference = (new[7].float() - real.float()) / 255
    nearest = difference.square().flatten(1).sum(1).sqrt()
    assert found.indices[7] == nearest.argmin() and found.distances[7].item() == pytest.approx(nearest.min().item())

    copies = torch.cat([real[[5, 9, 2]], new[:1]])
    found = find_neighbours(copies, real, held_out)
    assert found.indices[:3].tolist() == [5, 9, 2] and found.distances[:3].max() < 1e-6
    assert found.share_of_copies == 0.75 and found.ratio == pytest.approx(0, abs=1e-6)
    assert json.dumps(found.numbers())
    draw_neighbours(copies, real, found, tmp_path / "neighbours.png")
    with Image.open(tmp_path / "neighbours.png") as picture:
        above, below = np.split(np.asarray(picture.convert("L"))[2:-2], 2)
    width = 3 * (8 * 4 + 4)  # three copies, then an image that is none
    assert np.array_equal(above[:, :width], below[:, :width]) and not np.array_equal(above, below)

    in_features = find_neighbours(copies, real, held_out, lambda images: TinyClassifier()(images).features)
    assert in_features.indices[:3].tolist() == [5, 9, 2]
    with pytest.raises(ValueError, match="`held_out` must be one image or more"):
        find_neighbours(copies, real, held_out[:0])
    with pytest.raises(TypeError, match="`real` must be uint8, got torch.float32"):
        find_neighbours(copies, real.float(), held_out)


# Bad input


def _with(images, value):
    images = images.float() / 255
    images[13, 0, 0, 0] = value
    return images


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (_with(random_images(20), float("nan")).split(8), ValueError, "`images`.*NaN in image 13"),
        (_with(random_images(20), 1.5), ValueError, r"`images`.*\[0, 1\].*1.5"),
        (_with(random_images(20), -1.0), ValueError, r"`images`.*\[0, 1\].*-1.0"),
        (_with(random_images(20), float("inf")), ValueError, r"`images`.*\[0, 1\].*inf"),
        (random_images(20).int(), TypeError, "uint8.*torch.int32"),
        (random_images(20)[0], ValueError, r"`images`.*\(B, C, H, W\).*\(1, 8, 8\)"),
        (random_images(20, (1, 9, 8)), ValueError, r"\(1, 8, 8\), as the reference 'random', got \(1, 9, 8\)"),
        (random_images(20, (3, 8, 8)), ValueError, r"\(1, 8, 8\), as the reference 'random', got \(3, 8, 8\)"),
        (random_images(9), ValueError, "`num_images` must be at least 10 for 'is', got 9"),
        ([], ValueError, "`num_images` must be at least 2 for 'fd', got 0"),
    ],
)
def test_bad_images_are_an_error_that_names_them(images, error, words):
    with pytest.raises(error, match=words):
        evaluator().evaluate(images)


def test_batches_of_different_sizes_are_an_error():
    batches = [random_images(8), random_images(8, (1, 8, 9))]
    with pytest.raises(ValueError, match=r"\(1, 8, 8\), as the first batch, got \(1, 8, 9\)"):
        evaluator("is", reference=None).evaluate(batches)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"metrics": ("fd", "fid")}, ValueError, "`metrics`.*'kid'.*got 'fid'"),
        ({"metrics": ()}, ValueError, "`metrics`.*one or more"),
        ({"batch_size": 0}, ValueError, "`batch_size`.*got 0"),
        ({"seed": 1.5}, ValueError, "`seed`.*got 1.5"),
        ({"extractor": "resnet18"}, TypeError, "`extractor`"),
        ({"reference": [1, 2]}, TypeError, r"`reference\[0\]` must be a PIL image"),
        ({"extractor": TinyClassifier(backbone=None)}, ValueError, "`name`.*config.backbone"),
    ],
)
def test_bad_arguments_are_an_error_that_names_them(options, error, words):
    with pytest.raises(error, match=words):
        evaluator(**options)


def test_too_small_sets_and_broken_networks_are_an_error():
    with pytest.raises(ValueError, match=r"`len\(reference\)` must be at least 4 for 'recall', got 3"):
        evaluator("recall", reference=RandomImages(3)).evaluate(random_images(40))
    with pytest.raises(ValueError, match="`num_images`.*at least 10"):
        evaluator().evaluate_pipeline(None, 5)
    broken = TinyClassifier()
    broken.head.data[0] = torch.nan
    with pytest.raises(ValueError, match="`logits` must be finite, from tiny"):
        evaluator(extractor=broken).evaluate(random_images(20))


def test_fewer_images_than_dimensions_warn_with_the_rank():
    with pytest.warns(UserWarning, match=r"FD\(tiny\) of 5 images against 70.* 6 feature.* rank 4 and 6"):
        evaluator("fd").evaluate(random_images(5))
    with pytest.warns(UserWarning, match="of 40 images against 5.* rank 6 and 4"):
        evaluator("fd", reference=RandomImages(5)).evaluate(random_images(40))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluator("fd").evaluate(random_images(7))


# Inception


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A state dict of torch-fidelity's Inception with random weights, in its file's format."""
    network = feature_extractor_inceptionv3.FeatureExtractorInceptionV3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(network, "load_state_dict", lambda *args, **kwargs: None)
        torch.manual_seed(0)
        state_dict = network("random", ["2048"]).state_dict()
    path = tmp_path_factory.mktemp("inception") / INCEPTION_FILE
    torch.save(state_dict, path)
    return path


def test_inception_is_that_of_torch_fidelity_and_called_fid(inception_weights):
    extractor = InceptionExtractor(inception_weights)
    images = random_images(4)
    own = feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
        "own", ["2048", "logits_unbiased"], feature_extractor_weights_path=inception_weights
    )
    features, logits = own(images.expand(-1, 3, -1, -1))
    output = features_of(extractor, images)
    assert torch.equal(output.features, features) and torch.equal(output.logits, logits)
    assert features.std() > 0

    measure = evaluator("kid", extractor=extractor, reference=RandomImages(4, seed=1))
    result = measure.evaluate(images)
    assert result.metrics["kid"].label == "KID" and result.extractor == "inception-v3-compat"
    assert [measure.label(metric) for metric in ALL_METRICS] == ["FID", "IS", "KID", "precision", "recall"]
    assert not any(parameter.requires_grad for parameter in extractor.parameters())


def test_absent_inception_weights_say_what_to_fetch(tmp_path, monkeypatch):
    assert INCEPTION_URL == feature_extractor_inceptionv3.URL_INCEPTION_V3
    with pytest.raises(FileNotFoundError, match="--inception_weights") as caught:
        InceptionExtractor(tmp_path / "absent.pth")
    for words in ("absent.pth", INCEPTION_FILE, "https://github.com/toshas/torch-fidelity/releases"):
        assert words in str(caught.value)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="checkpoints"):
        InceptionExtractor()


class Unpickled:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_other_files_are_refused_and_no_pickle_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(2)}, "other.pth")
    with pytest.raises(ValueError, match="`inception_weights`.*other.pth"):
        InceptionExtractor("other.pth")
    Path("evil.pth").write_bytes(pickle.dumps(Unpickled(), protocol=2))
    with pytest.raises(ValueError, match="`inception_weights`.*evil.pth"):
        InceptionExtractor("evil.pth")
    assert not Path("unpickled").exists()


# Several processes


def evaluate_in_processes(folder, accelerator):
    """What each process of the test below does: 23 and 71 are odd, and of one image one process has none."""
    measure = evaluator(
        ALL_METRICS,
        reference=RandomImages(71),
        batch_size=8,
        accelerator=accelerator,
        cache_dir=Path(folder) / "cache",
    )
    result = measure.evaluate_pipeline(tiny_pipeline(), 23, progress=False)
    given = measure.evaluate(random_images(12)[: 12 if measure.is_main_process else 0])
    reads = measure.reference.reads
    measure.role = "twin"
    pixels = Evaluator(
        PixelExtractor(SHAPE), measure.reference, metrics="fd", role="pixels", accelerator=accelerator, cache_dir=False
    )
    panel = Panel([pixels, measure]).evaluate_pipeline(tiny_pipeline(), 23, progress=False)
    return {"result": result.to_dict(), "given": given.to_dict(), "panel": panel.named_values, "reads": reads}


def test_two_processes_give_the_value_of_one_process(tmp_path):
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "--module", __name__, str(tmp_path)]
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-m", *launch], cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    two = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [x.pop("reads") for x in two] == [35, 36]
    assert two[0] == two[1]
    one = evaluate_in_processes(tmp_path / "one", None)
    assert two[0]["panel"] == pytest.approx(one["panel"], rel=1e-4) and len(one["panel"]) == 6
    for key in ("result", "given"):
        values = {metric: entry["value"] for metric, entry in two[0][key].pop("metrics").items()}
        assert values == pytest.approx({m: entry["value"] for m, entry in one[key].pop("metrics").items()}, rel=1e-4)
        assert two[0][key] == one[key]


if __name__ == "__main__":
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    found = evaluate_in_processes(sys.argv[1], accelerator)
    Path(sys.argv[1], f"{accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.end_training()
