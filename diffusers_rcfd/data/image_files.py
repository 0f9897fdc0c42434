"""Image files: any image that PIL reads to uint8 pixels, IDX files and the embedded digits."""

import gzip
import json
import math
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

DIGITS_PATH = Path(__file__).parent / "digits.parquet"
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip
IDX_PREFIXES = {"train": "train", "test": "t10k"}
MAX_IDX_BYTES = 4 * 2**30
GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")


def _open(value) -> Image.Image:
    """Open an image without decoding its pixels; the value is as data sets store it: bytes, path, array or PIL."""
    if isinstance(value, np.ndarray):
        return Image.fromarray(value)
    if isinstance(value, (str, bytes)):
        value = {"bytes": value, "path": None} if isinstance(value, bytes) else {"bytes": None, "path": value}
    if not isinstance(value, dict):
        if isinstance(value, Image.Image):
            return value
        raise ValueError("it is missing" if value is None else f"it is a {type(value).__name__}")
    if value.get("bytes") is not None:
        return Image.open(BytesIO(value["bytes"]))
    if value.get("path") is None:
        raise ValueError("it has neither bytes nor a path")
    if "://" not in value["path"]:
        return Image.open(value["path"])
    from datasets import Image as ImageFeature  # a remote file: data sets' own opener knows endpoint and token

    return ImageFeature().decode_example(value)


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale deep grey to 8 bit, composite alpha on white, and bring every mode to L (grey sources) or RGB."""
    grey = image.mode in GREY_MODES
    if image.mode == "F":
        raise ValueError("mode 'F' has no defined range; store the image with 8 or 16 bits")
    if image.mode.startswith("I"):  # PNG, TIFF and PGM hold 16 bits in either I;16 or I
        levels = np.array(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"levels of mode 'I' must be in 0..65535 (16 bits), got {levels.min()}..{levels.max()}")
        if isinstance(image.info.get("transparency"), int):
            levels[levels == image.info["transparency"]] = 65535
        return Image.fromarray(np.round(levels / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if grey else "RGB")


def locate(where: str, value) -> str:
    """Return the words by which a message names a stored image, with its path where it has one."""
    path = value.get("path") if isinstance(value, dict) else None
    return f"{where} ({path})" if path else where


def name_row(name: str, row: int, value) -> str:
    """Return the words by which a message names the image of a row."""
    return locate(f"{name}: row {row}", value)


def decode_image(value, where: str, resolution: int | None, channels: int | None) -> np.ndarray:
    """Decode one stored image to uint8 (C, H, W); every failure is a ValueError that begins with `where`."""
    where = locate(where, value)
    try:
        with _open(value) as image:
            image = _to_8_bit(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{where}: {error}; if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS") from error
    except Exception as error:  # the decoders of PIL raise many types
        raise ValueError(f"{where}: cannot decode the image: {error}") from error
    if channels is not None:
        image = image.convert("L" if channels == 1 else "RGB")
    if resolution is not None and image.size != (resolution, resolution):
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC)  # PIL's bicubic antialiases
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)  # (C, H, W)


def read_header(value, where: str) -> tuple[int, int, int]:
    """Read the shape (C, H, W) that `decode_image` would give, from the file header alone."""
    try:
        with _open(value) as image:
            width, height = image.size
            if Image.Image.getexif(image).get(0x0112, 1) >= 5:  # orientation: turned by 90 degrees
                width, height = height, width
            return (1 if image.mode in GREY_MODES else 3), height, width
    except Exception:
        decode_image(value, where, None, None)  # raises with the right words
        raise


def check_size(size: tuple[int, int], expected: tuple[int, int], where: str) -> None:
    """Raise a ValueError that begins with `where` if an image is not of the size of those before it."""
    if size != expected:
        raise ValueError(
            f"{where}: the image is {size[0]}x{size[1]} (height x width) but the images before it are "
            f"{expected[0]}x{expected[1]}; give `resolution` to resize and crop all to one size"
        )


def read_digits(split: str) -> tuple[list, list, list]:
    """Return (stored images, labels, class names) of the embedded digits; pyarrow alone keeps this fast."""
    import pyarrow.parquet

    _check_split(split, ("train",), "digits")
    table = pyarrow.parquet.read_table(DIGITS_PATH)
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    return table["image"].to_pylist(), table["label"].to_pylist(), features["label"]["names"]


def read_fashion_mnist(folder: Path, split: str) -> tuple[np.ndarray, list, list]:
    """Return (images (N, 28, 28), labels, class names) from the IDX files in `folder`."""
    _check_split(split, tuple(IDX_PREFIXES), "fashion-mnist")
    images = _read_idx(folder, f"{IDX_PREFIXES[split]}-images", 3)
    return images, _read_idx(folder, f"{IDX_PREFIXES[split]}-labels", 1).tolist(), list(FASHION_MNIST_CLASSES)


def _check_split(split: str, allowed: tuple, name: str) -> None:
    if split not in allowed:
        raise ValueError(f"`split` must be one of {allowed} for {name}, got {split!r}.")


def _read_idx(folder: Path, stem: str, dimensions: int) -> np.ndarray:
    """Read one uint8 IDX file, gzipped or not (format: http://yann.lecun.com/exdb/mnist/)."""
    names = [f"{stem}-idx{dimensions}-ubyte", f"{stem}-idx{dimensions}-ubyte.gz"]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"`data_dir` must hold {names[0]} or {names[1]}, got {str(folder)!r}.")
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if zipped else open(path, "rb") as file:
            return _read_array(file, path, dimensions)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} must be a gzip file that is whole, got: {error}") from error


def _read_array(file, path: Path, dimensions: int) -> np.ndarray:
    """Read the array of an open IDX file, and never more bytes of it than its header promises."""
    start = file.read(4)
    sizes = file.read(4 * dimensions)
    if start != bytes([0, 0, 8, dimensions]) or len(sizes) < 4 * dimensions:
        raise ValueError(f"{path} must begin with 000008{dimensions:02x} (IDX of uint8), got {start.hex()}.")
    shape = tuple(int(size) for size in np.frombuffer(sizes, ">u4"))
    promised = math.prod(shape)
    if promised > MAX_IDX_BYTES:
        raise ValueError(f"{path} must hold at most {MAX_IDX_BYTES} bytes, got a header of {shape}.")
    data = file.read(promised + 1)
    if len(data) != promised:
        got = f"{len(data)}" if len(data) < promised else "more"
        raise ValueError(f"{path} must hold {promised} bytes of data, as its header {shape} says, got {got}.")
    return np.frombuffer(data, np.uint8).reshape(shape)
