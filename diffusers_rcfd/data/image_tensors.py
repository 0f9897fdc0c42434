"""Batches of images as tensors: ranges and augmentations. Pure functions, whose draws are arguments."""

import torch


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """Map uint8 images 0..255 to float32 in [-1, 1] by u / 127.5 - 1; floating images become float32 as they are."""
    if images.is_floating_point():
        return images.float()
    if images.dtype != torch.uint8:
        raise TypeError(f"`images` must be torch.uint8 or of a floating type, got {images.dtype}.")
    return images.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Map floating images in [-1, 1] to uint8 0..255, rounded and clamped: the exact inverse of `to_model_range`."""
    if not images.is_floating_point():
        raise TypeError(f"`images` must be of a floating type, with values in [-1, 1], got {images.dtype}.")
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def flip(images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mirror left to right those images (B, C, H, W) whose entry in the boolean `mask` (B,) is true."""
    if mask.dtype != torch.bool or mask.shape != images.shape[:1]:
        got = f"{mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"`mask` must be torch.bool ({images.shape[0]},), got {got}.")
    return torch.where(mask[:, None, None, None], images.flip(-1), images)


def shift_crop(images: torch.Tensor, offsets: torch.Tensor, padding: int, reflect: bool = False) -> torch.Tensor:
    """Pad each image by `padding` on all sides and crop its own size again at its own offset.

    Args:
        images: (B, C, H, W), uint8 or floating in [-1, 1].
        offsets: (B, 2) integers (y, x) in 0..2 * padding; `padding` itself leaves the image where it was.
        padding: pixels on each side, at least 0; below min(H, W) with `reflect`.
        reflect: mirror the image at its border; by default the padding is black (0 in uint8, -1 in floats).

    Raises:
        ValueError: shape, type or range of an argument is not as above (the range is not checked on an accelerator).
    """
    batch, _, height, width = images.shape
    if padding < 0 or (reflect and padding >= min(height, width)):
        allowed = f"at least 0, and below {min(height, width)} with reflect=True"
        raise ValueError(f"`padding` must be {allowed}, got {padding}.")
    if offsets.shape != (batch, 2) or offsets.is_floating_point():
        got = f"{offsets.dtype} {tuple(offsets.shape)}"
        raise ValueError(f"`offsets` must be integers of shape ({batch}, 2), got {got}.")
    if offsets.device.type == "cpu" and batch and not 0 <= offsets.min() <= offsets.max() <= 2 * padding:
        got = f"{offsets.min()}..{offsets.max()}"
        raise ValueError(f"`offsets` must be in 0..{2 * padding}, twice the padding, got {got}.")
    offsets = offsets.to(images.device, torch.long) - padding
    rows = torch.arange(height, device=images.device) + offsets[:, :1]  # (B, H)
    columns = torch.arange(width, device=images.device) + offsets[:, 1:]  # (B, W)
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None]
    if reflect:
        rows = height - 1 - (height - 1 - rows.abs()).abs()
        columns = width - 1 - (width - 1 - columns.abs()).abs()
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    index = torch.arange(batch, device=images.device)[:, None, None]
    cropped = images.movedim(1, -1)[index, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)  # (B, C, H, W)
    black = -1 if images.is_floating_point() else 0
    return cropped.contiguous() if reflect else cropped.masked_fill(~inside, black)
