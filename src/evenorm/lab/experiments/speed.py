"""Is training faster with batch norm? The net of Ioffe & Szegedy 2015, figure 1, on scikit-learn's digits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, median

import torch

from evenorm.lab import plots
from evenorm.lab.data import split_of
from evenorm.lab.experiment import Experiment, Scale
from evenorm.lab.experiments import speed_ladder
from evenorm.lab.grid import Cell, Grid, Measure
from evenorm.lab.language import Text
from evenorm.lab.networks import Sigmoid, initialise_, perceptron
from evenorm.lab.results import Analysis, Claim, Endpoint, Figure, Published, Table
from evenorm.lab.statistics import Comparison, Interval, first_crossing, judge, paired_interval
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

NAME, TITLE = "speed", Text("Training speed", "학습 속도")
CLAIM = Claim(
    korean="학습 속도 & 학습 결과가 개선된다 (Higer learning rate 적용 가능). 핵심은 학습 속도의 향상이다.",
    english="Training speed and the trained result improve (higher learning rates become usable). "
    "The core is faster training.",
    source=Text(
        "The document, “advantages of batch normalisation”; Ioffe & Szegedy 2015, section 4.1 and figure 1a",
        "문서의 “Batch Normalization의 장점”; Ioffe & Szegedy 2015, 4.1절과 그림 1a",
    ),
    question=Text(
        "How many times fewer steps to 90 % test accuracy with batch norm, and is the final accuracy higher?",
        "배치 정규화가 있으면 시험 정확도 90 %까지의 스텝이 몇 배 적으며, 마지막 정확도도 더 높은가?",
    ),
)

ARMS = {
    "none": Text("without batch norm", "배치 정규화 없음"),
    "batch norm": Text("with batch norm", "배치 정규화 있음"),
}
COLOURS = (plots.VERMILION, plots.BLUE)
RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
EVERY, WINDOW, TARGET = 25, 2, 0.90  # evaluated every 25 steps; 2 evaluations are a moving average over 50 steps
DOUBLINGS = 1.0  # margin: twice as fast; the pilot seeds gave +3.3, +3.6, +3.4
POINTS = 1.0  # margin on the final accuracy: what 360 test images resolve; the pilot seeds gave +1.2, +2.8, +2.8
RULE = Text(
    "Measure: the first step at which test accuracy, evaluated every 25 steps and averaged over 50, reaches 90 "
    "%; never reached counts as the last step, which can only hide a difference. REPRODUCED if the 95 % interval "
    "of log₂(steps without / steps with), each arm at its best rate, lies above 1 (at least twice as fast), WEAK "
    "if above 0 only, CONTRADICTED if below 0, INCONCLUSIVE otherwise. Best rates are chosen on pilot seeds "
    "1000-1002, which are then left out. Beside it, under Holm's rule for all three: steps at equal rates, and "
    "the final accuracy with a margin of 1 percentage point. " + speed_ladder.RULE,
    "잰 것: 25스텝마다 평가해 50스텝으로 평균한 시험 정확도가 처음 90 %에 이르는 스텝. 이르지 못하면 마지막 "
    "스텝으로 치며, 이는 차이를 숨길 수만 있다. 각 조건의 가장 좋은 학습률에서 log₂(없을 때의 스텝 / 있을 때의 "
    "스텝)의 95 % 구간이 1보다 위에 있으면(적어도 두 배 빠르면) 재현됨, 0보다 위이기만 하면 약함, 0보다 아래이면 "
    "반대로 나옴, 그 밖에는 판단 보류. 가장 좋은 학습률은 예비 시드 1000-1002로 고르고, 이 시드들은 판정에서 "
    "뺀다. 덧붙여, 셋 모두에 Holm의 규칙을 적용해: 같은 학습률에서의 스텝, 그리고 기준 폭이 1퍼센트포인트인 "
    "마지막 정확도. " + speed_ladder.RULE.korean,
)
PUBLISHED = (
    Published(
        Text(
            "curves only: with batch norm faster, and to a higher test accuracy",
            "곡선뿐이다: 배치 정규화가 있으면 더 빠르고, 시험 정확도도 더 높다",
        ),
        Text(
            "binary MNIST, 3 hidden layers of 100 sigmoid units, batch 60, 50 000 steps; rate, initial scale "
            "unstated",
            "이진 MNIST, sigmoid 100개인 은닉층 3개, 배치 60, 50 000스텝. 학습률과 초기 크기는 밝히지 않음",
        ),
        Text("Ioffe & Szegedy 2015, figure 1a", "Ioffe & Szegedy 2015, 그림 1a"),
    ),
    Published(
        Text(
            "13.3 M steps against 31.0 M to 72.2 %: 2.33 times fewer (batch norm alone, same rate)",
            "72.2 %까지 31.0 M 대신 13.3 M 스텝: 2.33배 적다 (배치 정규화만, 같은 학습률)",
        ),
        Text("Inception on ImageNet, rate 0.0015, batch 32", "ImageNet의 Inception, 학습률 0.0015, 배치 32"),
        Text("Ioffe & Szegedy 2015, figure 3", "Ioffe & Szegedy 2015, 그림 3"),
    ),
    Published(
        Text(
            "2.1 M steps against 31.0 M to 72.2 %: 14.8 times fewer (rate × 5 and six other changes)",
            "72.2 %까지 31.0 M 대신 2.1 M 스텝: 14.8배 적다 (학습률 × 5와 다른 여섯 가지 변화)",
        ),
        Text("Inception on ImageNet, BN-x5", "ImageNet의 Inception, BN-x5"),
        Text("Ioffe & Szegedy 2015, figure 3 and section 4.2.1", "Ioffe & Szegedy 2015, 그림 3과 4.2.1절"),
    ),
    Published(
        Text(
            "2.7 M steps against 31.0 M to 72.2 %: 11.5 times fewer (rate × 30 and the same six), and 74.8 % at "
            "last",
            "72.2 %까지 31.0 M 대신 2.7 M 스텝: 11.5배 적다 (학습률 × 30과 같은 여섯 가지), 마지막에는 74.8 %",
        ),
        Text("Inception on ImageNet, BN-x30", "ImageNet의 Inception, BN-x30"),
        Text("Ioffe & Szegedy 2015, figure 3 and section 4.2.1", "Ioffe & Szegedy 2015, 그림 3과 4.2.1절"),
    ),
    Published(
        Text(
            "69.8 % with sigmoids; without batch norm never above chance",
            "sigmoid로 69.8 %. 배치 정규화가 없으면 우연을 넘지 못한다",
        ),
        Text("Inception on ImageNet, BN-x5 with sigmoids", "ImageNet의 Inception, sigmoid를 쓴 BN-x5"),
        Text("Ioffe & Szegedy 2015, section 4.2.1", "Ioffe & Szegedy 2015, 4.2.1절"),
    ),
)


def plan(scale: Scale) -> list[Trial]:
    """Both arms over all rates, for the pilot seeds and the paired ones; and the ladder."""
    rates = RATES[3:] if scale.quick else RATES
    steps = settings(steps=1000 if scale.quick else 3000)
    seeds = (*PILOT_SEEDS, *scale.paired)
    trials = [Trial(NAME, 1, arm, seed, rate, steps) for arm in ARMS for rate in rates for seed in seeds]
    return trials + speed_ladder.plan(NAME, scale)


def train(trials: Sequence[Trial]) -> list[Record]:
    """Train 64-100-100-100-10 with sigmoids, W ~ N(0, 0.1²), batch 60, plain SGD."""
    if trials[0].arm in speed_ladder.RUNGS:
        return speed_ladder.train(trials)
    splits = [split_of(trial, "digits") for trial in trials]
    test, split = test_samples(splits), splits[0]
    normalise = trials[0].arm == "batch norm"
    network = perceptron(len(trials), (split.features, 100, 100, 100, split.classes), Sigmoid, normalise=normalise)
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
    """Compare the arms at each one's best rate, at equal rates, and by final accuracy; and climb the ladder."""
    grid = Grid({trial: record for trial, record in records.items() if trial.arm in ARMS}, scale)
    rungs = {trial: record for trial, record in records.items() if trial.arm in speed_ladder.RUNGS}
    ladder = speed_ladder.Ladder(rungs, scale)
    best = {arm: grid.best(arm, _quickness(grid), _accuracy) for arm in ARMS}
    without, with_ = best.values()
    endpoints = judge(_comparisons(grid, without, with_))
    return Analysis(
        experiment=NAME,
        title=TITLE,
        claim=CLAIM,
        protocol=_protocol(grid, ladder),
        rule=RULE,
        verdict=endpoints[0].verdict,
        answer=_answer(grid, endpoints, without, with_),
        endpoints=(*endpoints, *speed_ladder.endpoints(ladder)),
        figures=(_accuracy_figure(grid, best), _rate_figure(grid), speed_ladder.figure(ladder)),
        published=PUBLISHED,
        command=scale.command(NAME),
        tables=(_table(grid), speed_ladder.table(ladder)),
        notes=(
            Text(
                "Steps are counted in 25s: a net that needs 75 of them is known to a third.",
                "스텝은 25개 단위로 센다. 75스텝이 필요한 신경망이면 3분의 1까지만 안다.",
            ),
            speed_ladder.NOTE,
            *grid.notes(best, ARMS),
            *scale.notes(),
        ),
        seeds=scale.seeds,
        configuration={"steps": grid.steps, "rates": list(grid.rates), "best": dict(best.values())},
    )


