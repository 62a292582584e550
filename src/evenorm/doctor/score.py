"""Score outputs: accuracy, a loss of the user's own, or how near they come to those in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from evenorm.doctor.findings import Scores

Loss = Callable[[Any, Any], Any]
LEAST = 0.01  # a difference of scores below which nobody asks why


class Tally:
    """The scores of batch after batch, by three kinds of statistics."""

    def __init__(self, loss: Loss | None) -> None:
        """Take the user's own loss, if there is one."""
        self.loss = loss
        self.measure = "loss" if loss is not None else ""
        self.counts: list[int] = []
        self.batch: list[Tensor] = []  # of each batch: (N,) right or wrong, or one number
        self.running: list[Tensor] = []
        self.exact: list[Tensor] = []
        self.reference: list[Any] = []  # the labels; or by the batch's own statistics: classes, or outputs

    def takes(self, output: Any, batch: Any) -> bool:
        """Tell whether such outputs can be scored; the first batch decides how."""
        if self.loss is not None:
            return target(batch) is not None
        if not (isinstance(output, Tensor) and output.is_floating_point() and output.dim() and output.numel()):
            return False
        if not self.measure:
            classes = output.dim() == 2 and output.shape[1] > 1
            labels = self._labels(batch, output) if classes else None
            self.measure = "accuracy" if labels is not None else "agreement" if classes else "likeness"
        return self.measure != "accuracy" or self._labels(batch, output) is not None

    def add(self, batch: Any, by_batch: Any, by_running: Any) -> None:
        """Score a batch by its own and by the running statistics."""
        self.counts.append(len(by_batch) if isinstance(by_batch, Tensor) and by_batch.dim() else 1)
        kinds = {"accuracy": lambda: target(batch).to(by_batch.device), "agreement": lambda: by_batch.argmax(1)}
        self.reference.append(kinds[self.measure]() if self.measure in kinds else by_batch)
        self.batch.append(self._score(-1, batch, by_batch))
        self.running.append(self._score(-1, batch, by_running))

    def add_exact(self, index: int, batch: Any, output: Any) -> None:
        """Score the batch that was added as number `index` by the exact statistics."""
        self.exact.append(self._score(index, batch, output))

    def scores(self) -> Scores | None:
        """Return the scores; None where nothing could be scored."""
        if not self.counts:
            return None
        weights = torch.tensor(self.counts, dtype=torch.float64)
        each = [torch.cat([part.reshape(-1) for part in parts]) for parts in (self.running, self.exact, self.batch)]
        by_sample = self.measure in ("accuracy", "agreement")
        means = [float(one.mean() if by_sample else (one * weights).sum() / weights.sum()) for one in each]
        samples = int(weights.sum())
        sign = -1 if self.measure == "loss" else 1
        best = each[1] if sign * (means[1] - means[2]) > 0 else each[2]
        if by_sample:
            differ = int((each[0] != best).sum())
            noise = max(LEAST, 2 * differ**0.5 / samples)
        else:
            difference = each[0] - best
            spread = float(difference.std() / len(difference) ** 0.5) if len(difference) > 1 else 0.0
            noise = max(LEAST * (abs(means[2]) if self.measure == "loss" else 5), 2 * spread)
        if self.measure == "agreement":  # with outputs that are noisy themselves
            noise = max(noise, 1 - means[1] + noise)
        return Scores(self.measure, means[0], means[1], means[2], samples, noise)

    def _score(self, index: int, batch: Any, output: Any) -> Tensor:
        if self.loss is not None:
            return torch.as_tensor(self.loss(output, target(batch))).detach().double().mean().cpu()
        reference: Tensor = self.reference[index]
        if self.measure in ("accuracy", "agreement"):
            right: Tensor = _chosen(output) == reference
            return right.double().cpu()
        wanted, got = reference.double(), output.double()
        lost = (got - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean().clamp(min=1e-30)
        kept: Tensor = (1 - lost).clamp(min=0).nan_to_num(0).cpu()
        return kept

    def _labels(self, batch: Any, output: Tensor) -> Tensor | None:
        """Return a batch's labels, (N,), if its last entry can be that."""
        labels = target(batch)
        if not isinstance(labels, Tensor) or labels.shape != output.shape[:1] or labels.is_floating_point():
            return None
        least, most = labels.aminmax()
        return labels if int(least) >= 0 and int(most) < output.shape[1] else None


def target(batch: Any) -> Any:
    """Return what of a batch is no input: the last entry of a tuple, or what a dict has by a usual name."""
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[-1]
    if isinstance(batch, Mapping):
        return next((batch[key] for key in ("labels", "label", "target", "targets", "y") if key in batch), None)
    return None


def _chosen(output: Tensor) -> Tensor:
    """Return the classes, (N,); -1 where an output is not a number, which is never right."""
    best, classes = output.max(1)
    return torch.where(torch.isnan(best), -1, classes)
