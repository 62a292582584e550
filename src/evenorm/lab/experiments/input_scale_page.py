"""What the page says of `input-scale`: the claim, the measures, the answer, the plots and the table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, median

from evenorm.lab import plots
from evenorm.lab.grid import Cell, Grid, Measure
from evenorm.lab.language import Text, korean
from evenorm.lab.results import Claim, Endpoint, Figure, Table
from evenorm.lab.statistics import first_crossing
from evenorm.lab.trials import Record

CLAIM = Claim(
    korean="input data에 대해 Standardization과 같은 Normalization을 적용하면 전반적으로 model의 성능이 높아진다. "
    "데이터 내 Column들의 Scale에 모델이 너무 민감해지는 것을 막아주기 때문이다.",
    english=Text(
        "Normalising the input data, by standardisation for instance, raises a model's performance in general, "
        "because it keeps the model from being too sensitive to the scales of the columns.",
        "입력 데이터를 표준화 따위로 정규화하면 모델의 성능이 대체로 높아진다. 모델이 열의 크기에 지나치게 "
        "민감해지는 것을 막아 주기 때문이다.",
    ),
    source=Text(
        "The document, “batch normalisation”, first two sentences", "문서의 “Batch Normalization”, 첫 두 문장"
    ),
    question=Text(
        "How much more accurate is a net on standardised columns than on raw ones, over how many more rates "
        "does it train, and does batch norm as the first layer do as well?",
        "열을 표준화하면 신경망이 원래 열에서보다 얼마나 더 정확하고, 얼마나 더 많은 학습률에서 학습되는가? 첫 "
        "층의 배치 정규화도 그만큼 하는가?",
    ),
)

ARMS = {
    "raw": Text("raw columns", "원래 열"),
    "standardised": Text("standardised columns", "표준화한 열"),
    "batch norm": Text("batch norm as first layer", "첫 층이 배치 정규화"),
}
COLOURS = (plots.VERMILION, plots.GREEN, plots.BLUE)
EVERY, WINDOW, TARGET = 10, 5, 0.90  # evaluated every 10 steps; a moving average over 50
NOTES = (
    Text(
        "Columns run from 0.13 (nonflavanoid phenols, smallest) to 1680 (proline, largest).",
        "열의 값은 0.13(nonflavanoid phenols의 최솟값)에서 1680(proline의 최댓값)까지다.",
    ),
    Text(
        "The exact test takes the seeds for independent; their splits overlap, so its p is too small.",
        "정확 검정은 시드가 독립이라고 본다. 분할이 겹치므로 그 p는 너무 작다.",
    ),
    Text(
        "Of the digits the scales are made up: each pixel is multiplied by a power of ten from -2 to 2, drawn "
        "once.",
        "digits의 크기는 지어낸 것이다. 픽셀마다 10의 -2에서 2제곱 사이의 수를 한 번 뽑아 곱했다.",
    ),
)


def accuracy(record: Record) -> float:
    """Return the final accuracy in percent, the mean of the last 50 steps."""
    return 100 * float(mean(record["accuracy"][-WINDOW:]))


def confidence(record: Record) -> float:
    """Return minus the final test loss: of two rates with equal accuracy, the surer one is better."""
    return -mean(math.inf if loss is None else loss for loss in record["test_loss"][-WINDOW:])


def usable(grid: Grid, arm: str) -> list[int]:
    """Return at how many rates each seed trained: twice the chance, half the first loss."""

    def trained(record: Record) -> float:
        loss = record["train_loss"]
        learned = mean(record["train_accuracy"][-WINDOW:]) > 2 / record.get("classes", 3)
        return float(learned and not record["diverged"] and loss is not None and loss < record["first_loss"] / 2)

    return [
        int(sum(seed)) for seed in zip(*(grid.values((arm, rate), trained) for rate in grid.rates), strict=True)
    ]


def _steps(grid: Grid) -> Measure:
    def measure(record: Record) -> float:
        index = first_crossing(record["accuracy"], TARGET, WINDOW)
        return grid.steps if index is None else (index + 1) * EVERY

    return measure


def protocol(grid: Grid, digits: Grid) -> Text:
    """Return what was trained, in words enough to repeat it."""
    low, high = f"{grid.rates[0]:.2g}", f"{grid.rates[-1]:g}"
    seeds = grid.scale.seeds
    return Text(
        f"Data: scikit-learn's wine, 178 × 13, three classes; each seed draws a stratified split 142/36. "
        f"Network: 13-32-32-3, ReLU, W ~ N(0, 2/inputs), biases 0; columns raw, standardised by the training set's "
        f"mean and deviation, or normalised by batch norm as the first layer. Plain SGD, batch 32, {grid.steps} "
        f"steps, rates {low} to {high} in steps of 4. {seeds} paired seeds: the same "
        f"split, initial weights and batches in all arms. Digits: 64 pixels each multiplied by a power of ten from "
        f"-2 to 2, one split 1437/360, 64-32-32-10, {digits.steps} steps.",
        f"데이터: scikit-learn의 wine, 178 × 13, 세 클래스. 시드마다 층화 분할 142/36을 뽑는다. 신경망: "
        f"13-32-32-3, ReLU, W ~ N(0, 2/입력 수), 편향 0. 열은 원래대로, 또는 학습 집합의 평균과 표준편차로 "
        f"표준화, 또는 첫 층의 배치 정규화. 단순 SGD, 배치 32, {grid.steps}단계, 학습률 {low}에서 {high}까지 "
        f"4배씩. 짝지은 시드 {seeds}개: 모든 쪽이 같은 분할, 초기 가중치, 배치. digits: 픽셀 64개에 각각 10의 "
        f"-2에서 2제곱을 곱하고, 고정된 분할 1437/360, 64-32-32-10, {digits.steps}단계.",
    )


def answer(
    grid: Grid,
    endpoints: Sequence[Endpoint],
    best: Mapping[str, Cell],
    counts: Mapping[str, Sequence[float]],
    digits: Sequence[Endpoint],
) -> Text:
    """Return the result in plain words."""
    raw, standardised, batch_norm = (mean(grid.values(cell, accuracy)) for cell in best.values())
    gain = endpoints[0]
    trained = [mean(counts[arm]) for arm in ARMS]
    return Text(
        f"On raw columns the net reached {raw:.0f} % test accuracy, on standardised ones {standardised:.0f} % "
        f"(difference {gain.estimate:+.0f} points, {gain.low:+.0f} to {gain.high:+.0f}), with batch norm as first "
        f"layer {batch_norm:.0f} %. It trained at {trained[0]:.1f}, {trained[1]:.1f} "
        f"and {trained[2]:.1f} of {len(grid.rates)} rates. On badly scaled digits the two gained "
        f"{digits[0].estimate:+.1f} and {digits[1].estimate:+.1f} points.",
        f"원래 열에서 신경망의 시험 정확도는 {raw:.0f} %, 표준화한 열에서 {standardised:.0f} %(차이 "
        f"{gain.estimate:+.0f}포인트, {gain.low:+.0f} ~ {gain.high:+.0f}), 첫 층이 배치 정규화일 때 "
        f"{batch_norm:.0f} %였다. 학습률 {len(grid.rates)}개 가운데 차례로 {trained[0]:.1f}, {trained[1]:.1f}, "
        f"{trained[2]:.1f}개에서 학습되었다. 크기를 어그러뜨린 digits에서 두 방법은 {digits[0].estimate:+.1f}, "
        f"{digits[1].estimate:+.1f}포인트를 얻었다.",
    )


WINE, DIGITS = Text("wine", "wine"), Text("badly scaled digits", "크기를 어그러뜨린 digits")


def rate_figure(grid: Grid, data: Text, chance: Text) -> Figure:
    """Show the accuracy at each rate."""
    traces = [
        plots.whiskers(words, colour, grid.rates, [grid.values((arm, rate), accuracy) for rate in grid.rates])
        for (arm, words), colour in zip(ARMS.items(), COLOURS, strict=True)
    ]
    picture = plots.figure(
        traces,
        plots.axis(Text("learning rate", "학습률"), logarithmic=True),
        plots.axis(Text("final test accuracy (%)", "마지막 시험 정확도 (%)"), range=[0, 101]),
    )
    seeds = grid.scale.seeds
    caption = Text(
        f"Mean over {seeds} seeds and its 95 % interval. {chance} is chance.",
        f"시드 {seeds}개의 평균과 95 % 구간. 우연은 {korean(chance)}이다.",
    )
    title = Text(f"Accuracy at each learning rate: {data}", f"학습률마다의 정확도: {korean(data)}")
    return Figure(title, caption, picture)


def accuracy_figure(grid: Grid, best: Mapping[str, Cell]) -> Figure:
    """Show the accuracy along training."""
    x = [EVERY * (index + 1) for index in range(grid.steps // EVERY)]
    traces: list[plots.Trace] = []
    for (arm, words), colour in zip(ARMS.items(), COLOURS, strict=True):
        rate = f"{best[arm][1]:.2g}"
        name = Text(f"{words}, rate {rate}", f"{korean(words)}, 학습률 {rate}")
        traces += plots.band(name, colour, x, grid.curves(best[arm], "accuracy", 100))
    picture = plots.figure(
        traces,
        plots.axis(Text("training steps", "학습 단계"), logarithmic=True),
        plots.axis(Text("test accuracy (%)", "시험 정확도 (%)"), range=[0, 101]),
    )
    seeds = grid.scale.seeds
    caption = Text(
        f"Each arm at its best rate; mean over {seeds} splits and its 95 % interval.",
        f"각각 가장 좋은 학습률에서, 분할 {seeds}개의 평균과 95 % 구간.",
    )
    return Figure(Text("Test accuracy during training", "학습 중의 시험 정확도"), caption, picture)


def table(grid: Grid, best: Mapping[str, Cell], counts: Mapping[str, Sequence[float]], data: Text) -> Table:
    """Return each arm at its best rate."""
    rows = []
    for arm, cell in best.items():
        steps = median(grid.values(cell, _steps(grid)))
        rows.append(
            (
                ARMS[arm],
                f"{cell[1]:.2g}",
                f"{mean(grid.values(cell, accuracy)):.1f}",
                f"{-mean(grid.values(cell, confidence)):.3f}",
                f"≥ {grid.steps}" if steps == grid.steps else f"{steps:.0f}",
                f"{mean(counts[arm]):.1f}",
            )
        )
    columns = (
        Text("arm", "쪽"),
        Text("best rate", "가장 좋은 학습률"),
        Text("accuracy %", "정확도 %"),
        Text("test loss", "시험 손실"),
        Text("median steps to 90 %", "90 %까지 단계의 중앙값"),
        Text(f"usable of {len(grid.rates)} rates", f"학습률 {len(grid.rates)}개 가운데 쓸 수 있는 수"),
    )
    title = Text(f"Each arm at its best rate: {data}", f"각각 가장 좋은 학습률에서: {korean(data)}")
    return Table(title, columns, tuple(rows))
