"""Fingerprints of networks: two with the same one compute the same."""

import hashlib

import torch


def fingerprint_weights(network: torch.nn.Module) -> str:
    """16 hexadecimal digits that change with any weight or buffer of a network."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
