"""Over how many powers of ten of the initial weights does a net train, with batch norm and without?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean

import torch
from torch import nn

from evenorm.lab import plots
from evenorm.lab.data import split_of
from evenorm.lab.experiment import Experiment, Scale
from evenorm.lab.language import Text
from evenorm.lab.networks import Linear, initialise_, perceptron
from evenorm.lab.results import Analysis, Claim, Endpoint, Figure, Published
from evenorm.lab.statistics import Comparison, Kind, combine, judge
from evenorm.lab.training import Curves, descend, diverged, final_loss, score, trained, training_samples
from evenorm.lab.trials import Record, Trial, settings

NAME, TITLE = "init", Text("The scale of the initial weights", "초기 가중치의 크기")
CLAIM = Claim(
    korean="가중치 초기값에 크게 의존하지 않는다 (매 layer마다 정규화를 진행하므로 초기화의 중요도 감소)",
    english="It depends little on the initial weights: every layer is normalised, so initialisation matters less.",
    source=Text(
        "The document, “advantages of batch normalisation”; Ioffe & Szegedy 2015, section 3.3",
        "문서의 “Batch Normalization의 장점”; Ioffe & Szegedy 2015, 3.3절",
    ),
    question=Text(
        "Over how many more powers of ten of the initial scale does a net with batch norm train, and what is "
        "left of the dependence?",
        "배치 정규화가 있으면 초기 가중치 크기의 10의 거듭제곱 몇 개만큼 더 넓은 범위에서 학습되며, 무엇이 "
        "여전히 남는가?",
    ),
)

ARMS = {
    "none": Text("without batch norm", "배치 정규화 없음"),
    "batch norm": Text("with batch norm", "배치 정규화 있음"),
    "rate by scale": Text("with batch norm, rate ∝ scale²", "배치 정규화 있음, 학습률 ∝ 크기²"),
}
COLOURS = (plots.VERMILION, plots.BLUE, plots.GREEN)
SCALES = tuple(10 ** (half / 2) for half in range(-6, 5))  # 0.001 to 100
HIDDEN, BATCH, RATE = (32,) * 6, 60, 0.125  # the best rate at scale 1 without batch norm, on the pilot seeds
DECADES = 1.0  # margin on the range of scales; the pilot seeds 1000-1002 gave +5, +5, +5
FLAT = 2.0  # margin of “flat”, percentage points; the pilot seeds gave 0.5, 0.2, 1.1
POINTS = 5.0  # margin on what a large scale costs at a fixed rate; the pilot seeds gave +26, +25, +22
RULE = Text(
    "Measure: how many powers of ten of the initial scale s train, in steps of √10: no loss infinite or above 10 "
    "times the first, final training loss below half the first, training accuracy above twice chance. REPRODUCED "
    "if (1) the 95 % interval of the difference, with − without batch norm, lies above 1 power of ten, and (2) "
    "with the rate of the hidden weights ∝ s² the final training accuracy is the same at every s from 0.1 on: "
    "the largest deviation from that at s = 1 within 2 percentage points; otherwise the worse of the two "
    "verdicts. Beside it, under Holm's rule for all three: what s = 100 costs at a fixed rate, margin 5 points. "
    "Rate and margins were fixed on pilot seeds 1000-1002.",
    "잰 것: 초기 크기 s의 10의 거듭제곱 몇 개에서 학습되는가, √10배 간격. 학습되었다는 것은 손실이 무한대나 첫 "
    "손실의 10배를 넘지 않고, 마지막 학습 손실이 첫 손실의 절반보다 작고, 학습 정확도가 우연의 두 배를 넘는다는 "
    "뜻이다. (1) 배치 정규화가 있을 때에서 없을 때를 뺀 차이의 95 % 구간이 1보다 위에 있고, (2) 은닉층 가중치의 "
    "학습률을 s²에 비례하게 하면 0.1 이상의 모든 s에서 마지막 학습 정확도가 같으면, 곧 s = 1일 때와의 가장 큰 "
    "차이가 2퍼센트포인트 안이면 재현됨. 아니면 두 판정 중 나쁜 쪽. 덧붙여, 셋 모두에 Holm의 규칙을 적용해: "
    "학습률이 고정일 때 s = 100이 치르는 값, 기준 폭 5퍼센트포인트. 학습률과 기준 폭은 예비 시드 1000-1002로 "
    "정했다.",
)
PUBLISHED = (
    Published(
        Text(
            "BN((aW)u) = BN(Wu), and the gradient at aW is 1/a of that at W: larger weights take smaller steps",
            "BN((aW)u) = BN(Wu)이고 aW에서의 기울기는 W에서의 1/a이다. 큰 가중치는 작은 걸음을 뗀다",
        ),
        Text("an identity, exact without ε", "항등식, ε이 없으면 정확하다"),
        Text("Ioffe & Szegedy 2015, section 3.3", "Ioffe & Szegedy 2015, 3.3절"),
    ),
)
NOTES = (
    Text(
        "s multiplies the He scale of all hidden weights; the output layer keeps it. A net without batch norm "
        "might train at other scales at other rates; six layers this narrow tell nothing of a hundred.",
        "s는 모든 은닉층 가중치의 He 크기에 곱해지고 출력층은 그대로다. 배치 정규화가 없는 신경망도 다른 "
        "학습률에서는 다른 크기로 학습될 수 있다. 이렇게 좁은 여섯 층으로는 백 층에 대해 알 수 없다.",
    ),
    Text(
        "Scaled by s, an input of batch norm has variance of about s²; where that is below ε = 1e-5, s ≲ 0.003, "
        "ε rules and the invariance ends.",
        "s를 곱하면 배치 정규화 입력의 분산은 약 s²이다. 그것이 ε = 1e-5보다 작아지는 s ≲ 0.003에서는 ε이 "
        "지배하고 불변성이 끝난다.",
    ),
)


def plan(scale: Scale) -> list[Trial]:
    """Every arm at every initial scale, all at one rate."""
    scales, steps = (SCALES[::2], 120) if scale.quick else (SCALES, 300)
    return [
        Trial(NAME, 1, arm, seed, RATE, settings(scale=factor, steps=steps))
        for arm in ARMS
        for factor in scales
        for seed in scale.paired
    ]


def train(trials: Sequence[Trial]) -> list[Record]:
    """Train 6 hidden layers of 32 ReLUs, hidden W ~ s · N(0, 2/inputs), batch 60, plain SGD."""
    splits = [split_of(trial, "digits") for trial in trials]
    training, first = training_samples(splits), trials[0]
    widths = (splits[0].features, *HIDDEN, splits[0].classes)
    network = perceptron(len(trials), widths, nn.ReLU, normalise=first.arm != "none")
    initialise_(network, [trial.seed for trial in trials], lambda inputs: math.sqrt(2 / inputs))
    factor = first["scale"]
    for layer in [module for module in network if isinstance(module, Linear)][:-1]:
        with torch.no_grad():
            layer.weight.mul_(factor)
        if first.arm == "rate by scale":
            layer.weight.register_hook(lambda gradient: gradient * factor**2)
    history = torch.stack(
        [loss for _, loss in descend(network, training, trials, batch=BATCH, steps=first["steps"])]
    )
    accuracy = score(network, training)[0]
    curves = Curves(len(trials))
    curves.put(diverged=diverged(history), train_loss=final_loss(history), train_accuracy=accuracy)
    curves.put(trained=trained(history, accuracy, splits[0].classes))
    return curves.records()


class _Scales:
    """The records of each arm at each initial scale, seed by seed."""

    def __init__(self, records: Mapping[Trial, Record], seeds: Sequence[int]) -> None:
        self.scales = sorted({trial["scale"] for trial in records})
        self.steps = next(iter(records))["steps"]
        self.seeds = seeds
        self._records = {(trial.arm, trial["scale"], trial.seed): record for trial, record in records.items()}

    def accuracy(self, arm: str, factor: float) -> list[float]:
        """Return the final training accuracy of each seed in percent."""
        return [100 * self._records[arm, factor, seed]["train_accuracy"] for seed in self.seeds]

    def decades(self, arm: str) -> list[float]:
        """Return over how many powers of ten each seed trains: its scales that do, by their distance."""
        step = math.log10(self.scales[1] / self.scales[0])
        return [
            step * sum(self._records[arm, factor, seed]["trained"] for factor in self.scales) for seed in self.seeds
        ]

    def deviation(self, arm: str) -> list[float]:
        """Return how far each seed's accuracy at any scale from 0.1 on is from that at scale 1, at most."""
        rows = zip(*(self.accuracy(arm, factor) for factor in self.scales if factor > 0.09), strict=True)
        return [
            max(abs(value - own) for value in row) for row, own in zip(rows, self.accuracy(arm, 1.0), strict=True)
        ]


