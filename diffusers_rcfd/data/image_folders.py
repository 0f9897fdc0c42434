"""Local folders of images: which files are images, and which split and class each of them belongs to."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from diffusers.utils import logging
from PIL import Image

if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)

ARCHIVES = (".zip", ".tar", ".gz", ".tgz")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
TABLES = (".parquet", ".arrow")
SPLIT_OF_FOLDER = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip


class ImageFile(NamedTuple):
    """An image in a folder: its path in there, and the split and class that the folders above it name, if any."""

    path: str
    split: str | None
    label: str | None


class FolderContent(NamedTuple):
    """The files of a folder by what they are, as sorted paths relative to it."""

    images: list[ImageFile]
    tables: list[str]
    metadata: list[str]
    others: list[str]


def read_folder(root: Path) -> FolderContent:
    """List the files of a folder and its subfolders by what they are; hidden ones are left out."""
    endings = _list_endings()
    content = FolderContent([], [], [], [])
    for path in _walk(str(root), "", frozenset()):
        ending = os.path.splitext(path)[1].lower()
        if os.path.basename(path) in METADATA:
            content.metadata.append(path)
        elif ending in TABLES:
            content.tables.append(path)
        elif ending in endings:
            content.images.append(classify_path(path))
        else:
            content.others.append(path)
    return content


def _list_endings() -> set[str]:
    """Return the endings of the files that Pillow opens, lower case."""
    stubs = ("BUFR", "GRIB", "HDF5", "MPEG")  # which Pillow knows by name alone
    opened = Image.registered_extensions().items()
    return {ending for ending, kind in opened if kind in Image.OPEN and kind not in stubs}


def _walk(root: str, folder: str, above: frozenset[str]) -> Iterator[str]:
    """Yield the paths of all files in `folder` of `root`, sorted; symbolic links are followed, but not in circles."""
    real = os.path.realpath(os.path.join(root, folder))
    if real in above:
        logger.warning(f"{os.path.join(root, folder)} links to a folder above it and is left out.")
        return
    with os.scandir(os.path.join(root, folder)) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
    for entry in entries:
        path = os.path.join(folder, entry.name)
        if entry.name.startswith((".", "__")):
            continue
        if entry.is_dir():
            yield from _walk(root, path, above | {real})
        elif entry.is_file():
            yield path
        elif entry.is_symlink():
            logger.warning(f"{os.path.join(root, path)} links to nothing and is left out.")


def classify_path(path: str) -> ImageFile:
    """Find the split and the class of an image from the folders in its path.

    The split is the first folder with the name of one. The class is the first folder below it, else above it.
    """
    *folders, _ = Path(path).parts
    splits = [folder.lower() in SPLIT_OF_FOLDER for folder in folders]
    if not any(splits):
        return ImageFile(path, None, folders[0] if folders else None)
    at = splits.index(True)
    classes = folders[at + 1 :] or folders[:at]
    return ImageFile(path, SPLIT_OF_FOLDER[folders[at].lower()], classes[0] if classes else None)


def open_image_folder(root: Path, content: FolderContent, split: str, mixed: bool) -> "datasets.Dataset":
    """Return the images of a split as a data set of paths, with labels where the images lie in folders of classes.

    Args:
        root (`Path`): the folder.
        content (`FolderContent`): what `read_folder` found in it.
        split (`str`): a split, or what `datasets` calls an instruction, such as "train[:10%]" or "train+test".
        mixed (`bool`): whether to list the images in a random order (always the same), for streaming.

    Raises:
        ValueError: if there is no such split.
    """
    import datasets

    splits = _divide(root, content.images)
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(part) for name, part in splits.items()})
    files = [file for part in parts for file in splits[part.splitname][part.from_ : part.to]]
    if mixed:
        files = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
    _report_others(root, content)
    names = _find_classes(root, [file for part in splits.values() for file in part])
    features = {"image": datasets.Image(decode=False)}
    columns = {"image": [{"bytes": None, "path": str(root / file.path)} for file in files]}
    if names:
        features["label"] = datasets.ClassLabel(names=names)
        number_of = {name: number for number, name in enumerate(names)}
        columns["label"] = [number_of[file.label] for file in files]
    source = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return datasets.Dataset(source.data, info=source.info, fingerprint=_hash_files(root, files))


def _divide(root: Path, images: list[ImageFile]) -> dict[str, list[ImageFile]]:
    """Group the images of a folder by split; all are of "train" where no folder has the name of a split."""
    named = sorted({file.split for file in images if file.split})
    if not named:
        return {"train": images}
    stray = [file.path for file in images if file.split is None]
    if stray:
        logger.warning(
            f"{root} has folders of the splits {', '.join(named)}: {len(stray)} of {len(images)} images lie outside "
            f"of them and are left out, such as {stray[0]}."
        )
    return {name: [file for file in images if file.split == name] for name in named}


def _find_classes(root: Path, files: list[ImageFile]) -> list[str]:
    """Return the names of the classes, none where images have no class or all have the same."""
    names = sorted({file.label for file in files if file.label})
    loose = [file.path for file in files if file.label is None]
    if names and loose:
        logger.warning(
            f"{root}: {len(loose)} of {len(files)} images lie in none of the folders {', '.join(names[:10])}, such as "
            f"{loose[0]}, and no labels are loaded. To load labels, move each image into the folder of its class."
        )
        return []
    return names if len(names) > 1 else []


def _report_others(root: Path, content: FolderContent) -> None:
    """Log which files of a folder are left out because they are no images."""
    if content.others:
        logger.warning(f"{root}: files that are no images are left out: {count_endings(content)}.")


def count_endings(content: FolderContent) -> str:
    """Return the endings of the files that are neither images nor tables with their numbers, for a message."""
    endings = Counter(os.path.splitext(path)[1].lower() or "without ending" for path in content.others)
    return ", ".join(f"{ending} ({number})" for ending, number in endings.most_common(5))


def _hash_files(root: Path, files: list[ImageFile]) -> str:
    """Return a hash of the names and sizes of the images, which does not depend on where the folder lies."""
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        digest.update(f"{file.path}\0{(root / file.path).stat().st_size}\0".encode())
    return digest.hexdigest()


def is_below_link(root: Path, path: str) -> bool:
    """Whether a symbolic link stands between a folder and a file in it."""
    return any((root / folder).is_symlink() for folder in list(Path(path).parents)[:-1])
