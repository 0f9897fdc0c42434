"""What a run has made, listed in `made.json`: nothing but that is deleted, published or verified.

A file is listed before it is written, so that a kill leaves nothing in a folder that no list knows.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from diffusers_rcfd.saving import (
    CHECKSUMS_FILE,
    PREFIX,
    find_damage,
    list_files,
    listed_files,
    read_checked,
    require_folders,
    write_checked,
)
from diffusers_rcfd.trainers.lock import LOCK_FILE

MADE_FILE = "made.json"
LOGS = "logs"  # of the trackers, which name their files themselves


def read_made(output_dir: Path) -> dict[str, Any]:
    """What a run has made in a folder: nothing where it has no list.

    Returns:
        `dict`: "checkpoints" and "models", names of folders, and "files", size and checksum by name; None of a file
            that is being written.

    Raises:
        ValueError: if the list is damaged.
    """
    made = {"checkpoints": [], "models": [], "files": {}}
    path = Path(output_dir) / MADE_FILE
    return made | (read_checked(path) if path.is_file() else {})


def note_made(
    output_dir: Path, *, checkpoints: Iterable[str] = (), models: Iterable[str] = (), files: Iterable[str] = ()
) -> None:
    """List what is about to be made in a folder.

    Args:
        output_dir (`Path`): the run's folder.
        checkpoints (`Iterable[str]`): names of checkpoints.
        models (`Iterable[str]`): folders of saved models, "." for `output_dir` itself.
        files (`Iterable[str]`): names of other files, within `output_dir`.

    Raises:
        OSError: if a link or a file lies where one of these needs a folder.
    """
    made = read_made(output_dir)
    for name in files:
        require_folders(output_dir, output_dir / name)
    for name in models:
        require_folders(output_dir, output_dir / name / CHECKSUMS_FILE)
    noted = {kind: sorted({*made[kind], *names}) for kind, names in (("checkpoints", checkpoints), ("models", models))}
    noted["files"] = dict(sorted((made["files"] | dict.fromkeys(files)).items()))
    if noted != made:
        write_checked(output_dir / MADE_FILE, noted)


def forget_checkpoint(output_dir: Path, name: str) -> None:
    """Take a checkpoint that was deleted off the list."""
    made = read_made(output_dir)
    if name in made["checkpoints"]:
        made["checkpoints"].remove(name)
        write_checked(output_dir / MADE_FILE, made)


def seal_made(output_dir: Path) -> None:
    """Note size and checksum of each file that was written since it was listed."""
    made = read_made(output_dir)
    open_files = [name for name, listed in made["files"].items() if listed is None]
    growing = [name for name in made["files"] if name.endswith(".jsonl")]
    written = [output_dir / name for name in {*open_files, *growing} if (output_dir / name).is_file()]
    sealed = made | {"files": dict(sorted((made["files"] | list_files(output_dir, written)).items()))}
    if sealed != made:
        write_checked(output_dir / MADE_FILE, sealed)


def find_changed(output_dir: Path) -> list[str]:
    """What is wrong with the sealed files of a run, each to be read after the folder's name."""
    sealed = {name: listed for name, listed in read_made(output_dir)["files"].items() if listed is not None}
    return find_damage(output_dir, sealed)


def find_foreign(output_dir: Path) -> list[str]:
    """Names of the files and links in a folder that no list of this package knows; parts of a job have lists too."""
    made = read_made(output_dir)
    known = {MADE_FILE, *made["files"], *_model_files(output_dir, made["models"])}
    known |= {str(PurePosixPath(name).with_name(f"partial-{PurePosixPath(name).name}")) for name in known}
    folders = {form + name for name in made["checkpoints"] for form in ("", "partial-", "unused-")}
    folders |= {LOGS} if made["files"] else set()
    foreign = []
    for path in sorted(output_dir.rglob("*")):
        name = path.relative_to(output_dir)
        listed = name.as_posix() in known or name.parts[0] in folders or name.name == LOCK_FILE
        within = any(map(_has_list, [output_dir / parent for parent in list(name.parents)[:-1]]))
        if not (listed or within) and (path.is_symlink() or not path.is_dir()):
            foreign.append(name.as_posix())
    return foreign


def _has_list(folder: Path) -> bool:
    """Whether a folder is that of a part of a job, or a save of a model that a kill has cut short."""
    return (folder / MADE_FILE).is_file() or (folder.name.startswith(PREFIX) and (folder / CHECKSUMS_FILE).is_file())


def _model_files(output_dir: Path, models: list[str]) -> list[str]:
    """Names of the files of saved models, their lists last; none of a model whose list is damaged."""
    names = []
    for model in models:
        with suppress(ValueError):
            files = [*listed_files(output_dir / model), CHECKSUMS_FILE]
            names += [str(PurePosixPath(model) / name) for name in files]
    return names


def delete_files(folder: Path, names: Iterable[str]) -> None:
    """Delete files of a folder and the folders that are empty then; no link is followed, and none deleted."""
    emptied = set()
    for name in names:
        path = folder / name
        parents = [parent for parent in path.parents if folder in parent.parents]
        inside = ".." not in PurePosixPath(name).parts and folder in path.parents
        if inside and path.is_file() and not any(each.is_symlink() for each in [path, *parents]):
            path.unlink()
            emptied |= {*parents}
    for parent in sorted(emptied, reverse=True):  # the innermost first
        with suppress(OSError):  # is not empty
            parent.rmdir()


def delete_models_and_files(output_dir: Path) -> None:
    """Delete all that is listed but checkpoints, and the list."""
    made = read_made(output_dir)
    delete_files(output_dir, [*_model_files(output_dir, made["models"]), *made["files"], MADE_FILE])
