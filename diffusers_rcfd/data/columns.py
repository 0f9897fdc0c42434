"""The columns of a table that hold the images and their labels."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils import logging

logger = logging.get_logger(__name__)


def find_columns(
    features: dict[str, Any], image_column: str | None, label_column: str | None, name: str
) -> tuple[str, str | None]:
    """Return the image column and the label column (or None) among a data set's features, given or found."""
    for field, column in (("image_column", image_column), ("label_column", label_column)):
        if column and column not in features:
            raise ValueError(f"`{field}` must be a column of {name} ({', '.join(features)}), got {column!r}.")
    return _find_image_column(features, image_column, name), _find_label_column(features, label_column, name)


def _find_image_column(features: dict[str, Any], given: str | None, name: str) -> str:
    found = [column for column, feature in features.items() if _holds_images(feature)]
    found = [column for column in found if _name_kind(features[column]) == "Image"] or found
    if given:
        paths = getattr(features[given], "dtype", None) in ("string", "large_string")
        if not paths and not _holds_images(features[given]):
            raise ValueError(
                f"`image_column` must hold images, encoded bytes or paths, got {given!r} of {name}, which holds "
                f"{features[given]}."
            )
        return given
    if len(found) != 1:
        trouble = f"more than one image column ({', '.join(found)})" if found else "no image column"
        raise ValueError(
            f"`image_column` must be given for {name}, which has {trouble}: one of {', '.join(features)}, got None."
        )
    return found[0]


def _find_label_column(features: dict[str, Any], given: str | None, name: str) -> str | None:
    if given is not None:
        return given or None
    classes = [column for column, feature in features.items() if _name_kind(feature) == "ClassLabel"]
    named = [column for column in ("label", "labels") if column in features]
    if len(classes) > 1 and not named:
        raise ValueError(
            f"`label_column` must be given for {name}, which has more than one: {', '.join(classes)}, or '' for "
            "none, got None."
        )
    return (named or classes or [None])[0]


def _name_kind(feature: Any) -> str:
    return type(feature).__name__


def _holds_images(feature: Any) -> bool:
    struct = isinstance(feature, dict) and "bytes" in feature
    return struct or getattr(feature, "dtype", None) in ("PIL.Image.Image", "binary", "large_binary")


def encode_labels(
    values: list, class_names: list[str] | None, locate: Callable[[int], str]
) -> tuple[torch.Tensor, int, list[str] | None]:
    """Turn labels (class numbers, or names) into numbers.

    Args:
        values (`list`): the labels as stored.
        class_names (`list[str]`, *optional*): the classes that the numbers stand for.
        locate (`Callable`): gives the words by which a message names the image of a row.

    Returns:
        the labels, int64 (N,); the number of classes; and their names, None where they are numbers alone.

    Raises:
        ValueError: for the first label that is missing, of another type than the others, or out of range.
    """
    if set(map(type, values)) != {int}:
        values = [_clean_label(value) for value in values]
        if class_names is None and all(isinstance(value, str) or value is None for value in values):
            class_names = sorted(set(values) - {None})
            number_of = {name: number for number, name in enumerate(class_names)}
            values = [number_of.get(value) for value in values]
    limit = len(class_names) if class_names else None
    for row, value in enumerate(values):
        if not isinstance(value, int) or value < 0 or (limit is not None and value >= limit):
            wanted = "integers from 0" if limit is None else f"integers in 0..{limit - 1}"
            wanted = "a label for each image" if value is None else wanted
            got = "none" if value is None else repr(value)
            raise ValueError(
                f"`label_column` must hold {wanted}, or be '' to load no labels, got {got} in {locate(row)}."
            )
    labels = torch.tensor(values, dtype=torch.long)
    return labels, limit or int(labels.max()) + 1, class_names


def _clean_label(value: Any) -> Any:
    """Return a label as an integer where a table stored it as a float, and None where it is missing."""
    if isinstance(value, float):
        if value != value:
            return None
        return int(value) if value.is_integer() else value
    return None if value == "" else value


def warn_of_empty_classes(labels: torch.Tensor, num_classes: int, name: str) -> None:
    """Log a warning where class numbers leave out some, as 1..K does, which leaves class 0 of K + 1 empty."""
    present = labels.unique()
    if len(present) < num_classes:
        logger.warning(
            f"The labels of {name} are numbers in {present[0]}..{present[-1]}, which makes {num_classes} classes, of "
            f"which {num_classes - len(present)} have no images. Labels count from 0."
        )