def analyse(records: Mapping[Trial, Record], scale: Scale) -> Analysis:
    """Compare the ranges of scales over which the arms train, and how flat batch norm's are."""
    runs = _Scales(records, scale.paired)
    endpoints = judge(_comparisons(runs))
    return Analysis(
        experiment=NAME,
        title=TITLE,
        claim=CLAIM,
        protocol=_protocol(runs),
        rule=RULE,
        verdict=combine(endpoint.verdict for endpoint in endpoints[:2]),
        answer=_answer(runs, endpoints),
        endpoints=endpoints,
        figures=(_figure(runs),),
        published=PUBLISHED,
        command=scale.command(NAME),
        notes=(*NOTES, *scale.notes()),
        seeds=scale.seeds,
        configuration={
            "steps": runs.steps,
            "rate": RATE,
            "scales": [float(f"{value:.4g}") for value in runs.scales],
        },
    )


def _comparisons(runs: _Scales) -> list[Comparison]:
    largest = runs.scales[-1]
    wide, narrow = runs.decades("batch norm"), runs.decades("none")
    usual, large = runs.accuracy("batch norm", 1.0), runs.accuracy("batch norm", largest)
    return [
        Comparison(
            name=Text(
                "Range of initial scales that train, with − without batch norm",
                "학습되는 초기 크기의 범위, 배치 정규화 있음 − 없음",
            ),
            unit=Text("powers of ten", "10의 거듭제곱"),
            differences=tuple(a - b for a, b in zip(wide, narrow, strict=True)),
            margin=DECADES,
            favours=Text("the range is more than ten times wider", "범위가 10배 넘게 넓다"),
            would_change=Text("an interval that reaches below 1", "1 아래에 닿는 구간"),
        ),
        Comparison(
            name=Text(
                "Largest deviation from the accuracy at scale 1, rate ∝ scale²: none",
                "크기 1일 때 정확도와의 가장 큰 차이, 학습률 ∝ 크기²: 없음",
            ),
            unit=Text(
                "percentage points of training accuracy, scales from 0.1 on",
                "학습 정확도의 퍼센트포인트, 0.1 이상의 크기",
            ),
            differences=tuple(runs.deviation("rate by scale")),
            margin=FLAT,
            favours=Text(
                "the scale still matters where the rate follows it", "학습률이 따라가도 크기가 여전히 중요하다"
            ),
            would_change=Text(
                "an interval not wholly within ±2 points", "±2퍼센트포인트 안에 온전히 들지 않는 구간"
            ),
            kind=Kind.EQUIVALENCE,
        ),
        Comparison(
            name=Text(
                f"Training accuracy with batch norm at scale 1 − at scale {largest:g}, fixed rate",
                f"배치 정규화가 있을 때 학습 정확도, 크기 1 − 크기 {largest:g}, 고정 학습률",
            ),
            unit=Text("percentage points", "퍼센트포인트"),
            differences=tuple(a - b for a, b in zip(usual, large, strict=True)),
            margin=POINTS,
            favours=Text(
                "at a fixed rate a large initial scale still slows training",
                "학습률이 고정이면 큰 초기 크기는 여전히 학습을 늦춘다",
            ),
            would_change=Text("an interval that reaches below +5 points", "+5퍼센트포인트 아래에 닿는 구간"),
        ),
    ]


