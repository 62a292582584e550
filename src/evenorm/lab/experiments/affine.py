"""What do γ and β do to a layer: is a sigmoid without them a straight line?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import mean

import torch
from torch import Tensor, nn

from evenorm.lab import plots
from evenorm.lab.data import split_of
from evenorm.lab.experiment import Experiment, Scale
from evenorm.lab.grid import Cell, Grid, Measure
from evenorm.lab.language import Text
from evenorm.lab.networks import Sigmoid, initialise_, perceptron
from evenorm.lab.results import Analysis, Claim, Endpoint, Figure, Published, Table
from evenorm.lab.statistics import Comparison, Kind, combine, judge
from evenorm.lab.training import Curves, descend, diverged, final_loss, training_samples
from evenorm.lab.trials import PILOT_SEEDS, Record, Trial, settings

NAME, TITLE = "affine", Text("Scale and shift", "크기와 이동, γ와 β")
CLAIM = Claim(
    korean=(
        "위 그림과 같이 Scaling & Shifting을 적용하지 않으면 sigmoid의 입력값이 -1~1 사이로 출력 값의 형태가 "
        "거의 직선이다."
    ),
    english=(
        "As in the figure above, without scaling and shifting the sigmoid's inputs lie between −1 and 1, and its "
        "output is almost a straight line."
    ),
    source=Text(
        "The document, “batch normalization process”; Ioffe & Szegedy 2015, section 3",
        "문서의 “Batch Normalization process”; Ioffe & Szegedy 2015, 3절",
    ),
    question=Text(
        "How nearly straight is a layer of sigmoids without γ and β, how much more does it bend with them, and "
        "does the loss gain by it?",
        "γ와 β가 없는 sigmoid 층은 얼마나 직선에 가까우며, 있으면 얼마나 더 휘고, 그것이 손실에 이득이 되는가?",
    ),
)

ARMS = {"without": Text("without γ and β", "γ와 β 없음"), "with": Text("with γ and β", "γ와 β 있음")}
COLOURS = (plots.VERMILION, plots.BLUE)
ACTIVATIONS: dict[str, type[nn.Module]] = {"sigmoid": Sigmoid, "tanh": nn.Tanh, "ReLU": nn.ReLU}
RATES = {"sigmoid": (1.0, 3.0, 10.0), "tanh": (0.3, 1.0), "ReLU": (0.3, 1.0)}
HIDDEN, BATCH = (32, 32, 32), 60
EDGES = tuple(-8 + index / 4 for index in range(65))  # of the histogram of inputs
STRAIGHT = 2.0  # margin of “almost a line”, % of a unit's variance; pilot seeds 1000-1002 gave 0.9, 0.9, 1.1
DOUBLINGS = 1.0  # margin on how much more a layer bends: twice; the pilot seeds gave +2.2, +2.1, +1.9
POINTS = 10.0  # margin on the share of inputs in −1..1; the pilot seeds gave +28, +27, +26
GAIN = 0.5  # margin on the loss, in doublings: 1.4 times; the pilot seeds gave +0.9, +1.5, +1.7
RULE = Text(
    "Measure: the share of a sigmoid unit's output variance over the training set that the best straight line "
    "through its inputs leaves unexplained, mean over all hidden units, after training, each arm at its best "
    "rate (chosen on pilot seeds 1000-1002, which are then left out). REPRODUCED if (1) without γ and β the 95 % "
    "interval of that share lies within 2 % and (2) with them it is more than twice as large: the interval of "
    "log₂(with / without) above 1; otherwise the worse of the two verdicts. Beside it, under Holm's rule for all "
    "four: how many more inputs lie between −1 and 1 without γ and β, margin 10 points, and log₂ of the ratio of "
    "training losses, margin 0.5. Tanh and ReLU are shown, not judged.",
    "잰 것: 학습이 끝난 뒤, sigmoid 유닛의 입력에 가장 잘 맞는 직선이 학습 데이터에서 출력 분산 중 설명하지 "
    "못하는 비율, 모든 은닉 유닛의 평균, 각 조건의 가장 좋은 학습률에서(예비 시드 1000-1002로 고르고 그 시드들은 "
    "뺀다). (1) γ와 β가 없을 때 이 비율의 95 % 구간이 2 % 안에 있고 (2) 있을 때 두 배 넘게 크면, 곧 log₂(있을 때 "
    "/ 없을 때)의 구간이 1보다 위에 있으면 재현됨. 아니면 두 판정 중 나쁜 쪽. 덧붙여, 넷 모두에 Holm의 규칙을 "
    "적용해: γ와 β가 없을 때 −1과 1 사이의 입력이 얼마나 더 많은가, 기준 폭 10퍼센트포인트, 그리고 학습 손실 "
    "비의 log₂, 기준 폭 0.5. Tanh와 ReLU는 보여 줄 뿐 판정하지 않는다.",
)
PUBLISHED = (
    Published(
        Text(
            "normalising the inputs of a sigmoid would constrain them to the linear regime of the nonlinearity",
            "sigmoid의 입력을 정규화하면 비선형성의 선형 영역에 갇힐 것이다",
        ),
        Text("the reason given for γ and β; no number", "γ와 β를 두는 이유. 수치 없음"),
        Text("Ioffe & Szegedy 2015, section 3", "Ioffe & Szegedy 2015, 3절"),
    ),
)
NOTES = (
    Text(
        "Standardised inputs do not all lie between −1 and 1: of a normal distribution 68 % do. Over such inputs "
        "a line explains 98.4 % of a sigmoid's output, 93 % of a tanh's and 73 % of a ReLU's.",
        "표준화한 입력이 모두 −1과 1 사이에 있는 것은 아니다. 정규 분포라면 68 %이다. 그런 입력에서 직선은 "
        "sigmoid 출력의 98.4 %, tanh의 93 %, ReLU의 73 %를 설명한다.",
    ),
    Text(
        "A net can still bend without γ and β where the distribution of a unit's inputs is far from normal. "
        "Whether a deep net of sigmoids could be trained at all without them, three layers cannot show.",
        "γ와 β가 없어도 유닛의 입력 분포가 정규 분포와 많이 다르면 신경망은 휠 수 있다. sigmoid로 된 깊은 "
        "신경망이 이들 없이 학습될 수 있는지는 세 층으로는 알 수 없다.",
    ),
)


def plan(scale: Scale) -> list[Trial]:
    """Both arms with each activation over its rates, for the pilot seeds and the paired ones."""
    seeds, steps = (*PILOT_SEEDS, *scale.paired), 200 if scale.quick else 500
    return [
        Trial(NAME, 1, arm, seed, rate, settings(activation=activation, steps=steps))
        for arm in ARMS
        for activation, rates in RATES.items()
        for rate in (rates[1:2] if scale.quick else rates)
        for seed in seeds
    ]


def train(trials: Sequence[Trial]) -> list[Record]:
    """Train 3 hidden layers of 32 units behind batch norm, W ~ N(0, 1/inputs), batch 60, plain SGD."""
    splits = [split_of(trial, "digits") for trial in trials]
    training, first = training_samples(splits), trials[0]
    activation, widths = ACTIVATIONS[first["activation"]], (splits[0].features, *HIDDEN, splits[0].classes)
    network = perceptron(len(trials), widths, activation, normalise=True, affine=first.arm == "with")
    initialise_(network, [trial.seed for trial in trials], lambda inputs: 1 / math.sqrt(inputs))
    history = torch.stack(
        [loss for _, loss in descend(network, training, trials, batch=BATCH, steps=first["steps"])]
    )
    curves = Curves(len(trials))
    curves.put(
        diverged=diverged(history), train_loss=final_loss(history), **_bends(network, training.x, activation)
    )
    return curves.records()


@torch.no_grad()
def _bends(network: nn.Sequential, x: Tensor, activation: type[nn.Module]) -> dict[str, Tensor]:
    """Return what the activations' inputs look like, and what a line leaves of their outputs, by member."""
    network.eval()
    shares, left, counts = list[Tensor](), list[Tensor](), list[Tensor]()
    for layer in network:
        z, x = x, layer(x)
        if isinstance(layer, activation):
            shares.append((z.abs() <= 1).flatten(1).double().mean(1))
            a, b = (values.double() - values.double().mean(2, keepdim=True) for values in (z, x))
            covariance, variances = (a * b).mean(2), a.square().mean(2) * b.square().mean(2)
            left.append((1 - covariance.square() / variances).nanmean(1))  # a dead unit bends nothing
            edges = torch.tensor(EDGES)
            counts.append(
                torch.stack([torch.histogram(member.flatten(), edges).hist for member in z]) / z[0].numel()
            )
    return {
        "straight": torch.stack(shares).mean(0),
        "left": torch.stack(left).mean(0),
        "density": torch.stack(counts).mean(0),
    }


