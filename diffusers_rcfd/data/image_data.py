"""Image data sets: a Hub name, a local folder, parquet or arrow files, IDX files or the embedded digits.

`load_image_data` gives `ImageData` (map-style, uint8, in memory where it fits) or `StreamingImageData`.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, default_collate
from tqdm.auto import tqdm

from diffusers_rcfd.data.image_files import (
    DIGITS_PATH,
    check_size,
    decode_image,
    read_digits,
    read_fashion_mnist,
    read_header,
)


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


def _progress(total: int, words: str) -> tqdm:
    hidden = {"disable": True} if os.environ.get("LOCAL_RANK", "0") != "0" else {}  # else TQDM_DISABLE has its say
    return tqdm(total=total, desc=words, unit=" images", delay=1, **hidden)


def _decode_all(values, name: str, resolution: int | None, channels: int | None) -> torch.Tensor:
    """Decode all images into one uint8 tensor (N, C, H, W), in threads: PIL releases the interpreter lock."""
    images = None
    with _progress(len(values), f"Decoding {name}") as bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
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
    with _progress(len(values), f"Reading headers of {name}") as bar:
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
        if len(images) == 0:
            raise ValueError(f"{name}: no images; allowed: at least one")
        if isinstance(images, torch.Tensor) and (images.dtype != torch.uint8 or images.dim() != 4):
            raise ValueError(f"images is {images.dtype} {tuple(images.shape)}; allowed: torch.uint8 (N, C, H, W)")
        if labels is not None and len(labels) != len(images):
            raise ValueError(f"{name}: {len(labels)} labels for {len(images)} images; allowed: one for each")
        self.images = images if isinstance(images, torch.Tensor) else None
        self._stored = None if isinstance(images, torch.Tensor) else images
        self.labels, self.num_images = labels, len(images)
        self.num_classes, self.class_names, self.name = num_classes, class_names, name
        self.image_shape = tuple(images.shape[1:]) if shape is None else tuple(shape)
        self._resolution, self._fingerprint = resolution, None

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
        if not 0 < fraction < 1 or self.num_images < 2:
            raise ValueError(f"fraction={fraction} of {self.num_images} images; allowed: 0 < fraction < 1, 2 images")
        held_out = min(max(round(self.num_images * fraction), 1), self.num_images - 1)
        order = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(seed))
        return self.subset(order[held_out:].sort().values), self.subset(order[:held_out].sort().values)


class StreamingImageData(IterableDataset):
    """Image data that is read as it comes: items are `{"images": uint8 (C, H, W), "labels": int64 ()}`.

    Made by `load_image_data(..., streaming=True)`. DataLoader workers share the shards (`datasets` does it), nodes
    share by `split_by_node`. The order is shuffled in a buffer from `seed` and the epoch. Attributes are those of
    `ImageData`, with `num_images` None; `fingerprint` covers the parameters, not the contents.
    """

    collate = staticmethod(ImageData.collate)

    def __init__(self, source, image_column, label_column, **attributes):
        self.source, self.image_column, self.label_column, self.num_images = source, image_column, label_column, None
        for key in ("image_shape", "resolution", "num_classes", "class_names", "name", "fingerprint"):
            setattr(self, key, attributes[key])

    def __iter__(self):
        for number, row in enumerate(self.source):
            where = f"{self.name}: image {number} of the stream"
            pixels = decode_image(row[self.image_column], where, self.resolution, self.image_shape[0])
            check_size(pixels.shape[1:], self.image_shape[1:], where)
            item = {"images": torch.tensor(pixels)}
            if self.label_column is not None:
                label = row[self.label_column]
                item["labels"] = _encode_labels([label], self.num_classes, self.class_names, where)[0][0]
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


def _find_columns(features, image_column, label_column, name: str) -> tuple[str, str | None]:
    """Return the image column and the label column (or None) among a data set's features, given or found."""
    for field, column in (("image_column", image_column), ("label_column", label_column)):
        if column and column not in features:
            raise ValueError(f"{field}={column!r} is not in {name}; its columns: {', '.join(features)}")

    def dtype(column):
        return getattr(features[column], "dtype", None)

    def holds_images(column):
        struct = isinstance(features[column], dict) and "bytes" in features[column]
        return struct or dtype(column) in ("PIL.Image.Image", "binary", "large_binary")

    kinds = {column: type(feature).__name__ for column, feature in features.items()}
    found = [column for column in features if holds_images(column)]
    found = [column for column in found if kinds[column] == "Image"] or found
    if image_column and not holds_images(image_column) and dtype(image_column) not in ("string", "large_string"):
        raise ValueError(f"image_column={image_column!r} of {name} holds {features[image_column]}; allowed: images, "
                         "encoded bytes or paths")  # fmt: skip
    if not image_column and len(found) != 1:
        trouble = f"more than one image column ({', '.join(found)})" if found else "no image column"
        raise ValueError(f"{name} has {trouble}; give `image_column`, one of: {', '.join(features)}")
    image_column = image_column or found[0]
    if label_column is None:
        classes = [column for column in features if kinds[column] == "ClassLabel"]
        named = [column for column in ("label", "labels") if column in features]
        if len(classes) > 1 and not named:
            raise ValueError(f"{name} has more than one label column; give `label_column`, one of: "
                             f"{', '.join(classes)}, or '' for none")  # fmt: skip
        label_column = (named or classes or [None])[0]
    return image_column, label_column or None


