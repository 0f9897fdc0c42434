"""Whatever a user has as a data set, brought to what trainers and evaluators read."""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from diffusers_rcfd.data.config import DataConfig
from diffusers_rcfd.data.image_data import ImageData, StreamingImageData, read_table, split_indices
from diffusers_rcfd.data.image_files import decode_image
from diffusers_rcfd.validation import to_integer

IMAGE_KEYS = ("images", "image", "img", "pixel_values")
LABEL_KEYS = ("labels", "label")
PLAIN_KEYS = {"images", "labels"}
ROUNDING = 0.01  # by which images may lie outside [-1, 1]; bfloat16 rounds by 0.004 there
NUM_SAMPLES = 16  # images whose range is looked at before training
NUM_HASHED = 256  # images that make the fingerprint

WANTED = (
    "a map-style data set (with `__len__` and `__getitem__`) of images, alone, as pairs (image, label) or as "
    '{"images": image, "labels": label}, where an image is a PIL image, a uint8 tensor (C, H, W) or a floating tensor '
    "(C, H, W) in [-1, 1]"
)


def as_image_dataset(dataset: Any, name: str = "train_dataset") -> Dataset:
    """Bring a data set to the interface of `ImageData`; one that has it already is returned as it is.

    Args:
        dataset: an `ImageData` or `StreamingImageData`; a `datasets.Dataset` in any format or with a transform; a
            `torch.utils.data` data set, such as `Subset`, `ConcatDataset`, `TensorDataset` and those of torchvision;
            or any other object with `__len__` and `__getitem__`. Its first image is read.
        name (`str`, defaults to `"train_dataset"`): the argument that messages name.

    Returns:
        `ImageData`, `StreamingImageData` or `ImageItems`.

    Raises:
        TypeError: if it is no data set of images; the message says what is wanted.
        ValueError: if it is empty, or its images are not in [-1, 1].
    """
    if isinstance(dataset, ImageData | StreamingImageData | ImageItems) or _has_interface(dataset):
        return dataset
    if isinstance(dataset, IterableDataset):
        if hasattr(dataset, "split_by_node") and hasattr(dataset, "set_epoch"):
            return dataset
        raise TypeError(
            f"`{name}` must be map-style or come from `load_image_data(streaming=True)`, got {_name_type(dataset)}."
        )
    if not _is_map_style(dataset):
        raise TypeError(f"`{name}` must be {WANTED}, got {_name_type(dataset)}{_suggest_fix(dataset)}.")
    if len(dataset) == 0:
        raise ValueError(f"`{name}` must hold at least one image, got none.")
    if type(dataset) is Subset:
        return as_image_dataset(dataset.dataset, name).subset(dataset.indices)
    if type(dataset) is TensorDataset and dataset.tensors[0].dtype == torch.uint8 and dataset.tensors[0].ndim == 4:
        return _read_tensors(*dataset.tensors[:2], name=name)
    if _is_table(dataset) and dataset.format["type"] != "custom":  # which is the format of a transform
        return _read_rows(dataset, name)
    return ImageItems(dataset, name)


