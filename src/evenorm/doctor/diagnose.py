"""Put the checks together: from a network, or a checkpoint, to a diagnosis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from evenorm.doctor import checkpoint, data_checks, live
from evenorm.doctor.diagnosis import Diagnosis
from evenorm.doctor.findings import Finding, LayerView, ranked
from evenorm.doctor.measure import Measured, measure
from evenorm.doctor.records import Record, from_model, from_state, in_order
from evenorm.doctor.score import Loss
from evenorm.doctor.summary import summary
from evenorm.models.batches import Forward
from evenorm.workers import Group


@torch.no_grad()
def diagnose(
    model: nn.Module | Mapping[str, Tensor],
    data: Iterable[Any] | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Loss | None = None,
    forward: Forward | None = None,
    max_batches: int | None = None,
    process_group: Group = None,
) -> Diagnosis:
    r"""Find out why a network with batch norm is good in ``train()`` and bad in ``eval()``.

    .. math:: \text{score}_\text{batch} - \text{score}_\text{running} =
              \underbrace{\text{score}_\text{exact} - \text{score}_\text{running}}_\text{wrong running statistics} +
              \underbrace{\text{score}_\text{batch} - \text{score}_\text{exact}}_\text{what the batch itself gives}

    Without data the tensors and the network are looked at. With data the network runs in evaluation, without
    dropout, by three kinds of statistics: the running ones, exact ones of the data, and each batch's own. Nothing
    in the network changes.

    Args:
        model: a network with batch norm of any make; or a state_dict, without data.
        data: batches as in `calibrate`, as large as in training, read once: a tensor, a tuple (inputs, labels), or
            a dict. With labels, (N,) integers, the score is the accuracy.
        optimizer: looked at for weight decay.
        loss: ``loss(output, target)``, a number for the batch, is measured in place of the accuracy; the target is
            a batch's last entry.
        forward: called as ``forward(model, batch)`` for networks and batches of any other kind.
        max_batches: read no more than these.
        process_group: "world" or a torch ProcessGroup: compare the running statistics of its workers as well, by
            one small message. All of them must make this call, on the same network.

    Returns:
        `Diagnosis`: findings worst first, the scores, and each layer's running and exact statistics.

    Raises:
        TypeError: a model or batches of an unknown kind.
        ValueError: no batches, batches that the network does not take, or a state_dict that is damaged; a
            process_group without torch.distributed, or without this worker.

    Note:
        Scores come from half of the batches, up to 10,000 samples. With data that are NaN or inf inside
        the network nothing can be measured; the diagnosis then says so, and rests on the tensors.

    >>> import torch, evenorm
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3, momentum=0.01))
    >>> for batch in torch.randn(20, 16, 4):
    ...     _ = model(batch)
    >>> print(evenorm.diagnose(model).summary)
    the running statistics of 1 layer are stale (momentum 0.01, 20 updates)

    Source: Wu & Johnson 2021, section 3; for dropout, Li et al. 2018.
    """
    if not isinstance(model, (nn.Module, Mapping)):
        raise TypeError(f"model must be a network or a state_dict, got a {type(model).__name__}")
    if isinstance(model, nn.Module):
        records, state = from_model(model), _dense(model.state_dict())
    elif data is not None or process_group is not None:
        raise TypeError("a state_dict can neither run nor have workers; give the network, with its weights loaded")
    else:
        state = in_order(model)
        records = from_state(state)
    findings = [found for record in records for check in checkpoint.CHECKS for found in check(record)]
    findings = _without_calibrated(findings, records)
    findings += checkpoint.lost_parameters(state, records)
    measured = None
    if isinstance(model, nn.Module):
        network = live.Network(model, records, optimizer, process_group)
        findings += [found for check in live.CHECKS for found in check(network)]
        findings = _without_doubles(findings)
        if data is not None and records:
            measured = measure(model, records, data, loss, forward, max_batches)
            findings = data_checks.judged(findings, network, measured)
    worst = ranked(findings)
    views = tuple(_view(record, measured) for record in records)
    return Diagnosis(worst, views, summary(worst, len(records), measured), measured.scores if measured else None)


def _dense(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what of a live network's state has values to look at."""
    return {
        name: tensor
        for name, tensor in state.items()
        if isinstance(tensor, Tensor)
        and type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and not (tensor.is_quantized or tensor.is_meta)
    }


def _without_calibrated(findings: list[Finding], records: list[Record]) -> list[Finding]:
    """Leave out what the counters say where one layer shows that they are calibration's, which writes all alike."""
    calibrated = {record.batches for record in records if checkpoint.refuted(record)}
    layers = {record.name for record in records if record.batches in calibrated}
    return [found for found in findings if not (found.code == "stale-statistics" and found.layer in layers)]


def _without_doubles(findings: list[Finding]) -> list[Finding]:
    """Leave out what another finding of the same layer says better."""
    said = {(found.layer, found.code) for found in findings}
    return [
        found
        for found in findings
        if not (found.code == "never-updated" and (found.layer, "momentum-zero") in said)
    ]


def _view(record: Record, measured: Measured | None) -> LayerView:
    view = LayerView(record.name, _numbers(record.mean), _numbers(record.var))
    layer = measured.layers.get(record.name) if measured else None
    if layer is None:
        return view
    return replace(
        view,
        exact_mean=_numbers(layer.mean),
        exact_var=_numbers(layer.var),
        mean_shift=layer.mean_shift,
        log_ratio=layer.log_ratio,
        noise=layer.noise,
    )


def _numbers(tensor: Tensor | None) -> tuple[float, ...]:
    return () if tensor is None else tuple(tensor.detach().double().tolist())
