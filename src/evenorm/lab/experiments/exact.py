"""Is batch norm what the papers say it is? Identities, checked to rounding: no data to fit, no seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from evenorm.lab import identities, plots, symmetries, variance_rounding
from evenorm.lab.experiment import Experiment, Scale
from evenorm.lab.identities import LAYER64, PRINTED, ROUNDINGS, ROUTES, Route
from evenorm.lab.identity_table import IDENTITIES
from evenorm.lab.language import Text
from evenorm.lab.results import Analysis, Claim, Endpoint, Figure, Published, Table, Verdict
from evenorm.lab.statistics import combine
from evenorm.lab.trials import Record, Trial

NAME, TITLE = "exact", Text("The process itself", "과정 그 자체")
CLAIM = Claim(
    korean="Batch Normalization process: 각 Hidden layer 로의 Input data에 대해 평균이 0, 분산이 1 이 되도록 "
    "Normalization을 진행한다. Normalization의 결과에 Scaling (*γ) & Shifting (+β) 적용한다.",
    english="The batch normalisation process: the input of each hidden layer is normalised to mean 0 and variance "
    "1; the result is scaled by γ and shifted by β.",
    source=Text(
        "The document, “Batch Normalization process”; identities of Ioffe & Szegedy 2015 and Santurkar et al. 2018",
        "문서의 “Batch Normalization process”; Ioffe & Szegedy 2015와 Santurkar 외 2018의 항등식",
    ),
    question=Text(
        "Do evenorm's layers compute what the papers derive, to the last digits, forwards, backwards and twice?",
        "evenorm의 층은 논문이 유도한 그대로를, 순전파와 역전파, 두 번 미분까지, 마지막 자리까지 계산하는가?",
    ),
)

SIZES, BATCHES, LIMIT = (
    (2, 4, 8, 16, 64),
    20_000,
    4.0,
)  # Monte-Carlo: |z| of five means stays below 4 in 3999 of 4000
RULE = Text(
    "REPRODUCED if no identity is off by more than its bound, and no Monte-Carlo mean by 4 standard errors; "
    "otherwise CONTRADICTED. An error counts relative to the numbers that were added up; the bound is 16 roundings "
    "for each doubling of the 64 values, 96 in all: 1.1e-14 in float64, 5.7e-6 in float32; for central differences "
    "1e-6. Theorem 4.1 is judged with 1/m, as its own proof has it. The printed 1/√m is judged beside it.",
    "모든 항등식의 오차가 한계 안에 있고 몬테카를로 평균이 모두 표준오차 4개 안에 있으면 REPRODUCED, 아니면 "
    "CONTRADICTED다. 오차는 더해진 수들의 크기에 견주어 센다. 한계는 값 64개가 두 배씩 늘 때마다 반올림 16번, 모두 "
    "96번이다: float64에서 1.1e-14, float32에서 5.7e-6, 중앙 차분은 1e-6. 정리 4.1은 논문의 증명대로 1/m으로 "
    "판정하고, 인쇄된 1/√m은 그 곁에서 따로 판정한다.",
)
PUBLISHED = (
    Published(
        "‖∂L̂/∂y‖² ≤ γ²/σ² (‖g‖² − ⟨1, g⟩²/m − ⟨g, ŷ⟩²/√m)",
        Text("theorem 4.1 and equation 9; ‖ŷ‖ = √m there", "정리 4.1과 식 9; 거기서 ‖ŷ‖ = √m"),
        "Santurkar et al. 2018, section 4, appendix C",
    ),
    Published(
        "∂BN((aW)u)/∂(aW) = (1/a) · ∂BN(Wu)/∂W",
        Text("derived, ε = 0", "유도한 식, ε = 0"),
        "Ioffe & Szegedy 2015, section 3.3",
    ),
)


def plan(scale: Scale) -> list[Trial]:
    """One trial: nothing here depends on a seed or on the size of the run."""
    return [Trial(NAME, 1, "identities", 0, 0.0)]


def train(trials: Sequence[Trial]) -> list[Record]:
    """Measure every identity's error by each of its routes; the same record for each trial."""
    found = symmetries.theorem(LAYER64)
    record: Record = {
        "errors": {
            name: {route.name: _finite(identity.error(route)) for route in identity.routes}
            for name, identity in IDENTITIES.items()
        },
        "violated": float((found.left > found.printed).double().mean()),
        **{side: getattr(found, side)[:200].tolist() for side in ("left", "corrected", "printed")},
        "variance": variance_rounding.sweep(torch.float32),
        "constant printed": symmetries.constant_channel(PRINTED),
        "means": [identities.mean_variance(LAYER64, m) for m in SIZES],
        "sorted": identities.sorted_variance(LAYER64),
    }
    return [record for _ in trials]