def analyse(records: Mapping[Trial, Record], scale: Scale) -> Analysis:
    """Compare how much layers bend without γ and β and with them, each at its best rate."""
    grids = {
        name: Grid({trial: record for trial, record in records.items() if trial["activation"] == name}, scale)
        for name in RATES
    }
    best = {name: {arm: grid.best(arm, _progress) for arm in ARMS} for name, grid in grids.items()}
    endpoints = judge(_comparisons(grids["sigmoid"], best["sigmoid"]))
    return Analysis(
        experiment=NAME,
        title=TITLE,
        claim=CLAIM,
        protocol=_protocol(grids["sigmoid"]),
        rule=RULE,
        verdict=combine(endpoint.verdict for endpoint in endpoints[:2]),
        answer=_answer(grids["sigmoid"], best["sigmoid"], endpoints),
        endpoints=endpoints,
        figures=(_input_figure(grids["sigmoid"], best["sigmoid"]),),
        published=PUBLISHED,
        command=scale.command(NAME),
        tables=(_table(grids, best),),
        notes=(*NOTES, *grids["sigmoid"].notes(best["sigmoid"], ARMS), *scale.notes()),
        seeds=scale.seeds,
        configuration={
            "steps": grids["sigmoid"].steps,
            "best": {name: dict(cells.values()) for name, cells in best.items()},
        },
    )


