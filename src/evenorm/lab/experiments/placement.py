"""Before the activation or after it: where should batch norm stand? After Mishkin et al. 2016."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean

import torch
from torch import nn

from evenorm.lab import plots
from evenorm.lab.data import fold, split_of
from evenorm.lab.experiment import Experiment, Scale
from evenorm.lab.grid import Grid, Measure
from evenorm.lab.language import Text
from evenorm.lab.networks import Sigmoid, initialise_, perceptron
from evenorm.lab.results import Analysis, Claim, Endpoint, Figure, Published, Table
from evenorm.lab.statistics import Comparison, combine, judge
from evenorm.lab.training import Curves, descend, diverged, final_loss, score, test_samples, training_samples
from evenorm.lab.trials import PILOT_SEEDS, Record, Trial, settings

NAME, TITLE = "placement", Text("Before or after the activation", "활성화 함수의 앞 또는 뒤")
CLAIM = Claim(
    korean=(
        "Activation function을 적용하기 전에 Batch normalization을 먼저 적용한다 (앞과 뒤 중 어느 쪽에 삽일할 "
        "지는 논의/실험 중)"
    ),
    english=(
        "Batch normalisation is applied before the activation function (whether to insert it before or after is "
        "under discussion and experiment)."
    ),
    source=Text(
        "The document, on batch normalisation; Mishkin et al. 2016", "문서의 배치 정규화 설명; Mishkin 외 2016"
    ),
    question=Text(
        "Is a net more accurate, or trained faster, with batch norm before the activation than after it?",
        "배치 정규화를 활성화 함수 앞에 두면 뒤에 둘 때보다 더 정확하거나 더 빨리 학습되는가?",
    ),
)

ARMS = {
    "before": Text("before the activation", "활성화 함수 앞"),
    "after": Text("after the activation", "활성화 함수 뒤"),
}
COLOURS = (plots.BLUE, plots.ORANGE)
ACTIVATIONS: dict[str, tuple[type[nn.Module], float]] = {"ReLU": (nn.ReLU, 2.0), "sigmoid": (Sigmoid, 1.0)}
RATES, FOLDS = (0.3, 1.0), 5
HIDDEN, BATCH, EVERY = (32, 32, 32), 60, 25
POINTS = 1.0  # margin on accuracy; pilot seeds 1000-1002 gave +0.2, +0.7, +0.4 and -1.2, +0.4, -0.3
FASTER = math.log2(1.1)  # margin on the training loss, 10 %; they gave +0.19, +0.19, +0.26 and -0.96, -0.93, -0.97
RULE = Text(
    "Measure: accuracy over all held-out predictions of five stratified folds, dealt anew by every seed, each "
    "arm at its best rate (chosen on pilot seeds 1000-1002, which are then left out). REPRODUCED if the 95 % "
    "interval of before − after lies above 1 percentage point with ReLU and with sigmoid, WEAK if above 0, "
    "CONTRADICTED if one lies below 0, INCONCLUSIVE otherwise: then these data cannot tell, which is a result. "
    "Beside it, under Holm's rule for all four: log₂ of the ratio of the training losses, averaged over all "
    "steps, margin 10 %.",
    "잰 것: 시드마다 새로 나눈 층화 5겹의 모든 시험 예측에 대한 정확도, 각 조건의 가장 좋은 학습률에서(예비 시드 "
    "1000-1002로 고르고 그 시드들은 뺀다). ReLU와 sigmoid 모두에서 앞 − 뒤의 95 % 구간이 1퍼센트포인트보다 위에 "
    "있으면 재현됨, 0보다 위이면 약함, 하나라도 0보다 아래이면 반대로 나옴, 그 밖에는 판단 보류: 이 데이터로는 "
    "알 수 없으며 그것도 결과이다. 덧붙여, 넷 모두에 Holm의 규칙을 적용해: 모든 스텝에 걸쳐 평균한 학습 손실 "
    "비의 log₂, 기준 폭 10 %.",
)
REPORTED = {  # accuracy before − after, percentage points
    Text("CaffeNet (2016)", "CaffeNet (2016년)"): 47.8 - 49.3,
    Text("GoogLeNet (2016)", "GoogLeNet (2016년)"): 60.7 - 59.6,
}
PUBLISHED = (
    Published(
        Text(
            "before 47.8 %, after 49.3 %; without batch norm 47.1 %",
            "앞 47.8 %, 뒤 49.3 %, 배치 정규화 없음 47.1 %",
        ),
        Text(
            "CaffeNet, ImageNet at 128 pixels, γ and β, single runs",
            "CaffeNet, 128픽셀 ImageNet, γ와 β 있음, 한 번씩",
        ),
        "Mishkin et al. 2016, ducha-aiki/caffenet-benchmark",
    ),
    Published(
        Text(
            "before 60.7 %, after 59.6 %; without batch norm 61.9 %",
            "앞 60.7 %, 뒤 59.6 %, 배치 정규화 없음 61.9 %",
        ),
        Text(
            "GoogLeNet, ImageNet at 128 pixels, single runs, two ways to initialise",
            "GoogLeNet, 128픽셀 ImageNet, 한 번씩, 초기화 방법 두 가지",
        ),
        "Mishkin et al. 2016, ducha-aiki/caffenet-benchmark",
    ),
)
NOTES = (
    Text(
        "Near 97 % a point is a third of all errors left: digits cannot resolve less than about 0.4. With two "
        "rates each arm's best is known only coarsely. Convolutions, deep nets, and placing without γ and β were "
        "not tried.",
        "97 % 부근에서 1퍼센트포인트는 남은 오류의 3분의 1이다. digits로는 약 0.4보다 작은 차이를 가릴 수 없다. "
        "학습률이 둘뿐이라 가장 좋은 값을 대강만 안다. 합성곱, 깊은 신경망, γ와 β 없는 배치는 시험하지 않았다.",
    ),
    Text(
        "The intervals are over folds and initial weights; other images would widen them.",
        "구간은 겹 나누기와 초기 가중치에 대한 것이다. 다른 이미지라면 더 넓어진다.",
    ),
)


def plan(scale: Scale) -> list[Trial]:
    """Both arms with both activations over all rates and folds, for the pilot seeds and the paired ones."""
    seeds, folds, steps = (*PILOT_SEEDS, *scale.paired), 2 if scale.quick else FOLDS, 100 if scale.quick else 250
    return [
        Trial(NAME, 1, arm, seed, rate, settings(activation=activation, fold=index, steps=steps))
        for arm in ARMS
        for activation in ACTIVATIONS
        for index in range(folds)
        for rate in RATES
        for seed in seeds
    ]


def train(trials: Sequence[Trial]) -> list[Record]:
    """Train 3 hidden layers of 32 units on all folds but one, batch 60, plain SGD; test on that one."""
    first = trials[0]
    splits = [fold(split_of(trial, "digits"), trial.seed, first["fold"], FOLDS) for trial in trials]
    activation, gain = ACTIVATIONS[first["activation"]]
    widths = (splits[0].features, *HIDDEN, splits[0].classes)
    network = perceptron(len(trials), widths, activation, normalise=True, after=first.arm == "after")
    initialise_(network, [trial.seed for trial in trials], lambda inputs: math.sqrt(gain / inputs))
    samples, steps = training_samples(splits), first["steps"]
    history = torch.stack([loss for _, loss in descend(network, samples, trials, batch=BATCH, steps=steps)])
    rows = history.T.contiguous()  # along rows: the rounding of a column depends on its neighbours
    curves = Curves(len(trials))
    curves.put(diverged=diverged(history), train_loss=final_loss(history))
    curves.put(losses=rows.view(len(trials), -1, EVERY).mean(2), accuracy=score(network, test_samples(splits))[0])
    return [record | {"tested": len(splits[0].y_test)} for record in curves.records()]


def _grids(records: Mapping[Trial, Record], scale: Scale) -> dict[str, Grid]:
    """Return each activation's records, the folds of a seed made one."""
    folds: dict[Trial, list[Record]] = {}
    for trial, record in records.items():
        rest = settings(**{name: value for name, value in trial.settings if name != "fold"})
        folds.setdefault(replace(trial, settings=rest), []).append(record)
    pooled = {trial: _pooled(found) for trial, found in folds.items()}
    return {
        name: Grid({trial: record for trial, record in pooled.items() if trial["activation"] == name}, scale)
        for name in ACTIVATIONS
    }