def _finite(error: float) -> float:
    """Return the error as JSON can hold it: NaN and infinity are larger than any bound."""
    return error if error < 1e300 else 1e300


def analyse(records: Mapping[Trial, Record], scale: Scale) -> Analysis:
    """Hold every error against its bound."""
    (record,) = records.values()
    shares = _shares(record)
    endpoints = _endpoints(record, shares)
    worst = max(shares, key=lambda key: shares[key])
    label, count = IDENTITIES[worst[0]].label, len(IDENTITIES)
    share, violated = 100 * shares[worst], 100 * record["violated"]
    held = len({name for name, _ in shares} - {name for (name, _), share in shares.items() if share > 1})
    return Analysis(
        experiment=NAME,
        title=TITLE,
        claim=CLAIM,
        protocol=Text(
            "Random x (64, 32) with means up to some ±5 and deviations 0.5 to 2, random γ, β and gradients of the "
            "loss, always the same; ε = 0.001, or 1e-300 where the statement holds for ε = 0. By three routes: "
            "evenorm's layer in float64, in float32, and algorithm 1 as printed, differentiated by torch. Truth is "
            "another derivation in float64, or exact rational arithmetic for the variance.",
            "무작위 x (64, 32), 평균은 대략 ±5까지, 표준편차는 0.5에서 2; 무작위 γ, β와 손실의 기울기, 언제나 같은 "
            "수; ε = 0.001, ε = 0에서 성립하는 문장은 1e-300. 세 가지 길로 계산한다: evenorm의 층을 float64와 "
            "float32로, 그리고 인쇄된 그대로의 알고리즘 1을 torch로 미분하여. 참값은 float64로 따로 유도한 식이고, "
            "분산의 참값은 정확한 유리수 계산이다.",
        ),
        rule=RULE,
        verdict=combine(endpoint.verdict for endpoint in endpoints[:2]),
        answer=Text(
            f"{held} of {count} identities hold to rounding. The largest error is {share:.0f} % of its bound "
            f"({label}). Theorem 4.1 is an equality with 1/m; as printed, with 1/√m, it fails in {violated:.0f} % "
            f"of {symmetries.DRAWS} random draws.",
            f"항등식 {count}개 가운데 {held}개가 반올림 안에서 성립한다. 가장 큰 오차는 한계의 {share:.0f} %다"
            f"({label.korean}). 정리 4.1은 1/m으로는 등식이고, 인쇄된 1/√m으로는 무작위로 뽑은 "
            f"{symmetries.DRAWS}번 가운데 {violated:.0f} %에서 성립하지 않는다.",
        ),
        endpoints=endpoints,
        figures=(_error_figure(record), _theorem_figure(record), _variance_figure(record)),
        published=PUBLISHED,
        command=scale.command(NAME),
        tables=(_table(record), _mean_table(record)),
        notes=_notes(record),
        configuration={"roundings": ROUNDINGS, "values": identities.M, "epsilon": identities.EPS},
    )


def _shares(record: Record) -> dict[tuple[str, Route], float]:
    """Return every error over its bound."""
    errors = record["errors"]
    return {
        (name, route): errors[name][route.name] / identity.bound(route)
        for name, identity in IDENTITIES.items()
        for route in identity.routes
    }


def _check(value: float, margin: float, **words: Text) -> Endpoint:
    """Return one number that has to stay below a margin."""
    verdict = Verdict.REPRODUCED if value <= margin else Verdict.CONTRADICTED
    return Endpoint(
        estimate=value, low=value, high=value, p_value=math.nan, margin=margin, verdict=verdict, seeds=0, **words
    )


