"""Tests of diffusers_rcfd.data.datasets: whatever a user has as a data set."""

import pickle

import datasets
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset, random_split
from torchvision.transforms import Compose, Normalize, ToTensor

from diffusers_rcfd import load_image_data
from diffusers_rcfd.data.datasets import ImageItems, as_image_dataset
from diffusers_rcfd.data.image_data import ImageData

LEVELS = torch.tensor([0, 51, 102, 255], dtype=torch.uint8)
UINT8 = LEVELS.view(4, 1, 1, 1).expand(4, 1, 8, 8).contiguous()
FLOATS = UINT8.float() / 127.5 - 1
LABELS = torch.tensor([0, 1, 2, 1])
PIL_IMAGES = [Image.new("L", (8, 8), int(level)) for level in LEVELS]
TO_MODEL_RANGE = Compose([ToTensor(), Normalize(0.5, 0.5)])


class Items(Dataset):
    """A data set as research code writes it."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Batches(Items):
    """One that gives a batch at once, as a dictionary."""

    def __getitems__(self, indices):
        return {"images": UINT8[indices], "labels": LABELS[indices]}


def table():
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    return datasets.Dataset.from_dict({"image": PIL_IMAGES, "label": LABELS.tolist()}, features=features)


def transform(rows):
    return {"pixel_values": [TO_MODEL_RANGE(image) for image in rows["image"]], "label": rows["label"]}


def arrays():
    features = {"img": datasets.Array3D((1, 8, 8), "uint8"), "label": datasets.Value("int64")}
    columns = {"img": UINT8.numpy(), "label": LABELS.tolist()}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.fixture
def folder(tmp_path):
    for number, (image, label) in enumerate(zip(PIL_IMAGES, LABELS.tolist(), strict=True)):
        (tmp_path / str(label)).mkdir(exist_ok=True)
        image.convert("RGB").save(tmp_path / str(label) / f"{number}.png")
    return str(tmp_path)


PAIRS = list(zip(UINT8, LABELS.tolist(), strict=True))
DATASETS = {
    "ImageData": lambda: ImageData(UINT8, LABELS, num_classes=3),
    "subset": lambda: Subset(ImageData(UINT8.flip(0), LABELS.flip(0), num_classes=3), [3, 2, 1, 0]),
    "subset of a subset": lambda: Subset(Subset(Items(PAIRS * 2), range(2, 8)), [2, 3, 4, 5]),
    "concatenated": lambda: ConcatDataset([ImageData(UINT8[:2], LABELS[:2], num_classes=3), Items(PAIRS[2:])]),
    "table": table,
    **{
        f"table, {kind}": lambda kind=kind: table().with_format(kind) for kind in ("torch", "numpy", "arrow", "pandas")
    },
    "table with a transform": lambda: table().with_transform(transform),
    "subset of a table": lambda: Subset(table().with_transform(transform), [0, 1, 2, 3]),
    "table of arrays": arrays,
    "uint8 tensors": lambda: TensorDataset(UINT8, LABELS),
    "integer tensors": lambda: TensorDataset(UINT8.long(), LABELS),
    **{
        f"{kind} tensors": lambda kind=kind: TensorDataset(FLOATS.to(kind), LABELS)
        for kind in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    },
    "pairs with PIL images": lambda: Items(list(zip(PIL_IMAGES, LABELS.tolist(), strict=True))),
    "dictionaries": lambda: Items([{"image": image, "label": np.int64(label)} for image, label in PAIRS]),
    "grey arrays": lambda: Items([(image[0].numpy(), label) for image, label in PAIRS]),
    "batches": lambda: Batches(PAIRS),
    "a list": lambda: PAIRS,
}


@pytest.mark.parametrize("name", DATASETS)
def test_every_map_style_data_set_gives_the_same_batches(name):
    data = as_image_dataset(DATASETS[name]())
    assert len(data) == 4 and data.image_shape == (1, 8, 8) and data.num_classes == 3
    (batch,) = DataLoader(data, batch_size=4, collate_fn=data.collate)
    assert batch["images"].dtype in (torch.uint8, torch.float32) and batch["labels"].dtype == torch.int64
    images = batch["images"]
    images = images if images.dtype == torch.uint8 else ((images + 1) * 127.5).round().to(torch.uint8)
    assert (images.int() - UINT8.int()).abs().max() <= (1 if "bfloat16" in name else 0)
    assert batch["labels"].equal(LABELS)
    assert data[-1]["images"].shape == (1, 8, 8) and data[-1]["labels"] == 1
    with pytest.raises(IndexError):
        data[4]


@pytest.mark.parametrize("name", DATASETS)
def test_interface_of_image_data(name):
    data = as_image_dataset(DATASETS[name]())
    again = as_image_dataset(DATASETS[name]())
    assert data.fingerprint == again.fingerprint != data.subset([0, 1, 2]).fingerprint
    assert len(data.fingerprint) == 16 and isinstance(data.name, str)
    rest, held_out = data.split(0.25, seed=3)
    expected_rest, expected_held_out = ImageData(UINT8, LABELS, num_classes=3).split(0.25, seed=3)
    for part, expected in ((rest, expected_rest), (held_out, expected_held_out)):
        assert part.__getitems__(range(len(part)))["labels"].equal(expected.labels)
        assert part.num_classes == 3 and part.class_names == data.class_names and part.name == data.name


def test_image_data_passes_untouched():
    digits = load_image_data(max_images=20)
    stream = load_image_data(streaming=True, max_images=20)
    items = as_image_dataset(TensorDataset(FLOATS))
    for data in (digits, stream, items):
        assert as_image_dataset(data) is data


def test_random_split_of_the_digits_knows_its_classes():
    part, _ = random_split(load_image_data(max_images=64), [32, 32])
    data = as_image_dataset(part)
    assert isinstance(data, ImageData) and len(data) == 32 and data.num_classes == 10
    assert data.class_names == [str(digit) for digit in range(10)]
    assert data.images.equal(part.dataset.images[part.indices])


def test_torchvision_data_sets(folder):
    data = as_image_dataset(torchvision.datasets.ImageFolder(folder))
    assert data.image_shape == (3, 8, 8) and data.class_names == ["0", "1", "2"] and data.name == "ImageFolder"
    batch = data.__getitems__([0, 1, 2, 3])
    assert batch["images"].dtype == torch.uint8 and batch["labels"].tolist() == [0, 1, 1, 2]
    data = as_image_dataset(torchvision.datasets.ImageFolder(folder, TO_MODEL_RANGE))
    assert data.__getitems__([0])["images"].unique().tolist() == [-1.0]
    with pytest.raises(ValueError, match=r"`train_dataset` must hold .* \[-1, 1\], got 0..1 .*map it by 2 \* x - 1"):
        as_image_dataset(torchvision.datasets.ImageFolder(folder, ToTensor()))


def test_grey_among_colour_and_images_without_labels():
    colour = torch.zeros(3, 8, 8, dtype=torch.uint8)
    data = as_image_dataset([colour, UINT8[3]])
    assert data.num_classes is None and not data.has_labels
    batch = data.__getitems__([0, 1])
    assert set(batch) == {"images"} and batch["images"][1].equal(UINT8[3].expand(3, 8, 8))
    rows = np.zeros((8, 6, 3), np.uint8)
    assert as_image_dataset([rows]).image_shape == (3, 8, 6)


def test_columns_that_a_format_hides_are_not_read():
    data = as_image_dataset(table().with_format("torch", columns=["image"]))
    assert data.labels is None and data.num_classes is None


def test_workers_read_it():
    data = pickle.loads(pickle.dumps(as_image_dataset(Items(PAIRS))))
    loader = DataLoader(data, batch_size=2, collate_fn=data.collate, num_workers=1)
    assert torch.cat([batch["labels"] for batch in loader]).equal(LABELS)


def test_fingerprint_leaves_out_what_is_random():
    class Noisy(Items):
        def __getitem__(self, index):
            return torch.rand(1, 8, 8) - 0.5, index

    assert as_image_dataset(Noisy(PAIRS)).fingerprint == as_image_dataset(Noisy(PAIRS)).fingerprint
    changed = UINT8.clone()
    changed[2, 0, 3, 3] += 1
    prints = [as_image_dataset(Items(list(images))).fingerprint for images in (UINT8, changed)]
    assert prints[0] != prints[1]


class Stream(IterableDataset):
    def __iter__(self):
        yield {"images": UINT8[0]}


MAP_STYLE = r"`train_dataset` must be a map-style data set .* of images, .*, got "


@pytest.mark.parametrize(
    "dataset, message",
    [
        ("digits", MAP_STYLE + r"str 'digits': load it with `load_image_data\('digits'\)`"),
        ({"train": UINT8}, MAP_STYLE + "dict with train: give one of them"),
        (
            datasets.DatasetDict({"train": table(), "test": table()}),
            MAP_STYLE + ".*DatasetDict with train, test: give",
        ),
        (DataLoader(PAIRS), MAP_STYLE + ".*DataLoader: give its `dataset`"),
        (iter(PAIRS), MAP_STYLE + "list_iterator"),
        (3, MAP_STYLE + "int"),
        (Stream(), "`train_dataset` must be map-style or come from .*streaming=True.*, got .*Stream"),
        (["a.png"], r"`train_dataset\[0\]` must be a PIL image, an array or a tensor, got str"),
        ([{"text": "a"}], r"`train_dataset\[0\]` must have an image under one of .*, got the keys \['text'\]"),
        ([()], r"`train_dataset\[0\]` must be an image or a pair"),
        ([UINT8], r"`train_dataset\[0\]` must have the shape \(C, H, W\), got \(4, 1, 8, 8\)"),
        ([UINT8[0].long() + 256], r"`train_dataset\[0\]` must be integers in 0..255 or floating in \[-1, 1\]"),
        ([UINT8[0] > 9], r"`train_dataset\[0\]` must be integers in 0..255 .*got torch.bool"),
        ([(UINT8[0], "cat")], r"`train_dataset\[0\]` must have an integer from 0 as its label, got 'cat'"),
        ([(UINT8[0], -1)], r"`train_dataset\[0\]` must have an integer from 0 as its label, got -1"),
        ([(UINT8[0], LABELS)], r"`train_dataset\[0\]` must have .* label, got a tensor \(4,\)"),
        (TensorDataset(UINT8, FLOATS[:, 0, 0, 0]), "`train_dataset` must have integers from 0, .*got torch.float32"),
    ],
)
def test_what_cannot_work_is_a_type_error(dataset, message):
    with pytest.raises(TypeError, match=message):
        as_image_dataset(dataset)


@pytest.mark.parametrize(
    "images, words",
    [
        (UINT8.float(), "0..255 in images, which looks like 0..255: give uint8 images, or map it by x / 127.5 - 1"),
        (UINT8.float() / 255, r"0..1 in images, which looks like 0..1: map it by 2 \* x - 1"),
        (FLOATS * 2.5, "-2.5..2.5 in images, which looks like images normalized to mean 0"),
        (FLOATS * 100, "-100..100 in images"),
        (FLOATS * float("nan"), "nan..nan in images"),
    ],
)
@pytest.mark.parametrize("kind", [torch.float16, torch.float32, torch.float64])
def test_images_in_another_range_are_refused(images, words, kind):
    with pytest.raises(ValueError, match=rf"^`reference` must hold floating images in \[-1, 1\], got {words}.*\.$"):
        as_image_dataset(TensorDataset(images.to(kind)), "reference")


def test_rounding_is_not_out_of_range():
    for images in (FLOATS * 1.008, FLOATS * 0, FLOATS[:1] * 0.5, FLOATS[3:]):
        as_image_dataset(TensorDataset(images))


def test_faults_further_on_are_found_in_their_batch():
    items = [(FLOATS[0], 0)] * 100
    items[50] = (FLOATS[0] * 2, 0)
    with pytest.raises(ValueError, match=r"got -2..-1 in images \[49, 50\]"):
        as_image_dataset(items).__getitems__([49, 50])
    items[50] = (FLOATS[0, :, :4], 0)
    with pytest.raises(ValueError, match=r"must hold images of one shape, got \(1, 4, 8\) at 50 and \(1, 8, 8\) at 0"):
        as_image_dataset(Items(items)).__getitems__([49, 50])
    items[50] = FLOATS[0]
    with pytest.raises(ValueError, match="must hold a label for each image or for none, got none at 50"):
        as_image_dataset(items).__getitems__([49, 50])
    items = Items([(UINT8[0], 0)] * 99 + [(UINT8[0], 7)])
    items.classes = ["a", "b"]
    with pytest.raises(ValueError, match=r"must hold labels in 0..1, as it has 2 classes, got 7"):
        as_image_dataset(items).__getitems__([98, 99])
    with pytest.raises(ValueError, match="`train_dataset` must hold at least one image, got none"):
        as_image_dataset([])


def test_data_sets_that_trainers_share_already():
    """What has the interface of `ImageData`, or of its streams, is left alone."""

    class Own(Batches):
        image_shape, name, fingerprint = (1, 8, 8), "own", "0"

    class OwnStream(Stream):
        def split_by_node(self, rank, world_size):
            return self

        def set_epoch(self, epoch):
            pass

    for data in (Own(PAIRS), OwnStream()):
        assert as_image_dataset(data) is data
    assert isinstance(as_image_dataset(Batches(PAIRS)), ImageItems)
