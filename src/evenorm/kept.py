"""What a layer keeps: buffers that torch's has not, and how all of it is reset, moved, copied and loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedBuffer

from evenorm import workers
from evenorm.averages import Exponential, Window
from evenorm.workers import Group

COUNTERS = ("num_batches_tracked", "nonfinite_batches")
STATISTICS = ("running_mean", "running_var", "window_mean", "window_var")


class Kept(_NormBase):
    """The state of a layer, without what it computes."""

    process_group: Group
    running_mean: Tensor | None
    running_var: Tensor | None
    _average: Exponential | Window | None

    def complete_(self) -> None:
        """Add what a torch.nn layer does not have: wide statistics, and a counter that no checkpoint holds."""
        self._widen_statistics(dict(self._buffers))
        mean = self._buffers.get("running_mean")
        if mean is not None and "nonfinite_batches" not in self._buffers:  # in a `no_update` too
            self._make_counter(mean.device)

    def _make_counter(self, device: torch.device) -> None:
        counter = torch.zeros((), dtype=torch.long, device=device)
        self.register_buffer("nonfinite_batches", counter, persistent=False)

    def _make_window(self) -> None:
        """Keep the buffers that a window needs, filled with what the layer knows, and no others."""
        for name in ("mean", "var"):
            self._buffers.pop(f"window_{name}", None)
            known = self._buffers.get(f"running_{name}")
            if isinstance(self._average, Window) and not isinstance(known, UninitializedBuffer | None):
                self.register_buffer(f"window_{name}", known.detach().expand(self._average.size, -1).clone())

    def reset_running_stats(self) -> None:
        """Reset the running statistics to 0 and 1, as torch does, and the count of non-finite batches."""
        super().reset_running_stats()
        counter = self._buffers.get("nonfinite_batches")
        if counter is not None:
            counter.zero_()

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles are made of: not what a `one_update` gathers, which ends without them.

        See `workers.Held` for the process group.
        """
        state = {name: value for name, value in vars(self).items() if name not in ("gathers", "step")}
        group = state.get("process_group")
        return state | ({"process_group": workers.Held(group)} if isinstance(group, ProcessGroup) else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a copy or a pickle, as torch does."""
        held = state.get("process_group")
        super().__setstate__(state | ({"process_group": held.group} if isinstance(held, workers.Held) else {}))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Kept:
        """Move or cast as torch does, but leave statistics in float32 where the cast would narrow them."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        self._widen_statistics(before)
        return self

    def _widen_statistics(self, source: dict[str, Tensor | None]) -> None:
        for name, buffer in self._buffers.items():
            if name in COUNTERS:  # a mean of several layers' counts, say, or a cast of everything
                wide = torch.long
            elif name in STATISTICS and buffer is not None and buffer.itemsize < 4:
                wide = torch.float32
            else:
                continue
            known = source[name]
            if buffer is not None and known is not None and buffer.dtype != wide:
                self._buffers[name] = known.to(device=buffer.device, dtype=wide)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load as torch does; a checkpoint without a window fills ours with its running statistics.

        The count of non-finite batches, which no checkpoint holds, starts again, where the statistics now are: it
        may have been on "meta", of inference mode, or memory that `to_empty` gave.
        """
        if isinstance(self._average, Window):
            for name in ("mean", "var"):
                known, ours = state_dict.get(f"{prefix}running_{name}"), self._buffers.get(f"running_{name}")
                if known is None or ours is None:
                    continue
                window = known.expand(self._average.size, -1).clone()
                window = state_dict.setdefault(f"{prefix}window_{name}", window)
                if isinstance(ours, UninitializedBuffer):  # torch makes its own buffers as it loads them
                    self.register_buffer(f"window_{name}", torch.empty_like(window, device=ours.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._widen_statistics(dict(self._buffers))
        mean, counter = self._buffers.get("running_mean"), self._buffers.get("nonfinite_batches")
        if isinstance(mean, UninitializedBuffer):  # nothing has been counted, and it has nothing to compare with
            return
        if mean is not None and counter is not None and f"{prefix}running_mean" in state_dict:
            if counter.device == mean.device and counter.is_inference() == mean.is_inference():
                counter.zero_()
            else:
                self._make_counter(mean.device)
