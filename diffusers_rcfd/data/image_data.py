"""Image data sets: a Hub name, a local folder, parquet or arrow files, IDX files or the embedded digits.

`load_image_data` gives `ImageData` (map-style, uint8, in memory where it fits) or `StreamingImageData`.
"""

import glob
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import logging
from torch.utils.data import Dataset, IterableDataset, default_collate
from tqdm.auto import tqdm

from diffusers_rcfd.data.columns import encode_labels, find_columns, warn_of_empty_classes
from diffusers_rcfd.data.config import DataConfig
from diffusers_rcfd.data.image_files import (
    DIGITS_PATH,
    check_size,
    decode_image,
    locate,
    name_row,
    read_digits,
    read_fashion_mnist,
    read_header,
)
from diffusers_rcfd.data.image_folders import (
    ARCHIVES,
    TABLES,
    FolderContent,
    count_endings,
    is_below_link,
    open_image_folder,
    read_folder,
)
from diffusers_rcfd.validation import require, require_count

logger = logging.get_logger(__name__)

IN_PACKAGE = ("digits", "fashion-mnist")  # names of data sets, also where a folder has the same
MAX_MEMORY_BYTES = 4 * 2**30  # what is larger when decoded is decoded on demand


class _Column:
    """The image column of a `datasets.Dataset`, rows as stored; slices and index lists give lists."""

    def __init__(self, source, column: str):
        self.source, self.column = source.select_columns([column]), column

    def __len__(self):
        return len(self.source)

    def __getitem__(self, rows):
        return self.source[rows][self.column]

    def select(self, rows: list[int]) -> "_Column":
        return _Column(self.source.select(rows), self.column)


def _open_progress_bar(total: int, words: str) -> tqdm:
    hidden = {"disable": True} if os.environ.get("LOCAL_RANK", "0") != "0" else {}  # else respect TQDM_DISABLE
    return tqdm(total=total, desc=words, unit=" images", delay=1, **hidden)


