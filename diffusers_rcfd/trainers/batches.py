"""Which images a step sees: endless shuffled batches that begin anywhere, shared among processes."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from diffusers_rcfd.data.image_tensors import to_model_range
from diffusers_rcfd.trainers.checkpoints import TrainerState
from diffusers_rcfd.trainers.config import TrainingConfig


def derived_seed(*numbers: int) -> int:
    """One seed from several numbers, well mixed, in 0..2^63 - 1."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class RandomBatches(Sampler):
    """Endless batches of image indices, shuffled anew each epoch, beginning at any batch.

    Batch i is a function of the arguments alone. Each process receives its share of a batch that is common to all.

    Args:
        num_images (`int`): images of the data set; the rest that does not fill a batch is left out of an epoch.
        batch_size (`int`): images for each process.
        seed (`int`): of the shuffling.
        first (`int`, defaults to 0): number of the first batch.
        process_index, num_processes (`int`, default to 0 and 1): whose share of each batch.
        together (`int`, defaults to 1): batches of an optimizer step, of which an epoch holds whole ones if it can.
    """

    def __init__(self, num_images, batch_size, seed, first=0, process_index=0, num_processes=1, together=1):
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.first = first
        self.process_index = process_index
        self.num_processes = num_processes
        self.together = together

    def __iter__(self):
        images = self.batch_size * self.num_processes  # of a batch that is common to all
        batches_per_epoch = self.num_images // images
        batches_per_epoch -= batches_per_epoch % self.together if batches_per_epoch >= self.together else 0
        epoch = None
        for number in itertools.count(self.first):
            if epoch != number // batches_per_epoch:
                epoch = number // batches_per_epoch
                generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
                order = torch.randperm(self.num_images, generator=generator)
            start = number % batches_per_epoch * images + self.process_index * self.batch_size
            yield order[start : start + self.batch_size].tolist()


def endless_batches(
    accelerator: Accelerator, dataset: Dataset | None, config: TrainingConfig, state: TrainerState
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of this process on its device, images in [-1, 1], from where the stage stands.

    Without a data set they are empty, for the random numbers of a step to fill.
    """
    if dataset is None:
        yield from itertools.repeat({})
    first = state.step * config.gradient_accumulation_steps
    loader_options = {
        "num_workers": config.dataloader_num_workers,
        "pin_memory": accelerator.device.type == "cuda",
        "collate_fn": getattr(dataset, "collate", None),
        "generator": torch.Generator(),  # of its own, or it would draw from that of the dropout
    }
    process, processes = accelerator.process_index, accelerator.num_processes
    if isinstance(dataset, IterableDataset):
        state.streams = state.streams or [[0, 0] for _ in range(processes)]
        stream = dataset.split_by_node(process, processes)
        batches = streamed_batches(stream, config.train_batch_size, first, state.streams[process], loader_options)
    else:
        seed = derived_seed(config.seed, state.stage)
        together = config.gradient_accumulation_steps
        order = RandomBatches(len(dataset), config.train_batch_size, seed, first, process, processes, together)
        batches = DataLoader(dataset, batch_sampler=order, **loader_options)
    for batch in batches:
        batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
        yield batch | {"images": to_model_range(batch["images"])}


def streamed_batches(
    stream: IterableDataset, batch_size: int, first: int, position: list[int], loader_options: dict
) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of a streaming data set, epoch after epoch; what a resumed epoch had read is read again.

    Args:
        stream (`StreamingImageData`): this process's part.
        batch_size (`int`): images in a batch.
        first (`int`): number of the first batch to give, counted from the beginning of the stage.
        position (`list[int]`): the epoch and the stage's batches before it; kept up to date.
        loader_options (`dict`): of `DataLoader`.

    Raises:
        ValueError: if an epoch does not fill one batch.
    """
    while True:
        epoch, before = position
        stream.set_epoch(epoch)
        loader = DataLoader(stream, batch_size=batch_size, drop_last=True, **loader_options)
        for batch in itertools.islice(loader, first - before, None):
            first += 1
            yield batch
        if first == before:
            raise ValueError(
                f"`train_batch_size` must be at most the images that the stream has for a process, got {batch_size}."
            )
        position[:] = epoch + 1, first
