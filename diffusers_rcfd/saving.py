"""Files and folders that are written whole or not at all, with checksums by which damage is found."""

import json
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

PREFIX = "partial-save-"
CHECKSUMS_FILE = "checksums.json"  # of the files of a saved model, in its folder


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and rename it, so that a kill leaves the old content or the new one."""
    path = Path(path)
    partial = path.with_name(f"partial-{path.name}")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any | None:
    """The value of a JSON file, or None where there is none or where it is damaged, which a warning names."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:  # of JSON, or of UTF-8
        warnings.warn(f"{str(path)!r} is damaged and not used: {error}", stacklevel=2)
        return None


def write_checked(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON with a checksum of its own."""
    write_json(path, record | {"checksum": _checksum_of_record(record)})


def read_checked(path: Path) -> dict[str, Any]:
    """What `write_checked` wrote; a `ValueError` where it is not that any more."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        if record.pop("checksum") == _checksum_of_record(record):
            return record
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} cannot be read ({type(error).__name__}: {error})") from error
    raise ValueError(f"{path.name} is not what was written")


def list_files(folder: Path, paths: Iterable[Path]) -> dict[str, list[int]]:
    """Size and CRC-32 of files, by their names within a folder."""
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, checksum(path)] for path in sorted(paths)}


def find_damage(folder: Path, files: dict[str, list[int]]) -> list[str]:
    """What is wrong with the files that `list_files` listed, each to be read after the folder's name."""
    faults = []
    for name, (size, crc) in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else "none"
        if path.suffix == ".jsonl":  # has grown since it was listed
            found = min(found, size) if path.is_file() else found
        if found != size:
            faults.append(f"is not whole: {name} has {found} of {size} bytes")
        elif checksum(path, size) != crc:
            faults.append(f"is damaged: {name} is not what was written")
    return faults


def checksum(path: Path, size: int | None = None) -> int:
    """CRC-32 of a file, or of its first `size` bytes."""
    value, left = 0, path.stat().st_size if size is None else size
    with open(path, "rb") as file:
        while left and (block := file.read(min(left, 2**24))):
            value = zlib.crc32(block, value)
            left -= len(block)
    return value


def listed_files(folder: Path) -> dict[str, list[int]]:
    """The files of a saved model with size and checksum, as `checksums.json` lists them; none without that file.

    Raises:
        ValueError: if that file is damaged.
    """
    listing = Path(folder) / CHECKSUMS_FILE
    return read_checked(listing)["files"] if listing.is_file() else {}


def require_folders(folder: Path, path: Path) -> None:
    """Raise an `OSError` if a link or a file lies where `path`, a file to be, needs a folder below `folder`."""
    for parent in path.parents:
        if parent == folder:
            break
        if parent.is_symlink() or (parent.exists() and not parent.is_dir()):
            raise NotADirectoryError(f"{str(parent)!r} must be a folder, it is a {kind_of(parent)}.")
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} must be a file, it is a {kind_of(path)}.")


def kind_of(path: Path) -> str:
    """What lies at a place: "link", "folder" or "file"."""
    return "link" if path.is_symlink() else "folder" if path.is_dir() else "file"


@contextmanager
def saved_whole(folder: Path) -> Iterator[Path]:
    """A place to write what is to lie in `folder`; it is moved there, file by file, once all of it is written.

    `checksums.json` then lists the files that were written so, with their sizes and checksums.

    Args:
        folder (`Path`): made if it is missing; other files in it stay.

    Raises:
        OSError: if writing fails (a full disk, say), or a link or a file lies where a folder is to be; `folder` is
            then as it was before.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    partial = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{PREFIX}*/{CHECKSUMS_FILE}"):  # by a process that was killed
            shutil.rmtree(left.parent, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))  # on the same disk, so that moving is renaming
        listing = partial / CHECKSUMS_FILE
        write_checked(listing, {"files": {}})  # which marks the folder as ours
        yield partial
        files = {}
        with suppress(ValueError):  # a damaged list is written anew
            files = listed_files(folder)
        written = sorted(path for path in partial.rglob("*") if path.is_file() and path != listing)
        write_checked(listing, {"files": dict(sorted((files | list_files(partial, written)).items()))})
        places = {path: folder / path.relative_to(partial) for path in [*written, listing]}
        for place in places.values():
            require_folders(folder, place)
        for path, place in places.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
        missing = []
    except (OSError, SafetensorError) as error:
        raise OSError(f"Saving in {str(folder)!r} failed, and changed nothing there: {error}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for path in missing:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _checksum_of_record(record: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(record).encode())
