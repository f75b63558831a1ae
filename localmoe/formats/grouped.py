"""What the grouped integer formats share: rounding to a grid, and back. O = out_features, G = groups of a row."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest(weight: Tensor, scale: Tensor, group_size: int, lowest: int, highest: int) -> Tensor:
    """int8 [out, in]: weight / scale rounded half to even, held in [lowest, highest]; 0 where the scale is 0."""
    grid = scale.to(torch.float32).unsqueeze(-1)  # [O, G, 1]
    groups = weight.to(torch.float32).reshape(weight.shape[0], -1, group_size)  # [O, G, g]
    q = torch.where(grid == 0, 0.0, groups / torch.where(grid == 0, 1.0, grid))
    return q.round_().clamp_(lowest, highest).to(torch.int8).flatten(1)


def scaled(q: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """float32 [out, in]: q * scale."""
    groups = q.to(torch.float32).reshape(*scale.shape, group_size)  # [O, G, g]
    groups *= scale.to(torch.float32).unsqueeze(-1)
    return groups.flatten(1)
