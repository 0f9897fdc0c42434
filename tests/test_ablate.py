"""`rcfd ablate` on a real grid of tiny runs."""

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from diffusers_rcfd.cli import ablate
from diffusers_rcfd.cli.grids import COMMANDS, GRIDS, plan_jobs, read_grid
from tests.toys import tiny_classifier, tiny_teacher

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run_ablate(*args):
    command = [sys.executable, str(EXAMPLES / "ablate.py"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    tiny_teacher(4).save_pretrained(folder / "teacher")
    tiny_classifier().save_pretrained(folder / "judge")
    content = {
        "output_dir": str(folder / "grid"),
        "seeds": [0, 1],
        "prepare": [
            {"script": "train_classifier", "done": "config.json", "config": "digits", "max_train_steps": 2,
             "output_dir": str(folder / "grid/classifier-seed{seed}")}
        ],
        "options": {"config": "digits", "teacher": "{place}/teacher", "evaluator": "{place}/judge",
                    "classifier": str(folder / "grid/classifier-seed{seed}"), "student_steps": [2, 1],
                    "teacher_steps": [2, 2], "max_train_steps": 2, "train_batch_size": 8, "num_eval_images": 16,
                    "sample_steps": 0, "cpu_threads": 1},
        "runs": {"PD": {"objective": "pd"}, "features": {"objective": "cfd", "temperature": 0.7},
                 "features 1": {"objective": "cfd", "temperature": 1.0}},
        "figure": {"x": "temperature", "line": "objective"},
    }  # fmt: skip
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_grid_runs_resumes_and_reports(grid):
    place = f"place={grid.parent}"
    done = run_ablate(grid, "--variables", place)
    folder = grid.parent / "grid"
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == ["PD", "features", "features 1"] and list(results["PD"]) == ["2", "1"]
    for name, run in (("PD", "PD"), ("features", "features"), ("features 1", "features-1")):
        for seed in (0, 1):
            for row in json.loads((folder / f"{run}-seed{seed}/comparison.json").read_text()):
                value = results[name][str(row["num_inference_steps"])]["fd"][seed]
                assert value == row["evaluation"]["metrics"]["fd"]["value"]
    values = results["features 1"]["1"]["fd"]
    cell = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
    table = (folder / "results.md").read_text()
    assert cell in table and table in done.stdout and table.count("\n") == 5
    assert Image.open(folder / "results.png").width > 600

    # One run is missing: it alone is done again, and nothing changes.
    before = (folder / "features-seed0/comparison.json").stat().st_mtime_ns
    shutil.rmtree(folder / "features-1-seed1")
    done = run_ablate("--grid", grid, "--variables", place)
    assert "[1 of 1]" in done.stdout and "features-1-seed1" in done.stdout
    assert json.loads((folder / "results.json").read_text())["features 1"]["1"]["fd"] == pytest.approx(values)
    assert (folder / "features-seed0/comparison.json").stat().st_mtime_ns == before


def test_mistakes_are_found_before_the_first_run(grid, tmp_path, capsys):
    content = yaml.safe_load(grid.read_text()) | {"output_dir": str(tmp_path / "out")}
    path = tmp_path / "grid.yaml"

    def refusal(*args, grid=path, **changes):
        path.write_text(yaml.safe_dump(content | changes))
        with pytest.raises(SystemExit) as error:
            ablate.main([str(grid), *args])
        assert error.value.code not in (0, None) and not (tmp_path / "out").exists()
        return f"{error.value.code}\n{capsys.readouterr().err}"

    given = ("--variables", "place=x")
    assert "`variables` must give place=VALUE for this grid" in refusal()
    assert "`temperature` must be in (0, 1], got 2" in refusal(*given, runs={"PD": {"temperature": 2}})
    assert "--tau" in refusal(*given, runs={"PD": {"tau": 1}})
    job = {"command": "sfd", "done": "y", "output_dir": "z"}
    assert "`command` must be one of ('distill', 'sfd'" in refusal(*given, prepare=[job | {"command": "x"}])
    assert "`script` must be one of ('distill', 'sfd'" in refusal(*given, prepare=[{"script": "x", "done": "y"}])
    assert "`done` must be given for each job" in refusal(*given, prepare=[{"command": "sfd", "output_dir": "z"}])
    assert "`done` must be given for each job" in refusal(*given, prepare=[job | {"done": ["y"]}])
    assert "`command` must be one of" in refusal(*given, prepare=[job | {"command": ["sfd"]}])
    assert "`runs` must be given in the grid" in refusal(*given, runs={})
    assert "sections of" in refusal(*given, rums={})
    assert "`grid` must be a YAML file or one of" in refusal(grid="lossses")
    assert "`figure` must be an option that is one number" in refusal(*given, figure={"x": "objective"})


@pytest.mark.parametrize("section", ["output_dir", "seeds", "prepare", "options", "runs", "figure", 1, True, None])
def test_no_key_or_value_of_a_grid_crashes(grid, tmp_path, section):
    content, path = yaml.safe_load(grid.read_text()), tmp_path / "grid.yaml"
    for value in (None, True, 3, 0.5, "no", [], [None], [3], {}, {None: None}, {1: {2: 3}}):
        path.write_text(yaml.safe_dump(content | {section: value}))
        try:
            read = read_grid(str(path))
            jobs = list(plan_jobs(read, {"place": "somewhere"}))
        except ValueError as error:
            assert "`" in str(error)
        else:
            assert len(jobs) == len(read["seeds"]) * (len(read["runs"]) + len(read["prepare"]))


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.yaml")), ids=lambda path: path.stem)
def test_grids_of_the_paper_hold_only_known_options(path):
    grid = read_grid(path.stem)
    jobs = list(plan_jobs(grid, {"data_dir": "somewhere"}))
    assert len(jobs) == len(grid["seeds"]) * (len(grid["runs"]) + len(grid["prepare"]))
    for job in jobs:
        COMMANDS[job.command].read_options(job.args)
