"""What the page says of `batch-size`: the claim, the protocol, the answer, the plots and the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, TypeAlias

from evenorm.lab import plots
from evenorm.lab.language import Text
from evenorm.lab.results import Claim, Endpoint, Figure, Table
from evenorm.lab.trials import Record

CLAIM = Claim(
    korean="학습 단계의 배치 정규화: 배치별로 계산되어야 각 배치들이 표준 정규 분포를 각각 따른다.",
    english=Text(
        "Batch norm in training: it has to be computed batch by batch, so that each batch follows the standard "
        "normal distribution.",
        "학습 단계의 배치 정규화는 배치마다 계산해야 각 배치가 표준 정규 분포를 따른다.",
    ),
    source=Text(
        "The document, “batch normalisation in training”; Wu & Johnson 2021, section 3",
        "문서의 “학습 단계의 배치 정규화”; Wu & Johnson 2021, 3절",
    ),
    question=Text(
        "How small may the batch be that gives the statistics? Do small ones make test unlike training, does "
        "freezing the statistics repair it, and do batches of two fail as predicted?",
        "통계를 내는 배치는 얼마나 작아도 되는가? 작은 배치에서는 시험이 학습과 달라지는가, 통계를 고정하면 "
        "나아지는가, 크기 2는 예측대로 실패하는가?",
    ),
)
NOTES = (
    Text(
        "Two samples: x̂ is ±1 whatever they are, and the gradient is 0 but for ε. Where two nearly agree ε "
        "counts, and the gradient is huge: the weights move far and learn little. γ, β and the last layer are "
        "trained all the same.",
        "표본이 둘이면 무엇이든 x̂은 ±1이고 기울기는 ε을 빼면 0이다. 둘이 거의 같은 곳에서는 ε이 말을 하고 "
        "기울기가 매우 커서, 가중치는 멀리 움직이되 배우는 것은 적다. γ, β와 마지막 층은 그래도 학습된다.",
    ),
    Text(
        "Population statistics are each layer's over the training set, behind layers that use theirs. Digits are "
        "easy: a net trained on noisy statistics is surer with quiet ones here, which need not hold where "
        "features are correlated over positions, as in the images of the paper. One rate at all sizes.",
        "모집단 통계는 앞 층들도 모집단 통계를 쓸 때 각 층의 학습 집합 전체에 대한 것이다. digits는 쉽다. 잡음 "
        "있는 통계로 학습한 신경망이 여기서는 잡음 없는 통계에서 더 정확하지만, 논문의 그림처럼 위치마다 상관이 "
        "있는 곳에서도 그렇다는 법은 없다. 모든 크기에서 학습률은 하나다.",
    ),
    Text(
        "With fixed statistics nothing bounds the activations any more: where the error after freezing is large, "
        "single nets blew up at this rate.",
        "통계를 고정하면 더는 아무것도 활성값을 묶어 두지 않는다. 고정한 뒤의 오류가 큰 곳에서는 몇몇 신경망이 "
        "이 학습률에서 발산했다.",
    ),
)
LOST = 10.0  # what a loss counts as that is not finite, or larger
Runs: TypeAlias = "Mapping[int, Sequence[Record]]"  # by size, in the order of the seeds


def protocol(sizes: Sequence[int], rate: float, batch: int, steps: int, drawn: int, seeds: int) -> Text:
    """Return what was trained, in words enough to repeat it."""
    return Text(
        f"Data: scikit-learn's digits, x/16, one stratified split 1437/360. Network: 64-64-64-10, ReLU, "
        f"batch norm before each, W ~ N(0, 2/inputs). Plain SGD, rate {rate:g}, batch {batch}, {steps} "
        f"steps, of which each batch is normalised in parts of {', '.join(map(str, sizes))}. Frozen: a copy "
        f"trained with fixed population statistics for the last fifth. {drawn} test images drawn with "
        f"replacement. {seeds} paired seeds: the same initial weights and batches at all sizes.",
        f"데이터: scikit-learn의 digits, x/16, 고정된 층화 분할 1437/360. 신경망: 64-64-64-10, ReLU, 그 "
        f"앞마다 배치 정규화, W ~ N(0, 2/입력 수). 단순 SGD, 학습률 {rate:g}, 배치 {batch}, {steps}단계. 각 "
        f"배치를 {', '.join(map(str, sizes))}개씩 나누어 정규화한다. 고정: 마지막 5분의 1은 모집단 통계를 "
        f"고정하고 학습한 사본. 시험 그림 {drawn}장을 복원 추출. 짝지은 시드 {seeds}개: 모든 크기에서 "
        f"같은 초기 가중치와 같은 배치.",
    )


def error(record: Record, statistics: str) -> float:
    """Return the test error in percent, with the named statistics."""
    return 100 * (1 - float(record[f"{statistics} accuracy"]))


def loss(record: Record, name: str) -> float:
    """Return a loss, 10 where it is not finite or larger."""
    return min(LOST if record[name] is None else float(record[name]), LOST)


def answer(runs: Runs, endpoints: Sequence[Endpoint]) -> Text:
    """Return the result in plain words."""
    gap, _, repaired, two = endpoints
    own, population = (mean(error(run, name) for run in runs[4]) for name in ("own", "population"))
    bad, mended = (mean(error(run, name) for run in runs[2]) for name in ("population", "frozen"))
    return Text(
        f"Normalised in fours, the net erred on {population:.1f} % of the test images with population statistics "
        f"and on {own:.1f} % with those of fours: {gap.estimate:+.1f} points ({gap.low:+.1f} to "
        f"{gap.high:+.1f}). Freezing the statistics changed the error at 4 and 8 by {-repaired.estimate:+.1f} "
        f"points. At 2, where failure was predicted, the training loss ended {2**two.estimate:.1f} times as high "
        f"as at 4, with {bad:.0f} % errors, {mended:.0f} % after freezing.",
        f"4개씩 정규화한 신경망은 모집단 통계로 시험 그림의 {population:.1f} %, 4개의 통계로 {own:.1f} %를 "
        f"틀렸다: {gap.estimate:+.1f}포인트({gap.low:+.1f} ~ {gap.high:+.1f}). 통계를 고정하자 4와 8의 오류는 "
        f"{-repaired.estimate:+.1f}포인트 달라졌다. 실패가 예측된 2에서는 학습 손실이 4의 "
        f"{2**two.estimate:.1f}배로 끝났고 오류는 {bad:.0f} %, 고정한 뒤에는 {mended:.0f} %였다.",
    )


KINDS = {
    "own": Text("the batch's own", "배치 자신의 통계"),
    "population": Text("population", "모집단 통계"),
    "frozen": Text("population, frozen for the last fifth", "모집단 통계, 마지막 5분의 1 고정"),
}


def error_figure(runs: Runs) -> Figure:
    """Show the errors by size."""
    colours = (plots.VERMILION, plots.BLUE, plots.GREEN)
    traces = [
        plots.whiskers(words, colour, list(runs), [[error(run, name) for run in runs[size]] for size in runs])
        for (name, words), colour in zip(KINDS.items(), colours, strict=True)
    ]
    picture = plots.figure(traces, _sizes(runs), plots.axis(Text("test error (%)", "시험 오류 (%)"), minallowed=0))
    caption = Text(
        "One net a size and seed, evaluated with three kinds of statistics; mean over seeds and its 95 % interval.",
        "크기와 시드마다 신경망 하나를 세 가지 통계로 평가했다. 시드에 대한 평균과 95 % 구간.",
    )
    return Figure(
        Text("Test error by the size normalised together", "함께 정규화하는 크기에 따른 시험 오류"),
        caption,
        picture,
    )


def loss_figure(runs: Runs) -> Figure:
    """Show the training loss by size."""
    losses = [[loss(run, "train_loss") for run in runs[size]] for size in runs]
    traces = [plots.whiskers(Text("final training loss", "마지막 학습 손실"), plots.BLUE, list(runs), losses)]
    picture = plots.figure(traces, _sizes(runs), plots.axis(Text("training loss", "학습 손실"), type="log"))
    caption = Text(
        "The mean of the last 50 steps, with the batch's own statistics; mean over seeds and its 95 % interval.",
        "배치 자신의 통계로 잰 마지막 50단계의 평균. 시드에 대한 평균과 95 % 구간.",
    )
    return Figure(
        Text("Training loss by the size normalised together", "함께 정규화하는 크기에 따른 학습 손실"),
        caption,
        picture,
    )


def _sizes(runs: Runs) -> dict[str, Any]:
    ticks = list(runs)
    return plots.axis(Text("samples normalised together", "함께 정규화하는 표본 수"), type="log", tickvals=ticks)


def table(runs: Runs) -> Table:
    """Return all sizes in numbers."""
    rows = [
        (
            str(size),
            f"{mean(loss(run, 'train_loss') for run in records):.3f}",
            *(f"{mean(error(run, name) for run in records):.1f}" for name in KINDS),
            *(f"{mean(loss(run, f'{name} loss') for run in records):.3f}" for name in KINDS),
            f"{mean(run['moved'] for run in records):.2f}",
        )
        for size, records in runs.items()
    ]
    columns = (
        Text("size", "크기"),
        Text("training loss", "학습 손실"),
        Text("error %, own", "오류 %, 자신"),
        Text("population", "모집단"),
        Text("frozen", "고정"),
        Text("test loss, own", "시험 손실, 자신"),
        Text("population", "모집단"),
        Text("frozen", "고정"),
        Text("first weights moved, of their length", "첫 가중치가 움직인 거리 (길이 대비)"),
    )
    return Table(Text("Means over seeds", "시드에 대한 평균"), columns, tuple(rows))
