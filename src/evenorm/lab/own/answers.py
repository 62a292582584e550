"""What the trials on a user's data say to each of the six questions: comparisons and plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, median
from typing import TypeAlias

from evenorm.lab import plots
from evenorm.lab.grid import Cell, Grid
from evenorm.lab.language import Text, korean
from evenorm.lab.own.preparing import OwnData
from evenorm.lab.own.training import ARMS, EVALUATIONS, TASKS
from evenorm.lab.results import Figure
from evenorm.lab.statistics import Comparison, Kind, first_crossing, overlapping_splits
from evenorm.lab.trials import PILOT_SEEDS, Record

DOUBLINGS = 1.0  # margin of speed: twice as fast
POINTS = 1.0  # margin of a score, in hundredths
ALIKE = 1.0  # margin of “no longer needed”, in hundredths
FACTORS = 1.0  # margin of rates, in steps of the grid
WORTH = 5.0  # margin where initial weights are ten times wrong, in hundredths
MOST_OF = 0.9  # of what is learned without batch norm: the goal that speed is measured to
SEEDS_THAT_COUNT = 0.8  # a rate is usable where so many seeds train

COLOURS = dict(
    zip(
        ("none", "before", "after", "raw", "raw, first", "none, dropout", "before, dropout"),
        (plots.VERMILION, plots.BLUE, plots.GREEN, plots.ORANGE, plots.SKY, plots.ORANGE, plots.SKY),
        strict=True,
    )
)
POINTS_UNIT = Text("points (hundredths of the score)", "점 (점수의 100분의 1)")


@dataclass(frozen=True)
class Seen:
    """The trials that a question reads, on their data."""

    data: OwnData
    grid: Grid
    factor: float  # between neighbouring rates

    @property
    def score(self) -> Text:
        """Return what the score is called."""
        return TASKS[self.data.task].score

    @property
    def spread(self) -> float | None:
        """Return the spread of a mean where every seed has a split of its own."""
        if not self.data.redrawn:
            return None
        return overlapping_splits(self.grid.scale.seeds, self.data.train_rows, self.data.test_rows)

    def best(self, arm: str) -> Cell:
        """Return the arm at the rate with the best final score of the pilot seeds; a lower loss breaks ties."""
        return self.grid.best(arm, final, lambda record: -_loss(record))

    def gain(self, more: str, less: str) -> tuple[float, ...]:
        """Return how much better one arm's final score is than another's, each at its best rate."""
        return self.grid.differences(self.best(more), self.best(less), final)

    @cached_property
    def goal(self) -> float:
        """Return the score to reach: 90 % of the way from chance to the best without batch norm."""
        pilots = self.grid.records(self.best("none"), PILOT_SEEDS)
        reached: float = mean(record["final"] for record in pilots)
        return self.data.chance + MOST_OF * max(0.0, reached - self.data.chance)

    def steps(self, record: Record) -> float:
        """Return the steps until the goal, or all of them."""
        index = first_crossing(record["score"], self.goal, 1)
        return float(self.grid.steps if index is None else (index + 1) * (self.grid.steps // EVALUATIONS))

    @cached_property
    def halfway(self) -> float:
        """Return the training loss halfway from an untrained network's to the lowest one of the pilot seeds."""
        cells = [(arm, rate) for arm in ("none", "before") for rate in self.grid.rates]
        losses = [mean(_loss(record) for record in self.grid.records(cell, PILOT_SEEDS)) for cell in cells]
        first: float = median(record["first_loss"] for record in self.grid.records(("none", self.grid.rates[0])))
        return (first + min(losses)) / 2

    def usable(self, record: Record) -> bool:
        """Return whether a network trained: not diverged, and its training loss below halfway."""
        return not record["diverged"] and _loss(record) < self.halfway

    def highest(self, arm: str) -> list[float]:
        """Return each seed's largest usable rate, in steps of the grid above the lowest; −1 where there is none."""
        ladders = [[self.usable(record) for record in self.grid.records((arm, rate))] for rate in self.grid.rates]
        return [
            float(max((i for i, usable in enumerate(seed) if usable), default=-1))
            for seed in zip(*ladders, strict=True)
        ]

    def usable_to(self, arm: str) -> float | None:
        """Return the largest rate at which four of five seeds train, or None."""
        good = [
            rate
            for rate in self.grid.rates
            if mean(self.usable(record) for record in self.grid.records((arm, rate))) >= SEEDS_THAT_COUNT
        ]
        return max(good, default=None)


def final(record: Record) -> float:
    """Return the final score in hundredths."""
    return 100 * float(record["final"])


def _loss(record: Record) -> float:
    return math.inf if record["train_loss"] is None else float(record["train_loss"])


