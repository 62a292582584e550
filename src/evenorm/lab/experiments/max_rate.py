"""How much higher a learning rate does batch norm bear, and more so in deeper nets? After Bjorck et al. 2018."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from torch import nn

from evenorm.lab import plots
from evenorm.lab.data import split_of
from evenorm.lab.experiment import Experiment, Scale
from evenorm.lab.grid import Grid
from evenorm.lab.language import Text
from evenorm.lab.networks import initialise_, perceptron
from evenorm.lab.results import Analysis, Claim, Endpoint, Figure, Published
from evenorm.lab.statistics import Comparison, combine, judge
from evenorm.lab.training import Curves, descend, diverged, final_loss, score, trained, training_samples
from evenorm.lab.trials import PILOT_SEEDS, Record, Trial, settings

NAME, TITLE = "max-rate", Text("The largest usable rate", "쓸 수 있는 가장 큰 학습률")
CLAIM = Claim(
    korean="학습 속도 & 학습 결과가 개선된다 (Higer learning rate 적용 가능)",
    english="Training speed and the trained result improve (higher learning rates become usable).",
    source=Text(
        "The document, “advantages of batch normalisation”; Bjorck et al. 2018",
        "문서의 “Batch Normalization의 장점”; Bjorck 외 2018",
    ),
    question=Text(
        "How many times higher is the largest learning rate at which a net trains, and does the gap grow with "
        "depth?",
        "신경망이 학습되는 가장 큰 학습률이 몇 배 높아지며, 그 차이는 깊을수록 커지는가?",
    ),
)

ARMS = {
    "none": Text("without batch norm", "배치 정규화 없음"),
    "batch norm": Text("with batch norm", "배치 정규화 있음"),
}
COLOURS = (plots.VERMILION, plots.BLUE)
DEPTHS = (3, 6, 12)  # hidden layers; of 20 layers this narrow none trains in so few steps without batch norm
RATES = tuple(2.0**power for power in range(-6, 4))  # 1/64 to 8
WIDTH, BATCH = 32, 60
HIGHEST = 3.0  # loss that the plot shows
FACTOR = 0.5 / math.log10(2)  # margin: 3.2 times, half a power of ten; the pilot seeds gave +5, +4, +5 doublings
RULE = Text(
    "Measure: the largest rate, on a grid in steps of 2, at which a seed trains: no loss infinite or above 10 "
    "times the first, final training loss below half the first, training accuracy above twice chance. REPRODUCED "
    "if the 95 % interval of log₂(rate with / rate without) at 12 hidden layers lies above 1.66 (3.2 times, half "
    "a power of ten) and that of its growth per doubling of the depth above 0; otherwise the worse of the two "
    "verdicts. Beside it, under Holm's rule for all three: whether the rate explains most of the gain, so that "
    "at the best rate without batch norm less than half the gap in log training loss is left. Best rates are "
    "chosen on pilot seeds 1000-1002, which are then left out.",
    "잰 것: 2배 간격의 학습률 중 한 시드가 학습되는 가장 큰 값. 학습되었다는 것은 손실이 무한대나 첫 손실의 "
    "10배를 넘지 않고, 마지막 학습 손실이 첫 손실의 절반보다 작고, 학습 정확도가 우연의 두 배를 넘는다는 뜻이다. "
    "은닉층 12개에서 log₂(있을 때의 학습률 / 없을 때의 학습률)의 95 % 구간이 1.66(3.2배, 10의 절반 거듭제곱)보다 "
    "위에 있고, 깊이가 두 배가 될 때 커지는 양의 구간이 0보다 위에 있으면 재현됨. 아니면 두 판정 중 나쁜 쪽. "
    "덧붙여, 셋 모두에 Holm의 규칙을 적용해: 학습률이 이득의 대부분을 설명하는가, 곧 배치 정규화 없이 가장 좋은 "
    "학습률에서는 로그 학습 손실의 차이가 절반 미만으로 줄어드는가. 가장 좋은 학습률은 예비 시드 1000-1002로 "
    "고르고, 이 시드들은 판정에서 뺀다.",
)
PUBLISHED = (
    Published(
        Text(
            "5 times the base rate: without batch norm the parameters reach machine infinity; with it, 5 and 30 "
            "times the rate train",
            "기본 학습률의 5배: 배치 정규화가 없으면 매개변수가 무한대에 이르고, 있으면 5배와 30배에서도 학습된다",
        ),
        Text("Inception on ImageNet, base rate 0.0015", "ImageNet의 Inception, 기본 학습률 0.0015"),
        Text("Ioffe & Szegedy 2015, section 4.2.1", "Ioffe & Szegedy 2015, 4.2.1절"),
    ),
    Published(
        Text(
            "larger rates become usable, which is the cause of faster convergence and better generalisation",
            "더 큰 학습률을 쓸 수 있게 되고, 이것이 더 빠른 수렴과 더 나은 일반화의 원인이다",
        ),
        Text("residual networks on CIFAR-10", "CIFAR-10의 residual 신경망"),
        Text("Bjorck et al. 2018, abstract", "Bjorck 외 2018, 초록"),
    ),
)


def plan(scale: Scale) -> list[Trial]:
    """Both arms at every depth over all rates, for the pilot seeds and the paired ones."""
    depths, rates, steps = (DEPTHS[:2], RATES[1::2], 150) if scale.quick else (DEPTHS, RATES, 250)
    seeds = (*PILOT_SEEDS, *scale.paired)
    return [
        Trial(NAME, 1, arm, seed, rate, settings(depth=depth, steps=steps))
        for arm in ARMS
        for depth in depths
        for rate in rates
        for seed in seeds
    ]


def train(trials: Sequence[Trial]) -> list[Record]:
    """Train `depth` hidden layers of 32 ReLUs, W ~ N(0, 2/inputs), batch 60, plain SGD."""
    splits = [split_of(trial, "digits") for trial in trials]
    training, first = training_samples(splits), trials[0]
    widths = (splits[0].features, *[WIDTH] * first["depth"], splits[0].classes)
    network = perceptron(len(trials), widths, nn.ReLU, normalise=first.arm == "batch norm")
    initialise_(network, [trial.seed for trial in trials], lambda inputs: math.sqrt(2 / inputs))
    history = torch.stack(
        [loss for _, loss in descend(network, training, trials, batch=BATCH, steps=first["steps"])]
    )
    accuracy = score(network, training)[0]
    curves = Curves(len(trials))
    curves.put(diverged=diverged(history), first_loss=history[0], train_loss=final_loss(history))
    curves.put(train_accuracy=accuracy, trained=trained(history, accuracy, splits[0].classes))
    return curves.records()


def analyse(records: Mapping[Trial, Record], scale: Scale) -> Analysis:
    """Compare the largest usable rates at every depth, and the arms at equal and at their own best rates."""
    depths = sorted({trial["depth"] for trial in records})
    grids = {
        depth: Grid({trial: record for trial, record in records.items() if trial["depth"] == depth}, scale)
        for depth in depths
    }
    endpoints = judge(_comparisons(grids))
    return Analysis(
        experiment=NAME,
        title=TITLE,
        claim=CLAIM,
        protocol=_protocol(grids),
        rule=RULE,
        verdict=combine(endpoint.verdict for endpoint in endpoints[:2]),
        answer=_answer(grids, endpoints),
        endpoints=endpoints,
        figures=(_depth_figure(grids), _loss_figure(grids)),
        published=PUBLISHED,
        command=scale.command(NAME),
        notes=(*_notes(grids), *scale.notes()),
        seeds=scale.seeds,
        configuration={"depths": depths, "steps": grids[depths[0]].steps, "rates": list(grids[depths[0]].rates)},
    )


def _comparisons(grids: Mapping[int, Grid]) -> list[Comparison]:
    shallow, deep = min(grids), max(grids)
    grid, doublings = grids[deep], math.log2(deep / shallow)
    gains = {depth: _gains(grid) for depth, grid in grids.items()}
    rate, (own, same) = grid.best("none", _progress)[1], _gaps(grid)
    return [
        Comparison(
            name=Text(f"Largest usable rate, {deep} hidden layers", f"쓸 수 있는 가장 큰 학습률, 은닉층 {deep}개"),
            unit=Text("doublings: log₂(rate with / rate without)", "두 배의 횟수: log₂(있을 때 / 없을 때)"),
            differences=tuple(gains[deep]),
            margin=FACTOR,
            favours=Text(
                "batch norm bears more than 3.2 times the rate", "배치 정규화가 3.2배 넘는 학습률을 견딘다"
            ),
            would_change=Text("an interval that reaches below 1.66", "1.66 아래에 닿는 구간"),
        ),
        Comparison(
            name=Text(
                f"Growth of that gap with depth, {shallow} to {deep} layers",
                f"깊이에 따른 그 차이의 증가, {shallow}층에서 {deep}층까지",
            ),
            unit=Text("doublings of the rate per doubling of the depth", "깊이가 두 배 될 때 학습률의 두 배 횟수"),
            differences=tuple((b - a) / doublings for a, b in zip(gains[shallow], gains[deep], strict=True)),
            margin=0.0,
            favours=Text("the deeper the net, the larger the gap", "깊을수록 차이가 크다"),
            would_change=Text("an interval that reaches below 0", "0 아래에 닿는 구간"),
        ),
        Comparison(
            name=Text(
                f"Half the gap in log training loss, each at its best rate − the gap with both at rate {rate:g}",
                f"각자 가장 좋은 학습률에서 로그 학습 손실 차이의 절반 − 둘 다 학습률 {rate:g}일 때의 차이",
            ),
            unit=Text("powers of ten of the training loss", "학습 손실의 10의 거듭제곱"),
            differences=tuple(a / 2 - b for a, b in zip(own, same, strict=True)),
            margin=0.0,
            favours=Text("the higher rate explains most of the gain", "높은 학습률이 이득의 대부분을 설명한다"),
            would_change=Text("an interval that reaches below 0", "0 아래에 닿는 구간"),
        ),
    ]


def _edges(grid: Grid, arm: str) -> list[float]:
    """Return log₂ of each seed's largest rate that trained; a step below the grid where none did."""
    step = math.log2(grid.rates[1] / grid.rates[0])
    rows = zip(*(grid.values((arm, rate), lambda record: record["trained"]) for rate in grid.rates), strict=True)
    return [
        max(
            (math.log2(rate) for rate, usable in zip(grid.rates, row, strict=True) if usable),
            default=math.log2(grid.rates[0]) - step,
        )
        for row in rows
    ]


