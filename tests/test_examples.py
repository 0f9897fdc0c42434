"""Every example script as a user runs it: a process of its own, the smallest real setting."""

import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_rcfd import FeatureClassifier, RCFDPipeline
from diffusers_rcfd.trainers.checkpoints import find_checkpoints
from tests.toys import tiny_classifier, tiny_sfd_student, tiny_teacher

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
SMALL = [
    "--base_max_train_steps", "3", "--classifier_max_train_steps", "2", "--evaluator_max_train_steps", "2",
    "--base_train_batch_size", "8", "--train_batch_size", "8", "--max_train_steps", "2", "--base_sample_steps", "0",
    "--sample_steps", "0", "--num_eval_images", "32", "--checkpointing_steps", "2", "--cpu_threads", "1",
]  # fmt: skip


def command(script, *args):
    return [sys.executable, str(EXAMPLES / script), *map(str, args)]


def run(script, *args, launch=False, expect=0):
    line = command(script, *args)
    if launch:
        line = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", *line[1:]]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == expect, done.stderr
    return done


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_no_torch(script):
    probe = f"""
import atexit, runpy, sys
atexit.register(lambda: print('torch' in sys.modules, 'diffusers' in sys.modules))
sys.argv, sys.path[0] = [{script!r}, '--help'], {str(EXAMPLES)!r}
runpy.run_path({str(EXAMPLES / script)!r}, run_name='__main__')
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False False", done.stderr
    assert "--" in done.stdout


def test_main_job_end_to_end(tmp_path):
    done = run("distill_rcfd.py", *SMALL, "--output_dir", tmp_path / "run", launch=True)
    folder = tmp_path / "run"
    rows = json.loads((folder / "comparison.json").read_text())
    lines = [(row["method"], row["num_inference_steps"]) for row in rows]
    assert lines == [*(("DDIM", N) for N in (8, 4, 2, 1)), *(("PD", N) for N in (8, 4, 2, 1)),
                     *(("RCFD", N) for N in (4, 2, 1))]  # fmt: skip
    table = (folder / "comparison.md").read_text()
    assert table in done.stdout and f"Everything is in {folder}" in done.stdout
    assert "FD(" in table and "IS(" in table and "images/s" in table and "FID" not in table
    assert Image.open(folder / "comparison.png").width > 700
    for rung in ("students/16-step", "students/1-step", "students-pd/1-step", "base"):
        RCFDPipeline.from_pretrained(folder / rung)
    assert rows[0]["evaluation"]["reference"].startswith("digits")
    before = (folder / "students/1-step/unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    run("distill_rcfd.py", *SMALL, "--output_dir", folder, "--resume_from_checkpoint", "latest")
    assert (folder / "students/1-step/unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before
    refused = run("distill_rcfd.py", *SMALL, "--output_dir", folder, expect=1)
    assert "`output_dir` must be an empty folder" in refused.stderr


def test_main_job_with_a_teacher_classifier_and_data_of_ones_own(tmp_path):
    teacher = tiny_teacher(8)
    teacher.save_pretrained(tmp_path / "teacher")
    tiny_classifier(3).save_pretrained(tmp_path / "classifier")
    tiny_classifier(3).save_pretrained(tmp_path / "evaluator")
    generator = np.random.default_rng(0)
    for number in range(24):
        folder = tmp_path / "images" / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (12, 9), np.uint8)).save(folder / f"{number}.png")
    run("distill_rcfd.py", *SMALL, "--teacher", tmp_path / "teacher", "--classifier", tmp_path / "classifier",
        "--evaluator", tmp_path / "evaluator", "--dataset", tmp_path / "images", "--resolution", 8,
        "--student_steps", 4, 1, "--teacher_steps", 2, 4, "--objective", "rcfd", "--output_dir",
        tmp_path / "run", "--cache_dir", tmp_path / "cache")  # fmt: skip
    rows = json.loads((tmp_path / "run/comparison.json").read_text())
    assert [(row["method"], row["num_inference_steps"]) for row in rows] == [
        ("PD", 4),
        ("PD", 1),
        ("RCFD", 4),
        ("RCFD", 1),
    ]
    assert not (tmp_path / "run/base").exists() and not (tmp_path / "run/classifier").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (["--temperature", "1.5"], "`temperature` must be in (0, 1], got 1.5"),
        (["--student_steps", "2", "4"], "`student_steps` must be in falling order"),
        (["--teacher_steps", "2", "4", "2", "2", "2"], "`teacher_steps` must be 2, for 16 steps to become 8"),
        (
            ["--teacher", "me/ddpm", "--base_push_to_hub"],
            "`base_push_to_hub` must be unset with `teacher`='me/ddpm': only what is trained here is published",
        ),
        (["--classifier", "no/such/classifier"], "Unknown classifier 'no/such/classifier'"),
        (["--unet_preset", "cifar10"], "`train_dataset` must hold images of shape"),
        (["--label_column", ""], "must have class labels"),
        (["--resume_from_checkpoint", "checkpoint-5"], "`resume_from_checkpoint` must be 'latest' for this job"),
        (["--config", "cifar"], "`--config` must be a YAML file or one of"),
        (["--dataset", "no/such/folder.parquet"], "no such file or folder"),
    ],
)
def test_mistakes_are_found_before_any_training(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    script = importlib.import_module("distill_rcfd")
    with pytest.raises((SystemExit, ValueError, FileNotFoundError)) as error:
        script.main([*SMALL, *args, "--output_dir", str(tmp_path / "run")])
    assert message in f"{error.value}\n{capsys.readouterr().err}"
    assert not (tmp_path / "run").exists()


def test_stopped_in_the_middle_of_rungs_goes_on_in_them(tmp_path):
    """SIGTERM, then SIGKILL during the main job; `--resume_from_checkpoint latest` continues the same rung."""
    folder = tmp_path / "run"
    args = [*SMALL, "--max_train_steps", "12", "--checkpointing_steps", "3", "--logging_steps", "1",
            "--student_steps", "2", "1", "--teacher_steps", "4", "2", "--objective", "pd",
            "--output_dir", folder, "--resume_from_checkpoint", "latest"]  # fmt: skip

    def reached():
        found = find_checkpoints(folder / "students")
        return int(found[-1].name.removeprefix("checkpoint-")) if found else 0

    for number, at, code in ((signal.SIGTERM, 3, 143), (signal.SIGKILL, 18, -signal.SIGKILL)):
        process = subprocess.Popen(command("distill_rcfd.py", *args), cwd=ROOT,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        while process.poll() is None and reached() < at:
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait() == code
    first = (folder / "students/2-step/unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    run("distill_rcfd.py", *args)
    assert (folder / "students/2-step/unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns == first
    lines = [json.loads(line) for line in (folder / "students/metrics.jsonl").read_text().splitlines()]
    assert [line["global_step"] for line in lines] == list(range(1, 25))


def test_train_teacher_classifier_and_sample(tmp_path):
    small = ["--max_train_steps", 2, "--train_batch_size", 8]
    run("train_teacher.py", "--config", "digits", *small, "--sample_steps", 0, "--output_dir", tmp_path / "base",
        "--class_conditional", "--prediction_type", "v_prediction")  # fmt: skip
    base = RCFDPipeline.from_pretrained(tmp_path / "base")
    assert base.unet.config.num_class_embeds == 10 and base.scheduler.config.prediction_type == "v_prediction"
    done = run("train_classifier.py", "--config", "digits", *small, "--output_dir", tmp_path / "classifier")
    assert "Accuracy 0." in done.stdout and "180 held-out images" in done.stdout
    FeatureClassifier.from_pretrained(tmp_path / "classifier")

    options = ["--model", tmp_path / "base", "--num_images", 5, "--num_inference_steps", 2]
    run("sample.py", *options, "--output", tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size == (5 * 9 + 1, 10)
    run("sample.py", *options, "--output", tmp_path / "images.npz", "--batch_size", 2)
    run("sample.py", *options, "--output", tmp_path / "images", "--batch_size", 3)
    images = np.load(tmp_path / "images.npz")["images"]
    assert images.shape == (5, 8, 8, 1) and images.dtype == np.uint8
    files = sorted((tmp_path / "images").iterdir())
    assert len(files) == 5
    for image, file in zip(images, files, strict=True):
        np.testing.assert_allclose(image[..., 0].astype(int), np.asarray(Image.open(file)).astype(int), atol=1)
    run("sample.py", *options, "--output", tmp_path / "onnx.npz", "--onnx_runtime")
    again = np.load(tmp_path / "onnx.npz")["images"]
    np.testing.assert_allclose(again.astype(int), images.astype(int), atol=1)
    refused = run("sample.py", *options, "--output", "x.png", "--onnx_runtime", "--device", "cuda", expect=2)
    assert "`onnx_runtime` must be False with another dtype" in refused.stderr
    refused = run("sample.py", *options, "--output", tmp_path / "images", expect=2)
    assert "`output` must be a new file or empty folder" in refused.stderr


def test_sfd_job_with_a_comparison(tmp_path):
    """SFD-v with the feature loss on a given teacher and classifiers, beside another student; then once more, refused;
    and the second stage from that student.
    """
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    tiny_teacher(2).save_pretrained(tmp_path / "students/2-step")
    tiny_classifier().save_pretrained(tmp_path / "classifier")
    classifiers = ["--classifier", tmp_path / "classifier", "--evaluator", tmp_path / "classifier"]
    common = [*classifiers, "--objective", "cfd", "--max_train_steps", 2, "--train_batch_size", 4, "--sample_steps", 0,
              "--num_eval_images", 32, "--cpu_threads", 1]  # fmt: skip
    small = ["--teacher", tmp_path / "teacher", "--compare_with", tmp_path / "students/2-step", *common,
             "--student_steps", 1, 2, "--output_dir", tmp_path / "run"]  # fmt: skip
    run("distill_sfd.py", *small)
    rows = json.loads((tmp_path / "run/comparison.json").read_text())
    assert [(row["method"], row["num_inference_steps"]) for row in rows] == [
        ("DDIM", 2), ("DDIM", 1), ("teacher", 4), ("teacher", 8),
        ("students/2-step", 2), ("SFD-v cfd", 2), ("SFD-v cfd", 1),
    ]  # fmt: skip
    assert RCFDPipeline.from_pretrained(tmp_path / "run/student").scheduler.trained_steps == [1, 2]
    refused = run("distill_sfd.py", *small, expect=1)
    assert "`output_dir` must be an empty folder" in refused.stderr
    run("distill_sfd.py", "--teacher", tmp_path / "run/student", *common, "--student_steps", 1, "--output_dir",
        tmp_path / "one")  # fmt: skip
    rows = json.loads((tmp_path / "one/comparison.json").read_text())
    assert [(row["method"], row["num_inference_steps"]) for row in rows] == [("teacher", 2), ("SFD cfd", 1)]


@pytest.mark.parametrize("wrong, message", [
    (["--teacher", "teacher", "--compare_with", "students/2-step"],
     r"`compare_with` must be students made for one of \[3\] network .* got 'students/2-step, one for \[2\]"),
    (["--teacher", "teacher", "--compare_with", "teacher"], "`compare_with` must be students .* got 'teacher, a base"),
    (["--teacher", "teacher", "--compare_with", "large"], r"`compare_with` must be for images \(1, 8, 8\), as `data"),
    (["--nodes", "80", "0.0061", "0.006"], "`teacher` must be of a schedule that tells the nodes"),
    (["--teacher", "large"], r"`teacher` must be for images \(1, 8, 8\), as `dataset` has, got \(1, 16"),
    (["--teacher", "teacher", "--distribution", "spatial", "--feature_stages", "9"], "`feature_stages` must suit"),
])  # fmt: skip
def test_sfd_job_finds_what_is_wrong_before_anything_is_trained(tmp_path, monkeypatch, wrong, message):
    tiny_teacher().save_pretrained(tmp_path / "teacher")
    tiny_teacher(sample_size=16).save_pretrained(tmp_path / "large")
    tiny_teacher(2).save_pretrained(tmp_path / "students/2-step")
    tiny_classifier().save_pretrained(tmp_path / "classifier")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module("distill_sfd")
    with pytest.raises(ValueError, match=message):
        script.main([*wrong, "--classifier", "classifier", "--evaluator", "classifier", "--student_steps", "3",
                     "--output_dir", "run", "--cpu_threads", "1"])  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_evaluate_and_compare(tmp_path):
    """One pipeline alone and beside others, with the same judge: the same number."""
    base, student = tiny_teacher(), tiny_teacher(2, seed=1)
    for name, pipeline in (("base", base), ("student", student), ("sfd", tiny_sfd_student())):
        pipeline.save_pretrained(tmp_path / name)
    tiny_classifier().save_pretrained(tmp_path / "judge")
    options = ["--feature_extractor", tmp_path / "judge", "--extractor_name", "tiny", "--num_images", 40]
    options += ["--statistics_dir", tmp_path / "statistics"]
    done = run(
        "evaluate.py", "--model", tmp_path / "student", *options, "--output", tmp_path / "one.json", launch=True
    )
    one = json.loads((tmp_path / "one.json").read_text())
    assert one["num_inference_steps"] == 2 and one["extractor"] == "tiny" and one["num_images"] == 40
    assert f"2 network evaluations: FD(tiny) {one['metrics']['fd']['value']:.4g}" in done.stdout

    done = run("compare.py", "--base", tmp_path / "base", "--students", f"PD={tmp_path / 'student'}",
               f"SFD-v={tmp_path / 'sfd'}@2", f"SFD-v={tmp_path / 'sfd'}", *options,
               "--samplers", "dpm++2m", "heun", "--evaluations", 3, 2, "--output_dir", tmp_path / "all")  # fmt: skip
    rows = json.loads((tmp_path / "all/comparison.json").read_text())
    lines = [(row["method"], row["num_inference_steps"]) for row in rows]
    assert lines == [
        ("DPM-Solver++(2M)", 3),
        ("DPM-Solver++(2M)", 2),
        ("Heun", 3),
        ("PD", 2),
        ("SFD-v", 2),
        ("SFD-v", 3),
    ]
    assert "`num_inference_steps`=2 is not possible with Heun" in done.stderr
    assert rows[3]["evaluation"]["metrics"] == one["metrics"]
    assert (tmp_path / "all/comparison.md").read_text() in done.stdout
    assert Image.open(tmp_path / "all/comparison_curve.png").width > 400


@pytest.mark.parametrize(
    "script, args, message",
    [
        ("evaluate.py", ["--metrics", "fid"], "`metrics` must be of ('fd', 'is', 'kid', 'precision', 'recall')"),
        ("evaluate.py", ["--num_images", "0"], "`num_images` must be an integer of at least 2, got 0"),
        ("evaluate.py", ["--inception_weights", "x", "--feature_extractor", "y"], "`inception_weights` must be unset"),
        ("compare.py", [], "`base` must be given where there are no `students`"),
        ("compare.py", ["--base", "x", "--samplers", "ddpm"], "`samplers` must be of ('ddim',"),
        ("compare.py", ["--base", "x", "--evaluations", "0"], "`evaluations` must be an integer of at least 1, got 0"),
    ],
)
def test_mistakes_in_an_evaluation_are_named(script, args, message):
    assert message in run(script, *args, expect=2).stderr