def _pooled(folds: Sequence[Record]) -> Record:
    tested = sum(record["tested"] for record in folds)
    curves = zip(*(record["losses"] for record in folds), strict=True)
    return {
        "accuracy": sum(record["accuracy"] * record["tested"] for record in folds) / tested,
        "losses": [None if None in values else mean(values) for values in curves],
        "diverged": float(any(record["diverged"] for record in folds)),
    }


def analyse(records: Mapping[Trial, Record], scale: Scale) -> Analysis:
    """Compare accuracy and training loss, before − after, with either activation."""
    grids = _grids(records, scale)
    endpoints = judge([_accuracies(*item) for item in grids.items()] + [_losses(*item) for item in grids.items()])
    best = {name: {arm: grid.best(arm, _accuracy)[1] for arm in ARMS} for name, grid in grids.items()}
    return Analysis(
        experiment=NAME,
        title=TITLE,
        claim=CLAIM,
        protocol=_protocol(grids["ReLU"]),
        rule=RULE,
        verdict=combine(endpoint.verdict for endpoint in endpoints[:2]),
        answer=_answer(grids, endpoints),
        endpoints=endpoints,
        figures=(_forest_figure(endpoints[:2]), _loss_figure(grids)),
        published=PUBLISHED,
        command=scale.command(NAME),
        tables=(_table(grids),),
        notes=(*NOTES, *scale.notes()),
        seeds=scale.seeds,
        configuration={"steps": grids["ReLU"].steps, "rates": list(RATES), "best": best},
    )


