"""Batch norms of others, where they are installed and take the input, called as torch's are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from evenorm.bench.rows import Block, Row


def installed(row: Row, block: Block, dtype: torch.dtype) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of each that can be compared.

    InPlace-ABN is none of them: it overwrites its input, which others would have to copy.
    """
    images = len(row.shape) == 4 and row.channels_last and dtype is torch.float16
    if images and block.activation in ((None, "relu") if not block.residual else ("relu",)):
        try:
            from apex.contrib.groupbn.batch_norm import BatchNorm2d_NHWC
        except ImportError:  # no apex, or one without this part
            return
        yield "apex", _Apex(BatchNorm2d_NHWC(row.shape[1], fuse_relu=block.activation == "relu"))


class _Apex(nn.Module):
    """apex's layer sees channels last as (N, H, W, C)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = self.layer(x.movedim(1, -1), None if residual is None else residual.movedim(1, -1))
        return y.movedim(-1, 1)
