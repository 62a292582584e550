"""Is training faster with batch norm? The net of Ioffe & Szegedy 2015, figure 1, on scikit-learn's digits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, median

import torch

from evenorm.lab import plots
from evenorm.lab.data import digits
from evenorm.lab.experiment import Experiment, Scale
from evenorm.lab.grid import Cell, Grid, Measure
from evenorm.lab.networks import Sigmoid, initialise_, perceptron
from evenorm.lab.results import Analysis, Claim, Endpoint, Figure, Published, Table
from evenorm.lab.statistics import Comparison, first_crossing, judge, paired_interval
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

NAME, TITLE = "speed", "Training speed"
CLAIM = Claim(
    korean="학습 속도 & 학습 결과가 개선된다 (Higer learning rate 적용 가능). 핵심은 학습 속도의 향상이다.",
    english="Training speed and the trained result improve (higher learning rates become usable). "
    "The core is faster training.",
    source="The document, “advantages of batch normalisation”; Ioffe & Szegedy 2015, section 4.1 and figure 1a",
    question="How many times fewer steps to 90 % test accuracy with batch norm, and is the final accuracy higher?",
)

ARMS = {"none": "without batch norm", "batch norm": "with batch norm"}
COLOURS = (plots.VERMILION, plots.BLUE)
RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
EVERY, WINDOW, TARGET = 25, 2, 0.90  # evaluated every 25 steps; 2 evaluations are a moving average over 50 steps
DOUBLINGS = 1.0  # margin: twice as fast; the pilot seeds gave +3.3, +3.6, +3.4
POINTS = 1.0  # margin on the final accuracy: what 360 test images resolve; the pilot seeds gave +1.2, +2.8, +2.8
RULE = (
    "Measure: the first step at which test accuracy, evaluated every 25 steps and averaged over 50, reaches 90 %; "
    "never reached counts as the last step, which can only hide a difference. REPRODUCED if the 95 % interval "
    "of log₂(steps without / steps with), each arm at its best rate, lies above 1 (at least twice as fast), WEAK "
    "if above 0 only, CONTRADICTED if below 0, INCONCLUSIVE otherwise. Best rates are chosen on pilot seeds "
    "1000-1002, which are then left out. Beside it, under Holm's rule for all three: steps at equal rates, and "
    "the final accuracy with a margin of 1 percentage point."
)


PUBLISHED = (
    Published(
        "curves only: with batch norm faster, and to a higher test accuracy",
        "binary MNIST, 3 hidden layers of 100 sigmoid units, batch 60, 50 000 steps; rate, initial scale unstated",
        "Ioffe & Szegedy 2015, figure 1a",
    ),
    Published(
        "13.3 M steps against 31.0 M to 72.2 %: 2.33 times fewer (batch norm alone, same rate)",
        "Inception on ImageNet, rate 0.0015, batch 32",
        "Ioffe & Szegedy 2015, figure 3",
    ),
    Published(
        "2.1 M steps against 31.0 M to 72.2 %: 14.8 times fewer (rate × 5 and six other changes)",
        "Inception on ImageNet, BN-x5",
        "Ioffe & Szegedy 2015, figure 3 and section 4.2.1",
    ),
)


def plan(scale: Scale) -> list[Trial]:
    """Both arms over all rates, for the pilot seeds and the paired ones."""
    rates = RATES[3:] if scale.quick else RATES
    steps = settings(steps=1000 if scale.quick else 3000)
    seeds = (*PILOT_SEEDS, *scale.paired)
    return [Trial(NAME, 1, arm, seed, rate, steps) for arm in ARMS for rate in rates for seed in seeds]


def train(trials: Sequence[Trial]) -> list[Record]:
    """Train 64-100-100-100-10 with sigmoids, W ~ N(0, 0.1²), batch 60, plain SGD."""
    splits = [digits()] * len(trials)
    test = test_samples(splits)
    normalise = trials[0].arm == "batch norm"
    network = perceptron(len(trials), (64, 100, 100, 100, 10), Sigmoid, normalise=normalise)
    initialise_(network, [trial.seed for trial in trials], lambda inputs: 0.1)
    curves = Curves(len(trials))
    losses = []
    for step, loss in descend(network, training_samples(splits), trials, batch=60, steps=trials[0]["steps"]):
        losses.append(loss)
        if step % EVERY == 0:
            accuracy, test_loss = score(network, test)
            curves.append(accuracy=accuracy, test_loss=test_loss)
    history = torch.stack(losses)
    curves.put(diverged=diverged(history), train_loss=final_loss(history))
    return curves.records()


def analyse(records: Mapping[Trial, Record], scale: Scale) -> Analysis:
    """Compare the arms at each one's best rate, at equal rates, and by final accuracy."""
    grid = Grid(records, scale)
    best = {arm: grid.best(arm, _quickness(grid), _accuracy) for arm in ARMS}
    without, with_ = best.values()
    same = ("batch norm", without[1])
    endpoints = judge(
        [
            Comparison(
                name="Steps to 90 %, each arm at its best rate",
                unit="doublings: log₂(steps without / steps with)",
                differences=grid.differences(with_, without, _quickness(grid)),
                margin=DOUBLINGS,
                favours="batch norm needs fewer than half the steps",
                would_change="an interval that reaches below 1: less than twice as fast",
            ),
            Comparison(
                name=f"Steps to 90 %, both at rate {without[1]:g}, the best one without batch norm",
                unit="doublings: log₂(steps without / steps with)",
                differences=grid.differences(same, without, _quickness(grid)),
                margin=DOUBLINGS,
                favours="batch norm needs fewer than half the steps at the other arm's best rate",
                would_change="an interval that reaches below 1",
            ),
            Comparison(
                name="Final test accuracy, each arm at its best rate",
                unit="percentage points",
                differences=grid.differences(with_, without, _accuracy),
                margin=POINTS,
                favours="batch norm ends more accurate",
                would_change="an interval that reaches below +1 point",
            ),
        ]
    )
    return Analysis(
        experiment=NAME,
        title=TITLE,
        claim=CLAIM,
        protocol=_protocol(grid),
        rule=RULE,
        verdict=endpoints[0].verdict,
        answer=_answer(grid, endpoints, without, with_),
        endpoints=endpoints,
        figures=(_accuracy_figure(grid, best), _rate_figure(grid)),
        published=PUBLISHED,
        command=scale.command(NAME),
        tables=(_table(grid),),
        notes=(
            "Steps are counted in 25s: a net that needs 75 of them is known to a third.",
            *grid.notes(best, ARMS),
            *scale.notes(),
        ),
        seeds=scale.seeds,
        configuration={"steps": grid.steps, "rates": list(grid.rates), "best": dict(best.values())},
    )


