"""The ImageNet table of Ioffe & Szegedy 2015 in miniature: how many times faster at 1, 5 and 30 times the rate.

A part of `speed`: its trials are that experiment's, under arms of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median

import torch
from torch import nn

from evenorm.lab import plots
from evenorm.lab.data import split_of
from evenorm.lab.experiment import Scale
from evenorm.lab.language import Text
from evenorm.lab.networks import Sigmoid, initialise_, perceptron
from evenorm.lab.results import Endpoint, Figure, Table
from evenorm.lab.statistics import Comparison, first_crossing, judge
from evenorm.lab.training import Curves, descend, diverged, score, test_samples, training_samples
from evenorm.lab.trials import Record, Trial, settings

BASE = 0.125  # half the largest rate at which the net without batch norm trained on every pilot seed
WIDTH, BATCH, EVERY = 32, 60, 10
REACH = 0.95  # the goal: this share of the best accuracy without batch norm at the base rate


@dataclass(frozen=True)
class Rung:
    """A net of the ladder: whether it is normalised, its rate in units of BASE, its sigmoids, ImageNet's figure."""

    words: Text
    normalise: bool
    times: float
    sigmoid: bool = False
    imagenet: str = "–"


RUNGS = {
    "ladder none × 1": Rung(Text("without, rate × 1", "없음, 학습률 × 1"), False, 1, imagenet="1"),
    "ladder none × 5": Rung(Text("without, rate × 5", "없음, 학습률 × 5"), False, 5, imagenet="–"),
    "ladder batch norm × 1": Rung(Text("with, rate × 1", "있음, 학습률 × 1"), True, 1, imagenet="2.33"),
    "ladder batch norm × 5": Rung(Text("with, rate × 5", "있음, 학습률 × 5"), True, 5, imagenet="14.8"),
    "ladder batch norm × 30": Rung(Text("with, rate × 30", "있음, 학습률 × 30"), True, 30, imagenet="11.5"),
    "ladder sigmoid none × 5": Rung(
        Text("without, sigmoids, rate × 5", "없음, sigmoid, 학습률 × 5"), False, 5, True
    ),
    "ladder sigmoid batch norm × 5": Rung(
        Text("with, sigmoids, rate × 5", "있음, sigmoid, 학습률 × 5"), True, 5, True
    ),
}
NONE, NONE_5, BN, BN_5, BN_30, SIGMOID, BN_SIGMOID = RUNGS
POINTS = 50.0  # margin of “only with batch norm sigmoids train”; the pilot seeds gave +87, +84, +76
RULE = Text(
    "The ladder is judged by itself, under Holm's rule for its four comparisons, and leaves the verdict alone: "
    "steps to 95 % of the best accuracy that the net without batch norm reaches at the base rate, ratios above "
    "1; final accuracy with ten layers of sigmoids, margin 50 points.",
    "사다리는 네 비교에 Holm의 규칙을 적용해 따로 판정하며 위의 판정을 바꾸지 않는다: 배치 정규화 없는 신경망이 "
    "기본 학습률에서 이르는 가장 높은 정확도의 95 %까지의 스텝, 비가 1보다 큰가. sigmoid 열 층에서의 마지막 "
    "정확도, 기준 폭 50퍼센트포인트.",
)
NOTE = Text(
    "ImageNet's rungs × 5 and × 30 changed six other things too (dropout, L2, decay of the rate, shuffling, …); "
    "ours change the rate alone. The base rates differ, and so do the nets' widths: compare the order, not the "
    "size.",
    "ImageNet의 × 5와 × 30은 다른 여섯 가지(dropout, L2, 학습률 감소, 섞기 등)도 바꾸었고, 여기서는 학습률만 "
    "바꾼다. 기본 학습률과 신경망의 폭도 다르므로 크기가 아니라 순서를 비교해야 한다.",
)


def plan(experiment: str, scale: Scale) -> list[Trial]:
    """Every rung for the paired seeds; the base rate was fixed on pilot seeds."""
    steps = settings(steps=300 if scale.quick else 600)
    return [
        Trial(experiment, 1, arm, seed, BASE * rung.times, steps)
        for arm, rung in RUNGS.items()
        for seed in scale.paired
    ]


