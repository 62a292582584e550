"""Does standardising the input help where columns differ in scale a thousandfold, and can batch norm do it?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from evenorm.lab.data import split_of
from evenorm.lab.experiment import Experiment, Scale
from evenorm.lab.experiments import input_scale_page as page
from evenorm.lab.experiments.input_scale_page import ARMS, EVERY, accuracy, confidence, usable
from evenorm.lab.grid import Cell, Grid
from evenorm.lab.language import Text
from evenorm.lab.networks import BatchNorm, initialise_, perceptron
from evenorm.lab.results import Analysis
from evenorm.lab.statistics import Comparison, Kind, combine, judge, overlapping_splits
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

NAME, TITLE = "input-scale", Text("Columns of different scale", "크기가 다른 열")
DIGITS = "badly scaled digits"
RATES = tuple(4.0**power for power in range(-9, 2))  # 3.8e-6 to 4
POINTS = 5.0  # margin on accuracy; the pilot seeds gave +28, +22, +37 and +28, +24, +33
ALIKE = 3.0  # margin of “as well as”: one test wine of 36 is 2.8 points; the pilot seeds gave 0, +3, -3
FACTORS = 1.0  # margin on the range of usable rates, in steps of 4; the pilot seeds gave +3, +4, +6
PIXELS = 5.0  # margin on the digits' accuracy; the pilot seeds gave +29, +31, +36 and +29, +32, +37
RULE = Text(
    "Measure: test accuracy at the end, the mean of the last 50 steps, each arm at its best rate (chosen on pilot "
    "seeds 1000-1002, which are then left out). Every seed draws a split of its own, so the intervals are Nadeau "
    "and Bengio's. REPRODUCED if those of both differences, standardised − raw and batch norm − raw, lie above 5 "
    "percentage points; WEAK if above 0 only, CONTRADICTED if one lies below 0, INCONCLUSIVE otherwise. Beside it, "
    "under Holm's rule for all four: the number of usable rates (loss below half the first one, training accuracy "
    "above twice chance, not diverged), margin one step of the grid; and whether batch norm is as good as "
    "standardisation: the interval within ±3 points. Apart from these, under Holm's rule for the two, and not part "
    "of the verdict: the same two differences on badly scaled digits, margin 5 points.",
    "잰 것: 마지막 50단계의 평균 시험 정확도, 각각 가장 좋은 학습률에서(예비 시드 1000-1002로 고르고 이 시드들은 "
    "뺀다). 시드마다 분할을 뽑으므로 구간은 Nadeau와 Bengio의 것이다. 두 차이, 표준화 − 원래와 배치 정규화 − "
    "원래의 구간이 5 퍼센트포인트보다 위에 있으면 재현됨, 0보다만 위면 약함, 하나가 0보다 아래면 반박됨, 아니면 "
    "판단 보류. 덧붙여, 넷 모두에 Holm의 규칙을 적용해: 쓸 수 있는 학습률의 수(손실이 첫 손실의 절반 미만, 학습 "
    "정확도가 우연의 두 배를 넘고, 발산하지 않음), 기준 폭은 격자 한 칸. 그리고 배치 정규화가 표준화만큼 좋은가: "
    "구간이 ±3포인트 안. 이와 따로, 둘에 Holm의 규칙을 적용하되 판정에는 넣지 않고: 크기를 어그러뜨린 digits에서 "
    "같은 두 차이, 기준 폭 5포인트.",
)


def plan(scale: Scale) -> list[Trial]:
    """Every arm over all rates on wine and on digits, for the pilot seeds and the paired ones."""
    seeds = (*PILOT_SEEDS, *scale.paired)
    wine = settings(steps=300 if scale.quick else 600)
    digits = settings(data=DIGITS, steps=100 if scale.quick else 200)
    return [
        Trial(NAME, 1, arm, seed, rate, chosen)
        for chosen, rates in ((wine, RATES), (digits, RATES[::2]))
        for arm in ARMS
        for rate in rates
        for seed in seeds
    ]


def train(trials: Sequence[Trial]) -> list[Record]:
    """Train columns-32-32-classes with ReLU, W ~ N(0, 2/inputs), batch 32, plain SGD; wine split by each seed."""
    arm, members = trials[0].arm, len(trials)
    splits = [split_of(trial, "wine") for trial in trials]
    features, classes = splits[0].features, splits[0].classes
    if arm == "standardised":
        splits = [split.standardised() for split in splits]
    training, test = training_samples(splits), test_samples(splits)
    network = perceptron(members, (features, 32, 32, classes), nn.ReLU, normalise=False)
    initialise_(network, [trial.seed for trial in trials], lambda inputs: math.sqrt(2 / inputs))
    if arm == "batch norm":
        network = nn.Sequential(BatchNorm(members, features), *network)
    curves, losses = Curves(members), []
    for step, loss in descend(network, training, trials, batch=32, steps=trials[0]["steps"]):
        losses.append(loss)
        if step % EVERY == 0:
            accuracy, test_loss = score(network, test)
            curves.append(accuracy=accuracy, test_loss=test_loss, train_accuracy=score(network, training)[0])
    history = torch.stack(losses)
    curves.put(diverged=diverged(history), first_loss=history[0], train_loss=final_loss(history))
    curves.put(classes=torch.full((members,), classes))
    return curves.records()


def analyse(records: Mapping[Trial, Record], scale: Scale) -> Analysis:
    """Compare the arms at their best rates, and the ranges of rates over which they train."""
    named = {trial: dict(trial.settings).get("data", "wine") for trial in records}
    grid, digits = (
        Grid({trial: record for trial, record in records.items() if named[trial] == data}, scale)
        for data in ("wine", DIGITS)
    )
    best, best_of_digits = (_best(data) for data in (grid, digits))
    usable, usable_of_digits = (_usable(data) for data in (grid, digits))
    endpoints = judge(_comparisons(grid, best, usable, scale))
    beside = judge(_on_digits(digits, best_of_digits))
    return Analysis(
        experiment=NAME,
        title=TITLE,
        claim=page.CLAIM,
        protocol=page.protocol(grid, digits),
        rule=RULE,
        verdict=combine(endpoint.verdict for endpoint in endpoints[:2]),
        answer=page.answer(grid, endpoints, best, usable, beside),
        endpoints=(*endpoints, *beside),
        figures=(
            page.rate_figure(grid, page.WINE, Text("A third", "3분의 1")),
            page.accuracy_figure(grid, best),
            page.rate_figure(digits, page.DIGITS, Text("A tenth", "10분의 1")),
        ),
        published=(),
        command=scale.command(NAME),
        tables=(
            page.table(grid, best, usable, page.WINE),
            page.table(digits, best_of_digits, usable_of_digits, page.DIGITS),
        ),
        notes=(*page.NOTES, *grid.notes(best, ARMS), *scale.notes()),
        seeds=scale.seeds,
        configuration={"steps": grid.steps, "rates": list(grid.rates), "best": dict(best.values())},
    )


def _best(grid: Grid) -> dict[str, Cell]:
    return {arm: grid.best(arm, accuracy, confidence) for arm in ARMS}


def _usable(grid: Grid) -> dict[str, list[float]]:
    return {arm: [float(count) for count in usable(grid, arm)] for arm in ARMS}


def _on_digits(grid: Grid, best: Mapping[str, Cell]) -> list[Comparison]:
    """Return the two differences on badly scaled digits."""
    return [
        Comparison(
            name=Text(
                f"Badly scaled digits: test accuracy, {ARMS[arm]} − raw",
                f"크기를 어그러뜨린 digits: 시험 정확도, {ARMS[arm].korean} − 원래",
            ),
            unit=POINTS_UNIT,
            differences=grid.differences(best[arm], best["raw"], accuracy),
            margin=PIXELS,
            favours=Text("the net is more accurate so", "신경망이 더 정확하다"),
            would_change=Text("an interval that reaches below +5 points", "+5포인트보다 아래에 이르는 구간"),
        )
        for arm in ("standardised", "batch norm")
    ]


POINTS_UNIT = Text("percentage points", "퍼센트포인트")


def _comparisons(
    grid: Grid, best: Mapping[str, Cell], usable: Mapping[str, Sequence[float]], scale: Scale
) -> list[Comparison]:
    """Return what is compared, with the margins that were fixed before the run."""
    raw, standardised, batch_norm = best.values()
    spread = overlapping_splits(scale.seeds, train=142, test=36)
    return [
        Comparison(
            name=Text(
                "Test accuracy, standardised − raw, each at its best rate",
                "시험 정확도, 표준화 − 원래, 각각 가장 좋은 학습률에서",
            ),
            unit=POINTS_UNIT,
            differences=grid.differences(standardised, raw, accuracy),
            margin=POINTS,
            favours=Text("the net is more accurate on standardised columns", "표준화한 열에서 더 정확하다"),
            would_change=Text("an interval that reaches below +5 points", "+5포인트보다 아래에 이르는 구간"),
            spread=spread,
        ),
        Comparison(
            name=Text(
                "Test accuracy, batch norm as first layer − raw, each at its best rate",
                "시험 정확도, 첫 층의 배치 정규화 − 원래, 각각 가장 좋은 학습률에서",
            ),
            unit=POINTS_UNIT,
            differences=grid.differences(batch_norm, raw, accuracy),
            margin=POINTS,
            favours=Text(
                "the net is more accurate with batch norm as its first layer",
                "첫 층이 배치 정규화이면 신경망이 더 정확하다",
            ),
            would_change=Text("an interval that reaches below +5 points", "+5포인트보다 아래에 이르는 구간"),
            spread=spread,
        ),
        Comparison(
            name=Text(
                "Usable rates, batch norm as first layer − raw",
                "쓸 수 있는 학습률의 수, 첫 층의 배치 정규화 − 원래",
            ),
            unit=Text("steps of the grid, each a factor of 4", "격자의 칸, 한 칸은 4배"),
            differences=tuple(a - b for a, b in zip(usable["batch norm"], usable["raw"], strict=True)),
            margin=FACTORS,
            favours=Text("batch norm trains over a wider range of rates", "더 넓은 학습률에서 학습된다"),
            would_change=Text("an interval that reaches below 1", "1보다 아래에 이르는 구간"),
            spread=spread,
        ),
        Comparison(
            name=Text(
                "Test accuracy, batch norm as first layer − standardised: no difference",
                "시험 정확도, 첫 층의 배치 정규화 − 표준화: 차이 없음",
            ),
            unit=POINTS_UNIT,
            differences=grid.differences(batch_norm, standardised, accuracy),
            margin=ALIKE,
            favours=Text("the two differ", "둘은 다르다"),
            would_change=Text("an interval not wholly within ±3 points", "±3포인트 안에 다 들지 않는 구간"),
            kind=Kind.EQUIVALENCE,
            spread=spread,
        ),
    ]


EXPERIMENT = Experiment(NAME, TITLE, page.CLAIM, plan, train, analyse, cost=0.15, stack_size=64)