def _steps(grid: Grid) -> Measure:
    def measure(record: Record) -> float:
        index = first_crossing(record["accuracy"], TARGET, WINDOW)
        return grid.steps if index is None else (index + 1) * EVERY

    return measure


def _quickness(grid: Grid) -> Measure:
    return lambda record: -math.log2(_steps(grid)(record))


def _accuracy(record: Record) -> float:
    """Return the final accuracy in percent, the mean of the last four evaluations."""
    return 100 * float(mean(record["accuracy"][-4:]))


def _protocol(grid: Grid) -> str:
    return (
        f"Data: scikit-learn's digits, x/16, one stratified split 1437/360. Network: 64-100-100-100-10, sigmoid, "
        f"W ~ N(0, 0.1²), biases 0; in one arm batch norm before each sigmoid. Plain SGD, batch 60, {grid.steps} "
        f"steps, rates {', '.join(f'{rate:g}' for rate in grid.rates)}. {grid.scale.seeds} paired seeds: the same "
        f"initial weights and the same batches in both arms."
    )


def _answer(grid: Grid, endpoints: Sequence[Endpoint], without: Cell, with_: Cell) -> str:
    speed, _, final = endpoints
    ratio, low, high = (2**value for value in (speed.estimate, speed.low, speed.high))
    a, b = (f"{median(grid.values(cell, _steps(grid))):.0f} (rate {cell[1]:g})" for cell in (with_, without))
    return (
        f"With batch norm 90 % test accuracy took {ratio:.1f} times fewer steps (95 % interval {low:.1f} to "
        f"{high:.1f}): {a} against {b}, medians over seeds. The final accuracy changed by {final.estimate:+.1f} "
        f"points ({final.low:+.1f} to {final.high:+.1f})."
    )


def _accuracy_figure(grid: Grid, best: Mapping[str, Cell]) -> Figure:
    x = [EVERY * (index + 1) for index in range(grid.steps // EVERY)]
    traces: list[plots.Trace] = []
    owners: list[Cell] = []
    for (arm, words), colour in zip(ARMS.items(), COLOURS, strict=True):
        for cell in ((arm, rate) for rate in grid.rates):
            curves = grid.curves(cell, "accuracy", 100)
            name = f"{words}, rate {cell[1]:g}"
            traces += plots.band(name, colour, x, curves, visible=cell == best[arm])
            owners += [cell] * 2
    views = [[best[cell[0]] == cell for cell in owners]]
    views += [[rate == cell[1] for cell in owners] for rate in grid.rates]
    labels = ["each at its best rate", *(f"both at rate {rate:g}" for rate in grid.rates)]
    line, label = plots.level(100 * TARGET, "90 %")
    picture = plots.figure(
        traces,
        plots.axis("training steps", logarithmic=True),
        plots.axis("test accuracy (%)", range=[0, 101]),
        updatemenus=plots.buttons(labels, views),
        shapes=[line],
        annotations=[label],
    )
    caption = f"Mean over {grid.scale.seeds} seeds and its 95 % interval. The menu shows both arms at equal rates."
    return Figure("Test accuracy during training", caption, picture)


def _rate_figure(grid: Grid) -> Figure:
    traces = [
        plots.whiskers(words, colour, grid.rates, [grid.values((arm, rate), _steps(grid)) for rate in grid.rates])
        for (arm, words), colour in zip(ARMS.items(), COLOURS, strict=True)
    ]
    picture = plots.figure(
        traces,
        plots.axis("learning rate", logarithmic=True),
        plots.axis("steps to 90 % test accuracy", logarithmic=True),
    )
    caption = f"Mean over seeds and its 95 % interval; a seed that never got there counts as {grid.steps} steps."
    return Figure("Steps needed at each learning rate", caption, picture)


def _table(grid: Grid) -> Table:
    rows = []
    for rate in grid.rates:
        cells = [(arm, rate) for arm in ARMS]
        middle = [median(grid.values(cell, _steps(grid))) for cell in cells]
        interval = paired_interval(grid.differences(cells[1], cells[0], _quickness(grid)))
        rows.append(
            (
                f"{rate:g}",
                *(f"≥ {grid.steps}" if steps == grid.steps else f"{steps:.0f}" for steps in middle),
                f"{2**interval.mean:.1f} ({2**interval.low:.1f} to {2**interval.high:.1f})",
                *(f"{mean(grid.values(cell, _accuracy)):.1f}" for cell in cells),
            )
        )
    columns = ("rate", "steps without", "steps with", "times fewer", "final % without", "final % with")
    return Table("Both arms at equal rates (median steps, mean final accuracy)", columns, tuple(rows))


EXPERIMENT = Experiment(NAME, TITLE, CLAIM, plan, train, analyse)