def _name_type(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _has_interface(dataset: Any) -> bool:
    return all(hasattr(dataset, name) for name in ("__getitems__", "image_shape", "name", "fingerprint"))


def _is_map_style(dataset: Any) -> bool:
    return (
        hasattr(dataset, "__len__")
        and hasattr(dataset, "__getitem__")
        and not isinstance(dataset, str | bytes | Mapping | type)
    )


def _suggest_fix(dataset: Any) -> str:
    if isinstance(dataset, str):
        return f" {dataset!r}: load it with `load_image_data({dataset!r})`"
    if isinstance(dataset, Mapping):
        return f" with {', '.join(map(str, list(dataset)[:5]))}: give one of them"
    if isinstance(dataset, torch.utils.data.DataLoader):
        return ": give its `dataset`"
    return ""


def _is_table(dataset: Any) -> bool:
    """Whether it is a `datasets.Dataset`, without an import of `datasets`, which is slow."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(dataset, datasets.Dataset)


def _read_rows(table: Any, name: str) -> Dataset:
    """Read the columns of a `datasets.Dataset` that its format shows: image files, else arrays."""
    table = table.select_columns(table.format["columns"])
    if any(type(feature).__name__ == "Image" for feature in table.features.values()):
        return read_table(table, DataConfig(), table.info.dataset_name or name)
    return ImageItems(table.with_format("torch"), name)


def _read_tensors(images: torch.Tensor, labels: torch.Tensor | None = None, *, name: str) -> ImageData:
    """Return uint8 images (N, C, H, W) and their labels (N,) as `ImageData`."""
    if labels is None:
        return ImageData(images, name=name)
    if labels.ndim != 1 or labels.is_floating_point() or labels.min() < 0:
        got = f"{labels.dtype} {tuple(labels.shape)}, from {labels.min()}"
        raise TypeError(f"`{name}` must have integers from 0, one for each image, as its labels, got {got}.")
    return ImageData(images, labels.long(), num_classes=int(labels.max()) + 1, name=name)


class ImageItems(Dataset):
    """The images of any map-style data set, read one by one; made by `as_image_dataset`.

    Batches and attributes are those of `ImageData`. Floating images are float32 in [-1, 1], and are refused outside.

    Args:
        dataset: gives an image, a pair or a dictionary for each index, see `WANTED`.
        argument (`str`): the argument that messages name.
        whole (`ImageItems`, *optional*): what this is a part of, with the same name and classes.
    """

    collate = staticmethod(ImageData.collate)

    def __init__(self, dataset: Any, argument: str, whole: "ImageItems | None" = None):
        self.dataset = dataset
        self.argument = argument
        self.num_images = len(dataset)
        if whole is None:
            self.name = getattr(dataset, "name", None) or _find_name(dataset)
            self._num_classes, self.class_names = _find_classes(dataset)
        else:
            self.name = whole.name
            self._num_classes, self.class_names = whole._num_classes, whole.class_names
        self._whole = whole
        self._fingerprint = None
        (image,), (label,) = self._read([0])
        self._shape = image.shape
        self.image_shape = tuple(image.shape)
        self.has_labels = label is not None
        if image.is_floating_point():
            samples = [image.flatten() for image in self._read(_spread(self.num_images, NUM_SAMPLES))[0]]
            self._check_range(torch.cat(samples), "images", all_images=self.num_images > 1)

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = range(self.num_images)[index]  # negative indices and IndexError as in a list
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        indices = [int(index) for index in indices]
        items = self._fetch(indices)
        batch = _stack_plain(items)
        if batch is not None and batch["images"].shape[1:] == self._shape:
            self._check_plain(indices, batch)
            return batch
        images, labels = self._read_items(items, indices)
        if any(image.shape != self._shape for image in images):
            images = [self._fit_shape(image, index) for image, index in zip(images, indices, strict=True)]
        images = torch.stack(images)
        if images.is_floating_point() and images.device.type == "cpu":
            self._check_range(images, f"images {indices}")
        if not self.has_labels:
            return {"images": images}
        self._check_labels(indices, labels)
        return {"images": images, "labels": torch.tensor(labels)}

    def _fetch(self, indices: list[int]) -> list[Any]:
        """The items of the data set, as they are."""
        fetch = getattr(self.dataset, "__getitems__", None)
        items = fetch(indices) if fetch else [self.dataset[index] for index in indices]
        if isinstance(items, Mapping):  # a batch in place of a list of items
            items = [{key: values[i] for key, values in items.items()} for i in range(len(indices))]
        return items

    def _read(self, indices: list[int]) -> tuple[list[torch.Tensor], list[int | None]]:
        """Read items: images, each uint8 or float32 (C, H, W), and labels, each a number or None."""
        return self._read_items(self._fetch(indices), indices)

    def _read_items(self, items: list[Any], indices: list[int]) -> tuple[list[torch.Tensor], list[int | None]]:
        pairs = [self._read_item(item, index) for item, index in zip(items, indices, strict=True)]
        return [image for image, _ in pairs], [label for _, label in pairs]

    def _read_item(self, item: Any, index: int) -> tuple[torch.Tensor, int | None]:
        try:
            image, label = _divide(item)
            return _read_pixels(image), None if label is None else _read_label(label)
        except (TypeError, ValueError) as error:
            raise type(error)(f"`{self.argument}[{index}]` {error}") from error

    def _fit_shape(self, image: torch.Tensor, index: int) -> torch.Tensor:
        """Give a grey image among colour ones three channels; raise a `ValueError` for another shape."""
        if len(image) == 1 and self._shape[0] == 3:
            image = image.expand(3, -1, -1)
        if image.shape != self._shape:
            raise ValueError(
                f"`{self.argument}` must hold images of one shape, got {tuple(image.shape)} at {index} and "
                f"{self.image_shape} at 0: resize and crop them, and convert all to RGB, in its transform."
            )
        return image

    def _check_plain(self, indices: list[int], batch: dict[str, torch.Tensor]) -> None:
        """Check a batch of `_stack_plain` as a whole."""
        if batch["images"].is_floating_point():
            self._check_range(batch["images"], f"images {indices}")
        low, high = batch["labels"].aminmax()
        if low < 0 or (self._num_classes is not None and high >= self._num_classes):
            self._check_labels(indices, batch["labels"].tolist())

    def _check_labels(self, indices: list[int], labels: list[int | None]) -> None:
        if None in labels:
            index = indices[labels.index(None)]
            raise ValueError(f"`{self.argument}` must hold a label for each image or for none, got none at {index}.")
        if min(labels) < 0:
            index = indices[labels.index(min(labels))]
            raise TypeError(f"`{self.argument}[{index}]` must have an integer from 0 as its label, got {min(labels)}.")
        if self._num_classes is not None and max(labels) >= self._num_classes:
            allowed = f"labels in 0..{self._num_classes - 1}, as it has {self._num_classes} classes"
            raise ValueError(f"`{self.argument}` must hold {allowed}, got {max(labels)}.")

    def _check_range(self, images: torch.Tensor, which: str, all_images: bool = False) -> None:
        """Raise a `ValueError` for images outside [-1, 1] or, where they stand for all images, in 0..1."""
        low, high = (bound.item() for bound in images.aminmax())
        inside = -1 - ROUNDING <= low and high <= 1 + ROUNDING  # False for NaN
        from_0_to_1 = all_images and low >= 0 and high > 0.5
        if not inside or from_0_to_1:
            raise ValueError(
                f"`{self.argument}` must hold floating images in [-1, 1], got {low:.4g}..{high:.4g} in {which}"
                f"{_suggest_conversion(low, high)}."
            )

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None without labels; found by reading all labels, where the data set does not say it."""
        if self._num_classes is None and self._whole is not None:
            self._num_classes = self._whole.num_classes
        elif self._num_classes is None and self.has_labels:
            self._num_classes = max(self._read([index])[1][0] for index in range(self.num_images)) + 1
        return self._num_classes

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the number, shape and classes, and with 256 of the images.

        Contents that a second reading does not repeat, such as those of a random transform, are left out.
        """
        if self._fingerprint is None:
            digest = hashlib.blake2b(digest_size=8)
            digest.update(repr((self.num_images, self.image_shape, self.class_names)).encode())
            for index in _spread(self.num_images, NUM_HASHED):
                (image,), (label,) = self._read([index])
                if torch.equal(image, self._read([index])[0][0]):
                    digest.update(image.contiguous().cpu().numpy())
                digest.update(repr(label).encode())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def subset(self, indices: Sequence[int]) -> "ImageItems":
        """Return the images at `indices` (integers, each in -N..N-1) as data of their own, in that order."""
        rows = [range(self.num_images)[index] for index in torch.as_tensor(indices, dtype=torch.long).tolist()]
        return ImageItems(Subset(self.dataset, rows), self.argument, self)

    def split(self, fraction: float, seed: int = 0) -> tuple["ImageItems", "ImageItems"]:
        """Divide at random into (rest, held_out), as `ImageData.split` does."""
        rest, held_out = split_indices(self.num_images, fraction, seed)
        return self.subset(rest), self.subset(held_out)


def _find_name(dataset: Any) -> str:
    """Return the name of a torchvision data set, such as "CIFAR10"; others have none."""
    return type(dataset).__name__ if type(dataset).__module__.startswith("torchvision.") else ""


def _spread(length: int, number: int) -> list[int]:
    """Return up to so many indices, evenly spread over a length."""
    return sorted({round(i) for i in np.linspace(0, length - 1, min(length, number))})


def _stack_plain(items: list[Any]) -> dict[str, torch.Tensor] | None:
    """Collate {"images": uint8 or float32 (C, H, W), "labels": int64 ()}, which needs no reading; None for others."""
    if set(map(type, items)) != {dict} or any(item.keys() != PLAIN_KEYS for item in items):
        return None
    columns = [[item[key] for item in items] for key in ("images", "labels")]
    if any(set(map(type, column)) != {torch.Tensor} for column in columns):
        return None
    if any(len({value.dtype for value in column}) != 1 for column in columns):
        return None
    try:
        images, labels = map(torch.stack, columns)
    except RuntimeError:  # of different shapes
        return None
    plain = images.ndim == 4 and images.dtype in (torch.uint8, torch.float32) and images.device.type == "cpu"
    return {"images": images, "labels": labels} if plain and labels.ndim == 1 and labels.dtype == torch.int64 else None


def _divide(item: Any) -> tuple[Any, Any]:
    """Return (image, label) of an item, the label None where it has none."""
    if isinstance(item, torch.Tensor):
        return item, None
    if isinstance(item, tuple | list):
        if len(item) == 0:
            raise TypeError(f"must be an image or a pair (image, label), got an empty {_name_type(item)}.")
        return item[0], item[1] if len(item) > 1 else None
    if isinstance(item, Mapping):
        image = next((item[key] for key in IMAGE_KEYS if key in item), None)
        if image is None:
            raise TypeError(f"must have an image under one of {IMAGE_KEYS}, got the keys {list(item)}.")
        return image, next((item[key] for key in LABEL_KEYS if key in item), None)
    return item, None


def _read_pixels(image: Any) -> torch.Tensor:
    """Return an image as a tensor (C, H, W), uint8 in 0..255 or float32 as it is."""
    if isinstance(image, np.ndarray):
        tensor = torch.from_numpy(image)
        in_rows = image.ndim == 3 and image.shape[-1] in (1, 3) and image.shape[0] not in (1, 3)
        image = tensor.movedim(-1, 0) if in_rows else tensor  # (H, W, C) as well as (C, H, W)
    if not isinstance(image, torch.Tensor):
        if isinstance(image, Image | bytes) or (isinstance(image, Mapping) and "bytes" in image):
            return torch.tensor(decode_image(image, "must be an image", None, None))
        raise TypeError(f"must be a PIL image, an array or a tensor, got {_name_type(image)}.")
    image = image[None] if image.ndim == 2 else image
    if image.ndim != 3:
        raise TypeError(f"must have the shape (C, H, W), got {tuple(image.shape)}.")
    if image.dtype == torch.uint8:
        return image
    if image.is_floating_point():
        return image.float()
    if image.dtype == torch.bool or image.is_complex() or image.min() < 0 or image.max() > 255:
        raise TypeError(f"must be integers in 0..255 or floating in [-1, 1], got {image.dtype} outside of that.")
    return image.to(torch.uint8)


def _read_label(label: Any) -> int:
    """Return a label as an integer from 0."""
    number = to_integer(label)
    if number is None or number < 0:
        got = f"a tensor {tuple(label.shape)}" if isinstance(label, torch.Tensor) and label.ndim else repr(label)
        raise TypeError(f"must have an integer from 0 as its label, got {got}.")
    return number


def _suggest_conversion(low: float, high: float) -> str:
    """Return the end of a message about images in low..high: which conversion is probably meant."""
    if low >= 0 and high <= 1 + ROUNDING:
        return ", which looks like 0..1: map it by 2 * x - 1"
    if low >= 0 and 16 < high <= 255:
        return ", which looks like 0..255: give uint8 images, or map it by x / 127.5 - 1"
    if -4 <= low < 0 and high <= 4:
        return ", which looks like images normalized to mean 0 and deviation 1: take mean and deviation 0.5 instead"
    return ""


def _find_classes(dataset: Any) -> tuple[int | None, list[str] | None]:
    """Return number and names of the classes as far as a data set knows them without reading its images."""
    if isinstance(dataset, Subset):
        return _find_classes(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        found = [_find_classes(part) for part in dataset.datasets]
        numbers = [number for number, _ in found]
        same = all(names == found[0][1] for _, names in found)
        return None if None in numbers else max(numbers), found[0][1] if same else None
    if _is_table(dataset):
        features = [dataset.features[key] for key in LABEL_KEYS if key in dataset.features]
        names = next((feature.names for feature in features if hasattr(feature, "names")), None)
        return (len(names), list(names)) if names else (None, None)
    names = getattr(dataset, "class_names", None) or getattr(dataset, "classes", None)
    names = list(names) if isinstance(names, list | tuple) and names else None
    number = to_integer(getattr(dataset, "num_classes", None))
    return number or (len(names) if names else None), names
