"""How far exponential averages lag, and how many samples exact statistics need: the part of `inference`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, variance

import torch
from torch import nn

import evenorm
from evenorm.lab import plots
from evenorm.lab.data import digits
from evenorm.lab.evaluation import by_member, exact_statistics, logits, track
from evenorm.lab.experiment import Scale
from evenorm.lab.language import Text
from evenorm.lab.networks import initialise_, perceptron
from evenorm.lab.results import Figure
from evenorm.lab.statistics import Comparison, Kind
from evenorm.lab.training import Curves, Samples, descend, grade, test_samples, training_samples
from evenorm.lab.trials import Record, Trial, random_seed, settings

ARM = "lag"
MOMENTA = {0.1: Text("exponential 0.1", "지수 평균 0.1"), 0.01: Text("exponential 0.01", "지수 평균 0.01")}
COUNTS = (32, 100, 300, 1437)  # training samples that exact statistics are taken of
RATE, BATCH = 1.0, 479  # three batches an epoch, the training set's 1437
NOISIER = 0.0  # margin on ln(variance ratio); the pilot seeds gave +4.5, +5.5, +6.6
ALIKE = 0.5  # margin in points between 300 and all samples; they gave -0.13, -0.14, -0.14
RULE = Text(
    " Apart from these, under Holm's rule for the two, and not part of the verdict, after every epoch in the "
    "second half of the training of a net with three batches an epoch: whether the test error with the "
    "exponential average of momentum 0.01 varies more than with exact statistics (ln of the ratio of variances "
    "above 0), and whether exact statistics of 300 samples do as well as those of all 1437 (mean error within "
    "±0.5 points).",
    " 이와 따로, 둘에 Holm의 규칙을 적용하되 판정에는 넣지 않고, 한 에폭에 배치 셋으로 학습하는 신경망에서 뒤 "
    "절반의 에폭마다: 모멘텀 0.01의 지수 평균으로 잰 시험 오류가 정확한 통계로 잰 것보다 더 흔들리는가(분산의 비의 "
    "ln이 0보다 위), 그리고 표본 300개의 정확한 통계가 1437개 모두의 통계만큼 좋은가(평균 오류가 ±0.5포인트 안).",
)


PROTOCOL = Text(
    f"Lag: 64-64-64-10, ReLU, W ~ N(0, 2/inputs), rate {RATE:g}, batch {BATCH}, three batches an epoch.",
    f"뒤처짐: 64-64-64-10, ReLU, W ~ N(0, 2/입력 수), 학습률 {RATE:g}, 배치 {BATCH}, 한 에폭에 배치 셋.",
)


def plan(scale: Scale) -> list[Trial]:
    """Train one network a seed."""
    steps = settings(steps=60 if scale.quick else 120)
    return [Trial("inference", 1, ARM, seed, RATE, steps) for seed in scale.paired]


def train(trials: Sequence[Trial]) -> list[Record]:
    """Train 64-64-64-10 with ReLU and batch norm, batch 479, and evaluate it after each epoch.

    One by one: products of matrices this large are rounded otherwise in a stack, and have no overhead to save.
    """
    return [record for trial in trials for record in _train([trial])]


def _train(trials: Sequence[Trial]) -> list[Record]:
    members = len(trials)
    splits = [digits()] * members
    training, test = training_samples(splits), test_samples(splits)
    network = perceptron(members, (64, 64, 64, 10), nn.ReLU, normalise=True)
    initialise_(network, [trial.seed for trial in trials], lambda inputs: math.sqrt(2 / inputs))
    trackers = {momentum: track(network, evenorm.Exponential(momentum)) for momentum in MOMENTA}
    chosen = {count: _some(training, trials, count) for count in COUNTS}
    curves = Curves(members)
    for step, _ in descend(network, training, trials, batch=BATCH, steps=trials[0]["steps"]):
        if step % 3:
            continue
        network.eval()
        exact = exact_statistics(network, training)
        for momentum, layers in trackers.items():
            fixed = [(by_member(one.running_mean, members), by_member(one.running_var, members)) for one in layers]
            # B023: the lambda is called and forgotten before `fixed` changes.
            answers = logits(network, test.x, lambda index, x: fixed[index])  # noqa: B023
            last = len(fixed) - 1
            off = ((fixed[last][0] - exact(last, test.x)[0]).abs() / exact(last, test.x)[1].sqrt()).flatten(1)
            curves.append(**{f"error {momentum}": 1 - grade(answers, test.y)[0], f"off {momentum}": off.mean(1)})
        for count, samples in chosen.items():
            answers = logits(network, test.x, exact_statistics(network, samples))
            curves.append(**{f"error {count}": 1 - grade(answers, test.y)[0]})
    return curves.records()


def _some(training: Samples, trials: Sequence[Trial], count: int) -> Samples:
    """Return so many training samples, drawn by each seed."""
    orders = []
    for trial in trials:
        generator = torch.Generator().manual_seed(random_seed(trial.seed, f"{count} samples"))
        orders.append(torch.randperm(training.y.shape[1], generator=generator)[:count])
    return training.batch(torch.stack(orders))


def comparisons(runs: Sequence[Record]) -> list[Comparison]:
    """Return what is compared, with the margins that were fixed before the run."""
    return [
        Comparison(
            name=Text(
                "Variance of the test error over epochs, exponential average (0.01) over exact statistics",
                "에폭에 걸친 시험 오류의 분산, 지수 평균(0.01) / 정확한 통계",
            ),
            unit=Text("ln of the ratio", "비의 ln"),
            differences=tuple(_spread(run, 0.01) - _spread(run, COUNTS[-1]) for run in runs),
            margin=NOISIER,
            favours=Text("the error with the exponential average varies more", "지수 평균으로 잰 오류가 더 변한다"),
            would_change=Text("an interval that reaches below 0", "0보다 아래에 이르는 구간"),
        ),
        Comparison(
            name=Text(
                "Exact statistics of 300 samples − of all 1437: no difference",
                "표본 300개의 정확한 통계 − 1437개 모두의 통계: 차이 없음",
            ),
            unit=Text("percentage points of test error, mean over epochs", "시험 오류의 퍼센트포인트, 에폭의 평균"),
            differences=tuple(100 * (mean(_late(run, 300)) - mean(_late(run, COUNTS[-1]))) for run in runs),
            margin=ALIKE,
            favours=Text("the two differ", "둘은 다르다"),
            would_change=Text("an interval not wholly within ±0.5 points", "±0.5포인트 안에 다 들지 않는 구간"),
            kind=Kind.EQUIVALENCE,
        ),
    ]


def _late(run: Record, source: float) -> list[float]:
    """Return the errors of the second half of the epochs."""
    errors: list[float] = run[f"error {source}"]
    return errors[len(errors) // 2 :]


def _spread(run: Record, source: float) -> float:
    """Return the log of the errors' variance, of no less than a quarter of one test image."""
    return math.log(max(variance(_late(run, source)), (0.25 / 360) ** 2))


