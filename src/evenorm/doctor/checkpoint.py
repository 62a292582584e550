"""Checks that need nothing but a layer's tensors: each a function from a record to what it finds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from evenorm.doctor.findings import Finding, Severity, counted
from evenorm.doctor.records import Record

Check = Callable[[Record], Iterator[Finding]]

STALE = 0.05  # the share of the initial 0 and 1 from which on running statistics are not yet the data's
ORDERS = 8  # decades between the extreme variances, or weights, of a layer that no healthy network shows
CALIBRATE = "evenorm.calibrate(model, data)"


def not_finite(record: Record) -> Iterator[Finding]:
    """NaN or inf in a buffer or parameter: the outputs of the channel are lost."""
    for name, tensor in record.tensors.items():
        bad = int((~torch.isfinite(tensor.float())).sum())
        if bad:
            running = name.startswith("running")
            yield Finding(
                "not-finite",
                Severity.ERROR,
                record.name,
                {"tensor": name, "channels": bad, "of": tensor.numel()},
                f"{name} holds NaN or inf in {bad} of {counted(tensor.numel(), 'channel')}: "
                + ("a batch with NaN or inf entered it, and it never recovers" if running else "training diverged"),
                f"{CALIBRATE}; train with evenorm.convert(model), whose layers skip such batches"
                if running
                else "go back to a checkpoint from before it diverged",
            )


def variance_not_positive(record: Record) -> Iterator[Finding]:
    """A negative variance is impossible; a variance of zero is a constant channel."""
    if record.var is None:
        return
    var = record.var.float()
    negative, zero = int((var < 0).sum()), int((var == 0).sum())
    if negative:
        yield Finding(
            "negative-variance",
            Severity.ERROR,
            record.name,
            {"channels": negative, "smallest": float(var.min())},
            f"running_var is negative in {counted(negative, 'channel')}, which no data can produce: it was "
            "averaged or edited wrongly",
            f"{CALIBRATE}; average networks with evenorm.merge_statistics",
        )
    elif zero:
        yield Finding(
            "zero-variance",
            Severity.WARNING,
            record.name,
            {"channels": zero, "of": record.var.numel()},
            f"nothing varies in {counted(zero, 'channel')}: what comes out there is the layer's bias alone",
            "look at what comes before the layer: a dead ReLU, a constant input; or prune these channels",
        )


def never_updated(record: Record) -> Iterator[Finding]:
    """Statistics that are still the 0 and 1 they began with."""
    if record.mean is None or record.var is None or record.mean.numel() == 0:
        return
    untouched = bool((record.mean == 0).all() and (record.var == 1).all())
    if untouched or record.batches == 0:
        yield Finding(
            "never-updated",
            Severity.ERROR if untouched else Severity.WARNING,
            record.name,
            {"updates": record.batches if record.batches is not None else "unknown"},
            _why_untouched(record)
            if untouched
            else "num_batches_tracked is 0 although the running statistics have moved: they came from elsewhere",
            CALIBRATE,
        )


def _why_untouched(record: Record) -> str:
    began = "the running statistics are still the 0 and 1 they began with"
    if record.batches:
        return f"{began} after {counted(record.batches, 'update')}: their momentum was 0"
    return f"{began}: the layer never ran in train() mode, or a copy of it without its buffers was saved"


def too_few_updates(record: Record) -> Iterator[Finding]:
    """An exponential average that still holds much of its initial value."""
    left = initial_share(record)
    if left >= STALE and not refuted(record):
        known = f"momentum {record.momentum:g}" if record.live is not None else "torch's default momentum of 0.1"
        yield Finding(
            "stale-statistics",
            Severity.ERROR if left >= 0.2 else Severity.WARNING,
            record.name,
            {
                "momentum": record.momentum or 0.0,
                "updates": record.batches or 0,
                "initial value left in %": round(100 * left, 1),
            },
            f"after {counted(record.batches or 0, 'update')} with {known}, {100 * left:.0f} % of the running "
            "statistics are still the 0 and 1 they began with, if nothing has calibrated them since",
            f"{CALIBRATE}; or train with average=evenorm.Exponential({record.momentum:g}, debias=True)",
        )


def initial_share(record: Record) -> float:
    """Return how much of the running statistics is their initial value, by the count of updates; 0 if unknown."""
    if not record.batches or record.batches < 0 or record.momentum is None or not 0 < record.momentum < 1:
        return 0.0
    return 0.0 if record.debiased else float((1 - record.momentum) ** record.batches)


def refuted(record: Record) -> bool:
    """Tell whether statistics cannot hold so much of the initial value: no variance is below what is left of 1."""
    left = initial_share(record)
    return left >= STALE and record.var is not None and bool((record.var.float() < 0.99 * left).any())


def dead_channels(record: Record) -> Iterator[Finding]:
    """A weight of nearly zero: the channel is its bias, whatever comes in."""
    if record.weight is None or record.weight.numel() == 0:
        return
    size = record.weight.detach().float().abs()
    dead = int((size < 1e-4 * size.max().clamp(min=1e-30)).sum()) if bool(torch.isfinite(size).all()) else 0
    if dead:
        share = dead / record.weight.numel()
        yield Finding(
            "dead-channels",
            Severity.WARNING if share > 0.5 else Severity.NOTE,
            record.name,
            {"channels": dead, "of": record.weight.numel()},
            f"the weight of {dead} of {counted(record.weight.numel(), 'channel')} is nearly 0: what comes out "
            "there is the bias alone",
            "prune them; or take weight and bias of batch norm out of weight decay",
        )


def eps_dominates(record: Record) -> Iterator[Finding]:
    """A variance below eps: the layer does not bring the channel to unit variance."""
    if record.var is None or record.var.numel() == 0:
        return
    below = int(((record.var > 0) & (record.var < record.eps)).sum())
    if below:
        share = below / record.var.numel()
        yield Finding(
            "eps-dominates",
            Severity.WARNING if share > 0.5 else Severity.NOTE,
            record.name,
            {"channels": below, "of": record.var.numel(), "eps": record.eps},
            f"the variance of {below} of {counted(record.var.numel(), 'channel')} lies below eps = {record.eps:g}: "
            "what comes out there is smaller than the rest",
            "scale what comes in up, or lower eps",
        )


def half_precision(record: Record) -> Iterator[Finding]:
    """Statistics in 16 bits: three digits, and in float16 nothing above 65504."""
    if record.mean is not None and record.mean.is_floating_point() and record.mean.itemsize < 4:
        yield Finding(
            "half-precision-statistics",
            Severity.WARNING,
            record.name,
            {"dtype": str(record.mean.dtype)},
            f"the running statistics are kept in {record.mean.dtype}, where small steps are lost",
            "evenorm.convert(model) keeps them in float32 whatever .half() does; then " + CALIBRATE,
        )


def out_of_scale(record: Record) -> Iterator[Finding]:
    """Variances or weights that differ by more orders of magnitude than training brings about."""
    for name, tensor in (("running_var", record.var), ("weight", record.weight)):
        spread = _decades(tensor)
        if tensor is not None and spread > ORDERS:
            yield Finding(
                "out-of-scale",
                Severity.WARNING,
                record.name,
                {"tensor": name, "decades": round(spread, 1), "largest": float(tensor.detach().abs().max())},
                f"{name} spans {spread:.0f} orders of magnitude over the channels",
                "look for an exploding layer in front, an input in odd units, or a wrongly averaged checkpoint",
            )


def idle_bias(record: Record) -> Iterator[Finding]:
    """A bias in front of batch norm: the mean that is subtracted takes it away again."""
    if record.bias_in_front:
        yield Finding(
            "idle-bias",
            Severity.NOTE,
            record.name,
            {"parameter": record.bias_in_front},
            f"{record.bias_in_front} does nothing: batch norm subtracts it again with the mean",
            "construct the layer in front with bias=False",
        )


CHECKS: tuple[Check, ...] = (
    not_finite,
    variance_not_positive,
    never_updated,
    too_few_updates,
    dead_channels,
    eps_dominates,
    half_precision,
    out_of_scale,
    idle_bias,
)


def _decades(tensor: Tensor | None) -> float:
    if tensor is None:
        return 0.0
    size = tensor.detach().double().abs()
    size = size[(size > 0) & torch.isfinite(size)]
    return math.log10(float(size.max())) - math.log10(float(size.min())) if size.numel() else 0.0


def lost_parameters(state: Mapping[str, Tensor], records: Iterable[Record]) -> Iterator[Finding]:
    """NaN or inf in a tensor that is not of a batch norm layer."""
    seen = {f"{record.name}.{name}".lstrip(".") for record in records for name in record.tensors}
    for name, tensor in state.items():
        if name in seen or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        values = tensor.detach() if tensor.itemsize > 1 else tensor.detach().float()  # 8 bits have no isfinite
        # The sum of magnitudes is finite where all are, or else the long way tells; it allocates nothing.
        if bool(torch.isfinite(torch.linalg.vector_norm(values, 1, dtype=_wide(values)))):
            continue
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            yield Finding(
                "not-finite",
                Severity.ERROR,
                name.rpartition(".")[0],
                {"tensor": name.rpartition(".")[2], "values": bad, "of": tensor.numel()},
                f"{name.rpartition('.')[2]} holds NaN or inf in {bad} of {counted(tensor.numel(), 'value')}: "
                "it diverged",
                "go back to a checkpoint from before it diverged",
            )


def _wide(values: Tensor) -> torch.dtype | None:
    return torch.float32 if values.itemsize < 4 and not values.is_complex() else None