def _encode_labels(values: list, num_classes: int | None, class_names: list | None, name: str):
    """Turn labels (class numbers, or names) into (int64 tensor (N,), num_classes, class_names), checked."""
    if class_names is None and values and all(isinstance(value, str) for value in values):
        class_names = sorted(set(values))
        values = [class_names.index(value) for value in values]
        num_classes = len(class_names)
    for row, value in enumerate(values):
        if not isinstance(value, int) or value < 0 or (num_classes is not None and value >= num_classes):
            allowed = "integers from 0" if num_classes is None else f"integers in 0..{num_classes - 1}"
            at = f"{name}: row {row}" if len(values) > 1 else name
            raise ValueError(f"{at}: label {value!r}; allowed: {allowed} (or label_column='' to go without labels)")
    return torch.tensor(values, dtype=torch.long), num_classes, class_names


def _load_source(dataset: str, config, data_dir, split: str, streaming: bool, cache_dir):
    """Open a Hub or local data set with `datasets`; its errors come back naming our arguments."""
    import datasets

    path, arguments = Path(dataset).expanduser(), {"name": config, "data_dir": data_dir}
    local = path.exists()
    if not local and (path.is_absolute() or dataset.startswith((".", "~")) or path.suffix in (".parquet", ".arrow")):
        raise FileNotFoundError(f"dataset={dataset!r}: no such file or folder")
    if data_dir is not None and "://" not in str(data_dir) and dataset in ("imagefolder", "parquet", "arrow"):
        return _load_source(str(Path(data_dir).expanduser().absolute()), config, None, split, streaming, cache_dir)
    loader = dataset
    try:
        if path.is_file():
            if path.suffix not in (".parquet", ".arrow"):
                raise ValueError("not a parquet or arrow file; allowed: .parquet, .arrow or a folder")
            loader, arguments = path.suffix[1:], {"data_files": str(path)}
        elif local:
            if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):  # Dataset.save_to_disk
                source = datasets.load_from_disk(str(path))
                source = source if isinstance(source, dict) else {str(source.split or "train"): source}
                if split not in source:
                    raise ValueError(f"unknown split; allowed: {', '.join(source)}")
                return source[split].to_iterable_dataset() if streaming else source[split]
            tables = any(next(path.rglob(f"*.{kind}"), None) for kind in ("parquet", "arrow"))
            loader = str(path) if tables else "imagefolder"
            arguments = {"name": config, "data_dir": data_dir} if tables else {"data_dir": str(path)}
        return datasets.load_dataset(loader, split=split, streaming=streaming, cache_dir=cache_dir, **arguments)
    except (FileNotFoundError, ConnectionError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ConnectionError
        raise kind(f"dataset={dataset!r} ({'a local path' if local else 'no local path'}): {error}") from error
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        reason = f"{error} {error.__cause__ or ''}".strip()
        raise ValueError(f"dataset={dataset!r}, dataset_config_name={config!r}, split={split!r}: {reason}") from error


def _first_shape(source, image_column, label_column, name, resolution, channels) -> tuple[int, int, int]:
    """Check what can be checked of a stream before it is used, and return the shape (C, H, W) of its first image."""
    feature = source.features[label_column] if label_column else None
    if label_column and not hasattr(feature, "names") and "int" not in str(getattr(feature, "dtype", "")):
        raise ValueError(f"label_column={label_column!r} holds {feature}; allowed in a stream: ClassLabel or integers")
    first = next(iter(source), None)
    if first is None:
        raise ValueError(f"{name}: no images; allowed: at least one")
    return decode_image(first[image_column], f"{name}: row 0", resolution, channels).shape


def load_image_data(
    dataset: str = "digits",
    *,
    dataset_config_name: str | None = None,
    data_dir: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    resolution: int | None = None,
    channels: int | None = None,
    streaming: bool = False,
    cache_dir: str | None = None,
    max_images: int | None = None,
    seed: int = 0,
    max_memory_bytes: int = 4 * 2**30,
    buffer_size: int = 1000,
) -> ImageData | StreamingImageData:
    """Load images, and labels where there are any, from one of the sources below.

    Args:
        dataset: "digits" (1797 images 8x8, in the package), "fashion-mnist" (IDX files in `data_dir`, else from the
            Hub), a local folder of images (subfolders are classes) or of parquet or arrow files, one such file, or
            the name of a data set on the Hub.
        dataset_config_name: configuration of a Hub data set; default its own.
        data_dir: folder of the IDX files, or what `datasets.load_dataset` takes under this name.
        split: default "train"; digits have no other, IDX files "train" and "test"; elsewhere `datasets` knows.
        image_column, label_column: default the only image column, and "label", "labels" or the only ClassLabel
            column. `label_column=""` loads no labels.
        resolution: shorter side is resized (bicubic, antialiased) to this, at least 1, and the centre cropped;
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
    for field, value in (("max_images", max_images), ("resolution", resolution), ("buffer_size", buffer_size)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{field}={value!r}; allowed: integers from 1")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels={channels!r}; allowed: 1 (grey), 3 (RGB) or None")
    if not dataset or not split:
        raise ValueError(f"dataset={dataset!r}, split={split!r}; allowed: names that are not empty")
    if dataset == "digits" and data_dir is not None:
        raise ValueError(f"data_dir={str(data_dir)!r} with dataset='digits', which is in the package; give none")
    idx = dataset == "fashion-mnist" and data_dir is not None
    if idx and streaming:
        raise ValueError("streaming=True with IDX files; allowed: False, they are read at once")
    if (idx or dataset == "imagefolder") and data_dir is not None and "://" not in str(data_dir):
        if not Path(data_dir).expanduser().is_dir():
            raise FileNotFoundError(f"data_dir={str(data_dir)!r}: no such folder")

    name, source, names = f"{dataset} [{split}]", None, None
    if idx or (dataset == "digits" and not streaming):  # read without `datasets`, which is slow to import
        values, stored_labels, names = (
            read_fashion_mnist(Path(data_dir).expanduser(), split) if idx else read_digits(split)
        )
        _, label_column = _find_columns({"image": {"bytes": None}, "label": None}, image_column, label_column, name)
    else:
        loaded = {"digits": str(DIGITS_PATH), "fashion-mnist": "fashion_mnist"}.get(dataset, dataset)
        source = _load_source(loaded, dataset_config_name, data_dir, split, streaming, cache_dir)
        source = source._resolve_features() if source.features is None else source
        image_column, label_column = _find_columns(source.features, image_column, label_column, name)
        if type(source.features[image_column]).__name__ == "Image":  # we decode, to name the row of a damaged file
            source = source.cast_column(image_column, type(source.features[image_column])(decode=False))
        names = getattr(source.features[label_column], "names", None) if label_column else None
    if streaming:
        source = source if max_images is None else source.take(max_images)
        parameters = (name, dataset_config_name, str(data_dir), image_column, label_column, resolution, channels)
        fingerprint = hashlib.blake2b(repr((parameters, max_images, seed, buffer_size)).encode(), digest_size=8)
        return StreamingImageData(
            source.select_columns([column for column in (image_column, label_column) if column]).shuffle(
                seed=seed, buffer_size=buffer_size
            ),
            image_column,
            label_column,
            image_shape=_first_shape(source, image_column, label_column, name, resolution, channels),
            resolution=resolution,
            num_classes=len(names) if names else None,
            class_names=names,
            name=name,
            fingerprint=fingerprint.hexdigest(),
        )

    if source is not None:
        values, stored_labels = _Column(source, image_column), source[label_column][:] if label_column else None
    if len(values) == 0:
        raise ValueError(f"{name}: no images; allowed: at least one")
    described = {"name": name}
    labels = None
    if label_column:
        labels, num_classes, names = _encode_labels(stored_labels, len(names) if names else None, names, name)
        described.update(num_classes=num_classes or int(labels.max()) + 1, class_names=names)
    if max_images is not None and max_images < len(values):
        rows = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))[:max_images].sort().values
        labels = None if labels is None else labels[rows]
        values = values.select(rows.tolist()) if source is not None else [values[row] for row in rows.tolist()]
    _, height, width = read_header(values[0:1][0], f"{name}: row 0")
    size = (channels or 3) * (resolution**2 if resolution else height * width)
    if source is not None and len(values) * size > max_memory_bytes:
        shape = _scan_headers(values, name, resolution, channels)
        return ImageData(values, labels, shape=shape, resolution=resolution, **described)
    return ImageData(_decode_all(values, name, resolution, channels), labels, **described)