def _comparisons(grid: Grid, without: Cell, with_: Cell) -> list[Comparison]:
    """Return what the verdict rests on, with the margins that were fixed before the run."""
    same = ("batch norm", without[1])
    return [
        Comparison(
            name=Text("Steps to 90 %, each arm at its best rate", "90 %까지의 스텝, 각자 가장 좋은 학습률에서"),
            unit=Text("doublings: log₂(steps without / steps with)", "두 배의 횟수: log₂(없을 때 / 있을 때)"),
            differences=grid.differences(with_, without, _quickness(grid)),
            margin=DOUBLINGS,
            favours=Text("batch norm needs fewer than half the steps", "배치 정규화는 절반보다 적은 스텝이면 된다"),
            would_change=Text(
                "an interval that reaches below 1: less than twice as fast",
                "1 아래에 닿는 구간: 두 배보다 덜 빠르다",
            ),
        ),
        Comparison(
            name=Text(
                f"Steps to 90 %, both at rate {without[1]:g}, the best one without batch norm",
                f"90 %까지의 스텝, 둘 다 배치 정규화 없이 가장 좋은 학습률 {without[1]:g}에서",
            ),
            unit=Text("doublings: log₂(steps without / steps with)", "두 배의 횟수: log₂(없을 때 / 있을 때)"),
            differences=grid.differences(same, without, _quickness(grid)),
            margin=DOUBLINGS,
            favours=Text(
                "batch norm needs fewer than half the steps at the other arm's best rate",
                "상대의 가장 좋은 학습률에서도 배치 정규화는 절반보다 적은 스텝이면 된다",
            ),
            would_change=Text("an interval that reaches below 1", "1 아래에 닿는 구간"),
        ),
        Comparison(
            name=Text(
                "Final test accuracy, each arm at its best rate",
                "마지막 시험 정확도, 각자 가장 좋은 학습률에서",
            ),
            unit=Text("percentage points", "퍼센트포인트"),
            differences=grid.differences(with_, without, _accuracy),
            margin=POINTS,
            favours=Text("batch norm ends more accurate", "배치 정규화가 있으면 끝에 더 정확하다"),
            would_change=Text("an interval that reaches below +1 point", "+1퍼센트포인트 아래에 닿는 구간"),
        ),
    ]


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


