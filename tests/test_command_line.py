import re

import pytest

from diffusers_rcfd.cli.options import parse_options
from diffusers_rcfd.data.config import DataConfig
from diffusers_rcfd.trainers.config import DiffusionConfig
from diffusers_rcfd.trainers.ladder_config import CFDDistillationConfig


def parse(*args, recipes=None, default_recipe=None):
    groups = (DataConfig, (DiffusionConfig, "base_", ("output_dir",)), CFDDistillationConfig)
    return parse_options(*groups, recipes=recipes, default_recipe=default_recipe, args=list(args))


@pytest.fixture
def recipes(tmp_path):
    (tmp_path / "small.yaml").write_text(
        "dataset: digits\nstudent_steps: [4, 2]\ntemperature: 0.9\nrandom_flip: true\n"
        "base:\n  max_train_steps: 7\n  learning_rate: 2e-3\n"
    )
    return tmp_path


def test_recipe_by_name_or_path_and_sections(recipes):
    for args, default in (
        (("--config", "small"), None),
        ((f"--config={recipes / 'small.yaml'}",), None),
        ((), "small"),
    ):
        data, base, distillation = parse(*args, recipes=recipes, default_recipe=default)
        assert type(base) is DiffusionConfig and type(distillation) is CFDDistillationConfig
        assert (data.dataset, base.max_train_steps, base.learning_rate) == ("digits", 7, 2e-3)
        assert (distillation.student_steps, distillation.temperature) == ([4, 2], [0.9])
        assert distillation.random_flip and base.output_dir == "output"


def test_command_line_wins_over_the_recipe(recipes):
    _, base, distillation = parse(
        "--config", "small", "--student_steps", "8", "--base_max_train_steps", "3", "--random_flip", "false",
        "--temperature", "0.8", recipes=recipes
    )  # fmt: skip
    assert (distillation.student_steps, distillation.temperature, base.max_train_steps) == ([8], [0.8], 3)
    assert not distillation.random_flip


def test_options_of_the_recipe_that_another_one_overrides(recipes):
    (recipes / "ladder.yaml").write_text("student_steps: [4, 2]\ntemperature: [0.9, 0.8]\nlearning_rate: 1.0e-3\n")
    args = ["--config", "ladder", "--student_steps", "8"]
    options = {"recipes": recipes, "args": args, "overridden": {"student_steps": ("temperature",)}}
    (config,) = parse_options(CFDDistillationConfig, **options)
    assert (config.student_steps, config.temperature, config.learning_rate) == ([8], None, 1e-3)


def test_help_names_every_option_with_its_text(capsys, recipes):
    with pytest.raises(SystemExit) as leave:
        parse("--help", recipes=recipes)
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert leave.value.code == 0
    for words in ("--base_ema_decay", "--temperature", "tau in (0, 1], for each rung", "--config", "['small']"):
        assert words in text


@pytest.mark.parametrize(
    "args, message",
    [
        (("--temperature", "2"), r"`temperature` must be in \(0, 1\], got 2.0"),
        (("--base_max_train_steps", "-1"), r"base_\*: `max_train_steps` must be a positive integer, got -1"),
        (("--config", "huge"), r"`--config` must be a YAML file or one of \['small'\], got 'huge'"),
        (("--config", "{folder}/list.yaml"), "must hold `option: value` lines, got list"),
        (("--config", "{folder}/typo.yaml"), r"`temprature` in recipe .* is no option; near: \['temperature'"),
        (("--config", "{folder}/broken.yaml"), "is no YAML"),
        (("--temp", "0.9"), "unrecognized arguments: --temp|not used by the HfArgumentParser"),
    ],
)
def test_mistakes_end_with_a_message(capsys, recipes, args, message):
    (recipes / "list.yaml").write_text("- a\n- b\n")
    (recipes / "typo.yaml").write_text("temprature: 0.9\n")
    (recipes / "broken.yaml").write_text("a: [1\n")
    (recipes / "list.yaml").rename(folder_file := recipes.parent / "list.yaml")
    (recipes / "typo.yaml").rename(recipes.parent / "typo.yaml")
    (recipes / "broken.yaml").rename(recipes.parent / "broken.yaml")
    with pytest.raises((SystemExit, ValueError)) as leave:
        parse(*(arg.replace("{folder}", str(folder_file.parent)) for arg in args), recipes=recipes)
    assert re.search(message, capsys.readouterr().err + str(leave.value))