def figure(runs: Sequence[Record]) -> Figure:
    """Show the test error after each epoch."""
    some: dict[float, Text] = {
        count: Text(f"exact, {count} samples", f"정확한 통계, 표본 {count}개") for count in COUNTS
    }
    sources = {**MOMENTA, **some}
    colours = (plots.BLUE, plots.SKY, plots.VERMILION, plots.ORANGE, plots.GREEN, "#888888")
    traces: list[plots.Trace] = []
    for (source, words), colour in zip(sources.items(), colours, strict=True):
        curves = [[100 * error for error in run[f"error {source}"]] for run in runs]
        traces += plots.band(words, colour, range(1, len(curves[0]) + 1), curves)
    picture = plots.figure(
        traces,
        plots.axis(Text("epochs of three batches", "배치 셋의 에폭")),
        plots.axis(Text("test error (%)", "시험 오류 (%)"), type="log"),
    )
    off = {momentum: mean(run[f"off {momentum}"][-1] for run in runs) for momentum in MOMENTA}
    short, long = off.values()
    caption = Text(
        f"One net a seed; mean over seeds and its 95 % interval. At the end the mean of the last layer is off by "
        f"{short:.2f} deviations with momentum 0.1 and by {long:.2f} with 0.01.",
        f"시드마다 신경망 하나. 시드에 대한 평균과 95 % 구간. 끝에서 마지막 층의 평균은 모멘텀 0.1에서 "
        f"표준편차의 {short:.2f}배, 0.01에서 {long:.2f}배 어긋난다.",
    )
    title = Text("Error after each epoch, few batches an epoch", "에폭마다의 오류, 한 에폭에 배치 몇 개")
    return Figure(title, caption, picture)
