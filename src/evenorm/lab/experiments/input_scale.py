"""Does standardising the input help where columns differ in scale a thousandfold, and can batch norm do it?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, median

import torch
from torch import nn

from evenorm.lab import plots
from evenorm.lab.data import wine
from evenorm.lab.experiment import Experiment, Scale
from evenorm.lab.grid import Cell, Grid, Measure
from evenorm.lab.networks import BatchNorm, initialise_, perceptron
from evenorm.lab.results import Analysis, Claim, Endpoint, Figure, Table
from evenorm.lab.statistics import Comparison, Kind, combine, first_crossing, judge, overlapping_splits
from evenorm.lab.training import (
    Curves,
    descend,
    diverged,
    final_loss,
    score,
    test_samples,
    training_samples,
)
from evenorm.lab.trials import PILOT_SEEDS, Record, Trial, settings

NAME, TITLE = "input-scale", "Columns of different scale"
CLAIM = Claim(
    korean="input data에 대해 Standardization과 같은 Normalization을 적용하면 전반적으로 model의 성능이 높아진다. "
    "데이터 내 Column들의 Scale에 모델이 너무 민감해지는 것을 막아주기 때문이다.",
    english="Normalising the input data, by standardisation for instance, raises a model's performance in general, "
    "because it keeps the model from being too sensitive to the scales of the columns.",
    source="The document, “batch normalisation”, first two sentences",
    question="How much more accurate is a net on standardised columns than on raw ones, over how many more rates "
    "does it train, and does batch norm as the first layer do as well?",
)

ARMS = {"raw": "raw columns", "standardised": "standardised columns", "batch norm": "batch norm as first layer"}
COLOURS = (plots.VERMILION, plots.GREEN, plots.BLUE)
RATES = tuple(4.0**power for power in range(-9, 2))  # 3.8e-6 to 4
EVERY, WINDOW, TARGET = 10, 5, 0.90  # evaluated every 10 steps; a moving average over 50
POINTS = 5.0  # margin on accuracy; the pilot seeds gave +28, +22, +37 and +28, +24, +33
ALIKE = 3.0  # margin of “as well as”: one test wine of 36 is 2.8 points; the pilot seeds gave 0, +3, -3
FACTORS = 1.0  # margin on the range of usable rates, in steps of 4; the pilot seeds gave +3, +4, +6
RULE = (
    "Measure: test accuracy at the end, the mean of the last 50 steps, each arm at its best rate (chosen on pilot "
    "seeds 1000-1002, which are then left out). Every seed draws a split of its own, so the intervals are Nadeau "
    "and Bengio's. REPRODUCED if those of both differences, standardised − raw and batch norm − raw, lie above 5 "
    "percentage points; WEAK if above 0 only, CONTRADICTED if one lies below 0, INCONCLUSIVE otherwise. Beside it, "
    "under Holm's rule for all four: the number of usable rates (loss below half the first one, training accuracy "
    "above twice chance, not diverged), margin one step of the grid; and whether batch norm is as good as "
    "standardisation: the interval within ±3 points."
)


def plan(scale: Scale) -> list[Trial]:
    """Every arm over all rates, for the pilot seeds and the paired ones."""
    steps = settings(steps=300 if scale.quick else 600)
    seeds = (*PILOT_SEEDS, *scale.paired)
    return [Trial(NAME, 1, arm, seed, rate, steps) for arm in ARMS for rate in RATES for seed in seeds]


def train(trials: Sequence[Trial]) -> list[Record]:
    """Train 13-32-32-3 with ReLU, W ~ N(0, 2/inputs), batch 32, plain SGD, each seed on its own split."""
    arm, members = trials[0].arm, len(trials)
    splits = [wine(trial.seed).standardised() if arm == "standardised" else wine(trial.seed) for trial in trials]
    training, test = training_samples(splits), test_samples(splits)
    network = perceptron(members, (13, 32, 32, 3), nn.ReLU, normalise=False)
    initialise_(network, [trial.seed for trial in trials], lambda inputs: math.sqrt(2 / inputs))
    if arm == "batch norm":
        network = nn.Sequential(BatchNorm(members, 13), *network)
    curves, losses = Curves(members), []
    for step, loss in descend(network, training, trials, batch=32, steps=trials[0]["steps"]):
        losses.append(loss)
        if step % EVERY == 0:
            accuracy, test_loss = score(network, test)
            curves.append(accuracy=accuracy, test_loss=test_loss, train_accuracy=score(network, training)[0])
    history = torch.stack(losses)
    curves.put(diverged=diverged(history), first_loss=history[0], train_loss=final_loss(history))
    return curves.records()


def analyse(records: Mapping[Trial, Record], scale: Scale) -> Analysis:
    """Compare the arms at their best rates, and the ranges of rates over which they train."""
    grid = Grid(records, scale)
    best = {arm: grid.best(arm, _accuracy, _confidence) for arm in ARMS}
    usable = {arm: [float(count) for count in _usable(grid, arm)] for arm in ARMS}
    endpoints = judge(_comparisons(grid, best, usable, scale))
    return Analysis(
        experiment=NAME,
        title=TITLE,
        claim=CLAIM,
        protocol=_protocol(grid),
        rule=RULE,
        verdict=combine(endpoint.verdict for endpoint in endpoints[:2]),
        answer=_answer(grid, endpoints, best, usable),
        endpoints=endpoints,
        figures=(_rate_figure(grid), _accuracy_figure(grid, best)),
        published=(),
        command=scale.command(NAME),
        tables=(_table(grid, best, usable),),
        notes=(
            "Columns run from 0.13 (nonflavanoid phenols, smallest) to 1680 (proline, largest).",
            "The exact test takes the seeds for independent; their splits overlap, so its p is too small.",
            *grid.notes(best, ARMS),
            *scale.notes(),
        ),
        seeds=scale.seeds,
        configuration={"steps": grid.steps, "rates": list(grid.rates), "best": dict(best.values())},
    )


def _comparisons(
    grid: Grid, best: Mapping[str, Cell], usable: Mapping[str, Sequence[float]], scale: Scale
) -> list[Comparison]:
    """Return what is compared, with the margins that were fixed before the run."""
    raw, standardised, batch_norm = best.values()
    spread = overlapping_splits(scale.seeds, train=142, test=36)
    return [
        Comparison(
            name="Test accuracy, standardised − raw, each at its best rate",
            unit="percentage points",
            differences=grid.differences(standardised, raw, _accuracy),
            margin=POINTS,
            favours="the net is more accurate on standardised columns",
            would_change="an interval that reaches below +5 points",
            spread=spread,
        ),
        Comparison(
            name="Test accuracy, batch norm as first layer − raw, each at its best rate",
            unit="percentage points",
            differences=grid.differences(batch_norm, raw, _accuracy),
            margin=POINTS,
            favours="the net is more accurate with batch norm as its first layer",
            would_change="an interval that reaches below +5 points",
            spread=spread,
        ),
        Comparison(
            name="Usable rates, batch norm as first layer − raw",
            unit="steps of the grid, each a factor of 4",
            differences=tuple(a - b for a, b in zip(usable["batch norm"], usable["raw"], strict=True)),
            margin=FACTORS,
            favours="batch norm trains over a wider range of rates",
            would_change="an interval that reaches below 1",
            spread=spread,
        ),
        Comparison(
            name="Test accuracy, batch norm as first layer − standardised: no difference",
            unit="percentage points",
            differences=grid.differences(batch_norm, standardised, _accuracy),
            margin=ALIKE,
            favours="the two differ",
            would_change="an interval not wholly within ±3 points",
            kind=Kind.EQUIVALENCE,
            spread=spread,
        ),
    ]


def _accuracy(record: Record) -> float:
    """Return the final accuracy in percent, the mean of the last 50 steps."""
    return 100 * float(mean(record["accuracy"][-WINDOW:]))


def _confidence(record: Record) -> float:
    """Return minus the final test loss: of two rates with equal accuracy, the surer one is better."""
    return -mean(math.inf if loss is None else loss for loss in record["test_loss"][-WINDOW:])


def _usable(grid: Grid, arm: str) -> list[int]:
    """Return at how many rates each seed trained: twice the chance of three classes, half the first loss."""

    def trained(record: Record) -> float:
        loss = record["train_loss"]
        learned = mean(record["train_accuracy"][-WINDOW:]) > 2 / 3
        return float(learned and not record["diverged"] and loss is not None and loss < record["first_loss"] / 2)

    return [
        int(sum(seed)) for seed in zip(*(grid.values((arm, rate), trained) for rate in grid.rates), strict=True)
    ]


def _steps(grid: Grid) -> Measure:
    def measure(record: Record) -> float:
        index = first_crossing(record["accuracy"], TARGET, WINDOW)
        return grid.steps if index is None else (index + 1) * EVERY

    return measure


def _protocol(grid: Grid) -> str:
    return (
        f"Data: scikit-learn's wine, 178 × 13, three classes; each seed draws a stratified split 142/36. "
        f"Network: 13-32-32-3, ReLU, W ~ N(0, 2/inputs), biases 0; columns raw, standardised by the training set's "
        f"mean and deviation, or normalised by batch norm as the first layer. Plain SGD, batch 32, {grid.steps} "
        f"steps, rates "
        f"{grid.rates[0]:.2g} to {grid.rates[-1]:g} in steps of 4. {grid.scale.seeds} paired seeds: the same "
        f"split, initial weights and batches in all arms."
    )


def _answer(
    grid: Grid, endpoints: Sequence[Endpoint], best: Mapping[str, Cell], usable: Mapping[str, Sequence[float]]
) -> str:
    raw, standardised, batch_norm = (mean(grid.values(cell, _accuracy)) for cell in best.values())
    gain = endpoints[0]
    return (
        f"On raw columns the net reached {raw:.0f} % test accuracy, on standardised ones {standardised:.0f} % "
        f"(difference {gain.estimate:+.0f} points, {gain.low:+.0f} to {gain.high:+.0f}), with batch norm as first "
        f"layer {batch_norm:.0f} %. It trained at {mean(usable['raw']):.1f}, {mean(usable['standardised']):.1f} "
        f"and {mean(usable['batch norm']):.1f} of {len(grid.rates)} rates."
    )


def _rate_figure(grid: Grid) -> Figure:
    traces = [
        plots.whiskers(words, colour, grid.rates, [grid.values((arm, rate), _accuracy) for rate in grid.rates])
        for (arm, words), colour in zip(ARMS.items(), COLOURS, strict=True)
    ]
    picture = plots.figure(
        traces,
        plots.axis("learning rate", logarithmic=True),
        plots.axis("final test accuracy (%)", range=[0, 101]),
    )
    caption = f"Mean over {grid.scale.seeds} splits and its 95 % interval. A third is chance."
    return Figure("Accuracy at each learning rate", caption, picture)


def _accuracy_figure(grid: Grid, best: Mapping[str, Cell]) -> Figure:
    x = [EVERY * (index + 1) for index in range(grid.steps // EVERY)]
    traces: list[plots.Trace] = []
    for (arm, words), colour in zip(ARMS.items(), COLOURS, strict=True):
        name = f"{words}, rate {best[arm][1]:.2g}"
        traces += plots.band(name, colour, x, grid.curves(best[arm], "accuracy", 100))
    picture = plots.figure(
        traces,
        plots.axis("training steps", logarithmic=True),
        plots.axis("test accuracy (%)", range=[0, 101]),
    )
    caption = f"Each arm at its best rate; mean over {grid.scale.seeds} splits and its 95 % interval."
    return Figure("Test accuracy during training", caption, picture)


def _table(grid: Grid, best: Mapping[str, Cell], usable: Mapping[str, Sequence[float]]) -> Table:
    rows = []
    for arm, cell in best.items():
        steps = median(grid.values(cell, _steps(grid)))
        rows.append(
            (
                ARMS[arm],
                f"{cell[1]:.2g}",
                f"{mean(grid.values(cell, _accuracy)):.1f}",
                f"{-mean(grid.values(cell, _confidence)):.3f}",
                f"≥ {grid.steps}" if steps == grid.steps else f"{steps:.0f}",
                f"{mean(usable[arm]):.1f}",
            )
        )
    columns = (
        "arm",
        "best rate",
        "accuracy %",
        "test loss",
        "median steps to 90 %",
        f"usable of {len(grid.rates)} rates",
    )
    return Table("Each arm at its best rate", columns, tuple(rows))


EXPERIMENT = Experiment(NAME, TITLE, CLAIM, plan, train, analyse, cost=0.15, stack_size=64)
