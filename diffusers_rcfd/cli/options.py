"""Options of the commands: dataclasses filled from a YAML recipe and the command line, which wins. Free of torch."""

import dataclasses
import difflib
import sys
import types
import typing
import warnings
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from diffusers_rcfd.validation import require

RECIPES = Path(__file__).parent / "recipes"
FIRST = "options to begin with"

# Options that every trainer has, by subject.
TRAINING = {
    "optimization": ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "learning_rate",
                     "lr_scheduler", "lr_warmup_steps", "optimizer", "weight_decay", "max_grad_norm",
                     "max_skipped_steps", "ema_decay", "random_flip", "seed"),
    "speed and memory": ("mixed_precision", "torch_compile", "channels_last", "gradient_checkpointing",
                         "dataloader_num_workers"),
    "folder and checkpoints": ("output_dir", "overwrite_output_dir", "resume_from_checkpoint",
                               "checkpointing_steps", "checkpoints_total_limit"),
    "what is measured while training": ("logging_steps", "report_to", "eval_steps", "eval_num_images", "best_metric",
                                        "load_best_model_at_end", "sample_steps", "num_sample_images",
                                        "sample_inference_steps"),
    "publishing": ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_token", "hub_strategy"),
}  # fmt: skip

YES = ("yes", "y", "true", "t", "on", "1")
NO = ("no", "n", "false", "f", "off", "0")
KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
METAVARS = {int: "N", float: "X", str: "TEXT"}  # of a truth value: true|false


class Group(NamedTuple):
    """A dataclass whose fields are options of a command.

    Args:
        cls (`type`): the dataclass.
        title (`str`): heading of its options in `--help`.
        prefix (`str`, defaults to `""`): what the options' names begin with.
        without (`tuple[str, ...]`, defaults to `()`): fields that get no option and keep their default.
        subjects (`dict[str, tuple[str, ...]]`, *optional*): headings of their own for some of the fields.
    """

    cls: type
    title: str
    prefix: str = ""
    without: tuple[str, ...] = ()
    subjects: dict[str, tuple[str, ...]] = types.MappingProxyType({})

    def options(self) -> dict[str, tuple[dataclasses.Field, Any]]:
        """The fields that are options, with their types, by the name of the option."""
        kinds = typing.get_type_hints(self.cls)
        return {
            self.prefix + field.name: (field, kinds[field.name])
            for field in dataclasses.fields(self.cls)
            if field.init and field.name not in self.without
        }

    def heading(self, field: dataclasses.Field) -> str:
        """The heading of a field in `--help`."""
        return next((title for title, names in self.subjects.items() if field.name in names), self.title)


class PageFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Help that keeps the line breaks of the description, shows defaults, and one spelling of each option."""

    def _format_action_invocation(self, action):
        action = copy(action)
        action.option_strings = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        return super()._format_action_invocation(action)

    def _get_default_metavar_for_optional(self, action):
        return METAVARS.get(action.type, "true|false")

    def _get_help_string(self, action):
        if action.const is False:  # the --no_NAME beside each option that is on
            return f"The same as --{action.dest} false."
        return action.help if action.default is None else super()._get_help_string(action)


def parse_options(
    *groups: Group,
    command: str,
    description: str | None = None,
    first: tuple[str, ...] = (),
    recipes: Path | None = None,
    default_recipe: str | None = None,
    overridden: dict[str, tuple[str, ...]] | None = None,
    args: list[str] | None = None,
) -> tuple[Any, ...]:
    """Fill dataclasses from `--config RECIPE` and from the command line.

    Every field becomes an option with the help text of its metadata. A recipe is a YAML file of the same names, whose
    values mean what they mean on the command line; an option with the prefix `base_` may also stand without it in a
    section `base:`.

    Args:
        groups (`Group`): the dataclasses.
        command (`str`): name of the command in its messages.
        description (`str`, *optional*): head of the help text.
        first (`tuple[str, ...]`, defaults to `()`): the options that `--help` shows first, after `--config`.
        recipes (`Path`, *optional*): folder of the recipes that `--config` knows by name.
        default_recipe (`str`, *optional*): recipe used when `--config` is not given.
        overridden (`dict[str, tuple[str, ...]]`, *optional*): for an option, those of the recipe that lose their
            meaning when it is given on the command line, and go back to their defaults.
        args (`list[str]`, *optional*): the command line; defaults to that of the process.

    Returns:
        an instance of each dataclass, in the order of `groups`.

    Raises:
        SystemExit: with a message that names the option, for a value that is not allowed.
    """
    from transformers import HfArgumentParser

    args = sys.argv[1:] if args is None else list(args)
    parser = HfArgumentParser(
        _make_forms(groups, first, _describe_recipes(recipes), default_recipe),
        prog=f"rcfd {command}",
        usage="%(prog)s [--config RECIPE] [options]",
        description=description,
        formatter_class=PageFormatter,
        allow_abbrev=False,
    )
    try:
        options = _read_recipe(_find_recipe(args, default_recipe, recipes), groups)
        given = _names_on_command_line(args)
        for name in given & (overridden or {}).keys():
            options = {key: value for key, value in options.items() if key not in overridden[name]}
        parser.set_defaults(**options)
        values, unknown = parser.parse_known_args(args)
        if unknown:
            raise ValueError(f"unrecognized arguments: {' '.join(unknown)}{_suggest(unknown[0], vars(values))}")
        if "hub_token" in given:
            warnings.warn(
                "`--hub_token` on the command line shows the token to every user of this machine, in the shell's "
                "history and in the launcher's traceback: use `hf auth login` or the environment variable HF_TOKEN.",
                stacklevel=2,
            )
        return tuple(_fill(group, vars(values)) for group in groups)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def _make_forms(
    groups: tuple[Group, ...], first: tuple[str, ...], config_help: str, default_recipe: str | None
) -> list[type]:
    """Dataclasses without checks that `HfArgumentParser` can fill, one for each heading of `--help`."""
    top = FIRST if first else groups[0].title
    groups = sorted(groups, key=lambda group: group.prefix != "")
    headings = [title for group in groups for title in (group.title, *group.subjects)]
    forms = {heading: {} for heading in (top, *headings)}
    metadata = {"help": config_help, "metavar": "RECIPE"}
    forms[top]["config"] = (str | None, dataclasses.field(default=default_recipe, metadata=metadata))
    places = {}
    for group in groups:
        for name, (field, kind) in group.options().items():
            places[name] = (group.heading(field), (kind, _copy_field(field)))
    for name in sorted(places, key=lambda name: first.index(name) if name in first else len(first)):
        heading, form_field = places[name]
        forms[top if name in first else heading][name] = form_field
    return [
        dataclasses.make_dataclass(
            "Form",
            [(name, *form_field) for name, form_field in fields.items()],
            kw_only=True,
            namespace={"_argument_group_name": heading},
        )
        for heading, fields in forms.items()
        if fields
    ]


def _copy_field(field: dataclasses.Field) -> dataclasses.Field:
    """A field with the default and the help of another."""
    default = {"default": field.default, "default_factory": field.default_factory}
    default = {key: value for key, value in default.items() if value is not dataclasses.MISSING}
    return dataclasses.field(metadata=field.metadata, **default)


def _split_kind(kind: Any) -> tuple[Any, bool, bool]:
    """(type of a single value, whether it is a list of them, whether it may be None) of a field's type."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    kinds = typing.get_args(kind) if union else (kind,)
    optional = types.NoneType in kinds
    kind = next(each for each in kinds if each is not types.NoneType)
    listed = typing.get_origin(kind) is list
    return typing.get_args(kind)[0] if listed else kind, listed, optional


def _fill(group: Group, values: dict[str, Any]) -> Any:
    """The dataclass of a group, checked, from the values of all options."""
    try:
        return group.cls(**{field.name: values[name] for name, (field, _) in group.options().items()})
    except ValueError as error:
        raise ValueError(f"{group.prefix}*: {error}" if group.prefix else str(error)) from error


