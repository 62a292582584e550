"""Does batch norm reduce internal covariate shift? By the document's definition, and by one of gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, median

import numpy as np
import torch
from torch import Tensor, nn

from evenorm.lab.data import digits
from evenorm.lab.experiment import Experiment, Scale
from evenorm.lab.experiments import shift_page
from evenorm.lab.gradients import parameters_of, shift_of_gradients
from evenorm.lab.grid import Measure
from evenorm.lab.language import Text
from evenorm.lab.networks import BatchNorm, Linear, Sigmoid, initialise_, perceptron
from evenorm.lab.results import Analysis, Claim, Endpoint, Published
from evenorm.lab.statistics import Comparison, combine, judge
from evenorm.lab.training import (
    Criterion,
    Curves,
    Samples,
    batch_order,
    cross_entropy,
    descend,
    final_loss,
    training_samples,
)
from evenorm.lab.trials import Record, Trial, random_seed, settings

NAME, TITLE = "shift", Text("Internal covariate shift", "내부 공변량 변화")
CLAIM = Claim(
    korean="Batch 단위로 학습을 하게 되면 발생하는 Internal Covariant Shift 문제를 개선해준다. Internal Covariant "
    "Shift: 학습 과정에서 계층 별로 입력의 데이터 분포가 달라지는 현상",
    english="It mends the problem of internal covariate shift, which arises when one trains by batches: that the "
    "distribution of each layer's inputs changes during training.",
    source=Text(
        "The document, “batch normalisation”; Ioffe & Szegedy 2015, section 2 and figure 1b, c",
        "문서의 “Batch Normalization”; Ioffe & Szegedy 2015, 2절과 그림 1b, c",
    ),
    question=Text(
        "Do the inputs of a sigmoid wander less with batch norm, and do the gradients of a layer depend less on "
        "the layers before it?",
        "배치 정규화가 있으면 sigmoid의 입력이 덜 떠도는가? 그리고 한 층의 기울기가 앞선 층들에 덜 좌우되는가?",
    ),
)

ARMS = shift_page.ARMS
# Three nets, each at one rate for both arms. Sigmoid: 1.0, the best without batch norm of 0.1, 0.3, 1 and 3.
# Linear: of 0.001, 0.003 and 0.01 the pilot seeds gave cosines without / with of 1.0 / 0.3, 0.7 / 0.3, 0.0 / 0.1.
# Pilot seeds 1000-1002 gave, in the order of the margins: +3.2, +3.3, +3.1 and +6.2, +6.3, +6.3 doublings; cosines
# +0.43, +0.31, +0.26 (ReLU) and -0.09, -0.62, -0.83 (linear); loss -0.24, +0.23, +0.09 doublings.
RATES = {"sigmoid": 1.0, "relu": 0.1, "linear": 0.003}
STEPS = {"sigmoid": (1000, 700), "relu": (300, 150), "linear": (400, 100)}  # full, quick
EVERY, PROBE = 10, 500  # each 10 steps the same 500 images; inputs of the third hidden layer's sigmoids
PROBES = 8  # times along training at which gradients are compared
HALF = 1.0  # margin on drift and change of spread, in doublings: half as much
COSINE = 0.05  # margin on the cosine
LOSS = 0.0  # margin on the linear net's loss, in doublings: lower at all
RULE = Text(
    "The document speaks of the distribution of a layer's inputs. Measure: percentiles 15, 50 and 85 of what "
    "enters each of the 100 sigmoids of the third hidden layer, for the same 500 images every 10 steps. Drift of a "
    "unit: the path of its median over the mean width (85 − 15). Change of spread: largest width over smallest. "
    "REPRODUCED if, for the median unit, the 95 % intervals of log₂(without / with) of both lie above 1 (less than "
    "half as much); otherwise the worse verdict of the two. Beside it, under Holm's rule for all five: the cosine "
    "between a layer's gradient before and after the earlier layers took their step (1: no shift), with − without, "
    "margin 0.05, in a ReLU net and in the deep linear net of Santurkar et al.; and that net's final loss.",
    "문서는 층에 들어오는 입력의 분포를 말한다. 잰 것: 세 번째 은닉층의 sigmoid 100개에 들어가는 값의 15, 50, 85 "
    "백분위수를, 같은 그림 500장에 대해 10걸음마다. 한 단위의 떠돎: 중앙값이 지나온 길이를 평균 폭(85 − 15)으로 "
    "나눈 값. 폭의 변화: 가장 큰 폭 나누기 가장 작은 폭. 중앙에 있는 단위에서 두 값의 log₂(없을 때 / 있을 때)의 "
    "95 % 구간이 모두 1보다 위(절반 미만)이면 REPRODUCED, 아니면 둘 가운데 나쁜 판정. 덧붙여, 다섯 모두에 Holm의 "
    "규칙을 적용해: 앞선 층들이 한 걸음 내딛기 전과 후, 한 층의 기울기 사이의 코사인(1이면 변화 없음), 있을 때 − "
    "없을 때, 여백 0.05, ReLU 신경망과 Santurkar 외의 깊은 선형 신경망에서; 그리고 그 선형 신경망의 마지막 손실.",
)
PUBLISHED = (
    Published(
        Text(
            "curves only: the percentiles of one typical unit are much steadier with batch norm",
            "곡선만: 전형적인 단위 하나의 백분위수가 배치 정규화가 있으면 훨씬 안정하다",
        ),
        Text("binary MNIST, 3 hidden layers of 100 sigmoids", "이진 MNIST, sigmoid 100개씩 은닉층 3개"),
        Text("Ioffe & Szegedy 2015, figure 1b, c", "Ioffe & Szegedy 2015, 그림 1b, c"),
    ),
    Published(
        Text(
            "with batch norm gradients change as much or more; in the deep linear net almost uncorrelated, without "
            "it almost no change",
            "배치 정규화가 있으면 기울기가 그만큼 또는 더 변한다. 깊은 선형 신경망에서는 거의 무상관, 없으면 거의 "
            "변하지 않는다",
        ),
        Text(
            "VGG on CIFAR-10; 25 linear layers of 10 × 10, 1000 points, rates 1e-6 and 1e-7, 10 000 steps",
            "CIFAR-10의 VGG; 10 × 10 선형층 25개, 점 1000개, 학습률 1e-6과 1e-7, 10 000걸음",
        ),
        Text("Santurkar et al. 2018, figure 3 and section 2.2", "Santurkar 외 2018, 그림 3과 2.2절"),
    ),
)


def plan(scale: Scale) -> list[Trial]:
    """Both arms of the three nets, each at its rate."""
    return [
        Trial(NAME, 1, arm, seed, rate, settings(net=net, steps=STEPS[net][scale.quick]))
        for net, rate in RATES.items()
        for arm in ARMS
        for seed in scale.paired
    ]


def train(trials: Sequence[Trial]) -> list[Record]:
    """Train one of the three nets, and watch the inputs of its sigmoids or the gradients of its weights."""
    return {"sigmoid": _train_sigmoid, "relu": _train_relu, "linear": _train_linear}[trials[0]["net"]](trials)


def _train_sigmoid(trials: Sequence[Trial]) -> list[Record]:
    """Train 64-100-100-100-10 with sigmoids, W ~ N(0, 0.1²), batch 60; take percentiles of layer 3's inputs."""
    members, steps = len(trials), trials[0]["steps"]
    samples = training_samples([digits()] * members)
    network = perceptron(members, (64, 100, 100, 100, 10), Sigmoid, normalise=trials[0].arm == "batch norm")
    initialise_(network, [trial.seed for trial in trials], lambda inputs: 0.1)
    inputs_of_sigmoids = nn.Sequential(*list(network)[:-2])
    chosen = torch.randperm(samples.y.shape[1], generator=torch.Generator().manual_seed(0))[:PROBE]
    images = samples.x[:, :, chosen]
    watched, losses = [], []
    for step, loss in descend(network, samples, trials, batch=60, steps=steps):
        losses.append(loss)
        if step % EVERY == 0:
            with torch.no_grad():
                watched.append(_percentiles(inputs_of_sigmoids(images)))
    curves = Curves(members)
    for member, found in enumerate(np.stack(watched, 1)):  # (times, units, 3)
        width = found[..., 2] - found[..., 0]
        path = np.abs(np.diff(found[..., 1], axis=0)).sum(0)
        drift, spread = path / width.mean(0), width.max(0) / width.min(0)
        typical = int(np.argsort(drift, kind="stable")[len(drift) // 2])
        curves.records()[member] |= {
            "drift": [float(f"{value:.7g}") for value in drift],
            "spread": [float(f"{value:.7g}") for value in spread],
            "typical": [[float(f"{value:.7g}") for value in row] for row in found[:, typical]],
        }
    curves.put(loss=final_loss(torch.stack(losses)))
    return curves.records()


def _percentiles(x: Tensor) -> np.ndarray:
    """Return percentiles 15, 50 and 85 over the last dimension, (S, C, 3)."""
    places = [int(share * x.shape[2]) for share in (0.15, 0.5, 0.85)]
    return np.partition(x.numpy(), places, axis=2)[:, :, places]


def _train_relu(trials: Sequence[Trial]) -> list[Record]:
    """Train 64-(100 × 5)-10 with ReLU, W ~ N(0, 2/inputs), batch 60."""
    members = len(trials)
    network = perceptron(members, (64, *[100] * 5, 10), nn.ReLU, normalise=trials[0].arm == "batch norm")
    initialise_(network, [trial.seed for trial in trials], lambda inputs: math.sqrt(2 / inputs))
    return _compare_gradients(network, training_samples([digits()] * members), trials, 60, cross_entropy)


def _train_linear(trials: Sequence[Trial]) -> list[Record]:
    """Train 25 linear layers of 10 × 10 towards Ax by full batches of 1000 random x; batch norm behind each."""
    members = len(trials)
    sets = [torch.Generator().manual_seed(random_seed(trial.seed, "linear data")) for trial in trials]
    x, a = (torch.stack([torch.randn(10, count, generator=each) for each in sets]) for count in (1000, 10))
    targets = (a @ x).transpose(1, 2)
    member = torch.arange(members)[:, None]

    def squares(answers: Tensor, index: Tensor) -> Tensor:
        return (answers - targets[member, index].transpose(1, 2)).square().mean(1)

    layers: list[nn.Module] = []
    for _ in range(25):
        layers.append(Linear(members, 10, 10, bias=False))
        layers += [BatchNorm(members, 10)] if trials[0].arm == "batch norm" else []
    network = nn.Sequential(*layers)
    initialise_(network, [trial.seed for trial in trials], lambda inputs: math.sqrt(1 / inputs))
    samples = Samples(x, torch.arange(1000).expand(members, -1))
    return _compare_gradients(network, samples, trials, 1000, squares)


def _compare_gradients(
    network: nn.Sequential, samples: Samples, trials: Sequence[Trial], batch: int, criterion: Criterion
) -> list[Record]:
    """Train, and compare gradients across `PROBES` of the steps, evenly spread."""
    steps = trials[0]["steps"]
    moments = {round(steps * (part + 1) / PROBES) for part in range(PROBES)}
    order = torch.stack([batch_order(trial.seed, samples.y.shape[1], batch, steps) for trial in trials])
    before, losses, cosines, distances = parameters_of(network), [], [], []
    for step, loss in descend(network, samples, trials, batch=batch, steps=steps, criterion=criterion):
        losses.append(loss)
        if step in moments:
            found = shift_of_gradients(network, before, samples.batch(order[:, step - 1]), criterion)
            cosines.append(found[0])
            distances.append(found[1])
        if step + 1 in moments:
            before = parameters_of(network)
    curves = Curves(len(trials))
    by_layer = (torch.stack(every, 2).mean(2) for every in (cosines, distances))
    curves.put(loss=final_loss(torch.stack(losses)), **dict(zip(("cosine", "distance"), by_layer, strict=True)))
    return curves.records()


def analyse(records: Mapping[Trial, Record], scale: Scale) -> Analysis:
    """Compare the arms of each net, seed by seed."""
    runs = shift_page.Runs(
        {
            (net, arm): [
                records[trial]
                for trial in sorted(records, key=lambda trial: trial.seed)
                if (trial["net"], trial.arm) == (net, arm)
            ]
            for net in RATES
            for arm in ARMS
        }
    )
    endpoints = judge(_comparisons(runs))
    steps = {trial["net"]: trial["steps"] for trial in records}
    return Analysis(
        experiment=NAME,
        title=TITLE,
        claim=CLAIM,
        protocol=_protocol(steps, scale),
        rule=RULE,
        verdict=combine(endpoint.verdict for endpoint in endpoints[:2]),
        answer=_answer(runs, endpoints),
        endpoints=endpoints,
        figures=shift_page.figures(runs, EVERY),
        published=PUBLISHED,
        command=scale.command(NAME),
        tables=(shift_page.table(runs),),
        notes=(
            Text(
                "The sign of the gradient measure depends on the net and the rate: it is no property of batch norm "
                "alone. In the linear net at rate 0.01 the pilots found no difference.",
                "기울기로 잰 값의 부호는 신경망과 학습률에 달려 있다. 배치 정규화만의 성질이 아니다. 선형 "
                "신경망에서 학습률이 0.01일 때는 예비 시드에서 차이가 없었다.",
            ),
            Text(
                "Each net has one rate for both arms; nets this small and trainings this short do not show what "
                "happens late.",
                "신경망마다 두 쪽의 학습률이 같다. 이만큼 작은 신경망과 짧은 학습은 늦게 일어나는 일을 보여 주지 "
                "못한다.",
            ),
            *scale.notes(),
        ),
        seeds=scale.seeds,
        configuration={"rates": RATES, "steps": steps},
    )


def typical(name: str) -> Measure:
    """Return the measure of the median unit."""
    return lambda record: math.log2(median(record[name]))


def average(name: str) -> Measure:
    """Return the mean over layers; NaN where the net was lost counts as no agreement."""
    return lambda record: mean(0.0 if value is None else value for value in record[name])


def _logarithm(record: Record) -> float:
    return math.log2(min(record["loss"] or math.inf, 1e6))


def _comparisons(runs: shift_page.Runs) -> list[Comparison]:
    doublings = Text("doublings: log₂(without / with)", "두 배의 수: log₂(없을 때 / 있을 때)")
    half = Text("less than half as much with batch norm", "배치 정규화가 있으면 절반 미만")
    above = Text("an interval that reaches below 1", "1 아래에 닿는 구간")
    cosine = Text("cosine, with − without", "코사인, 있을 때 − 없을 때")
    steadier = Text("gradients change less with batch norm", "배치 정규화가 있으면 기울기가 덜 변한다")
    return [
        Comparison(
            name=Text("Drift of the median unit's inputs", "중앙에 있는 단위의 입력이 떠돈 정도"),
            unit=doublings,
            differences=runs.differences("sigmoid", "none", "batch norm", typical("drift")),
            margin=HALF,
            favours=half,
            would_change=above,
        ),
        Comparison(
            name=Text("Change of the median unit's spread", "중앙에 있는 단위의 폭의 변화"),
            unit=doublings,
            differences=runs.differences("sigmoid", "none", "batch norm", typical("spread")),
            margin=HALF,
            favours=half,
            would_change=above,
        ),
        *(
            Comparison(
                name=name,
                unit=cosine,
                differences=runs.differences(net, "batch norm", "none", average("cosine")),
                margin=COSINE,
                favours=steadier,
                would_change=Text("an interval on the other side of 0", "0의 다른 쪽에 있는 구간"),
            )
            for net, name in (
                ("relu", Text("Agreement of gradients, ReLU net", "기울기의 일치, ReLU 신경망")),
                ("linear", Text("Agreement of gradients, deep linear net", "기울기의 일치, 깊은 선형 신경망")),
            )
        ),
        Comparison(
            name=Text("Final loss of the deep linear net", "깊은 선형 신경망의 마지막 손실"),
            unit=doublings,
            differences=runs.differences("linear", "none", "batch norm", _logarithm),
            margin=LOSS,
            favours=Text("the net trains better with batch norm", "배치 정규화가 있으면 더 잘 학습된다"),
            would_change=Text("an interval that reaches below 0", "0 아래에 닿는 구간"),
        ),
    ]


def _protocol(steps: Mapping[str, int], scale: Scale) -> Text:
    return Text(
        f"Sigmoid net: 64-100-100-100-10, W ~ N(0, 0.1²), digits, batch 60, rate 1, {steps['sigmoid']} steps. ReLU "
        f"net: 64-(100 × 5)-10, W ~ N(0, 2/inputs), digits, batch 60, rate 0.1, {steps['relu']} steps. Linear net: "
        f"25 layers of 10 × 10, W ~ N(0, 1/10), target Ax, x and A normal, 1000 points, full batch, mean squared "
        f"error, rate 0.003, {steps['linear']} steps; batch norm behind every layer. Plain SGD. Gradients are "
        f"compared at {PROBES} steps, on the step's own batch, and averaged over layers. {scale.seeds} paired "
        f"seeds.",
        f"sigmoid 신경망: 64-100-100-100-10, W ~ N(0, 0.1²), digits, 배치 60, 학습률 1, {steps['sigmoid']}걸음. "
        f"ReLU 신경망: 64-(100 × 5)-10, W ~ N(0, 2/입력 수), digits, 배치 60, 학습률 0.1, {steps['relu']}걸음. "
        f"선형 신경망: 10 × 10인 층 25개, W ~ N(0, 1/10), 목표 Ax, x와 A는 정규 분포, 점 1000개, 전체 배치, 평균 "
        f"제곱 오차, 학습률 0.003, {steps['linear']}걸음, 모든 층 뒤에 배치 정규화. 순수한 SGD. 기울기는 "
        f"{PROBES}번, 그 걸음의 배치로 견주고 층에 대해 평균한다. 짝지은 시드 {scale.seeds}개.",
    )


def _answer(runs: shift_page.Runs, endpoints: Sequence[Endpoint]) -> Text:
    drift, spread = (2**endpoint.estimate for endpoint in endpoints[:2])
    relu, linear = ([mean(runs.values(net, arm, average("cosine"))) for arm in ARMS] for net in ("relu", "linear"))
    return Text(
        f"With batch norm the inputs of a typical sigmoid drifted {drift:.1f} times less and their spread changed "
        f"{spread:.0f} times less. By the gradients the answer depends on the net: agreement without and with "
        f"batch norm was {relu[0]:.2f} and {relu[1]:.2f} in the ReLU net, {linear[0]:.2f} and {linear[1]:.2f} in "
        f"the deep linear net (1 is no shift).",
        f"배치 정규화가 있으면 전형적인 sigmoid의 입력이 {drift:.1f}배 덜 떠돌았고 그 폭은 {spread:.0f}배 덜 "
        f"변했다. 기울기로 재면 답은 신경망에 달려 있다. 기울기의 일치는 없을 때와 있을 때 ReLU 신경망에서 "
        f"{relu[0]:.2f}와 {relu[1]:.2f}, 깊은 선형 신경망에서 {linear[0]:.2f}와 {linear[1]:.2f}였다(1이면 변화 "
        f"없음).",
    )


EXPERIMENT = Experiment(NAME, TITLE, CLAIM, plan, train, analyse, cost=3.0, stack_size=10)
