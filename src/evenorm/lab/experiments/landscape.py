"""Is the loss smoother along the gradient with batch norm? By Santurkar et al. 2018, and scale-free."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median
from typing import TypeAlias

import torch
from torch import nn

from evenorm.lab import plots
from evenorm.lab.data import digits
from evenorm.lab.experiment import Experiment, Scale
from evenorm.lab.gradients import along_gradient
from evenorm.lab.language import Text
from evenorm.lab.networks import initialise_, perceptron
from evenorm.lab.results import Analysis, Claim, Endpoint, Figure, Published, Table
from evenorm.lab.statistics import Comparison, combine, judge
from evenorm.lab.training import Curves, batch_order, cross_entropy, descend, final_loss, training_samples
from evenorm.lab.trials import Record, Trial, settings

NAME, TITLE = "landscape", Text("A smoother landscape", "더 매끄러운 지형")
CLAIM = Claim(
    korean="신경망의 경우 Normalization이 제대로 적용되지 않으면 최적의 cost 지점으로 가는 길을 빠르게 찾지 "
    "못한다.",
    english="A neural network that is not properly normalised does not find the way to the best cost quickly.",
    source=Text(
        "The document, “batch normalisation”; why that is so: Santurkar et al. 2018, section 3",
        "문서의 “Batch Normalization”; 그 까닭: Santurkar 외 2018, 3절",
    ),
    question=Text(
        "Does batch norm make loss and gradient change less along the step, and is that more than a matter of "
        "scale?",
        "배치 정규화가 있으면 걸음을 따라 손실과 기울기가 덜 변하는가? 그것은 눈금의 문제만은 아닌가?",
    ),
)

ARMS = {
    "none": Text("without batch norm", "배치 정규화 없음"),
    "batch norm": Text("with batch norm", "배치 정규화 있음"),
}
COLOURS = dict(zip(ARMS, (plots.VERMILION, plots.BLUE), strict=True))
RATE = 0.1  # half the largest rate without batch norm: the pilot seeds trained at 0.05, 0.1 and 0.2, not at 0.4
LENGTHS = tuple(RATE * 2.0 ** (-1 + 3 * place / 7) for place in range(8))  # 1/2 to 4 times the step
EVERY, BATCH = 10, 60
# Margins, written down after the pilot seeds 1000-1002: on log₁₀ ratios a factor of 2, on the early one of 10. They
# gave +0.5, +1.3, +1.3 (width), +0.2, +0.7, +0.7 (distance), -0.1, 0.0, 0.0 (β), +0.7, +0.8, +1.0 (early),
# +0.4, +0.5, +0.6 (relative distance), -0.1, 0.0, 0.0 (β‖w‖²) and +0.32, +0.36, +0.46 (cosine).
TWICE, TENFOLD, COSINE = math.log10(2), 1.0, 0.05
RULE = Text(
    "Every 10 steps, on the next step's batch, 8 points are taken along minus the gradient g, at 1/2 to 4 times "
    "the step. Measures: the width of the loss over these points; the largest distance ‖g′ − g‖; the largest "
    "β = ‖g′ − g‖ / (length · ‖g‖). Of each, the median over training of log₁₀(without / with), seed by seed. "
    "REPRODUCED if all three 95 % intervals lie above 0.30 (half as much with batch norm), otherwise the worst "
    "of the three verdicts. Beside it, under Holm's rule for all seven: the distance in the first tenth of "
    "training (margin 1: tenfold); and three that no change of scale can move: ‖g′ − g‖ / ‖g‖, β‖w‖², and the "
    "smallest cosine of g′ and g, with − without (margin 0.05).",
    "10걸음마다, 다음 걸음의 배치로, 기울기 g의 반대쪽으로 걸음의 1/2배에서 4배까지 8점을 잡는다. 잰 것: 이 "
    "점들에서 손실의 폭, 가장 큰 거리 ‖g′ − g‖, 가장 큰 β = ‖g′ − g‖ / (길이 · ‖g‖). 각각 log₁₀(없을 때 / 있을 "
    "때)의 학습 동안의 중앙값을 시드마다 구한다. 95 % 구간 셋이 모두 0.30보다 위(있을 때 절반)이면 REPRODUCED, "
    "아니면 셋 가운데 가장 나쁜 판정. 덧붙여, 일곱 모두에 Holm의 규칙을 적용해: 학습의 처음 10분의 1에서의 "
    "거리(여백 1: 10배), 그리고 눈금을 바꾸어도 변하지 않는 셋: ‖g′ − g‖ / ‖g‖, β‖w‖², g′와 g의 가장 작은 코사인, "
    "있을 때 − 없을 때 (여백 0.05).",
)
PUBLISHED = (
    Published(
        Text(
            "gradient predictiveness differs by close to two orders of magnitude, especially early",
            "기울기의 예측 가능성이 거의 두 자릿수만큼 다르며, 초기에 특히 그렇다",
        ),
        Text(
            "VGG on CIFAR-10, rate 0.1, batch 128, 15 000 steps", "CIFAR-10의 VGG, 학습률 0.1, 배치 128, 15 000걸음"
        ),
        Text("Santurkar et al. 2018, section 3.1 and figure 4", "Santurkar 외 2018, 3.1절과 그림 4"),
    ),
    Published(
        Text(
            "distances up to 250 without batch norm, β between 5 and 45 in the plots",
            "그림에서 배치 정규화 없이 거리는 250까지, β는 5에서 45 사이",
        ),
        Text("the same", "같은 설정"),
        Text("Santurkar et al. 2018, figure 4b, c", "Santurkar 외 2018, 그림 4b, c"),
    ),
)


def plan(scale: Scale) -> list[Trial]:
    """Both arms at one rate."""
    steps = settings(steps=150 if scale.quick else 500)
    return [Trial(NAME, 1, arm, seed, RATE, steps) for arm in ARMS for seed in scale.paired]


def train(trials: Sequence[Trial]) -> list[Record]:
    """Train 64-(100 × 10)-10 with ReLU, W ~ N(0, 2/inputs), and look along the gradient on the way."""
    members, steps = len(trials), trials[0]["steps"]
    samples = training_samples([digits()] * members)
    network = perceptron(members, (64, *[100] * 10, 10), nn.ReLU, normalise=trials[0].arm == "batch norm")
    initialise_(network, [trial.seed for trial in trials], lambda inputs: math.sqrt(2 / inputs))
    order = torch.stack([batch_order(trial.seed, samples.y.shape[1], BATCH, steps + 1) for trial in trials])
    curves, losses, lengths = Curves(members), [], torch.tensor(LENGTHS)
    for step, loss in descend(network, samples, trials, batch=BATCH, steps=steps):
        losses.append(loss)
        if step % EVERY:
            continue
        found = along_gradient(network, samples.batch(order[:, step]), LENGTHS, cross_entropy)
        relative = found.distances / found.norm[:, None]
        smoothness = (relative / lengths).amax(1)
        curves.append(
            loss=found.loss,
            lowest=found.losses.amin(1),
            highest=found.losses.amax(1),
            nearest=found.distances.amin(1),
            farthest=found.distances.amax(1),
            smoothness=smoothness,
            relative=relative.amax(1),
            invariant=smoothness * found.weights,
            cosine=found.cosines.amin(1),
        )
    curves.put(final=final_loss(torch.stack(losses)))
    return curves.records()


Series: TypeAlias = "list[float | None]"
Measure: TypeAlias = "Callable[[Record], Series]"  # a number at each moment, None where the net was lost
Pairs: TypeAlias = "list[tuple[Record, Record]]"  # without and with batch norm, seed by seed


def width(record: Record) -> Series:
    """Return the width of the loss over the points, at each moment."""
    return [
        None if low is None or high is None else high - low
        for low, high in zip(record["lowest"], record["highest"], strict=True)
    ]


def series(name: str) -> Measure:
    """Return a stored series."""
    return lambda record: record[name]


def ratio(pair: tuple[Record, Record], measure: Measure, share: float = 1.0) -> float:
    """Return the median over the first share of the moments of log₁₀(without / with), lost moments left out."""
    values = list(zip(*map(measure, pair), strict=True))
    values = values[: math.ceil(share * len(values))]
    ratios = [math.log10(max(a, 1e-12) / max(b, 1e-12)) for a, b in values if a is not None and b is not None]
    return median(ratios) if ratios else 0.0


def turn(pair: tuple[Record, Record]) -> float:
    """Return the median over the moments of the cosine with − without."""
    values = [b - a for a, b in zip(*(record["cosine"] for record in pair), strict=True) if None not in (a, b)]
    return median(values) if values else 0.0


COSINES = Text("Smallest cosine of g′ and g", "g′와 g의 가장 작은 코사인")
MEASURES: dict[Text, Measure] = {
    Text("Width of the loss", "손실의 폭"): width,
    Text("Distance of gradients, ‖g′ − g‖", "기울기의 거리, ‖g′ − g‖"): series("farthest"),
    Text("Smoothness β", "매끄러움 β"): series("smoothness"),
}
INVARIANT: dict[Text, Measure] = {
    Text("Relative distance, ‖g′ − g‖ / ‖g‖", "상대 거리, ‖g′ − g‖ / ‖g‖"): series("relative"),
    Text("β‖w‖²", "β‖w‖²"): series("invariant"),
}


def analyse(records: Mapping[Trial, Record], scale: Scale) -> Analysis:
    """Compare the arms moment by moment, seed by seed."""
    by_arm = {(trial.arm, trial.seed): record for trial, record in records.items()}
    pairs = [(by_arm["none", seed], by_arm["batch norm", seed]) for seed in scale.paired]
    endpoints = judge(_comparisons(pairs))
    steps = next(iter(records))["steps"]
    return Analysis(
        experiment=NAME,
        title=TITLE,
        claim=CLAIM,
        protocol=Text(
            f"Data: digits, x/16, training set of 1437. Network: 64-(100 × 10)-10, ReLU, W ~ N(0, 2/inputs), with "
            f"or without batch norm before each ReLU. Plain SGD, batch 60, rate {RATE:g} for both (half the "
            f"largest at which nets without batch norm train), {steps} steps. g: all parameters, training mode, "
            f"the batch of the next step, the same for g′. {scale.seeds} paired seeds.",
            f"데이터: digits, x/16, 학습 집합 1437개. 신경망: 64-(100 × 10)-10, ReLU, W ~ N(0, 2/입력 수), ReLU "
            f"앞에 배치 정규화가 있거나 없음. 순수한 SGD, 배치 60, 둘 다 학습률 {RATE:g}(배치 정규화 없이 학습되는 "
            f"가장 큰 값의 절반), {steps}걸음. g: 모든 매개변수, 학습 모드, 다음 걸음의 배치, g′도 같다. 짝지은 "
            f"시드 {scale.seeds}개.",
        ),
        rule=RULE,
        verdict=combine(endpoint.verdict for endpoint in endpoints[:3]),
        answer=_answer(endpoints),
        endpoints=endpoints,
        figures=(_forest_figure(endpoints), _loss_figure(pairs), _distance_figure(pairs)),
        published=PUBLISHED,
        command=scale.command(NAME),
        tables=(_table(pairs),),
        notes=(
            Text(
                "A net whose weights are 10 times larger and whose outputs are the same has a 10 times smaller "
                "gradient: distances and β of different nets cannot be compared as they are.",
                "가중치가 10배 크고 출력이 같은 신경망은 기울기가 10배 작다. 서로 다른 신경망의 거리와 β는 그대로 "
                "견줄 수 없다.",
            ),
            Text(
                "One rate, one depth, 500 steps on an easy task; late in training the order can turn round.",
                "학습률 하나, 깊이 하나, 쉬운 과제에서 500걸음이다. 학습의 끝에서는 순서가 뒤바뀔 수 있다.",
            ),
            *scale.notes(),
        ),
        seeds=scale.seeds,
        configuration={"rate": RATE, "steps": steps, "lengths": [round(length, 4) for length in LENGTHS]},
    )


def _comparisons(pairs: Pairs) -> list[Comparison]:
    unit = Text("powers of ten: log₁₀(without / with)", "10의 거듭제곱: log₁₀(없을 때 / 있을 때)")
    half = Text("less than half as much with batch norm", "배치 정규화가 있으면 절반 미만")
    below = Text("an interval that reaches below 0.30", "0.30 아래에 닿는 구간")

    def whole(name: Text, measure: Measure) -> Comparison:
        differences = tuple(ratio(pair, measure) for pair in pairs)
        return Comparison(name, unit, differences, TWICE, favours=half, would_change=below)

    return [
        *(whole(name, measure) for name, measure in MEASURES.items()),
        Comparison(
            Text("Early distance, first tenth of training", "초기 거리, 학습의 처음 10분의 1"),
            unit,
            tuple(ratio(pair, series("farthest"), 0.1) for pair in pairs),
            TENFOLD,
            favours=Text("less than a tenth with batch norm", "배치 정규화가 있으면 10분의 1 미만"),
            would_change=Text("an interval that reaches below 1", "1 아래에 닿는 구간"),
        ),
        *(whole(name, measure) for name, measure in INVARIANT.items()),
        Comparison(
            COSINES,
            Text("cosine, with − without", "코사인, 있을 때 − 없을 때"),
            tuple(map(turn, pairs)),
            COSINE,
            favours=Text("gradients turn less with batch norm", "배치 정규화가 있으면 기울기가 덜 돈다"),
            would_change=Text("an interval that reaches below 0.05", "0.05 아래에 닿는 구간"),
        ),
    ]


def _answer(endpoints: Sequence[Endpoint]) -> Text:
    width, distance, smoothness, _, relative, invariant, _ = (10**endpoint.estimate for endpoint in endpoints)
    low, high = 10 ** endpoints[2].low, 10 ** endpoints[2].high
    return Text(
        f"Along the step the loss varied {width:.1f} times less with batch norm, and gradients moved "
        f"{distance:.1f} times less; β was {smoothness:.2f} times smaller ({low:.2f} to {high:.2f}; 1 is no "
        f"difference). Free of scale: the relative distance was {relative:.1f} times smaller, β‖w‖² "
        f"{invariant:.2f} times.",
        f"걸음을 따라 손실은 배치 정규화가 있으면 {width:.1f}배 덜 변했고 기울기는 {distance:.1f}배 덜 움직였다. "
        f"β는 {smoothness:.2f}배 작았다({low:.2f} ~ {high:.2f}, 1이면 차이 없음). 눈금과 무관하게 보면 상대 "
        f"거리는 {relative:.1f}배, β‖w‖²는 {invariant:.2f}배 작았다.",
    )


def _forest_figure(endpoints: Sequence[Endpoint]) -> Figure:
    raw, free = [*endpoints[:3]], [*endpoints[4:6]]
    names = [*MEASURES, *INVARIANT]
    traces = []
    for part, title, colour in (
        (raw, Text("as published", "발표된 대로"), plots.PURPLE),
        (free, Text("free of scale", "눈금과 무관"), plots.GREEN),
    ):
        labels = names[: len(raw)] if part is raw else names[len(raw) :]
        error = {
            "type": "data",
            "symmetric": False,
            "array": [10**item.high - 10**item.estimate for item in part],
            "arrayminus": [10**item.estimate - 10**item.low for item in part],
        }
        traces.append(plots.points(title, colour, [10**item.estimate for item in part], labels, error_x=error))
    line = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": 1, "x1": 1}
    picture = plots.figure(
        traces,
        plots.axis(Text("times smaller", "몇 배 작은가"), logarithmic=True),
        plots.axis("", categoryorder="array", categoryarray=names[::-1], tickfont={"size": 11}),
        shapes=[line | {"line": {"color": "#888888", "width": 1, "dash": "dash"}}],
    )
    return Figure(
        Text(
            "What batch norm makes smaller, and how much of it is scale",
            "배치 정규화가 줄이는 것, 그 가운데 눈금의 몫",
        ),
        Text(
            "Median over training, mean over seeds and its 95 % interval. On the dashed line there is no "
            "difference.",
            "학습 동안의 중앙값, 시드에 대한 평균과 그 95 % 구간. 점선 위에서는 차이가 없다.",
        ),
        picture,
    )


def _loss_figure(pairs: Pairs) -> Figure:
    return Figure(
        Text("The loss along the step", "걸음을 따라 본 손실"),
        Text(
            "Band: lowest to highest loss at 1/2 to 4 times the step; line: the loss before it. Medians over "
            "seeds.",
            "띠: 걸음의 1/2배에서 4배까지 가장 낮은 손실과 가장 높은 손실. 선: 걷기 전의 손실. 시드에 대한 중앙값.",
        ),
        _bands(pairs, ("lowest", "loss", "highest"), Text("training loss", "학습 손실")),
    )


def _distance_figure(pairs: Pairs) -> Figure:
    return Figure(
        Text("How far the gradient moves along the step", "걸음을 따라 기울기가 움직인 거리"),
        Text(
            "Band: nearest to farthest of the 8 points; line: the farthest. Medians over seeds.",
            "띠: 8점 가운데 가장 가까운 것에서 가장 먼 것까지. 선: 가장 먼 것. 시드에 대한 중앙값.",
        ),
        _bands(pairs, ("nearest", "farthest", "farthest"), Text("‖g′ − g‖", "‖g′ − g‖")),
    )


def _bands(pairs: Pairs, names: Sequence[str], title: Text) -> dict[str, object]:
    traces: list[plots.Trace] = []
    for arm, (name, words) in enumerate(ARMS.items()):
        low, middle, high = (
            [_median(values) for values in zip(*(pair[arm][key] for pair in pairs), strict=True)] for key in names
        )
        x = [EVERY * (index + 1) for index in range(len(middle))]
        traces += plots.area(words, COLOURS[name], x, low, middle, high)
    return plots.figure(
        traces, plots.axis(Text("training steps", "학습 걸음")), plots.axis(title, logarithmic=True)
    )


def _median(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return median(numbers) if len(numbers) == len(values) else None


def _table(pairs: Pairs) -> Table:
    rows = []
    for name, measure in {
        **MEASURES,
        **INVARIANT,
        COSINES: series("cosine"),
    }.items():
        middles = [
            median(value for pair in pairs for value in measure(pair[arm]) if value is not None) for arm in (0, 1)
        ]
        rows.append((name, *(f"{value:.3g}" for value in middles)))
    finals = [mean(pair[arm]["final"] or math.nan for pair in pairs) for arm in (0, 1)]
    rows.append(
        (Text("Final training loss, mean", "마지막 학습 손실, 평균"), *(f"{value:.3g}" for value in finals))
    )
    columns = (Text("median over training and seeds", "학습과 시드에 대한 중앙값"), *ARMS.values())
    return Table(Text("Without and with batch norm", "배치 정규화가 없을 때와 있을 때"), columns, tuple(rows))


EXPERIMENT = Experiment(NAME, TITLE, CLAIM, plan, train, analyse, cost=10.0, stack_size=5)
