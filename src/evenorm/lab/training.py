"""Plain stochastic gradient descent on a stack of networks, and their scores.

Legend as in `networks`: S members, activations (S, C, N).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from evenorm.lab.data import Split
from evenorm.lab.pulse import beat
from evenorm.lab.trials import Record, Trial, random_seed


@dataclass(frozen=True)
class Samples:
    """Each member's own samples: x (S, C, N) and labels y (S, N)."""

    x: Tensor
    y: Tensor

    def batch(self, index: Tensor) -> Samples:
        """Return the samples that index (S, batch) names."""
        member = torch.arange(index.shape[0])[:, None]
        return Samples(self.x[member, :, index].transpose(1, 2), self.y[member, index])


def training_samples(splits: Sequence[Split]) -> Samples:
    """Stack the training sets, one split a member."""
    return _stack([(split.x_train, split.y_train) for split in splits])


def test_samples(splits: Sequence[Split]) -> Samples:
    """Stack the test sets, one split a member."""
    return _stack([(split.x_test, split.y_test) for split in splits])


def _stack(sets: Sequence[tuple[Tensor, Tensor]]) -> Samples:
    if all(x is sets[0][0] and y is sets[0][1] for x, y in sets):  # one set for all: a view, not S copies
        x, y = sets[0]
        return Samples(x.T.expand(len(sets), -1, -1), y.expand(len(sets), -1))
    return Samples(torch.stack([x.T for x, _ in sets]), torch.stack([y for _, y in sets]))


def batch_order(seed: int, samples: int, batch: int, steps: int) -> Tensor:
    """Return the sample numbers of every step, (steps, batch): shuffled epochs, the remainder left out."""
    generator = torch.Generator().manual_seed(random_seed(seed, "batch order"))
    per_epoch = samples // batch
    epochs = -(-steps // per_epoch)
    order = [torch.randperm(samples, generator=generator)[: per_epoch * batch] for _ in range(epochs)]
    return torch.cat(order).view(-1, batch)[:steps]


def cross_entropy(answers: Tensor, y: Tensor) -> Tensor:
    """Return the loss of each sample, (S, N), of logits (S, classes, N) and class numbers (S, N)."""
    return functional.cross_entropy(answers, y, reduction="none")


Criterion: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"  # answers (S, outputs, N), y (S, N) -> (S, N)


def descend(
    network: nn.Module,
    samples: Samples,
    trials: Sequence[Trial],
    *,
    batch: int,
    steps: int,
    criterion: Criterion = cross_entropy,
    penalties: Mapping[Tensor, Callable[[Tensor], Tensor]] | None = None,
    start: int = 0,
) -> Iterator[tuple[int, Tensor]]:
    """Train all members, each at its own rate and in its own batch order; yield (steps done, loss (S,)).

    The loss is yielded without the penalties, each of which gives its gradient at the parameter it is named for.
    A network that was trained for `start` steps goes on with the batches that follow them.

    A member that diverges fills its own slices with NaN and no others: the sum of the losses gives each
    parameter slice the gradient of its own member, and no operation mixes members.
    """
    members, count = samples.y.shape
    order = torch.stack([batch_order(trial.seed, count, min(batch, count), steps) for trial in trials])
    rates = torch.tensor([[trial.rate] for trial in trials])
    parameters = list(network.parameters())
    for step in range(start, steps):
        network.train()
        drawn = samples.batch(order[:, step])
        loss = criterion(network(drawn.x), drawn.y).mean(1)
        gradients = torch.autograd.grad(loss.sum(), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if penalties and parameter in penalties:
                    gradient = gradient + penalties[parameter](parameter)
                flat = parameter.view(members, -1)
                flat.addcmul_(gradient.reshape(members, -1), rates, value=-1.0)
        beat(step + 1, steps, loss.detach())
        yield step + 1, loss.detach()


@torch.no_grad()
def score(network: nn.Module, samples: Samples) -> tuple[Tensor, Tensor]:
    """Return each member's share of correct answers and mean loss, (S,) and (S,), with fixed statistics."""
    network.eval()
    return grade(network(samples.x), samples.y)


def grade(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the share of correct answers and the mean cross-entropy of logits (S, classes, N)."""
    finite = torch.isfinite(logits).all(1)
    correct = (logits.argmax(1) == y) & finite  # argmax of NaN is class 0: no answer is no correct answer
    return correct.float().mean(1), functional.cross_entropy(logits, y, reduction="none").mean(1)


class Curves:
    """Numbers measured along training, one list for each member and name, ready to be stored as JSON."""

    def __init__(self, members: int) -> None:
        """Take the number of members."""
        self._records: list[Record] = [{} for _ in range(members)]

    def append(self, **values: Tensor) -> None:
        """Append one value (S,) a name to each member's list."""
        for name, value in values.items():
            for record, number in zip(self._records, value.tolist(), strict=True):
                record.setdefault(name, []).append(rounded(number))

    def put(self, **values: Tensor) -> None:
        """Set one value (S,) or list of values (S, ...) a name."""
        for name, value in values.items():
            for record, numbers in zip(self._records, value.tolist(), strict=True):
                record[name] = rounded(numbers)

    def records(self) -> list[Record]:
        """Return what was measured, member by member."""
        return self._records


def rounded(value: float | list[float]) -> float | list[float] | None:
    """Return numbers with seven significant digits, which float32 has, and None for NaN and inf."""
    if isinstance(value, list):
        return [rounded(item) for item in value]  # type: ignore[misc]
    return float(f"{value:.7g}") if math.isfinite(value) else None


def diverged(losses: Tensor) -> Tensor:
    """Return which members were lost, (S,): a loss (steps, S) that is not finite, or 10 times the first one."""
    return (~torch.isfinite(losses) | (losses > 10 * losses[0])).any(0)


def trained(losses: Tensor, accuracy: Tensor, classes: int) -> Tensor:
    """Return which members learned, (S,), from their losses (steps, S) and final training accuracy (S,).

    Learned: not diverged, the loss below half the first one, the accuracy above twice chance, or, of two classes,
    of which twice chance is all, halfway from chance to all.
    """
    chance = 1 / classes
    return ~diverged(losses) & (final_loss(losses) < losses[0] / 2) & (accuracy > min(2 * chance, (1 + chance) / 2))


def final_loss(losses: Tensor) -> Tensor:
    """Return the mean of the last 50 losses (steps, S), (S,)."""
    return losses[-50:].T.contiguous().mean(1)  # along rows: the rounding of a column depends on its neighbours
