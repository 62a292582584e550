"""Which statistics should a trained network be evaluated with: averages, exact ones, or the test batch's own?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean

import torch
from torch import Tensor, nn

import evenorm
from evenorm.averages import Average
from evenorm.lab import plots
from evenorm.lab.data import digits
from evenorm.lab.evaluation import Statistics, by_member, exact_statistics, logits, own_statistics
from evenorm.lab.experiment import Experiment, Scale
from evenorm.lab.layer_page import LayerView
from evenorm.lab.networks import BatchNorm, Sigmoid, initialise_, perceptron
from evenorm.lab.results import Analysis, Claim, Endpoint, Figure, Published, Table
from evenorm.lab.statistics import Comparison, Kind, combine, judge
from evenorm.lab.training import (
    Curves,
    Samples,
    descend,
    grade,
    test_samples,
    training_samples,
)
from evenorm.lab.trials import Record, Trial, random_seed, settings

NAME, TITLE = "inference", "Statistics at inference"
CLAIM = Claim(
    korean="추론 단계의 배치 정규화: 평균과 분산에 고정값을 사용한다. 테스트 단계에서는 배치 단위로 "
    "평균/분산을 구하기 어렵다. 고정된 평균과 분산은 학습 과정에서 이동 평균 or 지수 평균을 통하여 계산한 값이다.",
    english="At inference mean and variance are fixed values, since they are hard to get batch by batch in the "
    "test phase; the fixed values are computed during training by a moving average or an exponential average.",
    source="The document, “batch normalisation at inference”; Ioffe & Szegedy 2015, algorithm 2",
    question="Do the averages kept in training serve as well as exact statistics of the training set, and how "
    "large must a test batch be for its own statistics to do?",
)

# One trained network a seed; an arm is a way to get its statistics.
AVERAGES: dict[str, Average] = {
    "exponential 0.1": evenorm.Exponential(0.1),
    "exponential 0.01": evenorm.Exponential(0.01),
    "debiased 0.01": evenorm.Exponential(0.01, debias=True),
    "cumulative": evenorm.Cumulative(),
    "window 100": evenorm.Window(100),
}
EXACT = "exact"  # of the whole training set in one batch, with the weights as they are
SIZES = (1, 2, 4, 8, 15, 30, 60, 120, 180, 360)  # of test batches; each divides the test set of 360
MOMENTS = (5, 10, 20, 50, 100, 200, 500, 1000)  # training steps after which all are evaluated
RATE, SMALL, EARLY = 0.3, 4, 10
ALIKE = 0.5  # margin of “as well as”, two test images of 360; pilot seeds 1000-1002 gave 0.0, -0.3, 0.0
WORSE = 5.0  # margin of “worse”; they gave +14, +20, +15 for batches of 4, and +52, +52, +74 after 10 steps
RULE = (
    "Measure: accuracy on the 360 test images after training. REPRODUCED if (1) the exponential average (momentum "
    "0.1) and (2) the moving average of the last 100 batches both equal exact statistics, the 95 % interval of "
    "the difference within ±0.5 percentage points, and (3) a test batch's own statistics at size 4 are worse than "
    "exact ones, the interval above 5 points. Otherwise the worst of the three verdicts; all comparisons under "
    "Holm's rule. Beside it: the plain average of all batches (within ±0.5), and after only 10 steps the "
    "exponential average, which is then still 35 % its initial 0 and 1, against exact statistics (above 5 points)."
)
ALONE = (
    "A batch of one value per channel cannot be normalised: its mean is itself and its variance 0, so every image "
    "gets the same answer, made of the biases alone. Chance is 10 %."
)
PUBLISHED = (
    Published(
        "fixed statistics re-estimated over 200 batches, by default",
        "fvcore's precise batch norm, the code of Wu & Johnson 2021",
        "facebookresearch/fvcore, precise_bn.py",
    ),
    Published(
        "m/(m − 1) · E[batch variance] over several batches, moving averages to follow training",
        "the original inference rule",
        "Ioffe & Szegedy 2015, section 3.1 and algorithm 2",
    ),
)


def plan(scale: Scale) -> list[Trial]:
    """Train one network a seed."""
    steps = settings(steps=200 if scale.quick else 1000)
    return [Trial(NAME, 1, "one network", seed, RATE, steps) for seed in scale.paired]


def train(trials: Sequence[Trial]) -> list[Record]:
    """Train 64-100-100-100-10 with batch norm and sigmoids, batch 60, and evaluate it in every way."""
    members = len(trials)
    splits = [digits()] * members
    training, test = training_samples(splits), test_samples(splits)
    network = perceptron(members, (64, 100, 100, 100, 10), Sigmoid, normalise=True)
    initialise_(network, [trial.seed for trial in trials], lambda inputs: 0.1)
    trackers = {name: _track(network, average) for name, average in AVERAGES.items()}
    curves = Curves(members)
    for step, _ in descend(network, training, trials, batch=60, steps=trials[0]["steps"]):
        if step not in MOMENTS:
            continue
        for name, layers in trackers.items():
            fixed = [
                (by_member(layer.running_mean, members), by_member(layer.running_var, members)) for layer in layers
            ]
            # B023: the lambda is called and forgotten before `fixed` changes.
            _evaluate(curves, name, logits(network, test.x, lambda index, x: fixed[index]), test)  # noqa: B023
        _evaluate(curves, EXACT, logits(network, test.x, exact_statistics(network, training)), test)
    curves.put(**_unit(network, training, test))
    shuffled = _shuffled(test, trials)
    for size in SIZES:
        _evaluate(curves, f"batch of {size}", logits(network, shuffled.x, own_statistics(size)), shuffled)
    return curves.records()


def _track(network: nn.Sequential, average: Average) -> list[evenorm.BatchNorm1d]:
    """Return layers that see what the network's batch norms see in training, and only keep statistics of it."""
    trackers = []
    for layer in network:
        if isinstance(layer, BatchNorm):
            tracker = evenorm.BatchNorm1d(layer.layer.num_features, affine=False, average=average)
            layer.layer.register_forward_pre_hook(_observe(tracker))
            trackers.append(tracker)
    return trackers