def _gains(grid: Grid) -> list[float]:
    return [b - a for a, b in zip(*(_edges(grid, arm) for arm in ARMS), strict=True)]


def _progress(record: Record) -> float:
    """Return −log₁₀ of the final training loss; a trial that was lost counts as 10 times its first loss."""
    loss = record["train_loss"]
    return -math.log10(10 * record["first_loss"] if record["diverged"] or loss is None else max(loss, 1e-12))


def _gaps(grid: Grid) -> list[tuple[float, ...]]:
    """Return batch norm's lead in log₁₀ loss, each arm at its best rate, and both at the best one without."""
    without, with_ = (grid.best(arm, _progress) for arm in ARMS)
    return [grid.differences(cell, without, _progress) for cell in (with_, ("batch norm", without[1]))]


def _times(doublings: float) -> str:
    return f"{2**doublings:.3g}"


def _protocol(grids: Mapping[int, Grid]) -> Text:
    grid, depths = next(iter(grids.values())), ", ".join(map(str, grids))
    step = grid.rates[1] / grid.rates[0]
    return Text(
        f"Data: scikit-learn's digits, x/16, one stratified split 1437/360. Networks: {depths} hidden layers of "
        f"{WIDTH} ReLUs, W ~ N(0, 2/inputs), biases 0; in one arm batch norm before each ReLU. Plain SGD, batch "
        f"{BATCH}, {grid.steps} steps, rates {grid.rates[0]:g} to {grid.rates[-1]:g} in steps of {step:g}. "
        f"{grid.scale.seeds} paired seeds: the same initial weights and the same batches in both arms.",
        f"데이터: scikit-learn의 digits, x/16, 층화 분할 하나 1437/360. 신경망: ReLU {WIDTH}개인 은닉층 "
        f"{depths}개, W ~ N(0, 2/입력 수), 편향 0. 한쪽에는 각 ReLU 앞에 배치 정규화. 단순 SGD, 배치 {BATCH}, "
        f"{grid.steps}스텝, 학습률 {grid.rates[0]:g}부터 {grid.rates[-1]:g}까지 {step:g}배 간격. 짝지은 시드 "
        f"{grid.scale.seeds}개: 양쪽의 초기 가중치와 배치가 같다.",
    )