def _endpoints(record: Record, shares: Mapping[tuple[str, Route], float]) -> tuple[Endpoint, ...]:
    return (
        _check(
            max(shares.values()),
            1.0,
            name=Text(f"Largest error of {len(shares)} checks", f"검사 {len(shares)}개 가운데 가장 큰 오차"),
            unit=Text("shares of its bound", "한계에 대한 비율"),
            favours=Text("an identity fails", "성립하지 않는 항등식이 있다"),
            would_change=Text("one error above its bound", "한계를 넘는 오차 하나"),
        ),
        _check(
            max(abs(z) for _, _, z in record["means"]),
            LIMIT,
            name=Text("m/(m − 1) · E[σ²_B] against σ², 5 sizes", "m/(m − 1) · E[σ²_B]와 σ²의 비교, 크기 5가지"),
            unit=Text("standard errors, largest", "표준오차, 가장 큰 것"),
            favours=Text("the correction is biased", "보정에 치우침이 있다"),
            would_change=Text("a mean that is 4 standard errors off", "표준오차 4개만큼 벗어난 평균"),
        ),
        _check(
            100 * record["violated"],
            0.0,
            name=Text(
                "Theorem 4.1 as printed, with 1/√m: draws that violate it", "인쇄된 1/√m의 정리 4.1: 어기는 비율"
            ),
            unit=Text("per cent of random draws", "무작위로 뽑은 것의 백분율"),
            favours=Text("the printed inequality is false", "인쇄된 부등식은 거짓이다"),
            would_change=Text("no draw that violates it", "어기는 경우가 하나도 없음"),
        ),
    )


def _notes(record: Record) -> tuple[Text, ...]:
    """Return what the numbers do not say by themselves."""
    lost, short = record["constant printed"], 100 * (1 - record["sorted"])
    return (
        Text(
            "Identities say that the layer is right, not that it helps.",
            "항등식은 층이 옳다는 것을 말할 뿐, 도움이 된다는 것을 말하지 않는다.",
        ),
        Text(
            f"Algorithm 1 as printed is not held to the constant channel: it is off by {lost:.1g}, for the mean of "
            f"equal numbers is rounded and the error divided by √ε.",
            f"인쇄된 그대로의 알고리즘 1에는 상수 채널을 묻지 않는다. 오차는 {lost:.1g}이다. 같은 수들의 평균이 "
            f"반올림되고 그 오차가 √ε으로 나뉘기 때문이다.",
        ),
        Text(
            f"m/(m − 1) holds for batches drawn at random. Sorted by class, batches of 60 digits show a variance "
            f"{short:.0f} % too small; the variance of the means has to be added.",
            f"m/(m − 1)은 무작위로 뽑은 배치에서 성립한다. 숫자 60개씩의 배치를 클래스 순서로 늘어놓으면 분산이 "
            f"{short:.0f} % 작게 나온다. 평균들의 분산을 더해야 한다.",
        ),
    )


COLOURS = {"layer, float64": plots.BLUE, "layer, float32": plots.ORANGE, "printed": plots.GREEN}
FLOOR = 1e-18  # where an error of exactly 0 is drawn


def _error_figure(record: Record) -> Figure:
    traces: list[plots.Trace] = []
    for route in reversed(ROUTES):
        tested = [name for name, identity in IDENTITIES.items() if route in identity.routes]
        errors = [max(record["errors"][name][route.name], FLOOR) for name in tested]
        labels = [IDENTITIES[name].label for name in tested]
        bounds = [IDENTITIES[name].bound(route) for name in tested]
        colour = COLOURS[route.name]
        traces.append(plots.points(route.words, colour, errors, labels))
        mark = {"symbol": "line-ns-open", "size": 11, "color": colour, "line": {"width": 2}}
        traces.append(plots.points(route.words, colour, bounds, labels, marker=mark, showlegend=False))
    ticks = plots.powers(range(-18, 0, 3))
    ticks["ticktext"][0] = "0"
    labels = [identity.label for identity in reversed(IDENTITIES.values())]
    picture = plots.figure(
        traces,
        plots.axis(Text("relative error", "상대 오차"), **ticks),
        plots.axis("", categoryorder="array", categoryarray=labels, tickfont={"size": 11}),
        height=620,
    )
    return Figure(
        Text("Every error (dot) against its bound (bar)", "모든 오차(점)와 그 한계(막대)"),
        Text(
            "Right of its bar a dot would be more than rounding. An error of exactly 0 stands at the left edge.",
            "점이 같은 색 막대의 오른쪽에 있으면 반올림으로 볼 수 없다. 정확히 0인 오차는 왼쪽 끝에 그렸다.",
        ),
        picture,
    )