def _protocol(runs: _Scales) -> Text:
    low, high, step = runs.scales[0], runs.scales[-1], runs.scales[1] / runs.scales[0]
    return Text(
        "Data: scikit-learn's digits, x/16, one stratified split 1437/360. Network: 6 hidden layers of 32 "
        f"ReLUs, hidden weights W ~ s · N(0, 2/inputs), biases 0, s from {low:g} to {high:g} in steps of "
        f"{step:.3g}; without batch norm, with it before each ReLU, and with it while the hidden weights learn "
        f"at rate s² · {RATE:g}. Plain SGD, batch {BATCH}, {runs.steps} steps, rate {RATE:g}. {len(runs.seeds)} "
        "paired seeds: the same initial weights and the same batches in all arms.",
        "데이터: scikit-learn의 digits, x/16, 층화 분할 하나 1437/360. 신경망: ReLU 32개인 은닉층 6개, 은닉층 "
        f"가중치 W ~ s · N(0, 2/입력 수), 편향 0, s는 {low:g}부터 {high:g}까지 {step:.3g}배 간격. 배치 정규화 "
        f"없음, 각 ReLU 앞에 있음, 있으면서 은닉층 가중치의 학습률이 s² · {RATE:g}. 단순 SGD, 배치 {BATCH}, "
        f"{runs.steps}스텝, 학습률 {RATE:g}. 짝지은 시드 {len(runs.seeds)}개: 모든 조건의 초기 가중치와 배치가 "
        "같다.",
    )