def _comparisons(grid: Grid, best: Mapping[str, Cell]) -> list[Comparison]:
    without, with_ = best.values()
    return [
        Comparison(
            name=Text(
                "What the best line leaves of a sigmoid's output, without γ and β: nothing",
                "γ와 β가 없을 때 가장 잘 맞는 직선이 sigmoid 출력에서 남기는 것: 없음",
            ),
            unit=Text("% of the output's variance", "출력 분산의 %"),
            differences=tuple(grid.values(without, _percent("left"))),
            margin=STRAIGHT,
            favours=Text("the layer bends", "층이 휜다"),
            would_change=Text("an interval not wholly within 2 %", "2 % 안에 온전히 들지 않는 구간"),
            kind=Kind.EQUIVALENCE,
        ),
        Comparison(
            name=Text("The same with γ and β, against without", "같은 값을 γ와 β가 있을 때와 없을 때 견주면"),
            unit=Text("doublings: log₂(with / without)", "두 배의 횟수: log₂(있을 때 / 없을 때)"),
            differences=grid.differences(with_, without, lambda record: math.log2(record["left"])),
            margin=DOUBLINGS,
            favours=Text(
                "γ and β more than double how much a layer bends", "γ와 β가 층의 휘는 정도를 두 배 넘게 키운다"
            ),
            would_change=Text("an interval that reaches below 1", "1 아래에 닿는 구간"),
        ),
        Comparison(
            name=Text("Inputs between −1 and 1, without − with γ and β", "−1과 1 사이의 입력, γ와 β 없음 − 있음"),
            unit=Text("percentage points", "퍼센트포인트"),
            differences=grid.differences(without, with_, _percent("straight")),
            margin=POINTS,
            favours=Text(
                "without γ and β more inputs lie in the straight stretch",
                "γ와 β가 없으면 더 많은 입력이 직선 구간에 있다",
            ),
            would_change=Text("an interval that reaches below +10 points", "+10퍼센트포인트 아래에 닿는 구간"),
        ),
        Comparison(
            name=Text("Training loss, without / with γ and β", "학습 손실, γ와 β 없음 / 있음"),
            unit=Text(
                "doublings: log₂(loss without / loss with)", "두 배의 횟수: log₂(없을 때의 손실 / 있을 때의 손실)"
            ),
            differences=tuple(value / math.log10(2) for value in grid.differences(with_, without, _progress)),
            margin=GAIN,
            favours=Text(
                "γ and β lower the training loss 1.4 times or more", "γ와 β가 학습 손실을 1.4배 이상 낮춘다"
            ),
            would_change=Text("an interval that reaches below 0.5", "0.5 아래에 닿는 구간"),
        ),
    ]


def _percent(name: str) -> Measure:
    return lambda record: 100 * float(record[name])


def _progress(record: Record) -> float:
    """Return −log₁₀ of the final training loss; of a trial that was lost, that of a huge one."""
    loss = record["train_loss"]
    return -math.log10(100.0 if record["diverged"] or loss is None else max(loss, 1e-12))


def _protocol(grid: Grid) -> Text:
    rates = "; ".join(f"{name} {', '.join(f'{rate:g}' for rate in rates)}" for name, rates in RATES.items())
    return Text(
        "Data: scikit-learn's digits, x/16, one stratified split 1437/360. Network: 3 hidden layers of 32 "
        "sigmoids (or tanhs, or ReLUs), batch norm before each, with γ and β or without, W ~ N(0, 1/inputs). "
        f"Plain SGD, batch {BATCH}, {grid.steps} steps, rates: {rates}. {grid.scale.seeds} paired seeds: the "
        "same initial weights and the same batches in both arms. Inputs and outputs of the units over the whole "
        "training set, with fixed statistics.",
        "데이터: scikit-learn의 digits, x/16, 층화 분할 하나 1437/360. 신경망: sigmoid(또는 tanh, ReLU) 32개인 "
        f"은닉층 3개, 각각의 앞에 배치 정규화, γ와 β가 있거나 없음, W ~ N(0, 1/입력 수). 단순 SGD, 배치 {BATCH}, "
        f"{grid.steps}스텝, 학습률: {rates}. 짝지은 시드 {grid.scale.seeds}개: 양쪽의 초기 가중치와 배치가 같다. "
        "유닛의 입력과 출력은 고정된 통계로 학습 데이터 전체에서 잰다.",
    )