def _protocol(grid: Grid, ladder: speed_ladder.Ladder) -> Text:
    rates, rungs = ", ".join(f"{rate:g}" for rate in grid.rates), speed_ladder.protocol(ladder)
    return Text(
        "Data: scikit-learn's digits, x/16, one stratified split 1437/360. Network: 64-100-100-100-10, sigmoid, "
        f"W ~ N(0, 0.1²), biases 0; in one arm batch norm before each sigmoid. Plain SGD, batch 60, {grid.steps} "
        f"steps, rates {rates}. {grid.scale.seeds} paired seeds: the same initial weights and the same batches "
        f"in both arms. {rungs}",
        "데이터: scikit-learn의 digits, x/16, 층화 분할 하나 1437/360. 신경망: 64-100-100-100-10, sigmoid, W ~ "
        f"N(0, 0.1²), 편향 0. 한쪽에는 각 sigmoid 앞에 배치 정규화. 단순 SGD, 배치 60, {grid.steps}스텝, 학습률 "
        f"{rates}. 짝지은 시드 {grid.scale.seeds}개: 양쪽의 초기 가중치와 배치가 같다. {rungs.korean}",
    )


def _answer(grid: Grid, endpoints: Sequence[Endpoint], without: Cell, with_: Cell) -> Text:
    speed, _, final = endpoints
    ratio, low, high = (f"{2**value:.1f}" for value in (speed.estimate, speed.low, speed.high))
    cells = [(f"{median(grid.values(cell, _steps(grid))):.0f}", f"{cell[1]:g}") for cell in (with_, without)]
    a, b = (f"{steps} (rate {rate})" for steps, rate in cells)
    c, d = (f"{steps}(학습률 {rate})" for steps, rate in cells)
    points = f"{final.low:+.1f}", f"{final.high:+.1f}"
    return Text(
        f"With batch norm 90 % test accuracy took {ratio} times fewer steps (95 % interval {low} to {high}): {a} "
        f"against {b}, medians over seeds. The final accuracy changed by {final.estimate:+.1f} points "
        f"({points[0]} to {points[1]}).",
        f"배치 정규화가 있으면 시험 정확도 90 %까지 스텝이 {ratio}배 적었다(95 % 구간 {low} ~ {high}). 시드 "
        f"중앙값으로 {d} 대신 {c}. 마지막 정확도는 {final.estimate:+.1f}퍼센트포인트 달라졌다({points[0]} ~ "
        f"{points[1]}).",
    )