Compare: TypeAlias = "Callable[[Seen], list[Comparison]]"
Draw: TypeAlias = "Callable[[Seen], Figure]"


def better(more: str, less: str, name: Text, favours: Text) -> Callable[[Seen], Comparison]:
    """Return how two arms' final scores are compared, each at its best rate."""

    def compare(seen: Seen) -> Comparison:
        return Comparison(
            Text(
                f"{name}: {seen.score}, each at its best rate",
                f"{korean(name)}: 각각 가장 좋은 학습률의 {seen.score.korean}",
            ),
            POINTS_UNIT,
            seen.gain(more, less),
            POINTS,
            favours,
            Text("an interval that reaches below +1 point", "구간이 +1점 아래에 닿으면 바뀐다"),
            spread=seen.spread,
        )

    return compare


def speed(seen: Seen) -> list[Comparison]:
    """Compare steps to the goal, and the final score."""
    without, with_ = seen.best("none"), seen.best("before")
    steps = Comparison(
        Text(
            f"Steps to {100 * seen.goal:.0f} % {seen.score}, each arm at its best rate",
            f"{seen.score.korean} {100 * seen.goal:.0f} %까지의 단계, 각각 가장 좋은 학습률에서",
        ),
        Text("doublings: log₂(steps without / steps with)", "두 배의 횟수: log₂(없을 때의 단계 / 있을 때의 단계)"),
        seen.grid.differences(with_, without, lambda record: -math.log2(seen.steps(record))),
        DOUBLINGS,
        Text("batch norm needs fewer than half the steps", "배치 정규화를 쓰면 절반보다 적은 단계로 된다"),
        Text(
            "an interval that reaches below 1: less than twice as fast",
            "구간이 1 아래에 닿으면(두 배보다 느리면) 바뀐다",
        ),
        spread=seen.spread,
    )
    gain = better(
        "before",
        "none",
        Text("With − without", "있음 − 없음"),
        Text("batch norm ends better", "배치 정규화를 쓴 쪽이 더 낫게 끝난다"),
    )
    return [steps, gain(seen)]


def placement(seen: Seen) -> list[Comparison]:
    """Compare before with after the activation."""
    name, favours = (
        Text("Before − after", "앞 − 뒤"),
        Text("before the activation is better", "활성화 앞이 더 낫다"),
    )
    return [better("before", "after", name, favours)(seen)]


def max_rate(seen: Seen) -> list[Comparison]:
    """Compare the largest usable rates."""
    pairs = zip(seen.highest("before"), seen.highest("none"), strict=True)
    return [
        Comparison(
            Text("Largest usable rate, with − without", "쓸 수 있는 가장 큰 학습률, 있음 − 없음"),
            Text(f"steps of the grid, each a factor of {seen.factor:g}", f"격자의 칸, 한 칸은 {seen.factor:g}배"),
            tuple(a - b for a, b in pairs),
            FACTORS,
            Text("batch norm bears a larger rate", "배치 정규화를 쓰면 더 큰 학습률을 견딘다"),
            Text("an interval that reaches below 1 step", "구간이 1칸 아래에 닿으면 바뀐다"),
            spread=seen.spread,
        )
    ]


def init(seen: Seen) -> list[Comparison]:
    """Compare what wrong initial weights cost."""
    cost = {
        arm: [
            mean(pair)
            for pair in zip(seen.gain(arm, f"{arm}, small"), seen.gain(arm, f"{arm}, large"), strict=True)
        ]
        for arm in ("none", "before")
    }
    return [
        Comparison(
            Text(
                "Score lost to weights 10 times too small or too large, without − with",
                "초기 가중치가 10배 작거나 클 때 잃는 점수, 없음 − 있음",
            ),
            POINTS_UNIT,
            tuple(a - b for a, b in zip(cost["none"], cost["before"], strict=True)),
            WORTH,
            Text("with batch norm initial weights matter less", "배치 정규화를 쓰면 초기 가중치가 덜 중요하다"),
            Text("an interval that reaches below 5 points", "구간이 5점 아래에 닿으면 바뀐다"),
            spread=seen.spread,
        )
    ]


def overfitting(seen: Seen) -> list[Comparison]:
    """Compare what dropout gains with and without batch norm."""
    with_, without = (seen.gain(f"{arm}, dropout", arm) for arm in ("before", "none"))
    return [
        Comparison(
            Text(
                "What dropout gains, without batch norm − with", "드롭아웃으로 얻는 점수, 배치 정규화 없음 − 있음"
            ),
            POINTS_UNIT,
            tuple(a - b for a, b in zip(without, with_, strict=True)),
            POINTS,
            Text("dropout is needed less with batch norm", "배치 정규화를 쓰면 드롭아웃이 덜 필요하다"),
            Text("an interval that reaches below +1 point", "구간이 +1점 아래에 닿으면 바뀐다"),
            spread=seen.spread,
        ),
        Comparison(
            Text(
                "What dropout gains with batch norm: no difference",
                "배치 정규화가 있을 때 드롭아웃으로 얻는 점수: 차이 없음",
            ),
            POINTS_UNIT,
            with_,
            ALIKE,
            Text("dropout changes the score", "드롭아웃이 점수를 바꾼다"),
            Text("an interval not wholly within ±1 point", "구간이 ±1점 안에 다 들지 않으면 바뀐다"),
            Kind.EQUIVALENCE,
            seen.spread,
        ),
    ]


