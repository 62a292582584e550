"""Made-up analyses in the shape of real ones, for the tests of the report. No number here was measured."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

from evenorm.lab.layer_page import LayerView
from evenorm.lab.results import Analysis, Claim, Endpoint, Figure, Published, Table, Verdict

HOSTILE = (
    "</script><img src=x onerror=\"document.title='owned'\"> '\"` {{ 7*7 }} \u202egnp.exe \x1b[31mred\x1b[0m "
    "\u2028 <a href='https://example.invalid/'>link</a> -->]]> \ud800"
)
ENVIRONMENT = {
    "evenorm": "0.1.0",
    "torch": "2.13.0",
    "Python": "3.11.7",
    "machine": "made up, 2 cores",
    "system": "Linux 6.1, x86-64",
}
_STEPS = list(range(0, 3001, 50))


def _curve(half: float, ceiling: float, noise: float, seed: int) -> list[float]:
    draw = random.Random(seed)
    return [
        round(ceiling * step / (step + half) + 0.1 * half / (step + half) + draw.gauss(0, noise), 4)
        for step in _STEPS
    ]


def _band(name: str, arm: str, half: float, ceiling: float, seed: int) -> list[dict[str, Any]]:
    middle = _curve(half, ceiling, 0.002, seed)
    spread = [0.05 * half / (half + step) + 0.006 for step in _STEPS]
    low = [round(y - s, 4) for y, s in zip(middle, spread, strict=True)]
    high = [round(y + s, 4) for y, s in zip(middle, spread, strict=True)]
    hidden = {"showlegend": False, "hoverinfo": "skip", "mode": "lines", "line": {"width": 0}}
    return [
        {"type": "scatter", "x": _STEPS, "y": low, "name": f"{name}, low", **hidden},
        {
            "type": "scatter",
            "x": _STEPS,
            "y": high,
            "name": f"{name}, high",
            "fill": "tonexty",
            "fillcolor": f"var(--{arm}-band)",
            **hidden,
        },
        {
            "type": "scatter",
            "mode": "lines",
            "x": _STEPS,
            "y": middle,
            "name": name,
            "line": {"color": f"var(--{arm})"},
        },
    ]


def _endpoint(
    name: str, unit: str, estimate: float, half: float, margin: float, verdict: Verdict, **more: Any
) -> Endpoint:
    given = {
        "p_value": 0.001953 if abs(estimate) > half else 0.31,
        "seeds": 10,
        "favours": "batch norm is faster",
        "would_change": f"an interval that reaches below {margin}",
        **more,
    }
    return Endpoint(
        name=name,
        unit=unit,
        estimate=estimate,
        low=estimate - half,
        high=estimate + half,
        margin=margin,
        verdict=verdict,
        **given,
    )


def speed() -> Analysis:
    rates = [0.03, 0.1, 0.3, 1, 3]
    return Analysis(
        experiment="speed",
        title="Training speed",
        claim=Claim(
            korean="핵심은 학습 속도의 향상이다.",
            english="The core is the gain in training speed.",
            source="the document, section “Batch Normalization의 장점”; Ioffe & Szegedy 2015, section 4.1",
            question="Does a network with batch norm reach the same accuracy in fewer steps?",
        ),
        protocol="Data: scikit-learn's digits, 1437 training and 360 test images, x/16.\n"
        "Network: 64-100-100-100-10, sigmoid, weights from N(0, 0.1²).\n"
        "Arms: without and with batch norm before each activation.\n"
        "SGD without momentum, batch 60, 3000 steps, learning rates 0.03 to 3; 10 paired seeds.",
        rule="REPRODUCED when the whole 95 % interval of log(steps without / steps with), each arm at its "
        "best rate, lies above log 2.",
        verdict=Verdict.REPRODUCED,
        answer="With batch norm the network needs 75 steps to 90 % test accuracy, without it 825.",
        endpoints=(
            _endpoint("best rate of each arm", "log ratio of steps", 2.4, 0.21, math.log(2), Verdict.REPRODUCED),
            _endpoint("equal rates, 0.3", "log ratio of steps", 3.1, 0.42, math.log(2), Verdict.REPRODUCED),
            _endpoint(
                "final test accuracy, best rates",
                "pp",
                0.22,
                0.41,
                -0.5,
                Verdict.REPRODUCED,
                favours="no worse with batch norm",
            ),
        ),
        figures=(
            Figure(
                "Test accuracy while training",
                "Each arm at its best rate; line: mean of 10 seeds, band: their range.",
                {
                    "data": _band("without batch norm", "vermilion", 420, 0.97, 1)
                    + _band("with batch norm", "blue", 35, 0.98, 2),
                    "layout": {
                        "xaxis": {"title": {"text": "step"}},
                        "yaxis": {"title": {"text": "test accuracy"}, "range": [0, 1], "tickformat": ".0%"},
                        "shapes": [
                            {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": 0.9, "y1": 0.9}
                            | {"line": {"dash": "dot", "width": 1}}
                        ],
                    },
                },
            ),
            Figure(
                "Steps to 90 % at each learning rate",
                "A missing point: 90 % was not reached in 3000 steps.",
                {
                    "data": [
                        {
                            "type": "scatter",
                            "mode": "lines+markers",
                            "name": "without batch norm",
                            "x": rates,
                            "y": [float("nan"), float("nan"), 2350, 825, 1200],
                            "line": {"color": "var(--vermilion)"},
                        },
                        {
                            "type": "scatter",
                            "mode": "lines+markers",
                            "name": "with batch norm",
                            "x": rates,
                            "y": [900, 310, 120, 75, 90],
                            "line": {"color": "var(--blue)"},
                        },
                    ],
                    "layout": {
                        "xaxis": {"type": "log", "title": {"text": "learning rate"}, "dtick": 1},
                        "yaxis": {"type": "log", "title": {"text": "steps to 90 %"}, "dtick": 1},
                        "updatemenus": [
                            {
                                "buttons": [
                                    {"label": label, "method": "restyle", "args": [{"visible": shown}]}
                                    for label, shown in (("both", [True, True]), ("with", [False, True]))
                                ]
                            }
                        ],
                    },
                },
            ),
        ),
        published=(
            Published(
                "13.3 M steps against 31.0 M to 72.2 %: 2.3 times fewer",
                "Inception on ImageNet, equal learning rate, batch 32",
                "Ioffe & Szegedy 2015, figure 3",
            ),
            Published(
                "2.1 M steps: 14.8 times fewer",
                "the same, rate × 5; dropout and five other things changed as well",
                "Ioffe & Szegedy 2015, figure 3",
            ),
        ),
        tables=(
            Table(
                "Steps to 90 % test accuracy",
                ("Rate", "Without, median", "With, median", "Ratio"),
                (
                    ("0.03", "not reached", "900", "> 3.3"),
                    ("0.3", "2350", "120", "19.6"),
                    ("1", "825", "75", "11.0"),
                ),
            ),
        ),
        command="evenorm lab run speed --seeds 10",
        notes=(
            "Steps, not seconds: a step with batch norm costs more time.",
            "The paper states neither the rate nor the initial weights of this network; both are our choice.",
        ),
        seeds=10,
        configuration={"hidden": [100, 100, 100], "batch": 60, "steps": 3000, "rates": rates, "init_std": 0.1},
    )


def inference() -> Analysis:
    sizes = [1, 2, 4, 8, 16, 32, 64, 128, 360]
    return Analysis(
        experiment="inference",
        title="Fixed statistics at inference",
        claim=Claim(
            korean="고정된 평균과 분산은 학습 과정에서 이동 평균 or 지수 평균을 통하여 계산한 값이다.",
            english="The fixed mean and variance come from training, as a moving or an exponential average.",
            source="the document, section “추론 단계의 배치 정규화”",
            question="Are averages kept while training as good as exact statistics?",
        ),
        protocol="One trained network, evaluated seven ways on the same 360 test images.",
        rule="REPRODUCED when the interval of the difference lies wholly within ±0.5 pp.",
        verdict=Verdict.WEAK,
        answer="The exponential average costs 0.3 points of accuracy against exact statistics: seen, but small.",
        endpoints=(
            _endpoint("exact − exponential", "pp of accuracy", 0.31, 0.24, 0.5, Verdict.WEAK, p_value=0.0215),
            _endpoint("exact − batch of 1", "pp of accuracy", 71.2, 6.4, 0.5, Verdict.REPRODUCED),
        ),
        figures=(
            Figure(
                "Accuracy by the statistics used",
                "The test batch's own statistics need some 32 images to come near the exact ones.",
                {
                    "data": [
                        {
                            "type": "bar",
                            "name": "test batch's own statistics",
                            "x": [str(size) for size in sizes],
                            "y": [0.12, 0.41, 0.78, 0.9, 0.945, 0.962, 0.968, 0.97, 0.971],
                            "error_y": {
                                "type": "data",
                                "array": [0.02, 0.05, 0.04, 0.02, 0.01, 0.01, 0.01, 0.01, 0.01],
                            },
                        }
                    ],
                    "layout": {
                        "xaxis": {"title": {"text": "test batch"}, "type": "category"},
                        "yaxis": {"title": {"text": "test accuracy"}, "tickformat": ".0%"},
                    },
                },
            ),
        ),
        published=(),
        command="evenorm lab run inference",
        notes=("One data set of 1797 small images.",),
        seeds=10,
    )


def placement() -> Analysis:
    return Analysis(
        experiment="placement",
        title="Before or after the activation",
        claim=Claim(
            korean="Activation function을 적용하기 전에 Batch normalization을 먼저 적용한다 "
            "(앞과 뒤 중 어느 쪽에 삽일할 지는 논의/실험 중)",
            english="Batch norm is applied before the activation (which side is better is still discussed).",
            source="the document, section “Batch Normalization”",
            question="Does it matter whether batch norm stands before or after the activation?",
        ),
        protocol="Five hidden layers of 100, ReLU and sigmoid; 20 seeds, 5-fold cross-validation.",
        rule="REPRODUCED when the interval of after − before lies beyond 1 pp of accuracy.",
        verdict=Verdict.INCONCLUSIVE,
        answer="On these data no difference can be told: the interval reaches from −0.4 to 0.6 points.",
        endpoints=(
            _endpoint("after − before, ReLU", "pp", 0.1, 0.5, 1.0, Verdict.INCONCLUSIVE, seeds=20, p_value=0.68),
        ),
        figures=(),
        published=(
            Published("49.9 % after, 47.4 % before", "CaffeNet128 on ImageNet, single runs", "Mishkin et al. 2016"),
        ),
        command="evenorm lab run placement",
    )


def overfitting() -> Analysis:
    return Analysis(
        experiment="overfitting",
        title="Overfitting",
        claim=Claim(
            korean="Overfitting을 억제한다 (dropout, L1/L2 regularization 등의 필요성 감소)",
            english="It suppresses overfitting (dropout, L1 and L2 regularisation are needed less).",
            source="the document, section “Batch Normalization의 장점”",
            question="Does batch norm by itself narrow the gap between training and test loss?",
        ),
        protocol="200 digits; factorial with none, dropout, L1, L2, each at its tuned strength.",
        rule="REPRODUCED when the gap is smaller with batch norm by more than 10 %.",
        verdict=Verdict.CONTRADICTED,
        answer="The gap is wider with batch norm by a fifth.",
        endpoints=(
            _endpoint("relative change of the gap", "%", -21.0, 7.5, 10.0, Verdict.CONTRADICTED),
            _endpoint("with dropout", "%", -12.0, math.inf, 10.0, Verdict.INCONCLUSIVE),
        ),
        figures=(),
        published=(),
        command="evenorm lab run overfitting",
    )


def analyses() -> list[Analysis]:
    """One of each verdict."""
    return [speed(), inference(), placement(), overfitting()]


def layer_view() -> LayerView:
    draw = random.Random(7)
    values = [draw.gauss(-1.4, 0.5) if draw.random() < 0.6 else draw.gauss(0.5, 0.6) for _ in range(500)]
    mean = sum(values) / len(values)
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    return LayerView("hidden layer 3, unit 17 (made up)", values, gamma=2.34, beta=-0.71, mean=mean, std=std)


def hostile() -> Analysis:
    """Every text that an analysis can hold tries to leave its place."""
    endpoint = replace(speed().endpoints[0], name=HOSTILE, unit=HOSTILE, favours=HOSTILE, would_change=HOSTILE)
    data = [{"type": "scatter", "x": [1, 2], "y": [1, 3], "name": HOSTILE, "text": [HOSTILE, HOSTILE]}]
    layout = {"xaxis": {"title": {"text": HOSTILE}}, "title": {"text": HOSTILE}, "showlegend": True}
    return Analysis(
        experiment=HOSTILE,
        title=HOSTILE,
        claim=Claim(HOSTILE, HOSTILE, HOSTILE, HOSTILE),
        protocol=HOSTILE,
        rule=HOSTILE,
        verdict=Verdict.WEAK,
        answer=HOSTILE,
        endpoints=(endpoint, endpoint),
        figures=(Figure(HOSTILE, HOSTILE, {"data": data, "layout": layout}),),
        published=(Published(HOSTILE, HOSTILE, HOSTILE),),
        command=HOSTILE,
        tables=(Table(HOSTILE, (HOSTILE, HOSTILE), ((HOSTILE, HOSTILE),)),),
        notes=(HOSTILE, HOSTILE),
        seeds=3,
        configuration={HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}},
    )
