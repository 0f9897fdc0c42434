"""SFD-v: several step counts in one network, told apart by the class embeddings of a plain `UNet2DModel`."""

import torch
from diffusers import UNet2DModel


def for_counts(unet: UNet2DModel, counts: int) -> UNet2DModel:
    """The network with class embeddings for several step counts, each without effect: zero, or those of its classes.

    `UNet2DModel` adds class embeddings to the time embedding, and a table of step count and class together is what a
    plain one can hold.
    """
    table = torch.zeros_like(unet.time_embedding.linear_2.bias)[None]
    if unet.class_embedding is not None:
        table = unet.class_embedding.weight.detach()
    return _with_embedding(unet, table.repeat(counts, 1))


def for_one_count(unet: UNet2DModel, row: int, counts: int) -> UNet2DModel:
    """The network of one of several step counts: its rows of the table, a single row in the time embedding."""
    if counts < 2:
        return unet
    table = unet.class_embedding.weight.detach().chunk(counts)[row]
    if len(table) > 1:
        return _with_embedding(unet, table)
    unet.time_embedding.linear_2.bias += table[0]
    return _with_embedding(unet, None)


def _with_embedding(unet: UNet2DModel, table: torch.Tensor | None) -> UNet2DModel:
    """A copy of the network with another table of class embeddings, or none."""
    config = dict(unet.config) | {"num_class_embeds": None if table is None else len(table)}
    config.pop("_use_default_values", None)  # which would put the argument back to its default
    weights = {} if table is None else {"class_embedding.weight": table.clone()}
    for name, value in unet.state_dict().items():
        if not name.startswith("class_embedding"):
            weights[name] = value.clone()
    copied = type(unet).from_config(config)
    copied.load_state_dict(weights, assign=True)  # with their device and type
    return copied