def input_scale(seen: Seen) -> list[Comparison]:
    """Compare raw columns with standardised ones, and with batch norm as the first layer."""
    standardised = better(
        "none",
        "raw",
        Text("Standardised − raw columns", "표준화한 열 − 원래 값의 열"),
        Text("standardising the input helps", "입력을 표준화하면 낫다"),
    )
    first = better(
        "raw, first",
        "raw",
        Text("Batch norm as first layer − raw columns", "첫 층의 배치 정규화 − 원래 값의 열"),
        Text("batch norm as first layer helps", "첫 층에 배치 정규화를 두면 낫다"),
    )
    return [standardised(seen), first(seen)]


def curves(*arms: str) -> Draw:
    """Return how the score during training is drawn, each arm at its best rate."""

    def draw(seen: Seen) -> Figure:
        every = seen.grid.steps // EVALUATIONS
        x = [every * (index + 1) for index in range(EVALUATIONS)]
        traces: list[plots.Trace] = []
        for arm in arms:
            cell, words = seen.best(arm), ARMS[arm].words
            name = Text(f"{words}, rate {cell[1]:.2g}", f"{words.korean}, 학습률 {cell[1]:.2g}")
            traces += plots.band(name, COLOURS[arm], x, seen.grid.curves(cell, "score", 100))
        y = plots.axis(Text(f"{seen.score} (%)", f"{seen.score.korean} (%)"), range=[0, 101])
        caption = Text(
            f"Each arm at its best rate; mean over {seen.grid.scale.seeds} seeds and its 95 % interval.",
            f"각각 가장 좋은 학습률에서. 시드 {seen.grid.scale.seeds}개의 평균과 95 % 구간.",
        )
        steps = plots.axis(Text("training steps", "학습 단계"), logarithmic=True)
        return Figure(Text("The score during training", "학습 중의 점수"), caption, plots.figure(traces, steps, y))

    return draw


def by_rate(*arms: str) -> Draw:
    """Return how the final score at each rate is drawn."""

    def draw(seen: Seen) -> Figure:
        traces = [
            plots.whiskers(
                ARMS[arm].words,
                COLOURS[arm],
                seen.grid.rates,
                [seen.grid.values((arm, rate), final) for rate in seen.grid.rates],
            )
            for arm in arms
        ]
        x = plots.axis(Text("learning rate", "학습률"), logarithmic=True)
        y = plots.axis(Text(f"final {seen.score} (%)", f"마지막 {seen.score.korean} (%)"), range=[0, 101])
        caption = Text(
            "Mean over seeds and its 95 % interval; a network that was lost scores 0.",
            "시드의 평균과 95 % 구간. 발산한 신경망은 0점이다.",
        )
        return Figure(
            Text("The final score at each learning rate", "학습률마다의 마지막 점수"),
            caption,
            plots.figure(traces, x, y),
        )

    return draw


def by_weights(seen: Seen) -> Figure:
    """Draw the final score by the scale of the initial weights."""
    scales = (0.1, 1.0, 10.0)
    traces = [
        plots.whiskers(
            ARMS[arm].words,
            COLOURS[arm],
            scales,
            [seen.grid.values(seen.best(name), final) for name in (f"{arm}, small", arm, f"{arm}, large")],
        )
        for arm in ("none", "before")
    ]
    x = plots.axis(Text("initial weights, in units of He's", "초기 가중치 (He 초기화의 배수)"), logarithmic=True)
    y = plots.axis(Text(f"final {seen.score} (%)", f"마지막 {seen.score.korean} (%)"), range=[0, 101])
    caption = Text(
        "Each at its best rate; mean over seeds and its 95 % interval.",
        "각각 가장 좋은 학습률에서. 시드의 평균과 95 % 구간.",
    )
    return Figure(
        Text("The final score by initial weights", "초기 가중치에 따른 마지막 점수"),
        caption,
        plots.figure(traces, x, y),
    )


def columns_of(seen: Seen, arms: Sequence[str]) -> Mapping[str, tuple[float, float]]:
    """Return each arm's best rate and its mean final score."""
    return {arm: (seen.best(arm)[1], mean(seen.grid.values(seen.best(arm), final))) for arm in arms}
