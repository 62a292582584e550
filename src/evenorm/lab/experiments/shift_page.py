"""What the report shows of the experiment `shift`: three plots and a table, from stored trials."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import mean, median

from evenorm.lab import plots
from evenorm.lab.grid import Measure
from evenorm.lab.language import Text
from evenorm.lab.results import Figure, Table
from evenorm.lab.trials import Record

ARMS = {
    "none": Text("without batch norm", "배치 정규화 없음"),
    "batch norm": Text("with batch norm", "배치 정규화 있음"),
}
COLOURS = dict(zip(ARMS, (plots.VERMILION, plots.BLUE), strict=True))
NETS = {
    "sigmoid": Text("sigmoid net", "sigmoid 신경망"),
    "relu": Text("ReLU net", "ReLU 신경망"),
    "linear": Text("deep linear net", "깊은 선형 신경망"),
}


class Runs:
    """The records of each net and arm, in the order of seeds."""

    def __init__(self, records: Mapping[tuple[str, str], Sequence[Record]]) -> None:
        """Take one list of records for each net and arm."""
        self._records = records

    def records(self, net: str, arm: str) -> Sequence[Record]:
        """Return the records of a net and arm."""
        return self._records[net, arm]

    def values(self, net: str, arm: str, measure: Measure) -> list[float]:
        """Return the measure of each seed."""
        return [measure(record) for record in self._records[net, arm]]

    def differences(self, net: str, more: str, less: str, measure: Measure) -> tuple[float, ...]:
        """Return the measure of `more` minus that of `less`, seed by seed."""
        pairs = zip(self.values(net, more, measure), self.values(net, less, measure), strict=True)
        return tuple(a - b for a, b in pairs)


def figures(runs: Runs, every: int) -> tuple[Figure, ...]:
    """Return the percentiles of a typical unit, the drift of all units, and the agreement of gradients by layer."""
    return _percentile_figure(runs, every), _drift_figure(runs), _gradient_figure(runs)


def _percentile_figure(runs: Runs, every: int) -> Figure:
    traces: list[plots.Trace] = []
    for arm, words in ARMS.items():
        low, middle, high = zip(*runs.records("sigmoid", arm)[0]["typical"], strict=True)
        x = [every * (index + 1) for index in range(len(middle))]
        traces += plots.area(words, COLOURS[arm], x, low, middle, high)
    picture = plots.figure(
        traces,
        plots.axis(Text("training steps", "학습 걸음")),
        plots.axis(Text("input of the sigmoid", "sigmoid의 입력")),
    )
    return Figure(
        Text("What enters one sigmoid of hidden layer 3", "은닉층 3의 sigmoid 하나에 들어가는 값"),
        Text(
            "Line: the median over 500 images; band: percentiles 15 to 85. Seed 0; the unit whose drift is the "
            "median of its layer's.",
            "선: 그림 500장의 중앙값. 띠: 백분위수 15에서 85. 시드 0, 떠돎이 그 층의 중앙인 단위.",
        ),
        picture,
    )


def _drift_figure(runs: Runs) -> Figure:
    drifts = {arm: [value for run in runs.records("sigmoid", arm) for value in run["drift"]] for arm in ARMS}
    low, high = (function(map(function, drifts.values())) for function in (min, max))
    first, last = math.floor(4 * math.log2(low)), math.ceil(4 * math.log2(high))
    edges = [2 ** (power / 4) for power in range(first, last + 1)]
    traces = []
    for arm, words in ARMS.items():
        shares = [
            100 * sum(left <= value < right for value in drifts[arm]) / len(drifts[arm])
            for left, right in pairwise(edges)
        ]
        middles = [math.sqrt(left * right) for left, right in pairwise(edges)]
        style = {"mode": "lines", "fill": "tozeroy", "line": {"color": COLOURS[arm], "width": 2, "shape": "hvh"}}
        traces.append(plots.points(words, COLOURS[arm], middles, shares, **style))
    picture = plots.figure(
        traces,
        plots.axis(Text("drift: path / width", "떠돎: 길이 / 폭"), logarithmic=True),
        plots.axis(Text("share of the units (%)", "단위의 비율 (%)"), rangemode="tozero"),
    )
    return Figure(
        Text("Drift of all units", "모든 단위의 떠돎"),
        Text(
            f"All 100 units of hidden layer 3, {len(runs.records('sigmoid', 'none'))} seeds. Left is steadier.",
            f"은닉층 3의 단위 100개 모두, 시드 {len(runs.records('sigmoid', 'none'))}개. 왼쪽일수록 안정하다.",
        ),
        picture,
    )


def _gradient_figure(runs: Runs) -> Figure:
    traces = []
    for net, dash in (("linear", "solid"), ("relu", "dot")):
        for arm, words in ARMS.items():
            by_layer = [
                [0.0 if value is None else value for value in values]
                for values in zip(*(run["cosine"] for run in runs.records(net, arm)), strict=True)
            ]
            name = Text(f"{NETS[net]}, {words}", f"{NETS[net].korean}, {words.korean}")
            trace = plots.whiskers(name, COLOURS[arm], range(2, len(by_layer) + 2), by_layer)
            trace["line"]["dash"] = dash
            traces.append(trace)
    picture = plots.figure(
        traces,
        plots.axis(Text("layer", "층")),
        plots.axis(Text("cosine of G and G′", "G와 G′의 코사인"), range=[-1.05, 1.05]),
    )
    return Figure(
        Text(
            "A layer's gradient before and after the earlier layers' step",
            "앞선 층들의 걸음 전과 후, 한 층의 기울기",
        ),
        Text(
            "1: the earlier layers' step does not turn the gradient; 0: it is another one; −1: reversed. Mean over "
            "seeds and its 95 % interval.",
            "1: 앞선 층들의 걸음이 기울기를 돌리지 않는다. 0: 다른 기울기가 된다. −1: 뒤집힌다. 시드에 대한 평균과 "
            "그 95 % 구간.",
        ),
        picture,
    )


def table(runs: Runs) -> Table:
    """Return the numbers of each net and arm, means over seeds."""
    rows = []
    for net, name in NETS.items():
        for arm, words in ARMS.items():
            found = runs.records(net, arm)
            cells = [
                f"{mean(median(run['drift']) for run in found):.1f}" if net == "sigmoid" else "–",
                f"{mean(median(run['spread']) for run in found):.1f}" if net == "sigmoid" else "–",
                *("–" if net == "sigmoid" else _mean(run[key] for run in found) for key in ("cosine", "distance")),
                _mean([run["loss"]] for run in found),
            ]
            rows.append((Text(f"{name}, {words}", f"{name.korean}, {words.korean}"), *cells))
    columns = (
        Text("net", "신경망"),
        Text("drift", "떠돎"),
        Text("change of spread", "폭의 변화"),
        Text("cosine of G, G′", "G, G′의 코사인"),
        "‖G − G′‖ / ‖G‖",
        Text("final training loss", "마지막 학습 손실"),
    )
    return Table(
        Text("Each net at its rate, means over seeds", "신경망마다, 시드에 대한 평균"), columns, tuple(rows)
    )


def _mean(lists: Iterable[Sequence[float | None]]) -> str:
    numbers = [value for values in lists for value in values if value is not None]
    return f"{mean(numbers):.3g}" if numbers else "–"
