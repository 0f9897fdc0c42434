"""What may be published of a name: no place on somebody's disk, and nothing that markdown takes for markup."""

import os
import re
from typing import Any

PLAIN = r"[\w \[\]./@:,+=()%-]"  # characters that mean nothing to markdown inside a line
SPLIT = r" \[[^/\\\[\]]*\]"  # of a data set: "anna/digits [train]"


def is_hub_id(name: str | os.PathLike | None) -> bool:
    """Whether a name has the form of a Hub repository, "owner/name", and is no local path."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name), re.ASCII)) and not os.path.exists(name)


def public_name(name: str | None) -> str | None:
    """The name of a data set or model as it may be published: None for a local path, and where there is no name.

    Args:
        name (`str`, *optional*): a Hub id, a plain name or a path; a data set's split may follow, as " [train]".
    """
    if not name:
        return None
    place = re.sub(f"{SPLIT}$", "", name)
    if is_hub_id(place):
        return name
    is_path = re.search(r"[/\\]|^~", place) or os.path.exists(place)
    return None if is_path else name


def remove_local_names(record: Any) -> Any:
    """Copy a JSON value, with null in place of each text that is a local path.

    Args:
        record (`dict`, `list`, `str` or a number): such as the options of a run.
    """
    if isinstance(record, dict):
        return {key: None if key in PLACES else remove_local_names(value) for key, value in record.items()}
    if isinstance(record, list):
        return [remove_local_names(value) for value in record]
    return public_name(record) if isinstance(record, str) else record


PLACES = ("output_dir", "data_dir", "cache_dir", "statistics_dir", "resume_from_checkpoint")  # options: always paths


def markdown_text(name: str) -> str:
    """Write a name for the running text, a list or a table of a card: markdown shows it as it is.

    Characters with a meaning become HTML entities, which markdown does not read as markup; white space, of which
    markdown would make lines and blocks, becomes single spaces.
    """
    name = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    special = rf"(?!{PLAIN}).|(?<!\w)_|_(?!\w)|\](?=[(\[:])"
    return re.sub(special, lambda match: f"&#{ord(match[0])};", name)


def markdown_code(name: str) -> str:
    """Write a name as inline code, or as text where it holds more than plain characters."""
    return f"`{name}`" if re.fullmatch(f"{PLAIN}+", name) else markdown_text(name)