def _accuracy(record: Record) -> float:
    return 100 * float(record["accuracy"])


def _ease(record: Record) -> float:
    """Return −log₂ of the training loss averaged over all steps; of a trial that was lost, that of a huge one."""
    losses = record["losses"]
    return -math.log2(100.0 if record["diverged"] or None in losses else mean(losses))


def _difference(grid: Grid, measure: Measure) -> tuple[float, ...]:
    """Return before − after of each seed, each arm at the rate that is best by the measure."""
    before, after = (grid.best(arm, measure) for arm in ARMS)
    return grid.differences(before, after, measure)


def _accuracies(name: str, grid: Grid) -> Comparison:
    return Comparison(
        name=Text(f"Held-out accuracy with {name}, before − after", f"{name}의 시험 정확도, 앞 − 뒤"),
        unit=Text("percentage points", "퍼센트포인트"),
        differences=_difference(grid, _accuracy),
        margin=POINTS,
        favours=Text(
            "batch norm before the activation is more accurate", "활성화 함수 앞의 배치 정규화가 더 정확하다"
        ),
        would_change=Text(
            "an interval that excludes 0, or lies beyond 1 point", "0을 포함하지 않거나 1퍼센트포인트를 넘는 구간"
        ),
    )


def _losses(name: str, grid: Grid) -> Comparison:
    return Comparison(
        name=Text(
            f"Training loss with {name}, mean over all steps, after / before",
            f"{name}의 학습 손실, 모든 스텝 평균, 뒤 / 앞",
        ),
        unit=Text("doublings: log₂(loss after / loss before)", "두 배의 횟수: log₂(뒤의 손실 / 앞의 손실)"),
        differences=_difference(grid, _ease),
        margin=FASTER,
        favours=Text(
            "batch norm before the activation trains faster", "활성화 함수 앞의 배치 정규화가 더 빨리 학습된다"
        ),
        would_change=Text("an interval on the other side of 0.14 (10 %)", "0.14(10 %)의 반대쪽에 있는 구간"),
    )


def _protocol(grid: Grid) -> Text:
    rates = ", ".join(f"{rate:g}" for rate in grid.rates)
    return Text(
        "Data: scikit-learn's digits, x/16, 1797 images in five stratified folds that every seed deals anew. "
        "Network: 3 hidden layers of 32 ReLUs or sigmoids, W ~ N(0, 2/inputs) or N(0, 1/inputs), batch norm "
        f"before or after each activation. Plain SGD, batch {BATCH}, {grid.steps} steps, rates {rates}. "
        f"{grid.scale.seeds} paired seeds of five nets each: the same folds, initial weights and batches in both "
        "arms.",
        "데이터: scikit-learn의 digits, x/16, 시드마다 새로 나눈 층화 5겹의 이미지 1797장. 신경망: ReLU 또는 "
        "sigmoid 32개인 은닉층 3개, W ~ N(0, 2/입력 수) 또는 N(0, 1/입력 수), 각 활성화 함수의 앞 또는 뒤에 "
        f"배치 정규화. 단순 SGD, 배치 {BATCH}, {grid.steps}스텝, 학습률 {rates}. 신경망이 다섯 개씩인 짝지은 "
        f"시드 {grid.scale.seeds}개: 양쪽의 겹, 초기 가중치, 배치가 같다.",
    )


