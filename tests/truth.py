"""Batch norm by the book, in float64 and through autograd alone: what the tests hold to be true.

It is written apart from the package and by another route: valid positions are gathered into rows, (V, C), and
the activations are torch's own. `complaints` says where evenorm is further from the truth than torch's own layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import evenorm
from cases import Case, State

MOMENTUM = 0.3
EPS = 1e-5
MODES = {"train": True, "eval": False}

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": functional.relu,
    "leaky_relu": functional.leaky_relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "elu": functional.elu,
    "hardswish": functional.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
MODULES: dict[str, nn.Module] = {
    "module leaky_relu 0.2": nn.LeakyReLU(0.2),
    "module leaky_relu -0.5": nn.LeakyReLU(-0.5),
    "module elu 0.5": nn.ELU(0.5),
    "module gelu tanh": nn.GELU(approximate="tanh"),
    "module softplus": nn.Softplus(),
}


def rows(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Gather what is valid in (N, C, *positions) into rows, (V, C)."""
    last = x.movedim(1, -1)
    return last.reshape(-1, x.shape[1]) if mask is None else last[mask]


def statistics(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of the columns of (V, C)."""
    if len(values) == 0:
        return values.new_zeros(values.shape[1]), values.new_zeros(values.shape[1])
    # Seen from the median: neither a large offset nor a constant channel costs float64 a digit.
    middle = values.detach().median(0).values
    step = (values - middle).mean(0)
    return middle + step, (values - middle - step).square().mean(0)


def plain(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    fixed: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str | nn.Module | None = None,
    eps: float = EPS,
) -> Tensor:
    """Return activation((x - mean) / sqrt(var + eps) * weight + bias + residual), and 0 where the mask is False."""
    values = rows(x, mask)
    if fixed is None and len(values):
        middle = values.detach().median(0).values
        centred = (values - middle) - (values - middle).mean(0)
        z = centred / (centred.square().mean(0) + eps).sqrt()
    else:
        mean, var = statistics(values) if fixed is None else fixed
        z = (values - mean) / (var + eps).sqrt()
    z = z if weight is None else z * weight
    z = z if bias is None else z + bias
    z = z if residual is None else z + rows(residual, mask)
    y = activation(z) if isinstance(activation, nn.Module) else ACTIVATIONS[activation](z)
    last = x.movedim(1, -1)
    if mask is None:
        return y.reshape(last.shape).movedim(-1, 1)
    return torch.zeros_like(last).index_put((mask,), y).movedim(-1, 1)


@dataclass(frozen=True)
class Call:
    """One call of batch norm, that ours, torch's and the truth all answer."""

    case: Case
    training: bool = True
    activation: str | nn.Module | None = None
    with_residual: bool = False
    with_mask: bool = False
    device: str = "cpu"  # where ours and torch's compute; the truth stays on the CPU

    def answer(self, by: Callable[..., Tensor], widen: bool = False) -> dict[str, Tensor]:
        """Return y, every gradient for a random cotangent, and the running statistics afterwards, on the CPU."""
        device = "cpu" if widen else self.device
        convert = (lambda t: t.double()) if widen else (lambda t: t)
        x = convert(self.case.make(device=device)).detach().requires_grad_()
        state = State(*(convert(tensor.to(device)) for tensor in self.case.state()))
        leaves = {"dx": x, "dweight": state.weight.requires_grad_(), "dbias": state.bias.requires_grad_()}
        residual = None
        if self.with_residual:
            residual = leaves["dresidual"] = convert(self.case.noise(1, device)).detach().requires_grad_()
        mask = self.case.mask().to(device) if self.with_mask else None
        y = by(x, state, self.training, self.activation, residual, mask)
        gradients = torch.autograd.grad(y, list(leaves.values()), convert(self.case.noise(2, device)))
        found = {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}
        if self.training:
            found |= {"running_mean": state.running_mean, "running_var": state.running_var}
        return {name: tensor.cpu() for name, tensor in found.items()}


def truth(
    x: Tensor,
    state: State,
    training: bool,
    activation: str | nn.Module | None,
    residual: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """Answer a call by the book; the running statistics move in place."""
    fixed = None if training else (state.running_mean, state.running_var)
    given = (x, state.weight, state.bias)
    y = plain(*given, fixed=fixed, residual=residual, mask=mask, activation=activation)
    values = rows(x, mask).detach()
    if training and len(values) > 1:
        mean, var = statistics(values)
        unbiased = var * (len(values) / (len(values) - 1))
        for running, new in ((state.running_mean, mean), (state.running_var, unbiased)):
            running.copy_((1 - MOMENTUM) * running + MOMENTUM * new)
    return y


def ours(
    x: Tensor,
    state: State,
    training: bool,
    activation: str | nn.Module | None,
    residual: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """Answer a call with evenorm."""
    more = {"activation": activation, "residual": residual, "mask": mask}
    mean, var, weight, bias = state.running_mean, state.running_var, state.weight, state.bias
    return evenorm.batch_norm(x, mean, var, weight, bias, training, MOMENTUM, EPS, **more)


def theirs(
    x: Tensor,
    state: State,
    training: bool,
    activation: str | nn.Module | None,
    residual: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """Answer a call as a user of torch writes it; with a mask, by gathering the valid rows."""
    values = x if mask is None else rows(x, mask)
    mean, var = state.running_mean, state.running_var
    z = functional.batch_norm(values, mean, var, state.weight, state.bias, training, MOMENTUM, EPS)
    if residual is not None:
        z = z + (residual if mask is None else rows(residual, mask))
    y = activation(z) if isinstance(activation, nn.Module) else ACTIVATIONS[activation](z)
    if mask is None:
        return y
    last = x.movedim(1, -1)
    return torch.zeros_like(last).index_put((mask,), y).movedim(-1, 1)


# Torch's own result may hit the truth by luck; ours has to be rounded to its dtype all the same: half a unit in
# the last place of the channel's largest value. In float64 the truth itself is rounded at each of its steps.
ROUNDING = {torch.float64: 16.0}
# An activation that is computed (an exponential, a division, products) rounds at each step, by luck differently
# from torch's: two units in the last place of the largest value of all.
EXACT_ACTIVATIONS = (None, "relu")
COMPUTED = 2.0


def complaints(call: Call) -> list[str]:
    """Return a complaint for each result of ours that is further from the truth than torch's."""
    found, torchs, true = call.answer(ours), call.answer(theirs), call.answer(truth, widen=True)
    if call.training:
        _stay_finite(true, torchs, call.case.state())
    said = []
    for name in true:
        if found[name].dtype != torchs[name].dtype:
            said.append(f"{name}: {found[name].dtype}, torch's is {torchs[name].dtype}")
        kind = torch.finfo(found[name].dtype)
        error, scale = distance(found[name], true[name])
        allowed = distance(torchs[name], true[name])[0].nan_to_num(torch.inf, torch.inf)
        floor = ROUNDING.get(found[name].dtype, 0.5) * scale
        if call.activation not in EXACT_ACTIVATIONS:
            floor = floor.clamp(min=COMPUTED * float(scale.max()))
        bad = ~(error <= allowed + kind.eps * (floor + kind.smallest_normal))  # an error of NaN is bad too
        if bad.any():
            at = int(bad.nonzero()[0])
            said.append(f"{name}[{at}]: ours off by {error[at]:.3g}, torch's by {allowed[at]:.3g}")
    return said


def _stay_finite(true: dict[str, Tensor], torchs: dict[str, Tensor], before: State) -> None:
    """Where the running statistics of a channel would leave the numbers of their dtype, they have to stay."""
    names = ("running_mean", "running_var")
    stay = ~torch.stack([torch.isfinite(true[name].to(torchs[name].dtype)) for name in names]).all(0)
    for answer in (true, torchs):
        for name in names:
            answer[name] = torch.where(stay, getattr(before, name).to(answer[name].dtype), answer[name])


def distance(found: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest error and the largest true value, by channel for (N, C, *positions), else over all.

    What is not finite in truth must be the same in `found`, or the error is infinite.
    """
    if found.shape != true.shape:
        raise AssertionError(f"shape {tuple(found.shape)} where {tuple(true.shape)} is due")
    found, true = ((t.double().transpose(0, 1).flatten(1) if t.dim() > 1 else t.view(1, -1)) for t in (found, true))
    if true.numel() == 0:
        return true.new_zeros(1), true.new_zeros(1)
    finite = torch.isfinite(true)
    same = (found == true) | (found.isnan() & true.isnan())
    error = torch.where(finite, (found.double() - true).abs(), torch.where(same, 0.0, torch.inf))
    return error.amax(1), torch.where(finite, true.abs(), 0).amax(1)
