import re
from dataclasses import dataclass, fields

import pytest

from diffusers_rcfd.cli.options import TRAINING, Group, parse_options
from diffusers_rcfd.data.config import DataConfig
from diffusers_rcfd.trainers.config import DiffusionConfig
from diffusers_rcfd.trainers.ladder_config import CFDDistillationConfig
from diffusers_rcfd.validation import option


def parse(*args, recipes=None, default_recipe=None):
    groups = (
        Group(DataConfig, "images"),
        Group(DiffusionConfig, "base model", "base_", without=("output_dir",)),
        Group(CFDDistillationConfig, "distillation", subjects=TRAINING),
    )
    options = {"first": ("objective", "dataset"), "recipes": recipes, "default_recipe": default_recipe}
    return parse_options(*groups, command="test", args=list(args), **options)


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
    options = {"recipes": recipes, "overridden": {"student_steps": ("temperature",)}}
    for spelling in (["--student_steps", "8"], ["--student-steps", "8"]):
        args = ["--config", "ladder", *spelling]
        group = Group(CFDDistillationConfig, "distillation")
        (config,) = parse_options(group, command="test", args=args, **options)
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
        (("--config", "{folder}/typo.yaml"), r"`temprature` in recipe .* is not an option; near: \['temperature'"),
        (("--config", "{folder}/broken.yaml"), "is not YAML"),
        (("--temperatur", "0.9"), r"unrecognized arguments: --temperatur 0.9; near: \['temperature'"),
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


def test_help_shows_the_first_options_first_and_prefixed_ones_last(capsys, recipes):
    with pytest.raises(SystemExit):
        parse("--help", recipes=recipes)
    text = capsys.readouterr().out
    headings = re.findall(r"^([a-z].*):$", text, re.MULTILINE)
    assert headings[:4] == ["options", "options to begin with", "images", "distillation"]
    assert headings[4:] == [*TRAINING, "base model"]
    sections = dict(zip(headings, re.split(r"^[a-z].*:$", text, flags=re.MULTILINE)[1:], strict=True))
    names = {title: re.findall(r"^  --(\w+)", section, re.MULTILINE) for title, section in sections.items()}
    assert names["options to begin with"] == ["config", "objective", "dataset"]
    assert {"learning_rate", "seed"} <= set(names["optimization"]) and "temperature" in names["distillation"]
    assert all(name.startswith(("base_", "no_base_")) for name in names["base model"])


@dataclass
class Kinds:
    """A field of each kind."""

    text: str = option("a", "Text.")
    choice: str = option("no", "A choice of which one is no.")
    whole: int = option(1, "An integer.")
    number: float = option(0.5, "A number.")
    flag: bool = option(False, "A truth value.")
    texts: list[str] = option(["a"], "Several texts.")
    numbers: list[float] | None = option(None, "Several numbers, or none.")
    whole_or_none: int | None = option(None, "An integer, or none.")


VALUES = [
    "1", "1.5", "-3", "1e-4", "9e-1", "true", "no", "off", "On", "null", "~", "", "[]", "[null]", "{}", "{1: 2}",
    "[[1]]", "2020-01-01", "0x1F", ".inf", ".nan", "1:30", "'text'", "!!binary aGk=", "!!set {a}", "!!bool maybe",
    "!!timestamp today", "!!int x", "!!int {a: 1}", "!!omap [a: 1]", "!!python/name:os.system", "[1, 2", "*a",
]  # fmt: skip
KEYS = ["1", "1.5", "true", "on", "null", "~", "2020-01-01", "[a, b]", "{a: b}", "''", "config", "help"]


