"""Tests of diffusers_rcfd.data.image_data: real files in tmp_path, no network."""

import gzip
import pickle
import shutil
import tracemalloc
import zlib
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from diffusers_rcfd.data import columns, image_data, image_files, image_folders
from diffusers_rcfd.data.image_data import ImageData, StreamingImageData, load_image_data
from diffusers_rcfd.data.image_tensors import flip, shift_crop, to_model_range, to_uint8

LEVELS = {"cat": (10, 20, 30), "dog": (110, 120)}  # one grey level an image, by class


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    """Keep the caches of `datasets` in the test's own folder, and do not wait 5 s where a shuffled stream ends."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


def grey(level, size=(6, 4)):
    return Image.new("L", size, level)


def encoded(image, kind="PNG", **options):
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def image_folder(tmp_path):
    root = tmp_path / "pets"
    for part in ("train", "test"):
        for name, levels in LEVELS.items():
            (root / part / name).mkdir(parents=True)
            for number, level in enumerate(levels if part == "train" else levels[:1]):
                grey(level).save(root / part / name / f"{number}.png")
    return root


@pytest.fixture
def table():
    levels = [10, 20, 30, 110, 120]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    columns = {"img": [grey(level) for level in levels], "label": [0, 0, 0, 1, 1]}
    return datasets.Dataset.from_dict(columns, features=features)


def check_pets(data):
    assert data.num_images == len(data) == 5 and data.image_shape == (1, 4, 6)
    assert data.num_classes == 2 and data.class_names == ["cat", "dog"]
    assert data.labels.tolist() == [0, 0, 0, 1, 1]
    batch = data.__getitems__(range(5))
    assert batch["images"].dtype == torch.uint8 and batch["images"].shape == (5, 1, 4, 6)
    assert batch["images"][:, 0, 0, 0].tolist() == [10, 20, 30, 110, 120]
    assert batch["labels"].dtype == torch.int64 and data[-1]["labels"] == 1 and data[4]["images"].shape == (1, 4, 6)
    with pytest.raises(IndexError):
        data[5]


# ------------------------------------------------------------------------------------------ sources


def test_digits():
    data = load_image_data()
    assert len(data) == 1797 and data.image_shape == (1, 8, 8) and data.num_classes == 10
    assert data.class_names == [str(digit) for digit in range(10)]
    assert torch.bincount(data.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert data.images[0, 0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # levels 0 0 5 13 9 1 0 0 of 16
    assert data.images.max() == 255 and data.images.min() == 0
    from_hub_form = datasets.load_dataset("parquet", data_files=str(image_files.DIGITS_PATH), split="train")
    assert from_hub_form.features["label"].names == data.class_names
    assert type(from_hub_form.features["image"]) is datasets.Image
    assert np.array_equal(np.array(from_hub_form[7]["image"]), data.images[7, 0].numpy())


def test_digits_match_scikit_learn():
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    source, data = sklearn_datasets.load_digits(), load_image_data()
    assert np.array_equal(data.images[:, 0].numpy(), np.round(source.images * 255 / 16).astype(np.uint8))
    assert np.array_equal(data.labels.numpy(), source.target)


def test_image_folder(image_folder):
    check_pets(load_image_data(str(image_folder)))
    check_pets(load_image_data("imagefolder", data_dir=str(image_folder)))
    assert load_image_data(str(image_folder), split="test").images[:, 0, 0, 0].tolist() == [10, 110]


# --------------------------------------------------------------------------------- layouts of folders


@pytest.fixture
def warnings_logged(monkeypatch):
    """The messages of warnings, whatever the verbosity of the test run."""
    messages = []
    for module in (columns, image_data, image_folders):
        monkeypatch.setattr(module.logger, "warning", messages.append)
    return messages


def place(*paths):
    """Write an image at each path, of a grey level that is its number."""
    for level, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        grey(level).save(path, "PNG")


def levels_and_labels(data):
    labels = None if data.labels is None else data.labels.tolist()
    return data.images[:, 0, 0, 0].tolist(), labels, data.class_names


def test_linked_folders_and_files_are_found(tmp_path, warnings_logged):
    root, pool = tmp_path / "root", tmp_path / "pool"
    place(root / "cat" / "0.png", root / "cat" / "1.png", pool / "dog" / "0.png", pool / "1.png")
    (root / "dog").symlink_to(pool / "dog")
    (root / "dog" / "linked.png").symlink_to(pool / "1.png")
    assert levels_and_labels(load_image_data(root)) == ([0, 1, 2, 3], [0, 0, 1, 1], ["cat", "dog"])
    assert not warnings_logged
    (root / "cat" / "circle").symlink_to(root)
    (root / "cat" / "gone.png").symlink_to(pool / "gone.png")
    assert len(load_image_data(root)) == 4
    assert [message.split(" links ")[0] for message in warnings_logged] == [
        str(root / "cat" / "circle"), str(root / "cat" / "gone.png")
    ]  # fmt: skip


def test_class_is_the_first_level_of_folders(tmp_path, warnings_logged):
    place(
        *(tmp_path / path for path in ("cat/indoor/0.png", "cat/0.png", "dog/indoor/young/0.png", "dog/outdoor/0.png"))
    )
    assert levels_and_labels(load_image_data(tmp_path)) == ([1, 0, 2, 3], [0, 0, 1, 1], ["cat", "dog"])
    assert not warnings_logged


def test_images_beside_the_classes_are_found_and_told(tmp_path, warnings_logged):
    place(*(tmp_path / path for path in ("cat/0.png", "dog/0.png", "top.png")))
    assert levels_and_labels(load_image_data(tmp_path)) == ([0, 1, 2], None, None)
    (message,) = warnings_logged
    assert "1 of 3 images lie in none of the folders cat, dog, such as top.png, and no labels are loaded" in message
    with pytest.raises(ValueError, match=r"`label_column` must be a column of .* \(image\), got 'label'"):
        load_image_data(tmp_path, label_column="label")


@pytest.mark.parametrize("streaming", [False, True])
def test_special_characters_and_upper_case(tmp_path, streaming):
    root = tmp_path / "odd [folder] *? 100% # ü {a}"
    names = ["a[1].png", "b*?.PNG", "c #%20.JPG", "ü é.jpeg", "x y.Png"]
    place(*(root / folder / name for folder in ("c [0]", "c{1}") for name in names))
    data = load_image_data(root, streaming=streaming)
    assert data.class_names == ["c [0]", "c{1}"]
    levels = levels_of(data) if streaming else data.images[:, 0, 0, 0].tolist()
    assert sorted(levels) == list(range(10))
    if not streaming:
        assert torch.equal(load_image_data(root, max_memory_bytes=1).__getitems__(range(10))["images"], data.images)


def test_splits(tmp_path, warnings_logged):
    paths = ("train/cat/0.png", "train/dog/0.png", "train/owl/0.png", "Val/dog/0.png", "test/owl/0.png")
    place(*(tmp_path / path for path in paths))
    classes = ["cat", "dog", "owl"]
    for split, levels, labels in (
        ("train", [0, 1, 2], [0, 1, 2]),
        ("validation", [3], [1]),
        ("test", [4], [2]),
        ("train+test", [0, 1, 2, 4], [0, 1, 2, 2]),
        ("train[1:]", [1, 2], [1, 2]),
    ):
        assert levels_and_labels(load_image_data(tmp_path, split=split)) == (levels, labels, classes)
    assert not warnings_logged
    place(tmp_path / "stray.png")
    assert len(load_image_data(tmp_path)) == 3
    (message,) = warnings_logged
    assert "1 of 6 images lie outside of them and are left out, such as stray.png" in message


def test_split_below_the_classes(tmp_path):
    place(*(tmp_path / path for path in ("cat/test/0.png", "cat/train/0.png", "dog/train/0.png")))
    assert levels_and_labels(load_image_data(tmp_path)) == ([1, 2], [0, 1], ["cat", "dog"])


def test_other_files_are_told(tmp_path, warnings_logged):
    place(tmp_path / "0.png", tmp_path / ".hidden.png", tmp_path / "__MACOSX" / "1.png")
    for name in ("a.npy", "b.npy", "LICENSE"):
        (tmp_path / name).write_text("no image")
    assert len(load_image_data(tmp_path)) == 1
    assert warnings_logged == [f"{tmp_path}: files that are no images are left out: .npy (2), without ending (1)."]
    (tmp_path / "0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"`dataset` must .*: there are no images .*, but \.npy \(2\)"):
        load_image_data(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_path_is_never_the_name_of_a_data_set(tmp_path, monkeypatch, streaming):
    monkeypatch.chdir(tmp_path)
    place(*(tmp_path / "digits" / path for path in ("cat/0.png", "dog/0.png")))
    assert load_image_data(Path("digits"), streaming=streaming).class_names == ["cat", "dog"]
    assert load_image_data("digits", streaming=streaming).num_classes == 10


def test_number_of_images_and_classes_is_logged(image_folder, monkeypatch):
    messages = []
    monkeypatch.setattr(image_data.logger, "info", messages.append)
    load_image_data(image_folder)
    assert messages == [f"{image_folder} [train]: 5 images of shape (1, 4, 6), 2 classes."]


def test_fingerprint_of_a_folder_follows_its_files_but_not_its_place(tmp_path):
    place(tmp_path / "one" / "0.png", tmp_path / "one" / "1.png")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    prints = [load_image_data(tmp_path / name, max_memory_bytes=1).fingerprint for name in ("one", "two")]
    (tmp_path / "two" / "1.png").unlink()
    place(tmp_path / "two" / "2.png")
    assert prints[0] == prints[1] != load_image_data(tmp_path / "two", max_memory_bytes=1).fingerprint


def test_metadata(tmp_path, warnings_logged):
    root = tmp_path / "root"
    place(*(root / f"{number}.png" for number in range(4)))
    (root / "metadata.csv").write_text("file_name,label\n2.png,1\n0.png,0\n1.png,0\n")
    assert levels_and_labels(load_image_data(root)) == ([2, 0, 1], [1, 0, 0], None)
    assert warnings_logged == [f"{root} has 4 images, of which its metadata names 3; these are loaded."]


def test_tables_that_are_not_read_are_told(table, tmp_path, warnings_logged):
    for folder in ("root", "pool"):
        (tmp_path / folder).mkdir()
        table.to_parquet(str(tmp_path / folder / "train.parquet"))
    (tmp_path / "root" / "more").symlink_to(tmp_path / "pool")
    place(tmp_path / "root" / "figure.png")
    check_pets(load_image_data(tmp_path / "root"))
    assert [message.split(": ")[1] for message in warnings_logged] == [
        "1 tables in linked folders are left out, such as more/train.parquet.", "its 1 image files are left out."
    ]  # fmt: skip
    (tmp_path / "pool").rename(tmp_path / "odd [0]")
    check_pets(load_image_data(tmp_path / "odd [0]" / "train.parquet"))
    with pytest.raises(ValueError, match=r"`dataset`.*\[0\].*reads \*, \? and \[ .* as patterns; rename the folder"):
        load_image_data(tmp_path / "odd [0]")


# --------------------------------------------------------------------------------- rows and their labels


@pytest.mark.parametrize("labels", [["0", "1", "", "2"], ["cat", "dog", "", "cat"]])
def test_missing_label_is_named_by_its_row(tmp_path, labels):
    root = tmp_path / "root"
    place(*(root / f"{number}.png" for number in range(4)))
    rows = "".join(f"{number}.png,{label}\n" for number, label in enumerate(labels))
    (root / "metadata.csv").write_text("file_name,label\n" + rows)
    with pytest.raises(ValueError, match=r"must hold a label for each image, .* got none in .*: row 2 \(.*2\.png\)"):
        load_image_data(root)
    assert load_image_data(root, label_column="").labels is None


def test_rows_that_are_bad_are_named(tmp_path):
    place(tmp_path / "0.png")
    features = {"image": datasets.Value("string")}
    for image, words in ((str(tmp_path / "gone.png"), "No such file"), (None, "it is missing")):
        path = save_columns(tmp_path, features, {"image": [str(tmp_path / "0.png"), image]})
        with pytest.raises(ValueError, match=f"row 1.*cannot decode the image: .*{words}"):
            load_image_data(path, image_column="image")
    features = {"image": datasets.Image(), "label": datasets.Value("float64")}
    path = save_columns(tmp_path, features, {"image": [grey(1)] * 3, "label": [0.0, 1.0, 1.5]})
    with pytest.raises(ValueError, match="must hold integers from 0, .* got 1.5 in .*row 2"):
        load_image_data(path)
    path = save_columns(tmp_path, features, {"image": [grey(1)] * 3, "label": [0.0, 1.0, 1.0]})
    assert load_image_data(path).labels.tolist() == [0, 1, 1]


def test_labels_from_1_are_told(tmp_path, warnings_logged):
    features = {"image": datasets.Image(), "label": datasets.Value("int64")}
    path = save_columns(tmp_path, features, {"image": [grey(1)] * 3, "label": [1, 2, 3]})
    assert load_image_data(path).num_classes == 4
    (message,) = warnings_logged
    assert "numbers in 1..3, which makes 4 classes, of which 1 have no images. Labels count from 0" in message
    path = save_columns(tmp_path, features, {"image": [grey(1)] * 3, "label": [0, 2, 1]})
    assert load_image_data(path).num_classes == 3 and len(warnings_logged) == 1


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow", "pandas"])
@pytest.mark.parametrize("streaming", [False, True])
def test_format_of_a_saved_table_does_not_matter(table, tmp_path, kind, streaming):
    table.with_format(kind).save_to_disk(str(tmp_path / "saved"))
    data = load_image_data(tmp_path / "saved", streaming=streaming)
    if streaming:
        assert sorted(levels_of(data)) == [10, 20, 30, 110, 120]
    else:
        check_pets(data)


def test_image_folder_without_classes(tmp_path):
    (tmp_path / "flat").mkdir()
    for number in range(3):
        grey(number).save(tmp_path / "flat" / f"{number}.png")
    data = load_image_data(str(tmp_path / "flat"))
    assert data.labels is None and data.num_classes is None and data.class_names is None
    assert set(data.__getitems__([0, 1])) == set(data[0]) == {"images"}


@pytest.mark.parametrize("form", ["file", "folder", "builder"])
def test_parquet(table, tmp_path, form):
    (tmp_path / "tables").mkdir()
    table.to_parquet(str(tmp_path / "tables" / "train-00000-of-00001.parquet"))
    path = tmp_path / "tables"
    if form == "builder":
        check_pets(load_image_data("parquet", data_dir=str(path)))
    else:
        check_pets(load_image_data(str(path / "train-00000-of-00001.parquet" if form == "file" else path)))


def test_parquet_without_feature_metadata(table, tmp_path):
    import pyarrow.parquet

    bare = table.data.table.replace_schema_metadata(None)
    pyarrow.parquet.write_table(bare, tmp_path / "bare.parquet")
    data = load_image_data(str(tmp_path / "bare.parquet"))
    assert data.images[:, 0, 0, 0].tolist() == [10, 20, 30, 110, 120]
    assert data.labels.tolist() == [0, 0, 0, 1, 1] and data.num_classes == 2 and data.class_names is None


def test_arrow_and_saved_to_disk(table, tmp_path):
    table.save_to_disk(str(tmp_path / "saved"))
    check_pets(load_image_data(str(tmp_path / "saved")))
    check_pets(load_image_data(str(tmp_path / "saved" / "data-00000-of-00001.arrow")))
    datasets.DatasetDict({"train": table, "test": table.select([4])}).save_to_disk(str(tmp_path / "parts"))
    check_pets(load_image_data(str(tmp_path / "parts")))
    assert load_image_data(str(tmp_path / "parts"), split="test").labels.tolist() == [1]


def test_text_labels(tmp_path):
    columns = {"image": [grey(level) for level in (1, 2, 3)], "label": ["b", "a", "b"]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "t.parquet"))
    data = load_image_data(str(tmp_path / "t.parquet"))
    assert data.labels.tolist() == [1, 0, 1] and data.class_names == ["a", "b"] and data.num_classes == 2
    assert load_image_data(str(tmp_path / "t.parquet"), label_column="").labels is None


def write_idx(folder, prefix, images, labels, zipped):
    for name, array in (("images", images), ("labels", labels)):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        path = folder / f"{prefix}-{name}-idx{array.ndim}-ubyte{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(header + array.tobytes()) if zipped else header + array.tobytes())


@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_mnist_idx(tmp_path, zipped):
    images = np.arange(3 * 28 * 28, dtype=np.uint32).reshape(3, 28, 28).astype(np.uint8)
    write_idx(tmp_path, "train", images, np.array([9, 0, 3], np.uint8), zipped)
    write_idx(tmp_path, "t10k", 255 - images[:2], np.array([1, 2], np.uint8), zipped)
    train = load_image_data("fashion-mnist", data_dir=str(tmp_path))
    assert np.array_equal(train.images[:, 0].numpy(), images) and train.labels.tolist() == [9, 0, 3]
    assert train.num_classes == 10 and train.class_names[9] == "Ankle boot"
    test = load_image_data("fashion-mnist", data_dir=str(tmp_path), split="test", resolution=32, channels=3)
    assert test.image_shape == (3, 32, 32) and test.labels.tolist() == [1, 2]


def test_fashion_mnist_without_folder_is_the_hub_name(table, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: asked.append((path, options)) or table)
    check_pets(load_image_data("fashion-mnist", split="test", cache_dir="there"))
    assert asked[0][0] == "fashion_mnist" and asked[0][1]["split"] == "test" and asked[0][1]["cache_dir"] == "there"


# ------------------------------------------------------------------------- in memory, on demand, loaders


@pytest.mark.parametrize("shape", [{}, {"resolution": 3, "channels": 3}])
def test_on_demand_equals_in_memory(image_folder, shape):
    memory = load_image_data(str(image_folder), **shape)
    lazy = load_image_data(str(image_folder), max_memory_bytes=1, **shape)
    assert memory.images is not None and lazy.images is None and lazy.image_shape == memory.image_shape
    assert torch.equal(lazy.__getitems__([3, 0])["images"], memory.images[[3, 0]])
    assert torch.equal(lazy[4]["images"], memory[4]["images"]) and lazy.labels.tolist() == memory.labels.tolist()
    assert torch.equal(lazy.subset([4, 1]).__getitems__([0, 1])["images"], memory.images[[4, 1]])
    again = load_image_data(str(image_folder), max_memory_bytes=1, **shape)
    assert lazy.fingerprint == again.fingerprint != lazy.subset([4, 1]).fingerprint


@pytest.mark.parametrize("max_memory_bytes", [1, 2**30])
@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader(image_folder, max_memory_bytes, workers):
    data = load_image_data(str(image_folder), max_memory_bytes=max_memory_bytes)
    loader = DataLoader(data, batch_size=2, collate_fn=ImageData.collate, num_workers=workers)
    batches = list(loader)
    assert [len(batch["images"]) for batch in batches] == [2, 2, 1]
    assert torch.cat([batch["images"] for batch in batches])[:, 0, 0, 0].tolist() == [10, 20, 30, 110, 120]
    stacked = ImageData.collate([data[0], data[3]])
    assert stacked["images"].shape == (2, 1, 4, 6) and stacked["labels"].tolist() == [0, 1]


def test_fingerprint_follows_the_contents():
    images, labels = torch.arange(48, dtype=torch.uint8).view(3, 1, 4, 4), torch.tensor([0, 1, 0])
    base = ImageData(images, labels, num_classes=2).fingerprint
    changed = images.clone()
    changed[2, 0, 3, 3] += 1
    assert base == ImageData(images.clone(), labels, num_classes=2, name="other").fingerprint and len(base) == 16
    others = [ImageData(changed, labels, num_classes=2), ImageData(images, labels.flip(0) + 1, num_classes=2),
              ImageData(images, num_classes=2), ImageData(images.view(3, 1, 2, 8), labels, num_classes=2)]  # fmt: skip
    assert len({base, *(other.fingerprint for other in others)}) == 5


def test_split_is_deterministic_and_disjoint():
    data = load_image_data(max_images=101, seed=3)
    numbered = ImageData(data.images, torch.arange(101), num_classes=101)
    rest, held_out = numbered.split(0.25, seed=7)
    assert len(held_out) == 25 and len(rest) == 76
    assert sorted(rest.labels.tolist() + held_out.labels.tolist()) == list(range(101))
    assert torch.equal(held_out.images, data.images[held_out.labels])
    assert numbered.split(0.25, seed=7)[1].labels.equal(held_out.labels)
    assert not numbered.split(0.25, seed=8)[1].labels.equal(held_out.labels)
    assert len(numbered.split(0.999)[0]) == 1 and len(numbered.split(1e-9)[1]) == 1
    for fraction in (0, 1, -0.5):
        with pytest.raises(ValueError, match="`fraction` must be"):
            numbered.split(fraction)


def test_max_images_is_a_seeded_draw(image_folder):
    everything = load_image_data()
    few = load_image_data(max_images=20, seed=1)
    assert len(few) == 20 and few.num_classes == 10
    assert torch.equal(few.images, load_image_data(max_images=20, seed=1).images)
    assert not torch.equal(few.images, load_image_data(max_images=20, seed=2).images)
    assert not torch.equal(few.images, everything.images[:20])
    assert len(load_image_data(str(image_folder), max_images=2)) == 2
    assert len(load_image_data(max_images=5000)) == 1797


# ------------------------------------------------------------------------------------------ streaming


def levels_of(stream):
    return [int(item["images"][0, 0, 0]) for item in stream]


def test_streaming_folder(image_folder):
    stream = load_image_data(str(image_folder), streaming=True, seed=5)
    assert isinstance(stream, StreamingImageData) and stream.num_images is None
    assert stream.image_shape == (1, 4, 6) and stream.class_names == ["cat", "dog"] and stream.num_classes == 2
    items = list(stream)
    assert sorted((int(item["images"][0, 0, 0]), int(item["labels"])) for item in items) == [
        (10, 0), (20, 0), (30, 0), (110, 1), (120, 1)
    ]  # fmt: skip
    assert items[0]["images"].dtype == torch.uint8 and items[0]["labels"].dtype == torch.int64
    first_epoch = levels_of(stream)
    orders = []
    for epoch in range(1, 5):
        stream.set_epoch(epoch)
        orders.append(levels_of(stream))
    assert first_epoch == levels_of(items) and any(order != first_epoch for order in orders)
    other = load_image_data(str(image_folder), streaming=True, seed=5)
    other.set_epoch(4)
    assert levels_of(other) == orders[-1] and other.fingerprint == stream.fingerprint
    changed = load_image_data(str(image_folder), streaming=True, seed=5, channels=3)
    assert changed.image_shape == (3, 4, 6) and changed.fingerprint != stream.fingerprint


@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_workers_and_nodes_share(table, tmp_path, workers):
    for shard in range(4):
        part = table.select([shard]) if shard < 3 else table.select([3, 4])
        (tmp_path / "shards").mkdir(exist_ok=True)
        part.to_parquet(str(tmp_path / "shards" / f"train-{shard:05d}-of-00004.parquet"))
    stream = pickle.loads(pickle.dumps(load_image_data(str(tmp_path / "shards"), streaming=True)))
    seen = []
    for rank in range(2):
        part = stream.split_by_node(rank, 2)
        loader = DataLoader(part, batch_size=1, collate_fn=part.collate, num_workers=workers)
        seen.append([int(batch["images"][0, 0, 0, 0]) for batch in loader])
    assert sorted(seen[0] + seen[1]) == [10, 20, 30, 110, 120] and min(len(part) for part in seen) >= 2


def test_streaming_resumes(table, tmp_path):
    table.to_parquet(str(tmp_path / "t.parquet"))
    options = {"streaming": True, "buffer_size": 1}  # a buffer of one does not reorder: the state is exact
    stream = load_image_data(str(tmp_path / "t.parquet"), **options)
    whole, passed = levels_of(stream), iter(stream)
    for _ in range(2):
        next(passed)
    state = stream.state_dict()
    resumed = load_image_data(str(tmp_path / "t.parquet"), **options)
    resumed.load_state_dict(pickle.loads(pickle.dumps(state)))
    assert levels_of(resumed) == whole[2:]


def test_streaming_digits_and_first_images():
    stream = load_image_data("digits", streaming=True, max_images=6)
    assert stream.image_shape == (1, 8, 8) and stream.num_classes == 10
    orders = {tuple(int(item["labels"]) for item in stream)}
    for seed in (1, 2, 3):
        other = load_image_data("digits", streaming=True, max_images=6, seed=seed)
        orders.add(tuple(int(item["labels"]) for item in other))
    assert len(orders) > 1 and {tuple(sorted(order)) for order in orders} == {(0, 1, 2, 3, 4, 5)}


# ------------------------------------------------------------------------------------------ decoding


def decode(image, tmp_path, kind="PNG", channels=None, resolution=None, **options):
    folder = tmp_path / f"odd-{len(list(tmp_path.iterdir()))}"  # a new one for each image
    folder.mkdir()
    (folder / f"image.{kind.lower()}").write_bytes(encoded(image, kind, **options))
    return load_image_data(str(folder), channels=channels, resolution=resolution).images[0]


def test_sixteen_bit_grey_is_scaled(tmp_path):
    levels = np.array([[0, 257, 32896, 65535, 300, 128]], np.uint16)
    for kind in ("PNG", "TIFF"):
        assert decode(Image.fromarray(levels), tmp_path, kind).tolist() == [[[0, 1, 128, 255, 1, 0]]]
    assert decode(Image.fromarray(levels), tmp_path, transparency=257).tolist() == [[[0, 255, 128, 255, 1, 0]]]


def test_integer_and_float_modes():
    deep = image_files.decode_image(Image.fromarray(np.array([[0, 65535]], np.int32)), "x", None, None)
    assert deep.tolist() == [[[0, 255]]]
    with pytest.raises(ValueError, match=r"row 3: .*0\.\.65535"):
        image_files.decode_image(Image.fromarray(np.array([[0, 70000]], np.int32)), "row 3", None, None)
    with pytest.raises(ValueError, match="'F' has no defined range"):
        image_files.decode_image(Image.fromarray(np.zeros((2, 2), np.float32)), "row 3", None, None)


def test_one_bit(tmp_path):
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert decode(image, tmp_path).tolist() == [[[0, 255]]]


def test_palette_and_transparent_palette(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([200, 100, 50, 1, 2, 3])
    image.putpixel((1, 0), 1)
    assert decode(image, tmp_path)[:, 0].T.tolist() == [[200, 100, 50], [1, 2, 3]]
    assert decode(image, tmp_path, transparency=1)[:, 0].T.tolist() == [[200, 100, 50], [255, 255, 255]]


def test_alpha_is_composited_on_white(tmp_path):
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 51))  # a fifth black on white: 204
    assert decode(image, tmp_path)[:, 0].T.tolist() == [[255, 255, 255], [255, 0, 0], [204, 204, 204]]
    assert decode(Image.new("LA", (1, 1), (100, 0)), tmp_path).tolist() == [[[255]]]
    assert decode(Image.new("LA", (1, 1), (100, 255)), tmp_path).tolist() == [[[100]]]
    assert decode(Image.new("L", (1, 1), 7), tmp_path, transparency=7).tolist() == [[[255]]]


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (8, 8), (255, 0, 0, 0))  # full cyan
    assert (decode(image, tmp_path, "TIFF")[:, 0, 0].int() - torch.tensor([0, 255, 255])).abs().max() <= 1


def test_grey_and_colour_by_channels(tmp_path):
    image = Image.new("RGB", (2, 2), (255, 0, 0))
    assert decode(image, tmp_path, channels=1).unique().tolist() == [76]  # 0.299 * 255
    assert decode(grey(9), tmp_path, channels=3).shape == (3, 4, 6)


def test_exif_orientation(tmp_path):
    image = Image.new("L", (3, 2))
    image.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise: top left goes to top right
    pixels = decode(image, tmp_path, exif=exif)
    assert pixels.shape == (1, 3, 2) and pixels[0, 0, 1] == 255 and pixels.sum() == 255
    header = image_files.read_header({"bytes": encoded(image.convert("RGB"), "JPEG", exif=exif), "path": None}, "x")
    assert header == (3, 3, 2)


def test_mixed_grey_and_colour_becomes_colour(tmp_path):
    (tmp_path / "mixed").mkdir()
    grey(50).save(tmp_path / "mixed" / "0.png")
    Image.new("RGB", (6, 4), (1, 2, 3)).save(tmp_path / "mixed" / "1.png")
    grey(60).save(tmp_path / "mixed" / "2.png")
    for limit in (1, 2**30):
        data = load_image_data(str(tmp_path / "mixed"), max_memory_bytes=limit)
        assert data.image_shape == (3, 4, 6)
        corner = data.__getitems__([0, 1, 2])["images"][:, :, 0, 0]
        assert corner.tolist() == [[50, 50, 50], [1, 2, 3], [60, 60, 60]]


def test_resize_and_centre_crop(tmp_path):
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, 4:8] = (10, 200, 30)  # exactly the centre square
    assert decode(Image.fromarray(pixels), tmp_path, resolution=4)[:, 0, 0].tolist() == [10, 200, 30]
    flat = decode(grey(77, (9, 5)), tmp_path, resolution=16)
    assert flat.shape == (1, 16, 16) and flat.unique().tolist() == [77]
    checks = np.indices((64, 64)).sum(0) % 2 * 255  # one-pixel checks average to middle grey only if antialiased
    assert (decode(Image.fromarray(checks.astype(np.uint8)), tmp_path, resolution=8).int() - 127).abs().max() <= 2


# ------------------------------------------------------------------------------------- pure functions


def test_uint8_round_trip_closed_form():
    levels = torch.arange(256, dtype=torch.uint8)
    values = to_model_range(levels)
    assert values.dtype == torch.float32 and values[0] == -1 and values[255] == 1
    assert torch.equal(to_uint8(values), levels)
    assert torch.equal(to_uint8(values.double()), levels)
    assert to_uint8(torch.tensor([-7.0, 7.0, 0.002, 0.005])).tolist() == [0, 255, 128, 128]
    floats = torch.zeros(2)
    assert to_model_range(floats) is floats
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert to_model_range(floats.to(dtype)).dtype == torch.float32
    for function, bad in ((to_model_range, levels.int()), (to_uint8, levels)):
        with pytest.raises(TypeError, match="`images` must be"):
            function(bad)


def test_flip_closed_form():
    images = torch.arange(12, dtype=torch.uint8).view(2, 1, 2, 3)
    flipped = flip(images, torch.tensor([False, True]))
    assert torch.equal(flipped[0], images[0]) and flipped[1, 0].tolist() == [[8, 7, 6], [11, 10, 9]]
    for mask in (torch.tensor([0, 1]), torch.tensor([True])):
        with pytest.raises(ValueError, match="`mask` must be"):
            flip(images, mask)


@pytest.mark.parametrize("reflect", [False, True])
@pytest.mark.parametrize("dtype, black", [(torch.uint8, 0), (torch.float32, -1)])
def test_shift_crop_closed_form(dtype, black, reflect):
    images = torch.randint(0, 255, (25, 2, 5, 4), generator=torch.Generator().manual_seed(0)).to(dtype)
    offsets = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    shifted = shift_crop(images, offsets, padding=2, reflect=reflect)
    assert shifted.dtype == dtype and shifted.is_contiguous() and torch.equal(shifted[12], images[12])
    for image, (y, x), result in zip(images, offsets.tolist(), shifted, strict=True):
        mode = {"mode": "reflect"} if reflect else {"constant_values": black}
        padded = np.pad(image.numpy(), ((0, 0), (2, 2), (2, 2)), **mode)
        assert np.array_equal(result.numpy(), padded[:, y : y + 5, x : x + 4])


def test_shift_crop_errors():
    images = torch.zeros(2, 1, 4, 4)
    for offsets, padding in (([[0, 0], [0, 5]], 2), ([[0, -1], [0, 0]], 2), ([[0, 0]], 2), ([[0.0, 0.0]] * 2, 2)):
        with pytest.raises(ValueError, match="`offsets` must be"):
            shift_crop(images, torch.tensor(offsets), padding)
    with pytest.raises(ValueError, match="`padding` must be .* got 4"):
        shift_crop(images, torch.zeros(2, 2, dtype=torch.long), 4, reflect=True)


# -------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"channels": 2}, r"`channels` must be 1 \(grey\) or 3 \(RGB\), got 2"),
        ({"resolution": 0}, "`resolution` must be a positive integer of at most 8192, got 0"),
        ({"resolution": 100_000}, "`resolution` must be a positive integer of at most 8192, got 100000"),
        (
            {"resolution": 8192},
            "`resolution` must be such that the 1797 images of digits .* max_memory_bytes=4294967296",
        ),
        ({"max_images": -1}, "`max_images` must be an integer of at least 1, got -1"),
        ({"max_images": 1.5}, "`max_images` must be an integer of at least 1, got 1.5"),
        ({"dataset": ""}, "`dataset` must be a name that is not empty, got ''"),
        ({"split": "test"}, r"`split` must be one of \('train',\) for digits, got 'test'"),
        ({"data_dir": "x"}, "`data_dir` must be None with the embedded digits, got 'x'"),
        ({"image_column": "pixels"}, r"`image_column` must be a column of digits .*\(image, label\), got 'pixels'"),
        ({"label_column": "kind"}, "`label_column` must be a column of digits .*, got 'kind'"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        load_image_data(**arguments)


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_and_empty_folders(tmp_path, streaming):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no image")
    for name in ("empty", "nowhere", "nowhere.parquet"):
        with pytest.raises(FileNotFoundError, match=f"`dataset` must be .*{name}"):
            load_image_data(str(tmp_path / name), streaming=streaming)
    with pytest.raises(FileNotFoundError, match="`dataset` must be .* exists where it is a path, got .*nowhere"):
        load_image_data(Path("nowhere"), streaming=streaming)
    with pytest.raises(FileNotFoundError, match=r"text.*: there are no images .* but \.txt \(1\)"):
        load_image_data(str(tmp_path / "text"), streaming=streaming)
    with pytest.raises(FileNotFoundError, match="`data_dir` must be a folder that exists, got .*nowhere"):
        load_image_data("imagefolder", data_dir=str(tmp_path / "nowhere"), streaming=streaming)
    with pytest.raises(ValueError, match="`dataset` must be a folder, a .parquet or an .arrow file"):
        load_image_data(str(tmp_path / "text" / "notes.txt"), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_unknown_split_and_column(image_folder, streaming):
    with pytest.raises(ValueError, match="`split` must .*'nope'.*test.*train"):
        load_image_data(str(image_folder), split="nope", streaming=streaming)
    with pytest.raises(ValueError, match=r"`image_column` must be a column of .* \(image, label\), got 'img'"):
        load_image_data(str(image_folder), image_column="img", streaming=streaming)
    with pytest.raises(ValueError, match="`image_column` must hold images, .* got 'label'"):
        load_image_data(str(image_folder), image_column="label", streaming=streaming)


def save_columns(tmp_path, features, columns):
    path = str(tmp_path / "bad.parquet")
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
    return path


def test_image_columns_that_cannot_be_found(tmp_path):
    two = {"before": datasets.Image(), "after": datasets.Image()}
    path = save_columns(tmp_path, two, {"before": [grey(1)], "after": [grey(2)]})
    with pytest.raises(
        ValueError, match=r"`image_column` must be given .* more than one image column \(before, after\)"
    ):
        load_image_data(path)
    assert load_image_data(path, image_column="after").images.unique().tolist() == [2]
    path = save_columns(tmp_path, {"text": datasets.Value("string")}, {"text": ["a"]})
    with pytest.raises(ValueError, match="`image_column` must be given .* no image column: one of text"):
        load_image_data(path)


def test_two_label_columns(tmp_path):
    features = {"image": datasets.Image(), "fine": datasets.ClassLabel(2), "coarse": datasets.ClassLabel(2)}
    path = save_columns(tmp_path, features, {"image": [grey(1)], "fine": [1], "coarse": [0]})
    with pytest.raises(ValueError, match="`label_column` must be given .*: fine, coarse"):
        load_image_data(path)
    assert load_image_data(path, label_column="fine").labels.tolist() == [1]


@pytest.mark.parametrize("label", [-1, None, 1.5])
def test_labels_out_of_range(tmp_path, label):
    kind = "float64" if label == 1.5 else "int64"
    features = {"image": datasets.Image(), "label": datasets.Value(kind)}
    path = save_columns(tmp_path, features, {"image": [grey(1), grey(2)], "label": [0, label]})
    wanted, got = ("a label for each image", "none") if label is None else ("integers from 0", label)
    with pytest.raises(ValueError, match=f"`label_column` must hold {wanted}, .* got {got} in .*row 1"):
        load_image_data(path)
    assert load_image_data(path, label_column="").labels is None
    if label == -1:
        with pytest.raises(ValueError, match="`label_column` must hold integers from 0, .* got -1"):
            list(load_image_data(path, streaming=True))


def test_label_above_the_classes(tmp_path):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    path = save_columns(tmp_path, features, {"image": [grey(1)], "label": [-1]})
    with pytest.raises(ValueError, match=r"integers in 0\.\.1, .* got -1 in .*row 0"):
        load_image_data(path)
    write_idx(tmp_path, "train", np.zeros((2, 4, 4), np.uint8), np.array([3, 10], np.uint8), False)
    with pytest.raises(ValueError, match=r"integers in 0\.\.9, .* got 10 in .*row 1"):
        load_image_data("fashion-mnist", data_dir=str(tmp_path))


@pytest.mark.parametrize("limit", [1, 2**30])
def test_sizes_differ(tmp_path, limit):
    (tmp_path / "sizes").mkdir()
    grey(1, (6, 4)).save(tmp_path / "sizes" / "0.png")
    grey(1, (4, 6)).save(tmp_path / "sizes" / "1.png")
    with pytest.raises(ValueError, match="row 1.*6x4.*4x6.*give `resolution`"):
        load_image_data(str(tmp_path / "sizes"), max_memory_bytes=limit)
    assert load_image_data(str(tmp_path / "sizes"), resolution=4, max_memory_bytes=limit).image_shape == (1, 4, 4)
    with pytest.raises(ValueError, match="give `resolution`"):
        list(load_image_data(str(tmp_path / "sizes"), streaming=True))


@pytest.mark.parametrize("damage", ["text", "truncated", "empty"])
def test_corrupt_image_names_the_file(tmp_path, damage):
    (tmp_path / "broken").mkdir()
    grey(1, (64, 64)).save(tmp_path / "broken" / "0.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    content = {"text": b"not an image", "truncated": encoded(Image.fromarray(noise))[:900], "empty": b""}[damage]
    (tmp_path / "broken" / "1.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"row 1 .*1\.png.*cannot decode"):
        load_image_data(str(tmp_path / "broken"))
    if damage == "truncated":  # a whole header: found when the image is read
        with pytest.raises(ValueError, match=r"row 1 .*1\.png.*cannot decode"):
            load_image_data(str(tmp_path / "broken"), max_memory_bytes=1)[1]
    else:
        with pytest.raises(ValueError, match=r"row 1 .*1\.png.*cannot decode"):
            load_image_data(str(tmp_path / "broken"), max_memory_bytes=1)


def test_decompression_bomb(tmp_path, monkeypatch):
    (tmp_path / "bomb").mkdir()
    grey(1, (100, 100)).save(tmp_path / "bomb" / "0.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"row 0 .*0\.png.*exceeds limit of 200 pixels.*MAX_IMAGE_PIXELS"):
        load_image_data(str(tmp_path / "bomb"))


def test_corrupt_table(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"`dataset`, .* must name data that can be read, got .*t\.parquet"):
        load_image_data(str(tmp_path / "t.parquet"))


def test_idx_errors(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="`data_dir` must hold train-images-idx3-ubyte or train-images-idx3-ubyte.gz"
    ):
        load_image_data("fashion-mnist", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"`split` must be one of \('train', 'test'\) for fashion-mnist"):
        load_image_data("fashion-mnist", data_dir=str(tmp_path), split="validation")
    with pytest.raises(ValueError, match="`streaming` must be False with IDX files"):
        load_image_data("fashion-mnist", data_dir=str(tmp_path), streaming=True)
    write_idx(tmp_path, "train", np.zeros((2, 4, 4), np.uint8), np.zeros(3, np.uint8), True)
    with pytest.raises(ValueError, match="`labels` must be one for each of the 2 images .*, got 3"):
        load_image_data("fashion-mnist", data_dir=str(tmp_path))
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for content, words in (
        (whole[:30], "must be a gzip file that is whole"),
        (whole[:12] + zlib.compress(b"x") + whole[20:], "must be a gzip file that is whole"),
        (gzip.compress(b"text, not IDX, of some length"), "must begin with 00000803"),
        (gzip.compress(gzip.decompress(whole)[:-1]), "must hold 32 bytes of data, .* got 31"),
        (gzip.compress(gzip.decompress(whole) + b"more"), "must hold 32 bytes of data, .* got more"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            load_image_data("fashion-mnist", data_dir=str(tmp_path))


def test_zipped_idx_file_is_inflated_no_further_than_its_header_says(tmp_path):
    write_idx(tmp_path, "train", np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.uint8), True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(2**26), 1))
    tracemalloc.start()
    with pytest.raises(ValueError, match="must hold 32 bytes of data, as its header .* says, got more"):
        load_image_data("fashion-mnist", data_dir=tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    header = bytes([0, 0, 8, 3]) + np.array([2**31, 2**10, 2**10], ">u4").tobytes()
    path.write_bytes(gzip.compress(header))
    with pytest.raises(ValueError, match="must hold at most 4294967296 bytes, got a header of"):
        load_image_data("fashion-mnist", data_dir=tmp_path)


def test_hub_name_that_cannot_be_reached(monkeypatch):
    def refuse(path, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ConnectionError, match=r"`dataset` must .* got 'some/name' \(no local path\): no route"):
        load_image_data("some/name")
