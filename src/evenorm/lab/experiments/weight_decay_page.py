"""What the page says of `weight-decay`: the claim, the protocol, the answer, the plots and the table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import TypeAlias

from evenorm.lab import plots
from evenorm.lab.language import Text
from evenorm.lab.results import Claim, Endpoint, Figure, Published, Table
from evenorm.lab.trials import Record

CLAIM = Claim(
    korean="",
    english=Text(
        "L2 regularisation has no regularising effect when combined with normalisation: it changes the effective "
        "learning rate.",
        "L2 정칙화는 정규화와 함께 쓰면 정칙화 효과가 없다. 그것은 실효 학습률을 바꾼다.",
    ),
    source=Text(
        "van Laarhoven 2017; Li & Arora 2019; η is the rate, λ the decay",
        "van Laarhoven 2017; Li & Arora 2019; η는 학습률, λ는 감쇠",
    ),
    question=Text(
        "Does weight decay before batch norm do nothing but set the angle by which weights turn a step, √(2ηλ)?",
        "배치 정규화 앞의 가중치 감쇠는 한 단계에 가중치가 도는 각을 √(2ηλ)로 정하는 일만 하는가?",
    ),
)
PUBLISHED = (
    Published(
        Text(
            "weight decay is the same training as a rate that grows exponentially",
            "가중치 감쇠는 지수적으로 커지는 학습률과 같은 학습이다",
        ),
        Text("theorem, networks with normalisation", "정리, 정규화가 있는 신경망"),
        "Li & Arora 2019",
    ),
)
NOTES = (
    Text(
        "Weights before a batch norm alone decay; γ, β and the last layer, whose decay would regularise, do not. "
        "A fifth of the labels are random, and training starts from short weights, so that the gradients and "
        "lengths settle within the run: near a minimum, or before the lengths settle, the angle is another.",
        "배치 정규화 앞의 가중치만 감쇠한다. 감쇠하면 정칙화될 γ, β와 마지막 층은 감쇠하지 않는다. 기울기와 "
        "길이가 실험 안에서 자리 잡도록 레이블의 5분의 1은 무작위이고 짧은 가중치에서 학습을 시작한다. 최솟값 "
        "가까이나 길이가 자리 잡기 전에는 각이 다르다.",
    ),
    Text(
        "That decay has no regularising effect on test error is not measured here, only what it does to the steps.",
        "감쇠가 시험 오류에 정칙화 효과를 내지 않는다는 것은 여기서 재지 않고, 단계에 하는 일만 잰다.",
    ),
)
COLOURS = (plots.BLUE, plots.GREEN, plots.VERMILION)
LAYERS = (1, 2, 3)
TICKS = [0.02, 0.03, 0.05, 0.07, 0.1, 0.15]
SETTLED = 0.6  # of the measurements come before the lengths have settled
Runs: TypeAlias = "dict[float, list[Record]]"  # by product of rate and decay, in the order of the seeds


def layer_ratio(record: Record, layer: int, product: float) -> float:
    """Return the median angle a step of a layer over the last 40 % of training, over √(2ηλ)."""
    angles = record[f"angle {layer}"]
    settled = [value for value in angles[round(SETTLED * len(angles)) :] if value is not None]
    return max(median(settled) if settled else 0.0, 1e-9) / math.sqrt(2 * product)


def ratio(record: Record, product: float) -> float:
    """Return the median of the layers' ratios."""
    return median(layer_ratio(record, layer, product) for layer in LAYERS)


def places(record: Record) -> float:
    """Return to how many decimal places the two trainings agree: 0 where one was lost."""
    difference = record["difference"]
    return 0.0 if difference is None else -math.log10(max(difference, 1e-17))


def protocol(steps: Mapping[float, int], rate: float, batch: int, seeds: int) -> Text:
    """Return what was trained, in words enough to repeat it."""
    products = ", ".join(f"{product:g}" for product in steps)
    lengths = ", ".join(map(str, steps.values()))
    return Text(
        f"Data: scikit-learn's digits, x/16, 1437 training images, a fifth of the labels drawn anew by each "
        f"seed. Network: 64-32-32-32-10, batch norm before each ReLU, W ~ N(0, 1/(8 inputs)). Plain SGD, batch "
        f"{batch}, rate η = {rate:g}, decay λ on the weights before a batch norm; ηλ = {products} for {lengths} "
        f"steps, 8 relaxation times 1/(4ηλ). {seeds} seeds.",
        f"데이터: scikit-learn의 digits, x/16, 학습 그림 1437장, 시드마다 레이블의 5분의 1을 다시 뽑는다. "
        f"신경망: 64-32-32-32-10, 각 ReLU 앞에 배치 정규화, W ~ N(0, 1/(8·입력 수)). 단순 SGD, 배치 {batch}, "
        f"학습률 η = {rate:g}, 배치 정규화 앞의 가중치에 감쇠 λ. ηλ = {products}로 {lengths}단계, 완화 시간 "
        f"1/(4ηλ)의 8배. 시드 {seeds}개.",
    )


