"""Checks of a live network that need no data: modes, places, neighbours, the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from evenorm.doctor.findings import Finding, Severity, counted
from evenorm.doctor.records import Record
from evenorm.layers import Layer
from evenorm.models.walk import names
from evenorm.workers import Group, resolve

CHECKPOINTED = ("gradient_checkpointing", "grad_checkpointing", "use_checkpoint", "use_checkpointing", "with_cp")
NAN = 1e300  # what stands for NaN where values are compared: as far from all others as it shows
DIFFERENT = 0.1  # standard deviations between workers, or of their variances' ratio, that are more than a note


@dataclass(frozen=True)
class Network:
    """A live network, the records of its batch norm layers, and its optimizer and workers where they are known."""

    model: nn.Module
    records: Sequence[Record]
    optimizer: torch.optim.Optimizer | None = None
    group: Group = None

    @property
    def layers(self) -> list[tuple[Record, _BatchNorm]]:
        """The records with their layers."""
        return [(record, record.live) for record in self.records if record.live is not None]


def wrong_mode(network: Network) -> Iterator[Finding]:
    """A layer that is in another mode than the network."""
    for record, layer in network.layers:
        if layer.training == network.model.training:
            continue
        mode, other = ("train()", "eval()") if layer.training else ("eval()", "train()")
        yield Finding(
            "wrong-mode",
            Severity.ERROR if layer.training else Severity.WARNING,
            record.name,
            {"layer": mode, "network": other},
            "the layer is in train() mode in a network that is in eval(): predictions depend on their batch"
            if layer.training
            else "the layer is in eval() mode in a network that trains; the next model.train() undoes that",
            "model.eval()" if layer.training else "evenorm.freeze(model), which stays frozen; or model.train()",
        )


def half_frozen(network: Network) -> Iterator[Finding]:
    """Frozen statistics with trained weights, and the reverse."""
    learns = any(parameter.requires_grad for parameter in network.model.parameters())
    for record, layer in network.layers:
        if layer.weight is None:
            continue
        if frozen(layer) and layer.weight.requires_grad:
            yield Finding(
                "frozen-statistics",
                Severity.NOTE,
                record.name,
                {"weight": "trained", "statistics": "frozen"},
                "the statistics are frozen while weight and bias are trained",
                "evenorm.freeze(model, affine=True) freezes both, evenorm.unfreeze(model) neither",
            )
        elif learns and not frozen(layer) and not layer.weight.requires_grad and record.mean is not None:
            yield Finding(
                "frozen-weights",
                Severity.WARNING,
                record.name,
                {"weight": "frozen", "statistics": "moving"},
                "weight and bias are frozen (requires_grad=False), but the statistics move with every batch",
                "evenorm.freeze(model), which holds the statistics too",
            )


def momentum_of_zero(network: Network) -> Iterator[Finding]:
    """A momentum that lets no batch in."""
    for record, layer in network.layers:
        if layer.momentum == 0 and record.mean is not None:
            yield Finding(
                "momentum-zero",
                Severity.ERROR,
                record.name,
                {"momentum": 0, "updates": record.batches if record.batches is not None else "unknown"},
                "momentum 0 lets no batch into the running statistics: they stay what they were. In torch, "
                "momentum is the weight of the NEW batch",
                "evenorm.calibrate(model, data); train with momentum=0.1, or evenorm.freeze(model) on purpose",
            )


def no_running_statistics(network: Network) -> Iterator[Finding]:
    """`track_running_stats=False`: eval() normalises by the batch as well."""
    for record, layer in network.layers:
        if record.mean is None or not layer.track_running_stats:
            yield Finding(
                "no-running-statistics",
                Severity.WARNING,
                record.name,
                {"track_running_stats": str(layer.track_running_stats)},
                "the layer keeps no running statistics: in eval() too, an answer depends on the rest of its batch"
                if record.mean is None
                else "track_running_stats was switched off: the running statistics do not follow training any more",
                "construct it with track_running_stats=True, then evenorm.calibrate(model, data)",
            )


def shared_layer(network: Network) -> Iterator[Finding]:
    """One layer at several places: its statistics are a mixture of what comes by in each."""
    places = names(network.model)
    for record, layer in network.layers:
        if len(places[layer]) > 1:
            yield Finding(
                "shared-layer",
                Severity.NOTE,
                record.name,
                {"places": len(places[layer])},
                f"the layer is held at {len(places[layer])} places ({', '.join(places[layer][:4])}): if what comes "
                "by differs, its running statistics fit none of them",
                "give each place a layer of its own; weight and bias may still be shared",
            )


def dropout_in_front(network: Network) -> Iterator[Finding]:
    """Dropout upstream: it raises the variance in train() and not in eval()."""
    for name, (source, p, direct) in dropouts(network).items():
        yield Finding(
            "dropout-in-front",
            Severity.WARNING if direct and p >= 0.2 else Severity.NOTE,
            name,
            {"dropout": source, "p": p, "variance in eval() / train()": round(1 - p, 3) if direct else "up to 1"},
            f"{source} (p = {p:g}) stands in front: in eval() the variance is "
            + (f"{1 - p:.2f} of that in train() where the mean is 0" if direct else "smaller than in train()"),
            "put dropout behind the last batch norm; or evenorm.calibrate(model, data), which runs without dropout",
        )


def weight_decay(network: Network) -> Iterator[Finding]:
    """Weight decay that pulls weight and bias of batch norm towards 0."""
    if network.optimizer is None:
        return
    decay = {
        id(parameter): group.get("weight_decay", 0)
        for group in network.optimizer.param_groups
        for parameter in group["params"]
    }
    reached = [(record.name, decay.get(id(layer.weight), 0)) for record, layer in network.layers]
    names_, values = [name for name, value in reached if value], [value for _, value in reached if value]
    if names_:
        yield Finding(
            "weight-decay",
            Severity.NOTE,
            "",
            {"layers": len(names_), "of": len(reached), "weight_decay": float(max(values))},
            f"weight decay of up to {max(values):g} reaches weight and bias of "
            f"{counted(len(names_), 'batch norm layer')}",
            "give parameters with one dimension a group of their own: {'params': ..., 'weight_decay': 0}",
        )


def not_pooled(network: Network) -> Iterator[Finding]:
    """Several workers, and layers that see only their own part of the batch."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    alone = [record.name for record, layer in network.layers if not _pools(layer)]
    if alone:
        mixed = len(alone) < len(network.layers)
        yield Finding(
            "not-pooled",
            Severity.WARNING if mixed else Severity.NOTE,
            alone[0] if mixed else "",
            {"layers": len(alone), "of": len(network.layers), "workers": dist.get_world_size()},
            f"{len(alone)} of {counted(len(network.layers), 'batch norm layer')} "
            f"{'does' if len(alone) == 1 else 'do'} not pool over the {dist.get_world_size()} "
            "workers: each normalises by its own part of the batch",
            'evenorm.set_process_group(model, "world")',
        )