def _answer(runs: _Scales, endpoints: Sequence[Endpoint]) -> Text:
    narrow, wide = (mean(runs.decades(arm)) for arm in ("none", "batch norm"))
    largest = runs.scales[-1]
    usual, large = (mean(runs.accuracy("batch norm", factor)) for factor in (1.0, largest))
    flat = endpoints[1].estimate
    return Text(
        f"With batch norm the net trained over {wide:.1f} powers of ten of the initial scale, without it over "
        f"{narrow:.1f}. At a fixed rate the scale still told: training accuracy {usual:.0f} % at scale 1, "
        f"{large:.0f} % at scale {largest:g}. With the rate ∝ scale² it deviated by {flat:.1f} points at most, "
        "from scale 0.1 on.",
        f"배치 정규화가 있으면 초기 크기의 10의 거듭제곱 {wide:.1f}개에서, 없으면 {narrow:.1f}개에서 학습되었다. "
        f"학습률이 고정이면 크기가 여전히 드러났다: 학습 정확도가 크기 1에서 {usual:.0f} %, 크기 {largest:g}에서 "
        f"{large:.0f} %. 학습률을 크기²에 비례하게 하면 크기 0.1부터 차이는 많아야 {flat:.1f}퍼센트포인트였다.",
    )


def _figure(runs: _Scales) -> Figure:
    traces = [
        plots.whiskers(words, colour, runs.scales, [runs.accuracy(arm, factor) for factor in runs.scales])
        for (arm, words), colour in zip(ARMS.items(), COLOURS, strict=True)
    ]
    x = math.log10(math.sqrt(1e-5))
    corner = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": 10**x, "x1": 10**x}
    label = {
        "x": x,
        "y": 0.5,
        "yref": "paper",
        "text": "s² = ε",
        "showarrow": False,
        "xanchor": "left",
        "yanchor": "middle",
    }
    picture = plots.figure(
        traces,
        plots.axis(Text("initial scale s of the hidden weights", "은닉층 가중치의 초기 크기 s"), logarithmic=True),
        plots.axis(Text("final training accuracy (%)", "마지막 학습 정확도 (%)"), range=[0, 101]),
        shapes=[{**corner, "line": {"color": "#888888", "width": 1, "dash": "dash"}}],
        annotations=[label],
    )
    caption = Text(
        "Mean over seeds and its 95 % interval; what diverged has no correct answer. Left of the dashed line ε "
        "outweighs the variance of what is normalised.",
        "시드 평균과 95 % 구간. 발산한 것은 정답이 없다. 점선 왼쪽에서는 ε이 정규화할 값의 분산보다 크다.",
    )
    return Figure(Text("Accuracy by initial scale", "초기 크기별 정확도"), caption, picture)


EXPERIMENT = Experiment(NAME, TITLE, CLAIM, plan, train, analyse, cost=0.6, stack_size=32)