def _answer(grids: Mapping[int, Grid], endpoints: Sequence[Endpoint]) -> Text:
    deep, gain, rate = max(grids), endpoints[0], grids[max(grids)].best("none", _progress)[1]
    ratio, low, high = (_times(value) for value in (gain.estimate, gain.low, gain.high))
    a, b = (_times(mean(_edges(grids[deep], arm))) for arm in ARMS)
    others = [(depth, _times(mean(_gains(grid)))) for depth, grid in grids.items() if depth != deep]
    own, same = (f"{10 ** mean(gaps):.1f}" for gaps in _gaps(grids[deep]))
    english = ", ".join(f"at {depth} layers {times} times" for depth, times in others)
    korean = ", ".join(f"{depth}층에서는 {times}배" for depth, times in others)
    return Text(
        f"At {deep} hidden layers the largest usable rate was {ratio} times higher with batch norm (95 % "
        f"interval {low} to {high}): {b} against {a}; {english}. Each at its best rate, batch norm's training "
        f"loss was {own} times lower; with both at rate {rate:g}, {same} times.",
        f"은닉층 {deep}개에서 쓸 수 있는 가장 큰 학습률은 배치 정규화가 있을 때 {ratio}배 높았다(95 % 구간 "
        f"{low} ~ {high}): {a} 대신 {b}. {korean}. 각자 가장 좋은 학습률에서 배치 정규화의 학습 손실은 {own}배 "
        f"낮았고, 둘 다 학습률 {rate:g}일 때는 {same}배 낮았다.",
    )