def _accuracy_figure(grid: Grid, best: Mapping[str, Cell]) -> Figure:
    x = [EVERY * (index + 1) for index in range(grid.steps // EVERY)]
    traces: list[plots.Trace] = []
    owners: list[Cell] = []
    for (arm, words), colour in zip(ARMS.items(), COLOURS, strict=True):
        for cell in ((arm, rate) for rate in grid.rates):
            curves = grid.curves(cell, "accuracy", 100)
            name = Text(f"{words}, rate {cell[1]:g}", f"{words.korean}, 학습률 {cell[1]:g}")
            traces += plots.band(name, colour, x, curves, visible=cell == best[arm])
            owners += [cell] * 2
    views = [[best[cell[0]] == cell for cell in owners]]
    views += [[rate == cell[1] for cell in owners] for rate in grid.rates]
    labels = [Text("each at its best rate", "각자 가장 좋은 학습률")]
    labels += [Text(f"both at rate {rate:g}", f"둘 다 학습률 {rate:g}") for rate in grid.rates]
    line, label = plots.level(100 * TARGET, "90 %")
    picture = plots.figure(
        traces,
        plots.axis(Text("training steps", "학습 스텝"), logarithmic=True),
        plots.axis(Text("test accuracy (%)", "시험 정확도 (%)"), range=[0, 101]),
        updatemenus=plots.buttons(labels, views),
        shapes=[line],
        annotations=[label],
    )
    caption = Text(
        f"Mean over {grid.scale.seeds} seeds and its 95 % interval. The menu shows both arms at equal rates.",
        f"시드 {grid.scale.seeds}개의 평균과 95 % 구간. 메뉴로 양쪽을 같은 학습률에서 볼 수 있다.",
    )
    return Figure(Text("Test accuracy during training", "학습하는 동안의 시험 정확도"), caption, picture)


def _rate_figure(grid: Grid) -> Figure:
    traces = [
        plots.whiskers(words, colour, grid.rates, [grid.values((arm, rate), _steps(grid)) for rate in grid.rates])
        for (arm, words), colour in zip(ARMS.items(), COLOURS, strict=True)
    ]
    picture = plots.figure(
        traces,
        plots.axis(Text("learning rate", "학습률"), logarithmic=True),
        plots.axis(Text("steps to 90 % test accuracy", "시험 정확도 90 %까지의 스텝"), logarithmic=True),
    )
    caption = Text(
        f"Mean over seeds and its 95 % interval; a seed that never got there counts as {grid.steps} steps.",
        f"시드 평균과 95 % 구간. 이르지 못한 시드는 {grid.steps}스텝으로 친다.",
    )
    return Figure(Text("Steps needed at each learning rate", "학습률별로 필요한 스텝"), caption, picture)


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
                _ratio(interval),
                *(f"{mean(grid.values(cell, _accuracy)):.1f}" for cell in cells),
            )
        )
    columns = (
        Text("rate", "학습률"),
        Text("steps without", "없을 때의 스텝"),
        Text("steps with", "있을 때의 스텝"),
        Text("times fewer", "몇 배 적은가"),
        Text("final % without", "없을 때 마지막 %"),
        Text("final % with", "있을 때 마지막 %"),
    )
    title = Text(
        "Both arms at equal rates (median steps, mean final accuracy)",
        "같은 학습률에서 양쪽 (스텝의 중앙값, 마지막 정확도의 평균)",
    )
    return Table(title, columns, tuple(rows))


def _ratio(interval: Interval) -> Text:
    ratio, low, high = (f"{2**value:.1f}" for value in (interval.mean, interval.low, interval.high))
    return Text(f"{ratio} ({low} to {high})", f"{ratio} ({low} ~ {high})")


EXPERIMENT = Experiment(NAME, TITLE, CLAIM, plan, train, analyse)
