"""Look at what stands around batch norm: activations that lose channels behind it, dropout in front of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from evenorm import functional
from evenorm.models.gather import ARGUMENTS, RENAMED

SATURATED = 4.0  # beyond, the slope of a sigmoid or tanh is below a fiftieth, or a thousandth
MOSTLY = 0.95  # of a channel's values

RELU = (nn.functional.relu, nn.functional.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
SIGMOID = (nn.functional.sigmoid, torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_)
TANH = (nn.functional.tanh, torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_)
ACTIVATIONS: dict[Callable[..., Any], str] = {
    **dict.fromkeys(RELU, "relu"),
    **dict.fromkeys(SIGMOID, "sigmoid"),
    **dict.fromkeys(TANH, "tanh"),
}
DROPOUTS = (
    *(nn.functional.dropout, nn.functional.dropout1d, nn.functional.dropout2d, nn.functional.dropout3d),
    *(nn.functional.alpha_dropout, nn.functional.feature_alpha_dropout, torch.dropout, torch.feature_dropout),
)


class Around(TorchFunctionMode):
    """While entered, find each layer's activation by the very tensor it is given, and count what it loses.

    And remember the dropout, a module's or a function's, that was called last before a layer and behind the one
    before it.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        """Take the layers by name."""
        super().__init__()
        self.names = {id(layer.running_mean): name for name, layer in layers.items()}
        self.latest: tuple[Tensor, str] | None = None
        self.counts: dict[str, tuple[str, Tensor, int]] = {}  # activation, values lost (C,), values a channel
        self.dropping = 0.0  # the p of the last dropout that no batch norm has come behind yet
        self.dropped: dict[str, float] = {}  # by layer, the p of the dropout in front of it
        self.closed = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let every call pass, and look at batch norm's and at activations'."""
        given = kwargs or {}
        if self.closed:
            return func(*args, **given)
        if func in ACTIVATIONS and self.latest is not None and args and args[0] is self.latest[0]:
            self._count(self.latest[1], ACTIVATIONS[func], self.latest[0], 0.0)  # before it is overwritten
        result = func(*args, **given)
        if func in DROPOUTS:
            p = args[1] if len(args) > 1 else given.get("p", 0.5)
            self.dropping = p if isinstance(p, float) else 0.0
        if func in ARGUMENTS:
            named = dict(zip(ARGUMENTS[func], args, strict=False)) | given
            standard = {RENAMED.get(key, key): value for key, value in named.items()}
            name = self.names.get(id(standard.get("running_mean")))
            if name is not None and isinstance(result, Tensor) and result.dim() >= 2:
                self.latest = result, name
                if self.dropping:
                    self.dropped[name] = self.dropping
                self.dropping = 0.0
                fused = standard.get("activation") if func is functional.infer else None
                if fused == "relu":
                    self._count(name, "relu", result, 0.0)
        return result

    def lost(self) -> dict[str, tuple[str, int, int]]:
        """Return by layer: the activation, how many channels it loses, of how many."""
        least = {"relu": 1.0, "sigmoid": MOSTLY, "tanh": MOSTLY}
        return {
            name: (kind, int((lost >= least[kind] * values).sum()), lost.numel())
            for name, (kind, lost, values) in self.counts.items()
        }

    def _count(self, name: str, kind: str, y: Tensor, bound: float) -> None:
        lost = y <= bound if kind == "relu" else y.abs() > (SATURATED if kind == "sigmoid" else SATURATED / 2)
        sums = lost.sum([dim for dim in range(y.dim()) if dim != 1])
        _, before, values = self.counts.get(name, (kind, torch.zeros_like(sums), 0))
        self.counts[name] = (kind, before + sums, values + y.numel() // y.shape[1])