def workers_differ(network: Network) -> Iterator[Finding]:
    """Running statistics that are not the same on all workers, by one message of 4 numbers a channel."""
    tracking = [(record, record.mean, record.var) for record in network.records]
    known = [(record, mean, var) for record, mean, var in tracking if mean is not None and var is not None]
    group = resolve(network.group, known[0][1]) if known else None
    if group is None:
        return
    own = torch.cat([torch.cat([mean, var]).detach().double() for _, mean, var in known])
    own = own.nan_to_num(nan=NAN)
    message = torch.cat([own, -own])
    dist.all_reduce(message, dist.ReduceOp.MAX, group)  # exact, unlike sums, and as short in a large world
    most, least = message[: len(own)], -message[len(own) :]
    apart: dict[str, tuple[float, float]] = {}
    start = 0
    for record, mean, _ in known:
        low, high = (side[start : start + 2 * len(mean)].view(2, -1) for side in (least, most))
        start += 2 * len(mean)
        if bool((low != high).any()):
            most_var, least_var = (side[1].clamp(min=0) + record.eps for side in (high, low))
            # 0 / 0 without an eps: a channel that is constant on all workers.
            shifts = ((high[0] - low[0]) / most_var.sqrt()).nan_to_num(0, math.inf)
            ratios = (most_var / least_var).nan_to_num(1, math.inf)
            apart[record.name] = float(shifts.max()), float(ratios.max())
    if apart:
        worst = max(apart, key=lambda name: apart[name])
        shift, ratio = (round(value, 3) for value in apart[worst])
        far = any(shift > DIFFERENT or ratio > 1 + DIFFERENT for shift, ratio in apart.values())
        yield Finding(
            "workers-differ",
            Severity.WARNING if far else Severity.NOTE,
            worst,
            {
                "layers": len(apart),
                "of": len(known),
                "workers": dist.get_world_size(group),
                "means apart by (standard deviations)": shift,
                "largest / smallest variance": ratio,
            },
            f"the running statistics of {len(apart)} of {counted(len(known), 'layer')} are not the same on all "
            "workers: each would evaluate, and save, another network",
            "evenorm.pool_running_statistics_(model) before evaluation or saving; or train with "
            'evenorm.set_process_group(model, "world")',
        )


