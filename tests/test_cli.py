"""`rcfd` and `python -m diffusers_rcfd`: its pages, its recipes, and what an installation brings of them."""

import re
import shlex
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml

from diffusers_rcfd.__main__ import COMMANDS, load_command, main
from diffusers_rcfd.cli.job import FIRST
from diffusers_rcfd.cli.options import RECIPES
from tests.toys import tiny_teacher

ROOT = Path(__file__).parent.parent
RECIPE_FILES = [path for path in sorted(RECIPES.glob("*/*.yaml")) if path.parent.name != "ablations"]
LINE = re.compile(r"^ *(?:rcfd|accelerate launch .*-m diffusers_rcfd) (\S+)(.*)$", re.MULTILINE)
SCRIPT_LINE = re.compile(r"^(?:accelerate launch|python) examples/(\w+)\.py(.*)$", re.MULTILINE)
SCRIPTS = {"distill_rcfd": "distill", "distill_sfd": "sfd", "inspect_student": "inspect",
           "convert_checkpoint": "convert"}  # fmt: skip


def page_of(command, capsys):
    with pytest.raises(SystemExit) as leave:
        main([command, "--help"])
    assert leave.value.code == 0
    return capsys.readouterr().out


def examples_in(text, pattern=LINE):
    """(command, arguments) of every example of a page, lines that end in a backslash joined."""
    for name, rest in pattern.findall(text.replace("\\\n", " ")):
        yield name, shlex.split(rest, comments=True)


def test_page_lists_every_command_with_one_line_and_loads_no_heavy_library():
    code = ("import sys; from diffusers_rcfd.__main__ import main; main(['--help']); "
            "print(*{'torch', 'diffusers', 'transformers', 'timm'} & sys.modules.keys())")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *page, loaded = done.stdout.split("\n")[:-1]
    assert loaded == ""
    listed = [line.split() for line in page[page.index("commands:") + 1 :]]
    assert [name for name, *_ in listed] == list(COMMANDS)
    assert all(words for _, *words in listed) and max(map(len, page)) < 120


def test_an_unknown_command_is_named():
    with pytest.raises(SystemExit, match="must be one of distill, sfd, .* got 'distil'"):
        main(["distil"])


def test_module_and_console_script_run_the_same_function():
    settings = (ROOT / "setup.py").read_text(encoding="utf-8")
    name, value = re.search(r'"console_scripts": \["(\w+) = ([^"]+)"\]', settings).groups()
    assert name == "rcfd" and EntryPoint(name, value, "console_scripts").load() is main
    done = subprocess.run([sys.executable, "-m", "diffusers_rcfd", "train_teacher", "--max_train_steps", "0"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2
    assert "rcfd train-teacher: error: `max_train_steps` must be a positive integer, got 0" in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_of_the_help_can_be_pasted(command, capsys, tmp_path, monkeypatch):
    page = page_of(command, capsys)
    assert load_command(command).__doc__.strip() in page  # with its line breaks
    examples = list(examples_in(page))
    assert examples
    monkeypatch.chdir(tmp_path)
    for name, args in examples:
        for word in args:
            if word.endswith((".pt", ".safetensors")):  # the checkpoint to convert must be there
                Path(word).parent.mkdir(parents=True, exist_ok=True)
                Path(word).touch()
        load_command(name).read_options(args)


@pytest.mark.parametrize("command", ["distill", "sfd"])
def test_help_shows_what_people_set_first(command, capsys):
    page = page_of(command, capsys)
    first = page.partition("options to begin with:")[2].partition("\n\n")[0]
    assert re.findall(r"^  --(\w+)", first, re.MULTILINE) == ["config", *FIRST] and len(FIRST) == 9
    headings = re.findall(r"^(\S.*):$", page.partition("options:")[2], re.MULTILINE)
    assert headings[-4:] == [
        "base model that is trained here (base_*)",
        "adoption of a teacher of another kind (adoption_*)",
        "classifier that is trained here (classifier_*)",
        "evaluator that is trained here (evaluator_*)",
    ]


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipe_holds_only_known_options_and_shows_how_it_is_run(path):
    command = path.parent.name.replace("_", "-")
    *_, config = load_command(command).read_options(["--config", path.stem])
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    options = load_command(command).read_options(["--config", str(path)])
    assert any(getattr(each, "output_dir", None) == written["output_dir"] for each in options)
    examples = list(examples_in(re.sub(r"^# *", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)))
    assert [name for name, _ in examples] == [command]
    assert load_command(command).read_options(examples[0][1])[1].dataset == written["dataset"]
    if command == "distill":
        rungs = config.rungs(None, 1024)
        assert [rung.student_steps for rung in rungs][-3:] == [4, 2, 1]
        assert rungs[-4].student_steps == 8 and rungs[-4].objective == "pd"
    if command == "sfd":
        assert config.student_steps == written["student_steps"]
    if command in ("distill", "sfd"):
        assert options[0].unet_preset == written["unet_preset"] and config.output_dir == f"runs/{path.stem}"


def test_commands_of_the_readme_parse():
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    blocks = re.findall(r"^```bash$(.*?)^```", "\n".join(pages), re.M | re.S)
    examples = [each for block in blocks for pattern in (LINE, SCRIPT_LINE) for each in examples_in(block, pattern)]
    assert len(examples) >= 5
    for name, args in examples:
        if name == "convert":
            continue  # whose checkpoint must be there
        load_command(SCRIPTS.get(name, name)).read_options(args)


def test_an_installation_brings_all_that_the_commands_read(tmp_path):
    """What a wheel holds is what setuptools builds here; from there, without the checkout, a recipe is found."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "build_py", "--build-lib",
               tmp_path / "library"]  # fmt: skip
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    entry_points = next(tmp_path.glob("*.egg-info")) / "entry_points.txt"
    assert "rcfd = diffusers_rcfd.__main__:main" in entry_points.read_text()
    package = tmp_path / "library" / "diffusers_rcfd"
    built = {path.relative_to(package) for path in package.rglob("*") if path.is_file()}
    source = ROOT / "diffusers_rcfd"
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert built == files
    assert {Path("py.typed"), Path("cli/space/README.md"), Path("cli/recipes/sfd/digits_sfd.yaml")} <= files
    run = [sys.executable, "-m", "diffusers_rcfd", "distill", "--config", "digits", "--temperature", "7"]
    done = subprocess.run(run, cwd=tmp_path / "library", env={"PATH": ""}, capture_output=True, text=True)
    assert "`temperature` must be in (0, 1], got 7.0" in done.stderr and done.returncode == 2


def test_verify_names_a_flipped_bit(tmp_path, capsys):
    tiny_teacher().save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(tmp_path)])
    assert ended.value.code == 0 and "is what was written" in capsys.readouterr().out
    weights = tmp_path / "model/unet/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(tmp_path)])
    assert ended.value.code == 1 and weights.name in capsys.readouterr().out
    with pytest.raises(SystemExit, match="`folder` must hold a run"):
        main(["verify", str(tmp_path / "nothing")])