def _notes(grids: Mapping[int, Grid]) -> list[str]:
    notes: list[str] = [
        Text(
            "Nets this small say nothing of how far the gap grows in nets of a hundred layers. “Usable” asks for "
            "half the loss within these few steps, so at 12 layers it also counts against a net that is merely "
            "slow.",
            "이렇게 작은 신경망으로는 백 층짜리 신경망에서 차이가 얼마나 커지는지 알 수 없다. “쓸 수 있다”는 이 "
            "적은 스텝 안에 손실이 절반으로 줄어야 한다는 뜻이므로, 12층에서는 단지 느린 신경망에도 불리하다.",
        )
    ]
    if any(2 ** max(_edges(grid, arm)) >= grid.rates[-1] for grid in grids.values() for arm in ARMS):
        notes.append(
            Text(
                "Some seeds trained at the largest rate of the grid: a larger one may be usable.",
                "격자의 가장 큰 학습률에서도 학습된 시드가 있다. 더 큰 학습률도 쓸 수 있을지 모른다.",
            )
        )
    return notes


def _depth_figure(grids: Mapping[int, Grid]) -> Figure:
    traces = [
        plots.whiskers(words, colour, list(grids), [_edges(grid, arm) for grid in grids.values()])
        for (arm, words), colour in zip(ARMS.items(), COLOURS, strict=True)
    ]
    powers = range(-7, 4)
    labels = [f"{2**power}" if power >= 0 else f"1/{2**-power}" for power in powers]
    rates: dict[str, Any] = {"tickvals": list(powers), "ticktext": labels, "zeroline": False}
    picture = plots.figure(
        traces,
        plots.axis(Text("hidden layers", "은닉층 수"), tickvals=list(grids)),
        plots.axis(Text("largest usable rate", "가장 큰 학습률"), **rates),
    )
    caption = Text(
        "Geometric mean over seeds and its 95 % interval. The distance between the lines is what batch norm adds.",
        "시드들의 기하 평균과 95 % 구간. 두 선 사이의 거리가 배치 정규화가 더해 주는 몫이다.",
    )
    return Figure(Text("Largest usable rate by depth", "깊이별 쓸 수 있는 가장 큰 학습률"), caption, picture)


def _loss_figure(grids: Mapping[int, Grid]) -> Figure:
    traces, owners = list[plots.Trace](), list[int]()
    for depth, grid in grids.items():
        for (arm, words), colour in zip(ARMS.items(), COLOURS, strict=True):
            losses = [
                grid.values((arm, rate), lambda record: min(HIGHEST, 10 ** -_progress(record)))
                for rate in grid.rates
            ]
            traces.append(plots.whiskers(words, colour, grid.rates, losses, visible=depth == max(grids)))
            owners.append(depth)
    order = sorted(grids, reverse=True)
    labels = [Text(f"{depth} hidden layers", f"은닉층 {depth}개") for depth in order]
    picture = plots.figure(
        traces,
        plots.axis(Text("learning rate", "학습률"), logarithmic=True),
        plots.axis(Text("final training loss", "마지막 학습 손실"), range=[0, HIGHEST]),
        updatemenus=plots.buttons(labels, [[owner == depth for owner in owners] for depth in order]),
    )
    caption = Text(
        "Mean over seeds and its 95 % interval. 2.3 is the loss of a guess among ten classes; what diverged lies "
        "above.",
        f"시드 평균과 95 % 구간. 우연은 2.3이며, {HIGHEST:g}보다 높아졌거나 발산한 것은 {HIGHEST:g}로 친다.",
    )
    return Figure(Text("Training loss at each rate", "학습률별 학습 손실"), caption, picture)


EXPERIMENT = Experiment(NAME, TITLE, CLAIM, plan, train, analyse, cost=0.9, stack_size=32)