def _decode_all(values, name: str, resolution: int | None, channels: int | None) -> torch.Tensor:
    """Decode all images into one uint8 tensor (N, C, H, W), in threads: PIL releases the interpreter lock."""
    images = None
    with (
        _open_progress_bar(len(values), f"Decoding {name}") as bar,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        for start in range(0, len(values), 256):
            rows = range(start, min(start + 256, len(values)))
            wheres = [f"{name}: row {row}" for row in rows]
            decode = partial(decode_image, resolution=resolution, channels=channels)
            decoded = pool.map(decode, values[start : rows.stop], wheres)
            for row, where, pixels in zip(rows, wheres, decoded, strict=True):
                if images is None:
                    images = np.empty((len(values), *pixels.shape), np.uint8)
                check_size(pixels.shape[1:], images.shape[2:], where)
                if len(pixels) > images.shape[1]:  # the first colour image after grey ones
                    images = images.repeat(3, axis=1)
                images[row] = pixels  # grey broadcasts over RGB
            bar.update(len(rows))
    return torch.from_numpy(images)


def _scan_headers(values, name: str, resolution: int | None, channels: int | None) -> tuple[int, int, int]:
    """Find the common shape (C, H, W) of images too many to decode now, from their file headers."""
    if resolution is not None and channels is not None:
        return channels, resolution, resolution
    shapes = []
    with _open_progress_bar(len(values), f"Reading headers of {name}") as bar:
        for start in range(0, len(values), 256):
            for row, value in enumerate(values[start : start + 256], start):
                shapes.append(read_header(value, f"{name}: row {row}"))
                if resolution is None:
                    check_size(shapes[-1][1:], shapes[0][1:], f"{name}: row {row}")
                bar.update()
    _, height, width = shapes[0]
    return channels or max(shape[0] for shape in shapes), resolution or height, resolution or width


class ImageData(Dataset):
    """Map-style image data: batches are `{"images": uint8 (B, C, H, W), "labels": int64 (B,)}`, labels if known.

    Use with `DataLoader(data, batch_size=..., collate_fn=ImageData.collate)`.

    Args:
        images: uint8 tensor (N, C, H, W); or, for data decoded on demand, the stored image column.
        labels: int64 (N,) or None.
        num_classes, class_names: number and names of the classes, None where unknown.
        name: what messages call the data.
        shape: (C, H, W), only with a stored image column; decoded images are brought to it.
        resolution: side to resize and crop to, only with a stored image column.

    Attributes: `images` (None when decoded on demand), `labels`, `num_images`, `image_shape` (C, H, W),
    `num_classes`, `class_names`, `name`, `fingerprint` (short hash of contents and parameters).
    """

    def __init__(
        self, images, labels=None, *, num_classes=None, class_names=None, name="images", shape=None, resolution=None
    ):
        in_memory = isinstance(images, torch.Tensor)
        if in_memory and (images.dtype != torch.uint8 or images.dim() != 4):
            got = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"`images` must be torch.uint8 (N, C, H, W), got {got}.")
        if len(images) == 0:
            raise ValueError(f"`images` must be at least one image, got none in {name}.")
        if labels is not None and len(labels) != len(images):
            raise ValueError(
                f"`labels` must be one for each of the {len(images)} images of {name}, got {len(labels)}."
            )
        self.images = images if in_memory else None
        self._stored = None if in_memory else images
        self.labels = labels
        self.num_images = len(images)
        self.num_classes = num_classes
        self.class_names = class_names
        self.name = name
        self.image_shape = tuple(images.shape[1:]) if shape is None else tuple(shape)
        self._resolution = resolution
        self._fingerprint = None

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = range(self.num_images)[index]  # negative indices and IndexError as in a list
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices) -> dict[str, torch.Tensor]:
        indices = torch.as_tensor(indices, dtype=torch.long)
        batch = {"images": self._decode(indices.tolist()) if self.images is None else self.images[indices]}
        if self.labels is not None:
            batch["labels"] = self.labels[indices]
        return batch

    def _decode(self, rows: list[int]) -> torch.Tensor:
        decoded = []
        for row, value in zip(rows, self._stored[rows], strict=True):
            where = f"{self.name}: row {row}"
            decoded.append(decode_image(value, where, self._resolution, self.image_shape[0]))
            check_size(decoded[-1].shape[1:], self.image_shape[1:], where)
        return torch.from_numpy(np.stack(decoded))

    @staticmethod
    def collate(batch):
        """Pass a batch made by `__getitems__` through; stack a list of single items."""
        return batch if isinstance(batch, dict) else default_collate(batch)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the images, labels or parameters; computed once, on first use."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(digest_size=8)
            digest.update(repr((self.num_images, self.image_shape, self.num_classes, self.class_names)).encode())
            if self.images is None:
                digest.update(f"{self._stored.source._fingerprint} {self._resolution}".encode())
            else:
                digest.update(self.images.contiguous().numpy())
            if self.labels is not None:
                digest.update(self.labels.contiguous().numpy())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def subset(self, indices) -> "ImageData":
        """Return the images at `indices` (integers, each in -N..N-1) as data of their own, in that order."""
        rows = [range(self.num_images)[index] for index in torch.as_tensor(indices, dtype=torch.long).tolist()]
        lazy = {"shape": self.image_shape, "resolution": self._resolution} if self.images is None else {}
        return ImageData(
            self._stored.select(rows) if lazy else self.images[rows],
            None if self.labels is None else self.labels[rows],
            num_classes=self.num_classes,
            class_names=self.class_names,
            name=self.name,
            **lazy,
        )

    def split(self, fraction: float, seed: int = 0) -> tuple["ImageData", "ImageData"]:
        """Divide at random into (rest, held_out); the same `seed` always gives the same division.

        Args:
            fraction: share held out, above 0 and below 1; each side gets at least one image.
            seed: of the draw.

        Raises:
            ValueError: `fraction` outside its range, or fewer than two images.
        """
        rest, held_out = split_indices(self.num_images, fraction, seed)
        return self.subset(rest), self.subset(held_out)


