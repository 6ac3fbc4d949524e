"""Random shifts of images while training. Shape suffixes: B rows, C channels, H rows and W columns of an image."""

# ruff: noqa: N806 -- the shape suffixes are capitals

import torch
from torch import Tensor
from torch.nn import functional


def shifted(x: Tensor) -> Tensor:
    """Each image of [B, H, W] or [B, C, H, W] moved by up to a tenth of its sides (a pixel at least), zeros moved in.

    Draws from torch's global random state of the tensor's device.
    """
    x_BCHW = x if x.dim() == 4 else x.unsqueeze(1)
    B, C, H, W = x_BCHW.shape
    down, right = max(1, H // 10), max(1, W // 10)
    padded = functional.pad(x_BCHW, (right, right, down, down))
    rows_BH = torch.randint(0, 2 * down + 1, (B, 1), device=x.device) + torch.arange(H, device=x.device)
    columns_BW = torch.randint(0, 2 * right + 1, (B, 1), device=x.device) + torch.arange(W, device=x.device)
    rows = torch.arange(B, device=x.device)[:, None, None, None]
    channels = torch.arange(C, device=x.device)[None, :, None, None]
    moved = padded[rows, channels, rows_BH[:, None, :, None], columns_BW[:, None, None, :]]
    return moved.reshape(x.shape)
