"""Options of the example scripts: dataclasses from a YAML recipe and the command line, which wins. Free of torch."""

import dataclasses
import difflib
import sys
from argparse import ArgumentDefaultsHelpFormatter
from pathlib import Path
from typing import Any

import yaml


def parse_options(
    *groups: type | tuple[type, str, tuple[str, ...]],
    description: str | None = None,
    recipes: Path | None = None,
    default_recipe: str | None = None,
    overridden: dict[str, tuple[str, ...]] | None = None,
    args: list[str] | None = None,
) -> tuple[Any, ...]:
    """Fill dataclasses from `--config RECIPE` and from the command line.

    Every field becomes an option with the help text of its metadata. A recipe is a YAML file of the same names; an
    option with the prefix `base_` may also stand without it in a section `base:`.

    Args:
        groups: dataclasses, or (dataclass, prefix of its options, names of fields that get no option and keep their
            default).
        description (`str`, *optional*): head of the help text.
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

    groups = [group if isinstance(group, tuple) else (group, "", ()) for group in groups]
    forms = [_form(*group) for group in groups]
    known = sorted(path.stem for path in recipes.glob("*.yaml")) if recipes else []
    parser = HfArgumentParser(
        forms,
        description=description,
        formatter_class=ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", default=default_recipe, help=f"Recipe: a YAML file, or one of {known}.")
    args = sys.argv[1:] if args is None else args
    recipe = _recipe_of(args, default_recipe)
    try:
        if recipe is not None:
            options = _read_recipe(recipe, recipes, forms)
            for option, others in (overridden or {}).items():
                if any(arg == f"--{option}" or arg.startswith(f"--{option}=") for arg in args):
                    options = {name: value for name, value in options.items() if name not in others}
            parser.set_defaults(**options)
        *filled, _ = parser.parse_args_into_dataclasses(args=args)
        return tuple(_fill(*group, form) for group, form in zip(groups, filled, strict=True))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def _form(cls: type, prefix: str, without: tuple[str, ...]) -> type:
    """A dataclass like `cls` with prefixed names and no checks, which `HfArgumentParser` can fill."""
    renamed = []
    for field in dataclasses.fields(cls):
        if field.name not in without:
            default = {"default": field.default, "default_factory": field.default_factory}
            default = {key: value for key, value in default.items() if value is not dataclasses.MISSING}
            renamed.append((prefix + field.name, field.type, dataclasses.field(metadata=field.metadata, **default)))
    return dataclasses.make_dataclass(f"{prefix}{cls.__name__}", renamed)


def _fill(cls: type, prefix: str, without: tuple[str, ...], form: Any) -> Any:
    """An instance of `cls`, checked, from its filled form."""
    try:
        return cls(**{name.removeprefix(prefix): value for name, value in vars(form).items()})
    except ValueError as error:
        raise ValueError(f"{prefix}*: {error}" if prefix else str(error)) from error


def _recipe_of(args: list[str], default: str | None) -> str | None:
    for i, arg in enumerate(args):
        if arg == "--config" and i + 1 < len(args):
            default = args[i + 1]
        elif arg.startswith("--config="):
            default = arg.removeprefix("--config=")
    return default


def _read_recipe(name: str, recipes: Path | None, forms: list[type]) -> dict[str, Any]:
    """The options of a recipe, its sections flattened to prefixes."""
    path = Path(name)
    if not path.is_file() and recipes is not None:
        path = recipes / f"{name}.yaml"
    if not path.is_file():
        known = sorted(file.stem for file in recipes.glob("*.yaml")) if recipes else []
        raise FileNotFoundError(f"`--config` must be a YAML file or one of {known}, got {name!r}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"`--config` {name!r} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"`--config` {name!r} must hold `option: value` lines, got {type(content).__name__}.")
    options: dict[str, Any] = {}
    for key, value in content.items():
        options.update({f"{key}_{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
    allowed = {field.name for form in forms for field in dataclasses.fields(form)}
    for option in options:
        if option not in allowed:
            close = difflib.get_close_matches(option, allowed, n=3)
            raise ValueError(f"`{option}` in recipe {name!r} is no option" + (f"; near: {close}." if close else "."))
    return options
