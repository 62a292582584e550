"""Statistics of a network whose weights are an average of other networks' weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from evenorm.moments import Moments

MEAN, VAR, COUNTER = "running_mean", "running_var", "num_batches_tracked"


def merge_statistics(
    models: Iterable[nn.Module | Mapping[str, Tensor]], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    r"""Return the batch norm statistics of several networks taken together, with the variance between them.

    .. math:: \mu = \sum_k w_k \mu_k, \qquad \sigma^2 = \sum_k w_k \left(\sigma_k^2 + (\mu_k - \mu)^2\right),
              \qquad \sum_k w_k = 1

    These are the statistics of the networks' activations mixed in the proportions ``weights``: exact for networks
    with the same weights that have seen different data, as federated workers have at the start of a round, and a
    starting point for `calibrate` where the weights differ, as in EMA and SWA. Averaging the variances like weights
    leaves out the variance between the networks; averaging the counters like weights fails, as they are integers.

    Args:
        models: networks, or their state_dicts, or both; at least one.
        weights: what each counts for, 0 or more; None: all the same.

    Returns:
        ``running_mean``, ``running_var`` and ``num_batches_tracked`` of every layer, under the names they have in a
        state_dict, to be loaded with ``strict=False``; of the first network's dtypes and devices. A counter becomes
        the weighted mean of the counters, rounded.

    Raises:
        TypeError: one model in place of several.
        ValueError: no model, no batch norm, layers or shapes that differ, values that are not finite, before or
            after merging, or weights that do not fit.

    >>> import torch, evenorm
    >>> layers = [evenorm.BatchNorm1d(3, momentum=None) for _ in range(2)]
    >>> halves = torch.randn(20_000, 3).split(10_000)
    >>> for layer, half in zip(layers, halves):
    ...     _ = layer(half)
    >>> _ = layers[0].load_state_dict(evenorm.merge_statistics(layers), strict=False)
    >>> torch.testing.assert_close(layers[0].running_var, torch.cat(halves).var(0), rtol=1e-4, atol=0)

    Source: the moments of a mixture; Chan, Golub & LeVeque 1983 (docs/math.md, eq. 5).
    """
    if isinstance(models, (nn.Module, Mapping)):
        raise TypeError(
            f"merge_statistics needs a list of networks or state_dicts, got one {type(models).__name__}"
        )
    states = [model.state_dict() if isinstance(model, nn.Module) else model for model in models]
    shares = _shares(weights, len(states))
    layers = _layers(states)
    merged: dict[str, Tensor] = {}
    for prefix in layers:
        mean, var = (
            [_entry(state, prefix + key, index) for index, state in enumerate(states)] for key in (MEAN, VAR)
        )
        _check_shapes(prefix, mean + var)
        together = _mixture(mean, var, shares)
        for key, value, like in ((MEAN, together.mean, mean[0]), (VAR, together.variance(), var[0])):
            merged[prefix + key] = value.to(like)
            if not torch.isfinite(merged[prefix + key]).all():
                raise ValueError(
                    f"the merged {prefix + key} reaches {value.abs().max().item():.3g}, which does not fit into "
                    f"{like.dtype}; give the statistics in float32, as model.float() makes them"
                )
        counters = [state.get(prefix + COUNTER) for state in states]
        known = [counter for counter in counters if counter is not None]
        if len(known) == len(states):
            batches = sum(share * float(counter) for share, counter in zip(shares, known, strict=True))
            merged[prefix + COUNTER] = torch.tensor(round(batches)).to(known[0])
    return merged


def _shares(weights: Sequence[float] | None, models: int) -> list[float]:
    """Return the weights, divided by their sum."""
    if not models:
        raise ValueError("merge_statistics needs at least one network or state_dict, got none")
    given = [1.0] * models if weights is None else [float(weight) for weight in weights]
    if len(given) != models:
        raise ValueError(f"weights must have one entry for each of the {models} networks, got {len(given)}")
    total = math.fsum(given)
    if not all(weight >= 0 for weight in given) or not 0 < total < math.inf:
        raise ValueError(f"weights must be 0 or more, finite, and not all 0, got {given}")
    return [weight / total for weight in given]


def _layers(states: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """Return the prefixes, ``"features.1."``, of the layers with statistics, the same in all networks."""
    found = [
        [key[: -len(MEAN)] for key in state if key.endswith(MEAN) and key[: -len(MEAN)] + VAR in state]
        for state in states
    ]
    for index, layers in enumerate(found):
        if not layers:
            raise ValueError(f"network {index} has no running_mean and running_var; is it a state_dict?")
        if set(layers) != set(found[0]):
            layer = sorted(set(layers) ^ set(found[0]))[0].rstrip(".")
            raise ValueError(
                f"networks 0 and {index} differ: one has the layer {layer!r} and the other has not; take off "
                "prefixes such as 'module.' first"
            )
    return found[0]


def _entry(state: Mapping[str, Tensor], key: str, index: int) -> Tensor:
    value = state[key]
    if not torch.isfinite(value).all():
        raise ValueError(f"{key} of network {index} holds NaN or inf; calibrate it, or leave it out")
    return value


def _check_shapes(prefix: str, values: Sequence[Tensor]) -> None:
    shapes = {tuple(value.shape) for value in values}
    if len(shapes) > 1:
        raise ValueError(
            f"{prefix.rstrip('.') or 'the model'} has statistics of different shapes: {sorted(shapes)}"
        )


def _mixture(means: Sequence[Tensor], variances: Sequence[Tensor], shares: Sequence[float]) -> Moments:
    """Merge statistics as moments whose counts are the shares."""
    mean, var = (torch.stack([value.detach().cpu().double() for value in values]) for values in (means, variances))
    count = torch.tensor(shares, dtype=torch.float64)
    return Moments(count, mean, count.unsqueeze(1) * var).pooled()