def _theorem_figure(record: Record) -> Figure:
    low = min(record["printed"])
    picture = plots.figure(
        [
            plots.points(
                Text("printed, 1/√m", "인쇄된 식, 1/√m"), plots.VERMILION, record["printed"], record["left"]
            ),
            plots.points(Text("corrected, 1/m", "고친 식, 1/m"), plots.BLUE, record["corrected"], record["left"]),
            plots.line(Text("both sides equal", "양변이 같음"), "#888888", (low, 1), (low, 1), dash="dash"),
        ],
        plots.axis(Text("right side", "우변")),
        plots.axis(Text("left side, ‖∂ℓ/∂x‖²", "좌변, ‖∂ℓ/∂x‖²"), range=[0.75, 1.01]),
    )
    return Figure(
        Text("Theorem 4.1, both sides, in units of γ²/σ² ‖g‖²", "정리 4.1의 양변, 단위 γ²/σ² ‖g‖²"),
        Text(
            "200 random draws, 64 values each. The theorem says “left ≤ right”: on or below the dashed line. As "
            "printed every draw lies above it; with 1/m each lies on it.",
            "무작위로 뽑은 200번, 값은 64개씩. 정리는 “좌변 ≤ 우변”, 곧 점이 점선에 닿거나 그 아래라고 말한다. "
            "인쇄된 식으로는 모두 점선보다 높이 있고, 1/m으로는 모두 점선에 닿는다.",
        ),
        picture,
    )


def _variance_figure(record: Record) -> Figure:
    words = {
        "textbook": (Text("⟨x²⟩ − ⟨x⟩²", "⟨x²⟩ − ⟨x⟩²"), plots.VERMILION),
        "welford": (Text("Welford's update", "웰퍼드의 갱신"), plots.ORANGE),
        "two passes": (Text("two passes", "두 번 훑기"), plots.GREEN),
        "layer": (Text("evenorm's layer", "evenorm의 층"), plots.BLUE),
    }
    traces = [
        plots.points(name, colour, variance_rounding.KAPPAS, record["variance"][key], mode="lines+markers")
        for key, (name, colour) in words.items()
    ]
    picture = plots.figure(
        traces,
        plots.axis(
            Text("κ: size of the values over their spread", "κ: 흩어짐에 견준 값의 크기"), **plots.powers(range(6))
        ),
        plots.axis(Text("relative error of the variance", "분산의 상대 오차"), **plots.powers(range(-18, 4, 3))),
    )
    return Figure(
        Text("The variance of float32 numbers", "float32 수의 분산"),
        Text(
            "Geometric mean over channels of 4, 64 and 1024 values, against exact rational arithmetic. The "
            "textbook's error grows as κ², Welford's as κ; at κ = 10 000 no digit of the textbook's is right. "
            "evenorm shifts the values and sums them in float64.",
            "값이 4, 64, 1024개인 채널들의 기하평균, 참값은 정확한 유리수 계산이다. 교과서 식의 오차는 κ²로, "
            "웰퍼드는 κ로 자란다. κ = 10 000에서 교과서 식은 맞는 자리가 하나도 없다. evenorm은 값을 옮긴 뒤 "
            "float64로 더한다.",
        ),
        picture,
    )


def _table(record: Record) -> Table:
    rows = []
    for name, identity in IDENTITIES.items():
        errors = [record["errors"][name].get(route.name) for route in ROUTES]
        cells = ("–" if error is None else "0" if error == 0 else f"{error:.1e}" for error in errors)
        rows.append((identity.label, identity.statement, *cells, identity.source))
    columns = (
        Text("identity", "항등식"),
        Text("statement", "내용"),
        *(route.words for route in ROUTES),
        Text("source", "출처"),
    )
    return Table(
        Text("Largest relative error of each identity", "항등식마다 가장 큰 상대 오차"), columns, tuple(rows)
    )


def _mean_table(record: Record) -> Table:
    rows = tuple(
        (str(m), f"{biased:.4f}", f"{(m - 1) / m:.4f}", f"{corrected:.4f}", f"{z:+.1f}")
        for m, (biased, corrected, z) in zip(SIZES, record["means"], strict=True)
    )
    columns = (
        Text("batch size m", "배치 크기 m"),
        "E[σ²_B] / σ²",
        Text("predicted", "예측"),
        Text("corrected", "보정 후"),
        "z",
    )
    title = Text("Mean batch variance over 20 000 random batches", "무작위 배치 20 000개의 평균 배치 분산")
    return Table(title, columns, rows)


EXPERIMENT = Experiment(NAME, TITLE, CLAIM, plan, train, analyse, cost=6000.0, stack_size=1)