def _answer(grids: Mapping[str, Grid], endpoints: Sequence[Endpoint]) -> Text:
    english, korean, losses = list[str](), list[str](), endpoints[len(grids) :]
    for (name, grid), found, loss in zip(grids.items(), endpoints, losses, strict=False):
        before, after = (f"{mean(grid.values(grid.best(arm, _accuracy), _accuracy)):.1f} %" for arm in ARMS)
        points = f"{found.estimate:+.2f}", f"{found.low:+.2f}", f"{found.high:+.2f}"
        times = f"{2**loss.estimate:.2f}"
        english.append(
            f"With {name} held-out accuracy was {before} before and {after} after (difference {points[0]} "
            f"points, {points[1]} to {points[2]}), and the training loss {times} times as large after as before."
        )
        korean.append(
            f"{name}의 시험 정확도는 앞 {before}, 뒤 {after}였고(차이 {points[0]}퍼센트포인트, {points[1]} ~ "
            f"{points[2]}), 학습 손실은 뒤가 앞의 {times}배였다."
        )
    return Text(" ".join(english), " ".join(korean))


def _forest_figure(endpoints: Sequence[Endpoint]) -> Figure:
    names = [Text(f"{name} (ours)", f"{name} (우리)") for name in ACTIVATIONS]
    whiskers = {
        "type": "data",
        "symmetric": False,
        "array": [endpoint.high - endpoint.estimate for endpoint in endpoints],
        "arrayminus": [endpoint.estimate - endpoint.low for endpoint in endpoints],
    }
    ours = plots.points(
        Text("measured here", "여기서 잰 값"),
        plots.BLUE,
        [each.estimate for each in endpoints],
        names,
        error_x=whiskers,
    )
    theirs = plots.points(
        Text("published, single runs", "발표된 값, 한 번씩"),
        plots.VERMILION,
        list(REPORTED.values()),
        list(REPORTED),
    )
    zone = {"type": "rect", "yref": "paper", "y0": 0, "y1": 1, "x0": -POINTS, "x1": POINTS, "line": {"width": 0}}
    picture = plots.figure(
        [ours, theirs],
        plots.axis(Text("before − after (points)", "앞 − 뒤 (퍼센트포인트)"), range=[-2, 2]),
        {"type": "category", "automargin": True},
        shapes=[{**zone, "fillcolor": "rgba(136,136,136,0.15)", "layer": "below"}],
        height=300,
    )
    caption = Text(
        "Right of zero: before is better. Grey: differences too small to matter. The two published pairs point "
        "opposite ways.",
        "0의 오른쪽: 앞이 낫다. 회색: 의미를 두기에는 작은 차이. 발표된 두 쌍(ImageNet)은 서로 반대쪽을 가리킨다.",
    )
    return Figure(Text("Before − after, ours and published", "앞 − 뒤, 우리 값과 발표된 값"), caption, picture)


def _loss_figure(grids: Mapping[str, Grid]) -> Figure:
    traces, owners = list[plots.Trace](), list[str]()
    for name, grid in grids.items():
        x = [EVERY * (index + 1) for index in range(grid.steps // EVERY)]
        for (arm, words), colour in zip(ARMS.items(), COLOURS, strict=True):
            traces += plots.band(
                words, colour, x, grid.curves(grid.best(arm, _ease), "losses"), visible=name == "ReLU"
            )
            owners += [name] * 2
    picture = plots.figure(
        traces,
        plots.axis(Text("training steps", "학습 스텝")),
        plots.axis(Text("training loss", "학습 손실"), rangemode="tozero"),
        updatemenus=plots.buttons(list(grids), [[owner == name for owner in owners] for name in grids]),
    )
    caption = Text(
        "Each arm at the rate that is best by this loss; mean over seeds and its 95 % interval. The menu shows "
        "either activation.",
        "이 손실로 가장 좋은 학습률에서 각 조건, 시드 평균과 95 % 구간. 메뉴로 활성화 함수를 고른다.",
    )
    return Figure(Text("Training loss", "학습 손실"), caption, picture)


def _table(grids: Mapping[str, Grid]) -> Table:
    rows = []
    for name, grid in grids.items():
        for arm, words in ARMS.items():
            for rate in grid.rates:
                accuracy, ease = (mean(grid.values((arm, rate), measure)) for measure in (_accuracy, _ease))
                rows.append((name, words, f"{rate:g}", f"{accuracy:.2f}", f"{2**-ease:.3f}"))
    columns = (
        Text("activation", "활성화 함수"),
        Text("batch norm", "배치 정규화"),
        Text("rate", "학습률"),
        Text("held-out accuracy %", "시험 정확도 %"),
        Text("mean training loss", "평균 학습 손실"),
    )
    return Table(Text("Every arm at every rate", "모든 조건과 학습률"), columns, tuple(rows))


EXPERIMENT = Experiment(NAME, TITLE, CLAIM, plan, train, analyse, cost=0.5, stack_size=32)
