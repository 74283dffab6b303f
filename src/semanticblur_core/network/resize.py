"""Bilinear resizing as matrix products.

Bilinear interpolation is linear and separable: ``Y = A X B^T`` with two taps in each row of A and
B. As dense products of small matrices it runs at the speed of a matrix multiplication, in bfloat16
too, and several sources can be resized *and summed* in one product. Same convention as
``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)``.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def resize_matrix(n_in: int, n_out: int, device: torch.device | None = None) -> Tensor:
    """Weights ``(n_out, n_in)`` float32 that resize an axis; rows sum to one."""
    if torch.compiler.is_compiling() or _is_recorded(device):  # sizes may be symbols
        return _make_matrix(n_in, n_out, device)
    return _cached_matrix(n_in, n_out, device)


def _is_recorded(device: torch.device | None) -> bool:
    """Whether a graph is recorded, which would go on reading what the cache has dropped."""
    on_gpu = device is not None and device.type == "cuda"
    return on_gpu and torch.cuda.is_current_stream_capturing()


@lru_cache(maxsize=64)
def _cached_matrix(n_in: int, n_out: int, device: torch.device | None) -> Tensor:
    # A cached tensor must also serve training, whichever mode it was first asked for in.
    with torch.inference_mode(False):
        return _make_matrix(n_in, n_out, device)


def _make_matrix(n_in: int, n_out: int, device: torch.device | None) -> Tensor:
    # A graph of a GPU's work must not copy from the processor; not every device knows float64.
    where = device if device is not None and device.type == "cuda" else None
    position = torch.arange(n_out, dtype=torch.float64, device=where) + 0.5
    position = (position * (n_in / n_out) - 0.5).clamp(0, n_in - 1)
    taps = torch.arange(n_in, dtype=torch.float64, device=where)
    weights = (1 - (position[:, None] - taps[None, :]).abs()).clamp(min=0)
    return weights.to(device=device, dtype=torch.float32)


def resize_columns(x: Tensor, width: int) -> Tensor:
    """Resize ``(N, H, W, C)`` to ``(N, H, width, C)``."""
    if x.shape[2] == width:
        return x
    matrix = resize_matrix(x.shape[2], width, x.device).to(x.dtype)
    return torch.matmul(matrix, x)


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """Resize ``(N, H, W, C)`` to ``(N, height, width, C)``."""
    x = resize_columns(x, width)
    n, h, _, c = x.shape
    if h == height:
        return x
    matrix = resize_matrix(h, height, x.device).to(x.dtype)
    return torch.matmul(matrix, x.reshape(n, h, width * c)).view(n, height, width, c)