def recomputed(network: Network) -> Iterator[Finding]:
    """torch.nn layers in a checkpointed block: the recomputation updates their statistics a second time."""
    modules = dict(network.model.named_modules())
    for record, layer in network.layers:
        if isinstance(layer, Layer):
            continue
        parents = [record.name.rsplit(".", cut)[0] for cut in range(1, record.name.count(".") + 1)]
        block = next((name for name in (*parents, "") if _checkpointed(modules.get(name))), None)
        if block is not None:
            yield Finding(
                "recomputed",
                Severity.WARNING,
                record.name,
                {"block": block or "the network"},
                "the layer lies in a checkpointed block: recomputation in backward updates its statistics twice",
                "evenorm.convert(model), whose layers recognise recomputation",
            )


CHECKS: tuple[Callable[[Network], Iterator[Finding]], ...] = (
    wrong_mode,
    momentum_of_zero,
    half_frozen,
    no_running_statistics,
    shared_layer,
    dropout_in_front,
    weight_decay,
    not_pooled,
    workers_differ,
    recomputed,
)


def frozen(layer: _BatchNorm) -> bool:
    """Tell whether the statistics are frozen by `evenorm.freeze`."""
    return bool(getattr(layer, "frozen", False))


def dropouts(network: Network) -> dict[str, tuple[str, float, bool]]:
    """Return for each batch norm that comes behind a dropout: its name, p, and whether nothing lies between.

    By the order in which modules were made, from one batch norm to the next: what comes between is taken to lie
    between.
    """
    found: dict[str, tuple[str, float, bool]] = {}
    last: tuple[str, float] | None = None
    direct = False
    for name, module in network.model.named_modules():
        if isinstance(module, _BatchNorm):
            if last is not None:
                found[name] = (*last, direct)
            last = None
        elif isinstance(module, _DropoutNd) and module.p > 0:
            last, direct = (name, module.p), True
        elif next(module.children(), None) is None and not isinstance(module, nn.Identity):
            direct = False
    return found


def _pools(layer: _BatchNorm) -> bool:
    return isinstance(layer, nn.SyncBatchNorm) or getattr(layer, "process_group", None) is not None


def _checkpointed(module: nn.Module | None) -> bool:
    if module is None:
        return False
    wrapped = "_checkpoint_wrapped_module" in module._modules
    return wrapped or any(vars(module).get(name) is True for name in CHECKPOINTED)