def split_indices(num_images: int, fraction: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide 0..num_images - 1 at random into (rest, held out), both sorted; see `ImageData.split`."""
    require(0 < fraction < 1, "fraction", fraction, "above 0 and below 1")
    require(num_images >= 2, "fraction", fraction, f"of two or more images, not of {num_images}")
    held_out = min(max(round(num_images * fraction), 1), num_images - 1)
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))
    return order[held_out:].sort().values, order[:held_out].sort().values


class StreamingImageData(IterableDataset):
    """Image data that is read as it comes: items are `{"images": uint8 (C, H, W), "labels": int64 ()}`.

    Made by `load_image_data(..., streaming=True)`. DataLoader workers share the shards (`datasets` does it), nodes
    share by `split_by_node`. The order is shuffled in a buffer from `seed` and the epoch. Attributes are those of
    `ImageData`, with `num_images` None; `fingerprint` covers the parameters, not the contents.
    """

    collate = staticmethod(ImageData.collate)

    def __init__(self, source, image_column, label_column, **attributes):
        self.source = source
        self.image_column = image_column
        self.label_column = label_column
        self.num_images = None
        for key in ("image_shape", "resolution", "num_classes", "class_names", "name", "fingerprint"):
            setattr(self, key, attributes[key])

    def __iter__(self):
        for number, row in enumerate(self.source):
            where = f"{self.name}: image {number} of the stream"
            pixels = decode_image(row[self.image_column], where, self.resolution, self.image_shape[0])
            check_size(pixels.shape[1:], self.image_shape[1:], where)
            item = {"images": torch.tensor(pixels)}
            if self.label_column is not None:
                where = locate(where, row[self.image_column])
                labels, _, _ = encode_labels([row[self.label_column]], self.class_names, lambda _, where=where: where)
                item["labels"] = labels[0]
            yield item

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from which, with the seed, the next pass draws its order."""
        self.source.set_epoch(epoch)

    def split_by_node(self, rank: int, world_size: int) -> "StreamingImageData":
        """Return the part of this stream that process `rank` of `world_size` reads; the parts do not overlap."""
        from datasets.distributed import split_dataset_by_node

        part = copy(self)
        part.source = split_dataset_by_node(self.source, rank, world_size)
        return part

    def state_dict(self) -> dict:
        """Return the position in the stream, as `datasets.IterableDataset.state_dict` gives it.

        It is that of the process that iterates: with DataLoader workers use torchdata's StatefulDataLoader. Images
        that sat in the shuffle buffer are not part of it and are skipped on resuming; for a resumption that is exact
        to the bit, iterate the same epoch again and drop the first batches instead.
        """
        return self.source.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Make the next pass begin where `state_dict` was taken; call `set_epoch` with its epoch first."""
        self.source.load_state_dict(state_dict)


def load_image_data(
    dataset: str | os.PathLike = "digits",
    *,
    dataset_config_name: str | None = None,
    data_dir: str | os.PathLike | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    resolution: int | None = None,
    channels: int | None = None,
    streaming: bool = False,
    cache_dir: str | os.PathLike | None = None,
    max_images: int | None = None,
    seed: int = 0,
    max_memory_bytes: int = MAX_MEMORY_BYTES,
    buffer_size: int = 1000,
) -> ImageData | StreamingImageData:
    """Load images, and labels where there are any, from one of the sources below.

    The numbers of images and classes are logged, and what is left out of a folder is warned of.

    Args:
        dataset: "digits" (1797 images 8x8, in the package), "fashion-mnist" (IDX files in `data_dir`, else from the
            Hub), a local folder of images or of parquet or arrow files, one such file, or the name of a data set on
            the Hub. In a folder of images the first level of subfolders are the classes, below folders with the
            names of splits (train, validation, test) where there are any.
        dataset_config_name: configuration of a Hub data set; default its own.
        data_dir: folder of the IDX files, or what `datasets.load_dataset` takes under this name.
        split: default "train"; digits have no other, IDX files "train" and "test"; elsewhere as in `datasets`.
        image_column, label_column: default the only image column, and "label", "labels" or the only ClassLabel
            column. `label_column=""` loads no labels.
        resolution: shorter side is resized (bicubic, antialiased) to this, 1 to 8192, and the centre cropped;
            default leaves images as they are, which must then have one size.
        channels: 1 (grey) or 3 (RGB); default 1 if all images are grey (streaming: if the first is), else 3.
        streaming: read while iterating; nothing is stored first.
        cache_dir: where `datasets` keeps its files.
        max_images: at most this many, drawn with `seed` (streaming: the first).
        seed: of that draw and of the streaming order.
        max_memory_bytes: data larger than this when decoded is decoded on demand; default 4 GiB.
        buffer_size: images held to shuffle a stream, default 1000.

    Raises:
        FileNotFoundError: no such folder or file, none that can be read in it, or no such data set on the Hub.
        ValueError: an argument, column, split, label or image is not as above; the message says which and what is
            allowed. Data decoded on demand or streamed is checked as far as its headers, or its first image.
    """
    if isinstance(dataset, os.PathLike):
        dataset = _check_path(dataset)
    options = DataConfig(
        dataset=dataset,
        dataset_config_name=dataset_config_name,
        data_dir=data_dir,
        split=split,
        image_column=image_column,
        label_column=label_column,
        resolution=resolution,
        channels=channels,
        streaming=streaming,
        cache_dir=cache_dir,
    )
    max_images = None if max_images is None else require_count("max_images", max_images, 1)
    seed = require_count("seed", seed, 0)
    max_memory_bytes = require_count("max_memory_bytes", max_memory_bytes, 0)
    buffer_size = require_count("buffer_size", buffer_size, 1)
    _check_data_dir(options)

    name = f"{options.dataset} [{options.split}]"
    if _is_idx(options) or (options.dataset == "digits" and not options.streaming):
        data = _read_packaged(options, name, max_images, seed, max_memory_bytes)
    else:
        source = _open_source(options)
        if options.streaming:
            return _stream(source, options, name, max_images, seed, buffer_size)
        data = read_table(source, options, name, max_images, seed, max_memory_bytes)
    classes = "no labels" if data.labels is None else f"{data.num_classes} classes"
    logger.info(f"{name}: {len(data)} images of shape {data.image_shape}, {classes}.")
    return data


def _check_path(path: os.PathLike) -> str:
    """Return a path as text that is no name of a data set; raise an error if it does not exist."""
    if not Path(path).expanduser().exists():
        raise FileNotFoundError(f"`dataset` must be a file or folder that exists where it is a path, got {path!r}.")
    text = os.fspath(path)
    return os.path.join(os.curdir, text) if text in IN_PACKAGE else text


def _is_idx(options: DataConfig) -> bool:
    return options.dataset == "fashion-mnist" and options.data_dir is not None


def _check_data_dir(options: DataConfig) -> None:
    """Raise an error for a `data_dir` or `streaming` that does not suit `dataset`."""
    folder = options.data_dir
    require(folder is None or options.dataset != "digits", "data_dir", folder, "None with the embedded digits")
    require(not (_is_idx(options) and options.streaming), "streaming", True, "False with IDX files")
    if folder is not None and options.dataset in ("fashion-mnist", "imagefolder") and "://" not in folder:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"`data_dir` must be a folder that exists, got {folder!r}.")


def _read_packaged(
    options: DataConfig, name: str, max_images: int | None, seed: int, max_memory_bytes: int
) -> ImageData:
    """Read the embedded digits or IDX files, without `datasets`, which is slow to import."""
    if _is_idx(options):
        values, stored_labels, names = read_fashion_mnist(Path(options.data_dir), options.split)
    else:
        values, stored_labels, names = read_digits(options.split)
    columns = {"image": {"bytes": None}, "label": None}
    _, label_column = find_columns(columns, options.image_column, options.label_column, name)
    labels, described = _read_labels(stored_labels if label_column else None, names, values, name)
    if max_images is not None and max_images < len(values):
        rows = _draw(len(values), max_images, seed)
        values = [values[row] for row in rows]
        labels = None if labels is None else labels[rows]
    size = _count_bytes(values, options, name)
    require(
        size <= max_memory_bytes,
        "resolution",
        options.resolution,
        f"such that the {len(values)} images of {name} have at most max_memory_bytes={max_memory_bytes}, not {size}",
    )
    return ImageData(_decode_all(values, name, options.resolution, options.channels), labels, **described)


def read_table(
    source,
    options: DataConfig,
    name: str,
    max_images: int | None = None,
    seed: int = 0,
    max_memory_bytes: int = MAX_MEMORY_BYTES,
) -> ImageData:
    """Read the images of a `datasets.Dataset`; arguments as of `load_image_data`."""
    source, image_column, label_column = _choose_columns(source, options, name)
    values = _Column(source, image_column)
    names = _read_class_names(source, label_column)
    labels, described = _read_labels(source[label_column][:] if label_column else None, names, values, name)
    if max_images is not None and max_images < len(values):
        rows = _draw(len(values), max_images, seed)
        values = values.select(rows)
        labels = None if labels is None else labels[rows]
    if _count_bytes(values, options, name) > max_memory_bytes:
        shape = _scan_headers(values, name, options.resolution, options.channels)
        return ImageData(values, labels, shape=shape, resolution=options.resolution, **described)
    return ImageData(_decode_all(values, name, options.resolution, options.channels), labels, **described)


def _choose_columns(source, options: DataConfig, name: str):
    """Return a data set whose rows come as stored, with its image column and label column."""
    source = source._resolve_features() if source.features is None else source
    source = source.with_format(None)
    image_column, label_column = find_columns(source.features, options.image_column, options.label_column, name)
    feature = source.features[image_column]
    if type(feature).__name__ == "Image":  # decoded here, so that a message can name the row of a damaged file
        source = source.cast_column(image_column, type(feature)(decode=False))
    return source, image_column, label_column


def _read_class_names(source, label_column: str | None) -> list[str] | None:
    return getattr(source.features[label_column], "names", None) if label_column else None


def _read_labels(stored: list | None, names: list[str] | None, values, name: str) -> tuple[torch.Tensor | None, dict]:
    """Return labels (N,) or None, and what `ImageData` is told of name and classes."""
    if len(values) == 0:
        raise ValueError(f"`dataset` must hold at least one image, got none in {name}.")
    if stored is None:
        return None, {"name": name}

    def locate_row(row):
        return name_row(name, row, values[row : row + 1][0])

    labels, num_classes, class_names = encode_labels(stored, names, locate_row)
    if class_names is None:
        warn_of_empty_classes(labels, num_classes, name)
    return labels, {"name": name, "num_classes": num_classes, "class_names": class_names}


def _draw(num_images: int, max_images: int, seed: int) -> list[int]:
    """Draw so many rows at random, and return them sorted."""
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))
    return order[:max_images].sort().values.tolist()


def _count_bytes(values, options: DataConfig, name: str) -> int:
    """Return the bytes of all images when they are decoded, as far as the first one tells."""
    _, height, width = read_header(values[0:1][0], f"{name}: row 0")
    pixels = options.resolution**2 if options.resolution else height * width
    return len(values) * (options.channels or 3) * pixels


def _stream(
    source, options: DataConfig, name: str, max_images: int | None, seed: int, buffer_size: int
) -> StreamingImageData:
    """Return the images of a `datasets.IterableDataset` as a shuffled stream."""
    source, image_column, label_column = _choose_columns(source, options, name)
    names = _read_class_names(source, label_column)
    shape = _read_first_shape(source, image_column, label_column, name, options)
    parameters = (name, options.dataset_config_name, str(options.data_dir), image_column, label_column,
                  options.resolution, options.channels, max_images, seed, buffer_size)  # fmt: skip
    source = source if max_images is None else source.take(max_images)
    source = source.select_columns([column for column in (image_column, label_column) if column])
    return StreamingImageData(
        source.shuffle(seed=seed, buffer_size=buffer_size),
        image_column,
        label_column,
        image_shape=shape,
        resolution=options.resolution,
        num_classes=len(names) if names else None,
        class_names=names,
        name=name,
        fingerprint=hashlib.blake2b(repr(parameters).encode(), digest_size=8).hexdigest(),
    )


def _read_first_shape(source, image_column, label_column, name, options) -> tuple[int, int, int]:
    """Check what can be checked of a stream before it is used, and return the shape (C, H, W) of its first image."""
    feature = source.features[label_column] if label_column else None
    if label_column and not hasattr(feature, "names") and "int" not in str(getattr(feature, "dtype", "")):
        raise ValueError(
            f"`label_column` must hold a ClassLabel or integers in a stream, got {label_column!r}, which holds "
            f"{feature}."
        )
    first = next(iter(source), None)
    if first is None:
        raise ValueError(f"`dataset` must hold at least one image, got none in {name}.")
    return decode_image(first[image_column], f"{name}: row 0", options.resolution, options.channels).shape


def _open_source(options: DataConfig):
    """Open a Hub or local data set with `datasets`; its errors come back naming our arguments."""
    import datasets

    path = Path(options.dataset)
    local = options.dataset not in IN_PACKAGE and path.exists()
    if not local and (path.is_absolute() or options.dataset.startswith(".") or path.suffix in TABLES):
        raise FileNotFoundError(
            f"`dataset` must be a file or folder that exists where it is a path, got {options.dataset!r}: no such "
            "file or folder."
        )
    folder = options.data_dir
    if folder is not None and "://" not in folder and options.dataset in ("imagefolder", "parquet", "arrow"):
        return _open_source(replace(options, dataset=os.path.abspath(folder), data_dir=None))
    try:
        return _open_path(path, options) if local else _load_from_hub(options)
    except (FileNotFoundError, ConnectionError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ConnectionError
        where = "a local path" if local else "no local path"
        raise kind(
            f"`dataset` must be a data set that can be found, got {options.dataset!r} ({where}): {error}"
        ) from error
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        cause = f"{error} {error.__cause__ or ''}".strip()
        raise ValueError(
            f"`dataset`, `dataset_config_name` and `split` must name data that can be read, got {options.dataset!r}, "
            f"{options.dataset_config_name!r} and {options.split!r}: {cause}"
        ) from error


def _load_from_hub(options: DataConfig):
    name = {"digits": str(DIGITS_PATH), "fashion-mnist": "fashion_mnist"}.get(options.dataset, options.dataset)
    if name == str(DIGITS_PATH):
        return _load_dataset("parquet", options, data_files=glob.escape(name))
    return _load_dataset(name, options, name=options.dataset_config_name, data_dir=options.data_dir)


def _load_dataset(loader: str, options: DataConfig, **arguments):
    import datasets

    return datasets.load_dataset(
        loader, split=options.split, streaming=options.streaming, cache_dir=options.cache_dir, **arguments
    )


def _open_path(path: Path, options: DataConfig):
    """Open a local file or folder."""
    if path.is_file():
        if path.suffix.lower() not in TABLES:
            raise ValueError(f"`dataset` must be a folder, a .parquet or an .arrow file, got {str(path)!r}.")
        return _load_dataset(path.suffix[1:].lower(), options, data_files=glob.escape(str(path)))
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _open_saved(path, options)
    content = read_folder(path)
    if content.images and not content.tables and not content.metadata:
        source = open_image_folder(path, content, options.split, mixed=options.streaming)
        return source.to_iterable_dataset(num_shards=min(len(source), 1024)) if options.streaming else source
    archives = any(other.lower().endswith(ARCHIVES) for other in content.others)
    if not (content.images or content.tables or content.metadata or archives):
        found = count_endings(content) if content.others else "no files"
        raise FileNotFoundError(f"there are no images and no parquet or arrow files, but {found}.")
    if glob.escape(str(path)) != str(path):
        raise ValueError(
            "`datasets` reads *, ? and [ in the path of a folder of tables as patterns; rename the folder."
        )
    if content.tables or (content.metadata and not content.images):
        return _open_tables(path, content, options)
    source = _load_dataset("imagefolder", options, data_dir=str(path))
    num_files = sum(file.split in (None, options.split) for file in content.images)
    if not options.streaming and len(source) < num_files:
        logger.warning(f"{path} has {num_files} images, of which its metadata names {len(source)}; these are loaded.")
    return source


def _open_tables(path: Path, content: FolderContent, options: DataConfig):
    """Open a folder of parquet or arrow files, or of others that `datasets` knows."""
    linked = [table for table in content.tables if is_below_link(path, table)]
    if linked:
        logger.warning(f"{path}: {len(linked)} tables in linked folders are left out, such as {linked[0]}.")
    if content.images:
        logger.warning(f"{path} has tables: its {len(content.images)} image files are left out.")
    return _load_dataset(str(path), options, name=options.dataset_config_name, data_dir=options.data_dir)


def _open_saved(path: Path, options: DataConfig):
    """Open what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` has written."""
    import datasets

    source = datasets.load_from_disk(str(path))
    source = source if isinstance(source, dict) else {str(source.split or "train"): source}
    if options.split not in source:
        raise ValueError(f"`split` must be one of {', '.join(source)}, got {options.split!r}.")
    source = source[options.split]
    return source.to_iterable_dataset() if options.streaming else source
