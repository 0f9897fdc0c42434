"""Which images a step sees: endless shuffled batches that begin anywhere, shared among processes."""

import itertools

import numpy as np
import torch
from torch.utils.data import Sampler


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
    """

    def __init__(self, num_images, batch_size, seed, first=0, process_index=0, num_processes=1):
        self.num_images, self.batch_size, self.seed, self.first = num_images, batch_size, seed, first
        self.process_index, self.num_processes = process_index, num_processes

    def __iter__(self):
        together = self.batch_size * self.num_processes
        batches_per_epoch = self.num_images // together
        epoch = None
        for number in itertools.count(self.first):
            if epoch != number // batches_per_epoch:
                epoch = number // batches_per_epoch
                generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
                order = torch.randperm(self.num_images, generator=generator)
            start = number % batches_per_epoch * together + self.process_index * self.batch_size
            yield order[start : start + self.batch_size].tolist()
