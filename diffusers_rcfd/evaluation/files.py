"""Files that are written whole or not at all."""

from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place and rename it, so that a kill leaves the old content or the new one."""
    path = Path(path)
    partial = path.with_name(f"partial-{path.name}")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)
