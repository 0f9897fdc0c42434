"""Writing a folder whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

PREFIX = "partial-save-"


@contextmanager
def saved_whole(folder: Path) -> Iterator[Path]:
    """A place to write what is to lie in `folder`; it is moved there, file by file, once all of it is written.

    Args:
        folder (`Path`): made if it is missing; other files in it stay.

    Raises:
        OSError: if writing fails (a full disk, say); `folder` is then as it was before.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    partial = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{PREFIX}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))  # on the same disk, so that moving is renaming
        yield partial
        for path in sorted(path for path in partial.rglob("*") if path.is_file()):
            target = folder / path.relative_to(partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        missing = []
    except (OSError, SafetensorError) as error:
        raise OSError(f"Saving in {str(folder)!r} failed, and changed nothing there: {error}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for path in missing:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