def answer(runs: Runs, endpoints: Sequence[Endpoint], exact: Sequence[Record]) -> Text:
    """Return the result in plain words."""
    slope = endpoints[0]
    found = [mean(ratio(record, product) for record in records) for product, records in runs.items()]
    ratios = ", ".join(f"{value:.2f}" for value in found)
    worst = min(places(record) for record in exact)
    power, low, high = (0.5 + value for value in (slope.estimate, slope.low, slope.high))
    return Text(
        f"Weights turned by {ratios} times √(2ηλ) a step at the products tried; the angle grew as (ηλ)^{power:.2f} "
        f"({low:.2f} to {high:.2f}). A run with decay and one with a growing rate and none had the same losses to "
        f"{worst:.0f} decimal places.",
        f"시험한 곱에서 가중치는 한 단계에 √(2ηλ)의 {ratios}배 돌았다. 각은 (ηλ)^{power:.2f}로 "
        f"커졌다({low:.2f} ~ {high:.2f}). 감쇠가 있는 학습과 감쇠 없이 학습률이 커지는 학습의 손실은 소수 "
        f"{worst:.0f}자리까지 같았다.",
    )


def angle_figure(runs: Runs) -> Figure:
    """Show the measured angles against the predicted ones."""
    predicted = [math.sqrt(2 * product) for product in runs]
    traces = [plots.line(Text("predicted: equal", "예측: 같음"), "#888888", predicted, predicted, dash="dash")]
    for layer, colour in zip(LAYERS, COLOURS, strict=True):
        angles = [
            [layer_ratio(record, layer, product) * math.sqrt(2 * product) for record in records]
            for product, records in runs.items()
        ]
        words = Text(f"layer {layer}", f"{layer}번째 층")
        traces.append(plots.whiskers(words, colour, predicted, angles, mode="markers"))
    picture = plots.figure(
        traces,
        plots.axis(Text("√(2ηλ), radians", "√(2ηλ), 라디안"), type="log", tickvals=TICKS),
        plots.axis(Text("angle a step, radians", "한 단계의 각, 라디안"), type="log", tickvals=TICKS),
    )
    caption = Text(
        "Median over the last 40 % of training; mean over seeds and its 95 % interval.",
        "학습의 마지막 40 %의 중앙값. 시드에 대한 평균과 95 % 구간.",
    )
    return Figure(Text("Angle by which weights turn a step", "가중치가 한 단계에 도는 각"), caption, picture)


def length_figure(runs: Runs, steps: Mapping[float, int]) -> Figure:
    """Show the lengths of the second layer, in units of the relaxation time."""
    traces: list[plots.Trace] = []
    for (product, records), colour in zip(runs.items(), COLOURS, strict=False):
        count = len(records[0]["length 2"])
        every = steps[product] // count
        x = [4 * product * every * (index + 1) for index in range(count)]
        curves = [[value and value / record["length 2"][-1] for value in record["length 2"]] for record in records]
        traces += plots.band(f"ηλ = {product:g}", colour, x, curves)
    picture = plots.figure(
        traces,
        plots.axis(Text("steps, in relaxation times 1/(4ηλ)", "단계, 완화 시간 1/(4ηλ)의 배수")),
        plots.axis(Text("length of the weights, of the final one", "가중치의 길이, 마지막 길이의 배수")),
    )
    caption = Text(
        "Second layer; mean over seeds and its 95 % interval. From either side the lengths come within some "
        "relaxation times to where growth by gradients and decay balance, and then follow the gradients slowly.",
        "둘째 층. 시드에 대한 평균과 95 % 구간. 길이는 어느 쪽에서든 완화 시간의 몇 배 안에 기울기에 의한 성장과 "
        "감쇠가 맞서는 곳에 이르고, 그 뒤로는 기울기를 천천히 따라간다.",
    )
    return Figure(Text("Lengths during training", "학습 중의 길이"), caption, picture)


def table(runs: Runs) -> Table:
    """Return every layer's ratio."""
    rows = [
        (
            f"{product:g}",
            f"{math.sqrt(2 * product):.4f}",
            *(f"{mean(layer_ratio(record, layer, product) for record in records):.3f}" for layer in LAYERS),
        )
        for product, records in runs.items()
    ]
    columns = ("ηλ", "√(2ηλ)", *(Text(f"layer {layer}: ratio", f"{layer}번째 층: 비") for layer in LAYERS))
    return Table(
        Text("Measured angle over √(2ηλ), means over seeds", "잰 각 / √(2ηλ), 시드에 대한 평균"),
        columns,
        tuple(rows),
    )