def _names_on_command_line(args: list[str]) -> set[str]:
    """Names of the options that a command line gives, in the spelling of the fields."""
    return {arg[2:].partition("=")[0].replace("-", "_") for arg in args if arg.startswith("--")}


def _suggest(name: str, allowed: typing.Iterable[str]) -> str:
    """The options that a wrong name may have meant."""
    close = difflib.get_close_matches(name.lstrip("-").partition("=")[0].replace("-", "_"), allowed, n=3)
    return f"; near: {close}." if close else "."


class RecipeLoader(yaml.SafeLoader):
    """YAML in which a plain word or number is text, as on the command line; only null is not."""

    yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


for _tag in ("bool", "int", "float", "timestamp", "binary"):  # also where a file asks for them: `!!int 3`
    RecipeLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", yaml.SafeLoader.construct_yaml_str)


def _describe_recipes(recipes: Path | None) -> str:
    known = _known_recipes(recipes)
    return f"Recipe: a YAML file, or one of {known}." if known else "Recipe: a YAML file of these options."


def _known_recipes(recipes: Path | None) -> list[str]:
    return sorted(path.stem for path in recipes.glob("*.yaml")) if recipes else []


def _find_recipe(args: list[str], default: str | None, recipes: Path | None) -> Path | None:
    """The file of the recipe that the command line names."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?", default=default)  # without a value it is refused by the main parser
    name = parser.parse_known_args(args)[0].config
    if name is None:
        return None
    for path in [Path(name), *([recipes / f"{name}.yaml"] if recipes else [])]:
        if path.is_file():
            return path
    raise FileNotFoundError(f"`--config` must be a YAML file or one of {_known_recipes(recipes)}, got {name!r}.")


def read_yaml(path: Path, name: str) -> dict:
    """The content of a YAML file, whose plain words and numbers are text.

    Args:
        path (`Path`): the file.
        name (`str`): the option that names it, for the messages.

    Raises:
        ValueError: if it is not YAML, or holds anything but `name: value` lines.
    """
    try:
        content = yaml.load(path.read_bytes(), RecipeLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"`{name}` {str(path)!r} is not YAML: {error}") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ValueError(f"`{name}` {str(path)!r} must hold `option: value` lines, got {type(content).__name__}.")
    return content


def _read_recipe(path: Path | None, groups: tuple[Group, ...]) -> dict[str, Any]:
    """The options of a recipe, its sections flattened to prefixes, its text read as the types of the options."""
    known = {name: each for group in groups for name, each in group.options().items()}
    given: dict[str, Any] = {}
    for key, value in (read_yaml(path, "--config") if path else {}).items():
        pairs = key in known and _split_kind(known[key][1])[1]  # a list, which may be written as pairs
        section = isinstance(value, dict) and not pairs
        given |= {f"{key}_{name}": part for name, part in value.items()} if section else {key: value}
    for name in given:
        if name not in known:
            raise ValueError(f"`{name}` in recipe {str(path)!r} is not an option{_suggest(str(name), known)}")
    return {name: _read_value(name, value, *known[name]) for name, value in given.items()}


def _read_value(name: str, value: Any, field: dataclasses.Field, kind: Any) -> Any:
    """A value of a recipe in the type of its option."""
    kind, listed, optional = _split_kind(kind)
    if value is None:
        require(optional, name, None, "given")
        return None
    if listed and isinstance(value, dict):  # as `terms: {image: 1}` for `--terms image=1`
        value = [f"{key}={_read_part(name, part, str)}" for key, part in value.items()]
    if listed:
        return [_read_part(name, part, kind) for part in (value if isinstance(value, list) else [value])]
    return _read_part(name, value, kind)


def _read_part(name: str, value: Any, kind: type) -> Any:
    """A single value, or one of a list, from its text; `argparse` reads that of other kinds."""
    if kind not in KINDS:
        return value
    if not isinstance(value, str):
        raise ValueError(f"`{name}` must be {KINDS[kind]}, got {type(value).__name__}.")
    if kind is bool:
        require(value.lower() in YES + NO, name, value, KINDS[bool])
        return value.lower() in YES
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"`{name}` must be {KINDS[kind]}, got {value!r}.") from None
