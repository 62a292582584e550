"""The layers: state and options around `functional`, no arithmetic.

Each subclasses the torch.nn class of the same name, so that parameters, buffers, state_dict keys, `_version`,
initialisation and error texts are torch's own, and tools that look for torch's classes find ours. What evenorm
adds is keyword-only, and every variant of batch norm is an option of the one layer.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.nn.modules.batchnorm import _BatchNorm

from evenorm import functional, updates, workers
from evenorm.averages import Average, Cumulative, Exponential, Window
from evenorm.checks import OnNonfinite, OnSingle, check, check_count, check_eps, check_options
from evenorm.engines import cpu
from evenorm.kept import Kept
from evenorm.moments import Moments, virtual_batches
from evenorm.renorm import Anchor, Renorm, keep, recall, remember
from evenorm.workers import Group

_FOR_SINGLE = "on_single='population' normalises such a batch by the running statistics"
_WITHOUT = "there are no running statistics to normalise such a batch by"
_CONVERT_SYNC = inspect.unwrap(nn.SyncBatchNorm.convert_sync_batchnorm).__code__


class Layer(Kept):
    """What all the layers share: evenorm's options, and the forward that follows them.

    The options' defaults stand on the class, so that a torch.nn layer which takes one of our classes, as
    `convert` and `freeze` make it do, has them without a constructor call.
    """

    _activation: str | None = None
    virtual_batch_size: int | None = None
    renorm: Renorm | None = None
    on_nonfinite: OnNonfinite = "skip"
    on_single: OnSingle = "raise"
    process_group: Group = None
    frozen: bool = False  # normalise by the running statistics and leave them alone, in training too
    name: str = ""  # the dotted name in a network, where a tool has walked it
    _average: Exponential | Window | None = None
    gathers: bool = False  # whether a `one_update` is under way
    step: Moments | None = None  # what it has gathered so far

    def __init__(
        self,
        num_features: int,
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
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._set_options(
            bias, activation, average, virtual_batch_size, renorm, on_nonfinite, on_single, process_group
        )

    def _set_options(
        self,
        bias: bool,
        activation: str | nn.Module | None,
        average: Average | None,
        virtual_batch_size: int | None,
        renorm: Renorm | None,
        on_nonfinite: OnNonfinite,
        on_single: OnSingle,
        process_group: Group,
    ) -> None:
        check_options(self, activation, average, virtual_batch_size, renorm, on_nonfinite, on_single, process_group)
        if not bias:  # not left to torch, whose older versions do not know the argument
            self.register_parameter("bias", None)
        self.activation, self.virtual_batch_size, self.renorm = activation, virtual_batch_size, renorm
        self.on_nonfinite, self.on_single, self.process_group = on_nonfinite, on_single, process_group
        if average is not None:
            self.average = average
        self.complete_()

    @property
    def activation(self) -> str | nn.Module | None:
        """What is applied in the same pass; may be set on a live layer."""
        # torch keeps a module among the children, where a default on the class would hide it.
        return self._modules.get("activation", self._activation)

    @activation.setter
    def activation(self, activation: str | nn.Module | None) -> None:
        assert not isinstance(activation, nn.Module)  # torch's __setattr__ keeps those
        self._activation = activation

    def __setattr__(self, name: str, value: Any) -> None:
        """Set as torch does, and let any activation take the place of a module, which torch keeps a child."""
        if name == "activation" and not isinstance(value, nn.Module):
            self._modules.pop(name, None)
        super().__setattr__(name, value)

    @property
    def average(self) -> Average:
        """How batches become running statistics; may be set on a live layer."""
        if self.momentum is None:
            return Cumulative()
        if isinstance(self._average, Exponential):
            return replace(self._average, momentum=self.momentum)
        return self._average or Exponential(self.momentum)

    @average.setter
    def average(self, average: Average) -> None:
        if not isinstance(average, (Exponential, Cumulative, Window)):
            raise TypeError(f"average must be Exponential, Cumulative or Window, got {average!r}")
        plain = isinstance(average, Cumulative) or (isinstance(average, Exponential) and not average.debias)
        self._average = None if plain else average  # type: ignore[assignment]  # never Cumulative, which is plain
        if not isinstance(average, Window):
            self.momentum = average.momentum if isinstance(average, Exponential) else None
        elif self.momentum is None:
            self.momentum = 0.1  # None would mean Cumulative
        self._make_window()

    def forward(self, input: Tensor, *, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Normalise, add the residual, activate; where the mask is False, give 0. See the class."""
        if type(input) is not Tensor and isinstance(input, fx.Proxy):
            return self._as_a_leaf(input, residual, mask)
        self._check_input_dim(input)
        mean, var, weight, bias = self._tensors()
        cure = _WITHOUT if mean is None else _FOR_SINGLE
        check(input, mean, var, weight, bias, residual, mask)
        if self._is_ordinary():
            among = None if self.process_group is None else workers.among(self.process_group, input)
            if among is None:
                check_count(input, mask=mask, cure=cure)
            update = self._update(mean, var)
            y = functional.train_step(input, weight, bias, residual, mask, self.eps, self.activation, update, among)
            if y is not None:
                return y
        by_batch = (self.training and not self.frozen) or (mean is None and var is None)
        check_eps(self.eps, by_batch)
        pools = by_batch and self.training and self.process_group is not None
        among = workers.among(self.process_group, input) if pools else None
        lonely = self.on_single == "population" and mean is not None
        if by_batch and lonely and among is None and not self.gathers and input.numel() == input.shape[1]:
            # One value has no variance; but with workers or in a `one_update` it may be one of several.
            by_batch = False
        if not by_batch:
            assert mean is not None
            assert var is not None  # `check` saw both
            return functional.infer(input, mean, var, weight, bias, residual, mask, self.eps, self.activation)
        if among is None:
            check_count(input, self.training, mask, lonely, cure=cure)
        size, again = self.virtual_batch_size, updates.recomputing()
        splits = None if size is None else virtual_batches(input.shape[0], size)
        anchor = self._anchor(mean, var, mask) if self.renorm or lonely else None
        tied_to = recall(self, anchor) if anchor is not None and again else anchor
        given = (input, weight, bias, residual, mask, splits, self.eps, self.activation)
        y, batch = functional.train(*given, tied_to, among)
        if anchor is not None and not again:
            remember(self, batch, anchor)
        if self.training and self.track_running_stats and not again and mean is not None and var is not None:
            self._commit_(mean, var, batch)
        return y

    def _as_a_leaf(self, input: fx.Proxy, residual: Any, mask: Any) -> Any:
        """Enter a symbolic trace as one call, as torch.nn's own layers do, which fx knows by their home."""
        given = {name: value for name, value in (("residual", residual), ("mask", mask)) if value is not None}
        tracer: Any = input.tracer  # a `fx.Tracer`, which knows modules
        path = tracer.path_of_module(self)
        if not path:
            raise TraceError(f"{type(self).__name__} is one call in a trace; trace a network that holds it")
        return tracer.create_proxy("call_module", path, (input,), given)

    def __prepare_scriptable__(self) -> None:
        """Tell torch.jit.script, which asks for this, that it cannot read us."""
        raise TypeError(
            "torch.jit.script cannot read evenorm's layers; use torch.jit.trace or torch.export, or script "
            "evenorm.revert(copy.deepcopy(model)), which holds torch.nn's"
        )

    def _tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Return running_mean, running_var, weight, bias, past nn.Module's look, which takes 0.6 us for each."""
        buffers, parameters = self._buffers, self._parameters
        if (
            "weight" in parameters
            and "bias" in parameters
            and "running_mean" in buffers
            and "running_var" in buffers
        ):
            return buffers["running_mean"], buffers["running_var"], parameters["weight"], parameters["bias"]
        return self.running_mean, self.running_var, self.weight, self.bias  # parametrized, pruned or sharded

    def _anchor(self, mean: Tensor | None, var: Tensor | None, mask: Tensor | None) -> Anchor | None:
        """Return what ties a batch to the running statistics, if an option asks for that."""
        batches = self.num_batches_tracked
        hidden = mask is not None or self.gathers or self.process_group is not None  # `forward` sees all others
        single = self.on_single == "population" and hidden
        if mean is None or var is None or batches is None or not (self.training and (self.renorm or single)):
            return None
        if torch.compiler.is_compiling():
            mean, var, batches = keep(mean), keep(var), keep(batches)
        limits = (self.renorm or Renorm(r_max=1.0, d_max=0.0)).limits(batches)
        return Anchor(mean, var, *limits, replaces_single=single)

    def _is_ordinary(self) -> bool:
        """Tell whether nothing stands between pool, apply and track, so that they can be one call."""
        apart = self.renorm is not None or self.virtual_batch_size is not None or isinstance(self._average, Window)
        asked = apart or self.gathers or self.on_nonfinite == "raise" or self.on_single == "population"
        by_batch = self.training and not self.frozen and self.eps > 0
        return by_batch and not asked and not torch.compiler.is_compiling()

    def _update(self, mean: Tensor | None, var: Tensor | None) -> cpu.Update:
        """Return how a batch enters the running statistics, as the CPU engine takes it."""
        if mean is None or var is None or not self.track_running_stats or updates.recomputing():
            return cpu.NO_UPDATE
        usual = self.momentum if self._average is None else None  # needs no object
        momentum, debias = updates.weight(self.average) if usual is None else (usual, False)
        batches, skips = self._buffers.get("num_batches_tracked"), self.on_nonfinite != "propagate"
        return mean, var, batches, momentum, debias, skips, self._counter_beside(mean)

    def _commit_(self, mean: Tensor, var: Tensor, batch: Moments) -> None:
        """Let the batch enter the running statistics, now or at the end of a `one_update`."""
        get, bad = self._buffers.get, self._counter_beside(mean)
        if self.on_nonfinite == "raise":
            name = self.name or f"{type(self).__name__}({self.num_features})"  # repr is nothing that compiles
            updates.require_finite(mean if bad is None else bad, batch.pooled(), name)
        if self.gathers:
            batch = batch.pooled()
            self.step = batch if self.step is None else self.step + batch
            return
        counter = get("num_batches_tracked")
        running = updates.Running(mean, var, counter, get("window_mean"), get("window_var"), bad)
        updates.commit_(running, batch, self.average, skip_nonfinite=self.on_nonfinite != "propagate")

    def _counter_beside(self, mean: Tensor) -> Tensor | None:
        """Return the count of non-finite batches; None where it is on "meta", and statistics were handed in."""
        counter = self._buffers.get("nonfinite_batches")
        return None if counter is None or (counter.is_meta and not mean.is_meta) else counter

    def finish_step_(self) -> None:
        """Commit what `one_update` gathered, as one batch."""
        self.gathers = False
        if self.step is not None and self.running_mean is not None and self.running_var is not None:
            self._commit_(self.running_mean, self.running_var, self.step)

    def extra_repr(self) -> str:
        """Return torch's line, and the options that differ from torch's behaviour."""
        ours = {
            "activation": self.activation if isinstance(self.activation, str) else None,
            "average": self.average if self._average is not None else None,
            "virtual_batch_size": self.virtual_batch_size,
            "renorm": self.renorm,
            "on_nonfinite": None if self.on_nonfinite == "skip" else self.on_nonfinite,
            "on_single": None if self.on_single == "raise" else self.on_single,
            "process_group": self.process_group,
            "frozen": self.frozen or None,
        }
        changed = [f"{name}={value}" for name, value in ours.items() if value is not None]
        return ", ".join([super().extra_repr(), *changed])

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Return what torch does, but not to a conversion that would drop our options without a word."""
        if sys._getframe(1).f_code is _CONVERT_SYNC:
            raise TypeError(
                "torch.nn.SyncBatchNorm has none of evenorm's options, so that this conversion would lose them; "
                "call evenorm.set_process_group(model, 'world') instead, which pools over the same workers"
            )
        return super().named_children()


class BatchNorm(Layer, _BatchNorm):
    r"""Batch normalisation of (N, C, *positions), for any number of positions.

    .. math:: y = \mathrm{activation}\!\left(\frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}}\,\gamma + \beta
              + \mathrm{residual}\right)

    In training μ and σ² are the batch's own mean and (biased) variance of each channel, and the running
    statistics move towards them (with the unbiased variance). In evaluation, μ and σ² are the running
    statistics. `BatchNorm1d`, `BatchNorm2d` and `BatchNorm3d` are this layer with torch's check of dimensions.

    Args:
        num_features: the number of channels C.
        eps: added to the variance; above 0.
        momentum: the weight of the NEW batch in the running statistics; None: all batches weigh the same.
        affine: learn weight (γ, starts at 1) and bias (β, starts at 0), both (C,).
        track_running_stats: keep running statistics; without them evaluation uses the batch's own too.
        device: where the parameters and buffers live.
        dtype: of the parameters and buffers; the input may be narrower.
        bias: learn β (with ``affine``).
        activation: relu, leaky_relu, silu, gelu, elu, hardswish, sigmoid, tanh, or a module; applied in the
            same pass.
        average: `Exponential`, `Cumulative` or `Window`: how batches become running statistics; None: what
            ``momentum`` says. `Exponential` brings its own momentum. Setting ``momentum`` to None on a live
            layer means `Cumulative`, whatever the average, as torch's tools expect.
        virtual_batch_size: normalise sub-batches apart: N samples are cut into ``N // virtual_batch_size`` runs
            (at least one) whose sizes differ by one at most, so that none is smaller than asked for. Running
            statistics still get the moments of the whole batch.
        renorm: `Renorm`: correct the batch towards the running statistics.
        on_nonfinite: what a batch with NaN or inf does to the running statistics: "skip" leaves those of the
            channel as they are and counts the batch in ``nonfinite_batches``; "raise" raises, and waits for the
            device to know; its error begins with ``layer.name``, if you or `freeze` or `set_process_group` set it;
            "propagate" takes the batch in, as torch does. The output shows the NaN in any case.
        on_single: training with one value per channel: "raise" as torch does, or "population": normalise by the
            running statistics and leave them alone. In `one_update` they count with the rest of the step.
        process_group: in training, pool over these workers: None, "world", or a torch ProcessGroup. All of them
            must run the layer equally often; a worker whose batch is empty takes part and changes nothing.

    Called with ``layer(x, residual=None, mask=None)``: the residual, of x's shape, is added before the
    activation; the mask, bool, True where a position is VALID, has shape (N,) for x (N, C), else
    (N, *positions).

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: shapes that do not fit, one value per channel in training, a mask that leaves no position in
            training (where that can be seen without waiting for a device), an unknown activation.

    Note:
        Statistics are computed in float32 or wider whatever the input's dtype, see `batch_norm`. Running
        statistics change only by a training forward that counts: not when activation checkpointing recomputes
        one, not from an empty batch, and never to NaN or inf.

    >>> import torch, evenorm
    >>> layer = evenorm.BatchNorm(3, activation="relu")
    >>> layer(torch.randn(8, 3, 4, 4)).shape
    torch.Size([8, 3, 4, 4])

    Source: Ioffe & Szegedy 2015, algorithms 1 and 2 (docs/math.md, eq. 1 to 11).
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions from two on; `checks.check` says so."""


class BatchNorm1d(Layer, nn.BatchNorm1d):
    """Batch normalisation of (N, C) or (N, C, L): `torch.nn.BatchNorm1d`, with the options of `BatchNorm`.

    >>> import torch, evenorm
    >>> evenorm.BatchNorm1d(3, activation="silu")(torch.randn(8, 3)).shape
    torch.Size([8, 3])
    """


class BatchNorm2d(Layer, nn.BatchNorm2d):
    """Batch normalisation of (N, C, H, W): `torch.nn.BatchNorm2d`, with the options of `BatchNorm`.

    >>> import torch, evenorm
    >>> x = torch.randn(8, 3, 4, 4)
    >>> evenorm.BatchNorm2d(3, activation="relu")(x, residual=x).shape
    torch.Size([8, 3, 4, 4])
    """


class BatchNorm3d(Layer, nn.BatchNorm3d):
    """Batch normalisation of (N, C, D, H, W): `torch.nn.BatchNorm3d`, with the options of `BatchNorm`.

    >>> import torch, evenorm
    >>> evenorm.BatchNorm3d(3)(torch.randn(2, 3, 4, 4, 4)).shape
    torch.Size([2, 3, 4, 4, 4])
    """
