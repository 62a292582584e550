"""Layers that learn their number of channels from their first input, by torch's own mechanism."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _LazyNormBase

from evenorm.averages import Average
from evenorm.checks import OnNonfinite, OnSingle
from evenorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, Layer
from evenorm.renorm import Renorm
from evenorm.workers import Group


class _LazyLayer(Layer, _LazyNormBase):
    """What the three share: torch's lazy constructor and initialisation, and ours."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | nn.Module | None = None,
        average: Average | None = None,
        virtual_batch_size: int | None = None,
        renorm: Renorm | None = None,
        on_nonfinite: OnNonfinite = "skip",
        on_single: OnSingle = "raise",
        process_group: Group = None,
    ) -> None:
        """Store the options; `BatchNorm` says what they mean."""
        _LazyNormBase.__init__(self, eps, momentum, affine, track_running_stats, device, dtype)
        self._set_options(
            bias, activation, average, virtual_batch_size, renorm, on_nonfinite, on_single, process_group
        )

    def initialize_parameters(self, input: Tensor) -> None:
        """Make the parameters and buffers, the average's too."""
        loaded = not self.has_uninitialized_params()
        super().initialize_parameters(input)
        if not loaded:  # a checkpoint brings its own window
            self._make_window()


class LazyBatchNorm1d(_LazyLayer, nn.LazyBatchNorm1d):
    """`BatchNorm1d` that learns ``num_features`` from its first input.

    >>> import torch, evenorm
    >>> layer = evenorm.LazyBatchNorm1d()
    >>> layer(torch.randn(8, 3)).shape, layer.num_features
    (torch.Size([8, 3]), 3)
    """

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_LazyLayer, nn.LazyBatchNorm2d):
    """`BatchNorm2d` that learns ``num_features`` from its first input.

    >>> import torch, evenorm
    >>> layer = evenorm.LazyBatchNorm2d(activation="relu")
    >>> layer(torch.randn(8, 3, 4, 4)).shape, layer.num_features
    (torch.Size([8, 3, 4, 4]), 3)
    """

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_LazyLayer, nn.LazyBatchNorm3d):
    """`BatchNorm3d` that learns ``num_features`` from its first input.

    >>> import torch, evenorm
    >>> layer = evenorm.LazyBatchNorm3d()
    >>> layer(torch.randn(2, 3, 4, 4, 4)).shape, layer.num_features
    (torch.Size([2, 3, 4, 4, 4]), 3)
    """

    cls_to_become = BatchNorm3d