def train(trials: Sequence[Trial]) -> list[Record]:
    """Train 5 hidden layers of 32 ReLUs, W ~ N(0, 2/inputs), or 10 of sigmoids, W ~ N(0, 0.1²)."""
    splits, rung = [split_of(trial, "digits") for trial in trials], RUNGS[trials[0].arm]
    depth, activation = (10, Sigmoid) if rung.sigmoid else (5, nn.ReLU)
    widths = (splits[0].features, *[WIDTH] * depth, splits[0].classes)
    network = perceptron(len(trials), widths, activation, normalise=rung.normalise)
    seeds = [trial.seed for trial in trials]
    initialise_(network, seeds, lambda inputs: 0.1 if rung.sigmoid else math.sqrt(2 / inputs))
    test, curves, losses = test_samples(splits), Curves(len(trials)), []
    for step, loss in descend(network, training_samples(splits), trials, batch=BATCH, steps=trials[0]["steps"]):
        losses.append(loss)
        if step % EVERY == 0:
            curves.append(accuracy=score(network, test)[0])
    curves.put(diverged=diverged(torch.stack(losses)))
    return curves.records()


class Ladder:
    """The records of every rung, seed by seed."""

    def __init__(self, records: Mapping[Trial, Record], scale: Scale) -> None:
        """Take the records of the ladder's trials."""
        self.seeds = scale.paired
        self.last = next(iter(records))["steps"]
        self._records = {(trial.arm, trial.seed): record for trial, record in records.items()}

    def accuracy(self, arm: str) -> list[float]:
        """Return each seed's best test accuracy in percent."""
        return [100 * max(self._records[arm, seed]["accuracy"]) for seed in self.seeds]

    def final(self, arm: str) -> list[float]:
        """Return each seed's final test accuracy in percent, the mean of the last five evaluations."""
        return [100 * mean(self._records[arm, seed]["accuracy"][-5:]) for seed in self.seeds]

    def steps(self, arm: str) -> list[float]:
        """Return the steps each seed needs to its goal, all of them where it never gets there."""
        found = []
        for seed in self.seeds:
            goal = REACH * max(self._records[NONE, seed]["accuracy"])
            index = first_crossing(self._records[arm, seed]["accuracy"], goal, 1)
            found.append(float(self.last if index is None else (index + 1) * EVERY))
        return found

    def doublings(self, slow: str, fast: str) -> tuple[float, ...]:
        """Return log₂ of the ratio of steps, seed by seed."""
        return tuple(math.log2(a / b) for a, b in zip(self.steps(slow), self.steps(fast), strict=True))


def endpoints(ladder: Ladder) -> tuple[Endpoint, ...]:
    """Judge the four rungs that the paper's table compares."""
    trained = tuple(b - a for a, b in zip(ladder.final(SIGMOID), ladder.final(BN_SIGMOID), strict=True))
    return judge(
        [
            _faster(
                ladder,
                NONE,
                BN,
                Text("batch norm at the same rate is faster", "같은 학습률에서 배치 정규화가 더 빠르다"),
            ),
            _faster(
                ladder,
                BN,
                BN_5,
                Text("batch norm at 5 times the rate is faster yet", "5배 학습률에서 배치 정규화가 더욱 빠르다"),
            ),
            _faster(
                ladder,
                NONE_5,
                NONE,
                Text(
                    "without batch norm 5 times the rate is slower, or fails",
                    "배치 정규화가 없으면 5배 학습률에서 더 느리거나 실패한다",
                ),
            ),
            Comparison(
                name=Text(
                    "Ladder: final accuracy of ten layers of sigmoids, with − without batch norm",
                    "사다리: sigmoid 열 층의 마지막 정확도, 배치 정규화 있음 − 없음",
                ),
                unit=Text("percentage points", "퍼센트포인트"),
                differences=trained,
                margin=POINTS,
                favours=Text(
                    "only with batch norm do the sigmoids train", "배치 정규화가 있어야만 sigmoid가 학습된다"
                ),
                would_change=Text("an interval that reaches below +50 points", "+50퍼센트포인트 아래에 닿는 구간"),
            ),
        ]
    )