@pytest.mark.parametrize("key", [*KEYS, *(field.name for field in fields(Kinds))])
def test_no_key_or_value_of_a_recipe_crashes(tmp_path, capsys, key):
    path = tmp_path / "recipe.yaml"
    for value in VALUES:
        path.write_text(f"? {key}\n: {value}\n")
        try:
            (got,) = parse_options(Group(Kinds, "kinds"), command="test", args=["--config", str(path)])
        except SystemExit as leave:
            message = capsys.readouterr().err.partition("error: ")[2]
            names = [f"`{key}"] if key in [field.name for field in fields(Kinds)] else ["`"]
            assert leave.code == 2 and any(name in message for name in [*names, "is not YAML"])
        else:
            assert type(got.flag) is bool and type(got.number) is float and type(got.whole) is int
            assert type(got.text) is str and all(type(text) is str for text in got.texts)


@pytest.mark.parametrize(
    "text, field, value",
    [
        ("mixed_precision: no", "mixed_precision", "no"),
        ("mixed_precision: off", "mixed_precision", "no"),
        ("mixed_precision: false", "mixed_precision", "no"),
        ("mixed_precision: 'no'", "mixed_precision", "no"),
        ("random_flip: off", "random_flip", False),
        ("random_flip: Yes", "random_flip", True),
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("temperature: 9e-1", "temperature", [0.9]),
        ("temperature: [9e-1, 8e-1, 1]", "temperature", [0.9, 0.8, 1.0]),
        ("temperature: null", "temperature", None),
        ("preset:", "preset", None),
        ("max_train_steps: [1_000, 2000, 3000]", "max_train_steps", [1000, 2000, 3000]),
        ("student_steps: 4", "student_steps", [4]),
        ("seed: 010", "seed", 10),
        ("hub_model_id: 1234", "hub_model_id", "1234"),
        ("hub_model_id: on", "hub_model_id", "on"),
        ("base_seed: 3", "base_seed", 3),
    ],
)
def test_a_recipe_s_value_means_what_it_means_on_the_command_line(tmp_path, text, field, value):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    _, base, distillation = parse("--config", str(path))
    got = getattr(base if field.startswith("base_") else distillation, field.removeprefix("base_"))
    assert got == value and type(got) is type(value)


def test_a_list_of_pairs_may_be_written_as_a_section(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("texts: {image: 1, feature_kl: 5e-1}")
    (kinds,) = parse_options(Group(Kinds, "kinds"), command="test", args=["--config", str(path)])
    assert kinds.texts == ["image=1", "feature_kl=5e-1"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rate: fast", "`learning_rate` must be a number, got 'fast'"),
        ("temperature: [0.9, high]", "`temperature` must be a number, got 'high'"),
        ("max_train_steps: 1e3", "`max_train_steps` must be an integer, got '1e3'"),
        ("random_flip: maybe", "`random_flip` must be true or false, got 'maybe'"),
        ("dataset: null", "`dataset` must be given, got None"),
        ("dataset: [a, b]", "`dataset` must be text, got list"),
        ("temperature: {a: 1}", "`temperature` must be a number, got 'a=1'"),
        ("dataset: {a: 1}", "`dataset_a` in recipe .* is not an option"),
        ("objective: {a: {b: 1}}", "`objective` must be text, got dict"),
        ("base: {1: 2}", "`base_1` in recipe .* is not an option"),
        ("dataset: " + "[" * 3000, "is not YAML"),
        ("a: &a [x, x]\nb: &b [*a, *a]\ndataset: [*b, *b]", "`a` in recipe .* is not an option"),
    ],
)
def test_what_a_recipe_gets_wrong_is_named(tmp_path, capsys, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit):
        parse("--config", str(path))
    assert re.search(message, capsys.readouterr().err)


def test_a_recipe_that_is_not_text_is_named(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SystemExit):
        parse("--config", str(path))
    assert f"`--config` {str(path)!r} is not YAML" in capsys.readouterr().err


@pytest.mark.parametrize("args", [("--hub_token", "hf_secret"), ("--hub-token=hf_secret",)])
def test_a_token_on_the_command_line_is_warned_of(args):
    with pytest.warns(UserWarning, match="`--hub_token` .* use `hf auth login` or the environment variable HF_TOKEN"):
        *_, distillation = parse(*args)
    assert distillation.hub_token == "hf_secret"