def _observe(tracker: evenorm.BatchNorm1d) -> Callable[[nn.Module, tuple[Tensor]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
        with torch.no_grad():
            tracker(inputs[0].detach())

    return hook


def _unit(network: nn.Sequential, training: Samples, test: Samples) -> dict[str, Tensor]:
    """Return what the report takes apart: the last hidden layer's first unit, its inputs and four numbers."""
    exact, seen = exact_statistics(network, training), list[Tensor]()

    def keep(index: int, x: Tensor) -> Statistics:
        seen.append(x)
        return exact(index, x)

    logits(network, test.x, keep)
    layer = [module.layer for module in network if isinstance(module, BatchNorm)][-1]
    average, variance = exact(len(seen) - 1, seen[-1])
    affine = (by_member(parameter, test.x.shape[0]) for parameter in (layer.weight, layer.bias))
    numbers = torch.cat([*affine, average, torch.sqrt(variance + layer.eps)], dim=2)
    return {"unit inputs": seen[-1][:, 0], "unit": numbers[:, 0]}


def layer_view(record: Record) -> LayerView:
    """Return the unit that the report takes apart."""
    gamma, beta, average, deviation = record["unit"]
    return LayerView("hidden layer 3, unit 1", record["unit inputs"], gamma, beta, average, deviation, "sigmoid")


def _shuffled(test: Samples, trials: Sequence[Trial]) -> Samples:
    """Return the test set in each seed's own order: which images share a batch is part of the draw."""
    orders = []
    for trial in trials:
        generator = torch.Generator().manual_seed(random_seed(trial.seed, "test order"))
        orders.append(torch.randperm(test.y.shape[1], generator=generator))
    return test.batch(torch.stack(orders))


def _evaluate(curves: Curves, name: str, answers: Tensor, samples: Samples) -> None:
    accuracy, loss = grade(answers, samples.y)
    curves.append(**{f"{name}, accuracy": accuracy, f"{name}, loss": loss})


def analyse(records: Mapping[Trial, Record], scale: Scale) -> Analysis:
    """Compare every source of statistics with exact ones."""
    trials = sorted(records, key=lambda trial: trial.seed)
    runs = [records[trial] for trial in trials]
    steps = [step for step in MOMENTS if step <= trials[0]["steps"]]
    endpoints = judge(
        [
            _alike(runs, "exponential 0.1", "the exponential average (momentum 0.1)"),
            _alike(runs, "window 100", "the moving average of the last 100 batches"),
            Comparison(
                name=f"Exact statistics − the test batch's own at size {SMALL}",
                unit="percentage points of test accuracy",
                differences=_difference(runs, EXACT, f"batch of {SMALL}"),
                margin=WORSE,
                favours="a small test batch's own statistics are worse than fixed ones",
                would_change="an interval that reaches below +5 points",
            ),
            _alike(runs, "cumulative", "the plain average of all batches"),
            Comparison(
                name=f"After {EARLY} steps: exact statistics − the exponential average (momentum 0.1)",
                unit="percentage points of test accuracy",
                differences=_difference(runs, EXACT, "exponential 0.1", at=steps.index(EARLY)),
                margin=WORSE,
                favours="early in training the exponential average lags behind",
                would_change="an interval that reaches below +5 points",
            ),
        ]
    )
    return Analysis(
        experiment=NAME,
        title=TITLE,
        claim=CLAIM,
        protocol=(
            f"Data: scikit-learn's digits, x/16, one stratified split 1437/360. Network: 64-100-100-100-10, batch "
            f"norm before each sigmoid, W ~ N(0, 0.1²). Plain SGD, rate {RATE:g}, batch 60, {steps[-1]} steps. One "
            f"network a seed, {scale.seeds} seeds; all averages watch the same training. Test batches are drawn "
            f"at random."
        ),
        rule=RULE,
        verdict=combine(endpoint.verdict for endpoint in endpoints[:3]),
        answer=_answer(runs, endpoints),
        endpoints=endpoints,
        figures=(_size_figure(runs), _lag_figure(runs, steps)),
        published=PUBLISHED,
        command=scale.command(NAME),
        tables=(_table(runs),),
        notes=(
            ALONE,
            "One test image of 360 is 0.28 points.",
            *scale.notes(),
        ),
        seeds=scale.seeds,
        configuration={"steps": steps[-1], "rate": RATE},
    )


def _accuracy(run: Record, source: str, at: int = -1) -> float:
    return 100 * float(run[f"{source}, accuracy"][at])


def _difference(runs: Sequence[Record], more: str, less: str, at: int = -1) -> tuple[float, ...]:
    def last(source: str) -> int:
        return -1 if source.startswith("batch") else at

    return tuple(_accuracy(run, more, last(more)) - _accuracy(run, less, last(less)) for run in runs)


def _alike(runs: Sequence[Record], source: str, words: str) -> Comparison:
    return Comparison(
        name=f"{words[0].upper()}{words[1:]} − exact statistics: no difference",
        unit="percentage points of test accuracy",
        differences=_difference(runs, source, EXACT),
        margin=ALIKE,
        favours="the two differ",
        would_change="an interval not wholly within ±0.5 points",
        kind=Kind.EQUIVALENCE,
    )


def _answer(runs: Sequence[Record], endpoints: Sequence[Endpoint]) -> str:
    def percent(source: str) -> str:
        return f"{mean(_accuracy(run, source) for run in runs):.1f} %"

    return (
        f"Exact statistics gave {percent(EXACT)} test accuracy, the exponential average "
        f"{percent('exponential 0.1')}, the window {percent('window 100')}, the plain average of all batches "
        f"{percent('cumulative')}. A test batch's own statistics gave {percent('batch of 1')} alone, "
        f"{percent('batch of 4')} in batches of 4 and {percent('batch of 30')} in batches of 30. After {EARLY} "
        f"steps the exponential average was {endpoints[4].estimate:.0f} points behind exact statistics."
    )


COLOURS = dict(
    zip(
        (EXACT, *AVERAGES),
        ("#888888", plots.BLUE, plots.SKY, plots.PURPLE, plots.ORANGE, plots.GREEN),
        strict=True,
    )
)


def _size_figure(runs: Sequence[Record]) -> Figure:
    own = [[_accuracy(run, f"batch of {size}") for run in runs] for size in SIZES]
    traces = [plots.whiskers("the test batch's own", plots.VERMILION, SIZES, own)]
    for source, colour in COLOURS.items():
        height = mean(_accuracy(run, source) for run in runs)
        traces.append(plots.line(source, colour, (SIZES[0], SIZES[-1]), (height, height), dash="dash"))
    picture = plots.figure(
        traces,
        plots.axis("images in a test batch", logarithmic=True),
        plots.axis("test accuracy (%)", range=[0, 101]),
    )
    caption = (
        f"Mean over {len(runs)} seeds and its 95 % interval; dashed, the fixed statistics. A batch of one image is "
        "normalised to nothing but the biases."
    )
    return Figure("Accuracy by size of the test batch", caption, picture)


def _lag_figure(runs: Sequence[Record], steps: Sequence[int]) -> Figure:
    traces: list[plots.Trace] = []
    for source, colour in COLOURS.items():
        curves = [[100 * value for value in run[f"{source}, accuracy"]] for run in runs]
        traces += plots.band(source, colour, steps, curves)
    picture = plots.figure(
        traces,
        plots.axis("training steps", logarithmic=True),
        plots.axis("test accuracy (%)", range=[0, 101]),
    )
    caption = (
        "The same networks, evaluated during training. After t batches an exponential average of momentum m is "
        "still (1 − m)^t its initial mean 0 and variance 1: at m = 0.01 and 100 steps 37 %. Debiased, it is not."
    )
    return Figure("Lag of the averages during training", caption, picture)


def _table(runs: Sequence[Record]) -> Table:
    rows = []
    for source in (EXACT, *AVERAGES, *(f"batch of {size}" for size in SIZES)):
        losses = [run[f"{source}, loss"][-1] for run in runs]
        behind = mean(_difference(runs, source, EXACT))
        accuracy = mean(_accuracy(run, source) for run in runs)
        rows.append((source, f"{accuracy:.2f}", f"{behind:+.2f}", f"{mean(losses):.4f}"))
    columns = ("statistics", "test accuracy %", "− exact, points", "test loss")
    return Table("After training, mean over seeds", columns, tuple(rows))


EXPERIMENT = Experiment(NAME, TITLE, CLAIM, plan, train, analyse, cost=4.0, stack_size=5)