def _faster(ladder: Ladder, slow: str, fast: str, favours: Text) -> Comparison:
    names = RUNGS[slow].words, RUNGS[fast].words
    return Comparison(
        name=Text(
            f"Ladder: steps, {names[0]} / {names[1]}", f"사다리: 스텝, {names[0].korean} / {names[1].korean}"
        ),
        unit=Text("doublings: log₂ of the ratio of steps", "두 배의 횟수: 스텝 비의 log₂"),
        differences=ladder.doublings(slow, fast),
        margin=0.0,
        favours=favours,
        would_change=Text("an interval that reaches below 0", "0 아래에 닿는 구간"),
    )


def figure(ladder: Ladder) -> Figure:
    """Draw our ratios of steps beside ImageNet's."""
    arms = (BN, BN_5, BN_30)
    names = [RUNGS[arm].words for arm in arms]
    ours = [[2**value for value in ladder.doublings(NONE, arm)] for arm in arms]
    traces = [
        plots.whiskers(Text("digits (ours)", "digits (우리)"), plots.BLUE, names, ours, mode=("markers")),  # type: ignore[arg-type]  # an axis of categories
        plots.points(
            Text("ImageNet (2015)", "ImageNet (2015년)"),
            plots.VERMILION,
            names,
            [float(RUNGS[arm].imagenet) for arm in arms],
        ),
    ]
    line, label = plots.level(1, Text("without batch norm, rate × 1", "배치 정규화 없음, 학습률 × 1"))
    picture = plots.figure(
        traces,
        plots.axis(Text("batch norm", "배치 정규화"), type="category"),
        plots.axis(Text("times fewer steps", "스텝이 몇 배 적은가"), rangemode="tozero"),
        shapes=[line],
        annotations=[{**label, "yanchor": "top"}],
    )
    caption = Text(
        "Mean over seeds of (steps without at rate × 1 / steps with) and its 95 % interval, to one goal; "
        "ImageNet's are single runs of Inception.",
        "같은 목표까지 (학습률 × 1에서 없을 때의 스텝 / 있을 때의 스텝)의 시드 평균과 95 % 구간. ImageNet은 "
        "Inception 한 번씩.",
    )
    return Figure(
        Text("The ladder of rates, ours and ImageNet's", "학습률의 사다리, 우리와 ImageNet"), caption, picture
    )


def table(ladder: Ladder) -> Table:
    """List every rung beside ImageNet's."""
    rows = []
    for arm, rung in RUNGS.items():
        steps, ratio = median(ladder.steps(arm)), 2 ** mean(ladder.doublings(NONE, arm))
        never = steps >= ladder.last
        rows.append(
            (
                rung.words,
                f"≥ {ladder.last}" if never else f"{steps:.0f}",
                "–" if rung.sigmoid else f"{'≤ ' if never else ''}{ratio:.2f}",
                rung.imagenet,
                f"{mean(ladder.accuracy(arm)):.1f}",
            )
        )
    columns = (
        Text("batch norm", "배치 정규화"),
        Text("median steps to the goal", "목표까지의 스텝 (중앙값)"),
        Text("times fewer (geometric mean)", "몇 배 적은가 (기하 평균)"),
        Text("ImageNet", "ImageNet에서는"),
        Text("best test accuracy %", "가장 높은 시험 정확도 %"),
    )
    return Table(Text("The ladder", "사다리"), columns, tuple(rows))


def protocol(ladder: Ladder) -> Text:
    """Return what is needed to repeat the ladder."""
    return Text(
        f"Ladder: digits, 5 hidden layers of {WIDTH} ReLUs, W ~ N(0, 2/inputs), base rate {BASE:g} (half the "
        f"largest at which the net without batch norm trains), batch {BATCH}, {ladder.last} steps, evaluated "
        f"every {EVERY}; ten layers of sigmoids, W ~ N(0, 0.1²).",
        f"사다리: digits, ReLU {WIDTH}개인 은닉층 5개, W ~ N(0, 2/입력 수), 기본 학습률 {BASE:g}(배치 정규화 "
        f"없이 학습되는 가장 큰 값의 절반), 배치 {BATCH}, {ladder.last}스텝, {EVERY}스텝마다 평가. sigmoid 열 "
        "층은 W ~ N(0, 0.1²).",
    )