def _answer(grid: Grid, best: Mapping[str, Cell], endpoints: Sequence[Endpoint]) -> Text:
    straight, left = (
        [mean(grid.values(cell, _percent(name))) for cell in best.values()] for name in ("straight", "left")
    )
    loss = 2 ** endpoints[3].estimate
    return Text(
        f"Without γ and β {straight[0]:.0f} % of the sigmoids' inputs lay between −1 and 1, and a straight line "
        f"explained {100 - left[0]:.1f} % of their output; with them {straight[1]:.0f} % and {100 - left[1]:.1f} "
        f"%. The training loss was {loss:.1f} times lower with γ and β.",
        f"γ와 β가 없을 때 sigmoid 입력의 {straight[0]:.0f} %가 −1과 1 사이에 있었고 직선이 출력의 "
        f"{100 - left[0]:.1f} %를 설명했다. 있을 때는 {straight[1]:.0f} %와 {100 - left[1]:.1f} %였다. 학습 "
        f"손실은 γ와 β가 있을 때 {loss:.1f}배 낮았다.",
    )


def _input_figure(grid: Grid, best: Mapping[str, Cell]) -> Figure:
    centres = [(low + high) / 2 for low, high in pairwise(EDGES)]
    width = EDGES[1] - EDGES[0]
    traces: list[plots.Trace] = []
    for (arm, cell), colour in zip(best.items(), COLOURS, strict=True):
        traces += plots.band(ARMS[arm], colour, centres, grid.curves(cell, "density", 100 / width))
    curve = [1 / (1 + math.exp(-z)) for z in centres]
    sigmoid = plots.line(
        Text("the sigmoid itself (right axis)", "sigmoid 자체 (오른쪽 축)"), "#888888", centres, curve, dash="dot"
    )
    stretch = {"type": "rect", "yref": "paper", "y0": 0, "y1": 1, "x0": -1, "x1": 1, "line": {"width": 0}}
    picture = plots.figure(
        [*traces, {**sigmoid, "yaxis": "y2"}],
        plots.axis(Text("input of the sigmoid", "sigmoid의 입력"), range=[-6, 6]),
        plots.axis(Text("inputs (% per unit)", "입력 (단위당 %)"), rangemode="tozero"),
        yaxis2={
            "overlaying": "y",
            "side": "right",
            "range": [0, 1],
            "tickvals": [0, 0.5, 1],
            "tickmode": "array",
            "showgrid": False,
        },
        shapes=[{**stretch, "fillcolor": "rgba(136,136,136,0.15)", "layer": "below"}],
    )
    caption = Text(
        "Inputs of all hidden units over the training set, mean over seeds and its 95 % interval. Grey: the "
        "stretch from −1 to 1, in which the sigmoid is almost straight.",
        "학습 데이터에서 모든 은닉 유닛의 입력, 시드 평균과 95 % 구간. 회색: sigmoid가 거의 직선인 −1에서 "
        "1까지의 구간.",
    )
    return Figure(Text("Where the sigmoids' inputs lie", "sigmoid의 입력이 놓이는 곳"), caption, picture)


def _table(grids: Mapping[str, Grid], best: Mapping[str, Mapping[str, Cell]]) -> Table:
    rows = []
    for name, grid in grids.items():
        for arm, words in ARMS.items():
            cell = best[name][arm]
            shares = (f"{mean(grid.values(cell, _percent(key))):.1f}" for key in ("straight", "left"))
            loss = 10 ** -mean(grid.values(cell, _progress))
            rows.append((name, words, f"{cell[1]:g}", *shares, f"{loss:.4f}"))
    columns = (
        Text("activation", "활성화 함수"),
        Text("arm", "조건"),
        Text("best rate", "가장 좋은 학습률"),
        Text("inputs in −1 to 1, %", "−1에서 1 사이의 입력, %"),
        Text("not explained by a line, %", "직선이 설명하지 못하는 것, %"),
        Text("training loss (geometric mean)", "학습 손실 (기하 평균)"),
    )
    return Table(Text("Each arm at its best rate", "각 조건의 가장 좋은 학습률에서"), columns, tuple(rows))


EXPERIMENT = Experiment(NAME, TITLE, CLAIM, plan, train, analyse, cost=0.4, stack_size=32)
