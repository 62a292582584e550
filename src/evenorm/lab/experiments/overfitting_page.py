"""What the page says of `overfitting`: the claim, the answer, the plots and the table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean

from evenorm.lab import plots
from evenorm.lab.experiments.overfitting_cells import (
    NOISY_SIZES,
    NORMS,
    NOTHING,
    WORDS,
    Cells,
    best,
    gains,
    gap,
    log_test_loss,
)
from evenorm.lab.language import Text, korean
from evenorm.lab.results import Claim, Endpoint, Figure, Published, Table

CLAIM = Claim(
    korean="Overfitting을 억제한다 (dropout, L1/L2 regularization 등의 필요성 감소)",
    english=Text(
        "Overfitting is suppressed (dropout, L1 and L2 regularisation are needed less).",
        "과적합을 억제한다 (드롭아웃, L1·L2 정칙화의 필요가 줄어든다).",
    ),
    source=Text(
        "The document, “advantages of batch normalisation”; Ioffe & Szegedy 2015, section 3.4; Luo et al. 2019",
        "문서의 “Batch Normalization의 장점”; Ioffe & Szegedy 2015, 3.4절; Luo 외 2019",
    ),
    question=Text(
        "On few samples, is the test loss lower with batch norm, and do dropout, L1 and L2 then bring less?",
        "표본이 적을 때 배치 정규화가 있으면 시험 손실이 더 낮은가? 그때 드롭아웃, L1, L2가 가져오는 이득은 "
        "줄어드는가?",
    ),
)
COLOURS = (plots.VERMILION, plots.BLUE)
PUBLISHED = (
    Published(
        Text(
            "dropout “can be either removed or reduced in strength”; L2 reduced 5 times",
            "드롭아웃을 “없애거나 약하게 할 수 있다”; L2는 5분의 1로",
        ),
        Text("Inception on ImageNet, BN-x5 and BN-x30", "ImageNet의 Inception, BN-x5와 BN-x30"),
        Text("Ioffe & Szegedy 2015, sections 3.4 and 4.2.1", "Ioffe & Szegedy 2015, 3.4절과 4.2.1절"),
    ),
    Published(
        Text(
            "batch norm is population normalisation plus a penalty on γ, which falls with the size of the batch",
            "배치 정규화는 모집단 정규화에 γ에 대한 벌점을 더한 것이며, 벌점은 배치가 클수록 줄어든다",
        ),
        Text("theory of one layer, and experiments", "한 층의 이론과 실험"),
        Text("Luo et al. 2019, abstract", "Luo 외 2019, 초록"),
    ),
)
NOTES = (
    Text(
        "A first design let batch norm have rate 1 as well. Three pilot seeds liked it; of the other ten some then "
        "blew up under L1 and L2 and the intervals said nothing. Both arms have had the same rates since.",
        "첫 설계에서는 배치 정규화에 학습률 1도 주었다. 예비 시드 셋은 그것이 좋다고 했으나 다른 시드 열 가운데 "
        "몇은 L1과 L2에서 발산하다시피 했고 구간은 아무것도 말하지 못했다. 그 뒤로 두 쪽의 학습률은 같다.",
    ),
    Text(
        "The training samples of two seeds overlap, and all share the test set: intervals are widened for the "
        "first, and hold for this test set.",
        "두 시드의 학습 표본은 겹치고 시험 집합은 모두 같다. 앞의 것 때문에 구간을 넓혔고, 구간은 이 시험 집합에 "
        "대한 것이다.",
    ),
    Text(
        "Dropout stands behind each ReLU. With batch norm its masks are part of the variance that is averaged in "
        "training and missing at test (Li et al. 2018): what dropout brings is what it brings in this usual place.",
        "드롭아웃은 각 ReLU 뒤에 있다. 배치 정규화가 있으면 그 마스크가 학습 중 평균되는 분산에 들어가고 시험 "
        "때는 빠진다(Li 외 2018). 드롭아웃의 이득은 이 보통의 자리에서의 이득이다.",
    ),
    Text(
        "Small nets on small images: the need for dropout in the wide last layers of large nets is not seen here. "
        "That the added loss falls as 1 / size is an expansion for little noise: training samples learned by heart "
        "have a loss near 0, to which only rare batches add, so there it falls faster.",
        "작은 그림에 대한 작은 신경망이다. 큰 신경망의 넓은 마지막 층에 드롭아웃이 필요한지는 여기서 보이지 "
        "않는다. 더해진 손실이 1 / 크기로 줄어든다는 것은 잡음이 작을 때의 전개다. 외워 버린 학습 표본은 손실이 "
        "0에 가깝고 드문 배치만 손실을 더하므로 더 빨리 줄어든다.",
    ),
)


def protocol(cells: Cells, seeds: int, steps: int, rates: str, strengths: str) -> Text:
    """Return what was trained, in words enough to repeat it."""
    record = cells["none", NOTHING].records[0]
    few, of = (round(record[name]) for name in ("few", "of"))
    return Text(
        f"Data: scikit-learn's digits, x/16, one stratified split; each seed draws {few} of the {of} training "
        f"samples and is tested on the 360 test images. Network: 64-64-64-10, ReLU, W ~ N(0, 2/inputs), with or "
        f"without batch norm before each ReLU; beside it nothing, dropout, L1 or L2 on all weights "
        f"({strengths}). Plain SGD, batch 50, {steps} steps, rates {rates}. {seeds} paired seeds: the same "
        f"samples, initial weights and batches in all cells.",
        f"데이터: scikit-learn의 digits, x/16, 고정된 층화 분할. 시드마다 학습 표본 {of}개에서 {few}개를 뽑고 "
        f"시험 그림 360장으로 시험한다. 신경망: 64-64-64-10, ReLU, W ~ N(0, 2/입력 수), 각 ReLU 앞에 배치 "
        f"정규화가 있거나 없다. 그 밖에 없음, 드롭아웃, 모든 가중치에 대한 L1 또는 L2 ({strengths}). 단순 SGD, "
        f"배치 50, {steps}단계, 학습률 {rates}. 짝지은 시드 {seeds}개: 모든 조합이 같은 표본, 같은 초기 가중치, "
        f"같은 배치를 쓴다.",
    )


def answer(cells: Cells, endpoints: Sequence[Endpoint]) -> Text:
    """Return the result in plain words."""
    first, need = endpoints[:2]
    change, low, high = (_percent(-value) for value in (first.estimate, first.high, first.low))
    names = [best(cells, norm) for norm in NORMS]
    plain, normalised = (WORDS[name] for name in names)
    without, with_ = (_percent(-mean(gains(cells, norm, name))) for norm, name in zip(NORMS, names, strict=True))
    return Text(
        f"Batch norm alone changed the test loss by {change} ({low} to {high}). The best regulariser changed it by "
        f"{without} without batch norm ({plain}) and by {with_} with it ({normalised}); with batch norm it brought "
        f"{need.estimate:+.2f} less in log loss ({need.low:+.2f} to {need.high:+.2f}).",
        f"배치 정규화만으로 시험 손실은 {change} 달라졌다({low} ~ {high}). 가장 좋은 정칙화는 배치 정규화가 "
        f"없을 때 손실을 {without} ({korean(plain)}), 있을 때 {with_} ({korean(normalised)}) 바꾸었다. 배치 "
        f"정규화가 있을 때 그 이득은 로그 손실로 {need.estimate:+.2f}만큼 작았다({need.low:+.2f} ~ "
        f"{need.high:+.2f}).",
    )


def _percent(logarithm: float) -> str:
    """Return the change by a factor, in percent."""
    return f"{round(100 * math.expm1(logarithm)):+d} %"


def loss_figure(cells: Cells) -> Figure:
    """Show the test loss of the eight cells side by side."""
    traces = []
    for shift, (norm, words), colour in zip((-0.08, 0.08), NORMS.items(), COLOURS, strict=True):
        losses = [[math.exp(value) for value in cells[norm, name].values(log_test_loss)] for name in WORDS]
        x = [index + shift for index in range(len(WORDS))]
        traces.append(plots.whiskers(words, colour, x, losses, mode="markers"))
    ticks = plots.axis("", tickvals=list(range(len(WORDS))), ticktext=list(WORDS.values()), zeroline=False)
    picture = plots.figure(traces, ticks, plots.axis(Text("test loss", "시험 손실"), rangemode="tozero"))
    title = Text("Test loss with each regulariser", "정칙화마다의 시험 손실")
    caption = Text(
        "Mean over seeds and its 95 % interval over seeds (not widened); each at its chosen strength and rate.",
        "시드에 대한 평균과 95 % 구간(넓히지 않음). 각각 고른 세기와 학습률에서.",
    )
    return Figure(title, caption, picture)


def training_figure(cells: Cells, every: int) -> Figure:
    """Show training and test loss along training, no other regulariser."""
    traces: list[plots.Trace] = []
    kinds = (
        ("test_loss", Text("test", "시험"), "solid"),
        ("train_loss", Text("training", "학습"), "dot"),
    )
    for (norm, words), colour in zip(NORMS.items(), COLOURS, strict=True):
        for name, kind, dash in kinds:
            curves = [record[name] for record in cells[norm, NOTHING].records]
            x = [every * (index + 1) for index in range(len(curves[0]))]
            middle = [None if None in losses else mean(losses) for losses in zip(*curves, strict=True)]
            label = Text(f"{kind}, {words}", f"{korean(kind)}, {korean(words)}")
            traces.append(
                {**plots.line(label, colour, x, []), "y": middle, "line": {"color": colour, "dash": dash}}
            )
    picture = plots.figure(
        traces,
        plots.axis(Text("training steps", "학습 단계")),
        plots.axis(Text("loss", "손실"), type="log"),
    )
    title = Text("Test and training loss during training", "학습 중의 시험 손실과 학습 손실")
    caption = Text(
        "No other regulariser, each at its chosen rate; means over seeds. The distance between a colour's two "
        "lines is the gap.",
        "다른 정칙화 없이 각각 고른 학습률에서, 시드에 대한 평균. 같은 색의 두 선 사이의 거리가 간격이다.",
    )
    return Figure(title, caption, picture)


def noise_figure(cells: Cells) -> Figure:
    """Show the loss that a batch's own statistics add, by its size."""
    kinds = (
        ("test_noise", Text("test images", "시험 그림"), plots.BLUE),
        ("training_noise", Text("training samples", "학습 표본"), plots.PURPLE),
    )
    traces = []
    for name, words, colour in kinds:
        added = [
            list(sizes)
            for sizes in zip(*(record[name] for record in cells["batch norm", NOTHING].records), strict=True)
        ]
        traces.append(plots.whiskers(words, colour, NOISY_SIZES, added))
    start = traces[0]["y"][0] or 1.0
    guide = [start * NOISY_SIZES[0] / size for size in NOISY_SIZES]
    traces.append(plots.line(Text("1 / size", "1 / 크기"), "#888888", NOISY_SIZES, guide, dash="dash"))
    picture = plots.figure(
        traces,
        plots.axis(Text("samples in the batch", "배치의 표본 수"), logarithmic=True),
        plots.axis(Text("added loss", "더해진 손실"), type="log"),
    )
    title = Text("Loss that a batch's own statistics add", "배치 자신의 통계가 더하는 손실")
    caption = Text(
        "The trained net with batch norm, its weights fixed: loss with the batch's own statistics minus loss with "
        "exact ones; mean over seeds and its 95 % interval.",
        "배치 정규화가 있는 학습된 신경망, 가중치는 고정: 배치 자신의 통계로 잰 손실에서 정확한 통계로 잰 손실을 "
        "뺀 값. 시드에 대한 평균과 95 % 구간.",
    )
    return Figure(title, caption, picture)


def table(cells: Cells) -> Table:
    """Return the eight cells in numbers."""
    rows = []
    for (norm, regulariser), cell in cells.items():
        accuracy = mean(cell.values(lambda record: 100 * float(record["accuracy"][-1])))
        rows.append(
            (
                NORMS[norm],
                WORDS[regulariser],
                f"{cell.strength:g}" if regulariser != NOTHING else "",
                f"{cell.rate:g}",
                f"{math.exp(mean(cell.values(log_test_loss))):.3f}",
                f"{mean(cell.values(gap)):.3f}",
                f"{accuracy:.1f}",
            )
        )
    columns = (
        Text("batch norm", "배치 정규화"),
        Text("beside it", "그 밖에"),
        Text("strength", "세기"),
        Text("rate", "학습률"),
        Text("test loss, geometric mean", "시험 손실, 기하평균"),
        Text("gap", "간격"),
        Text("accuracy %", "정확도 %"),
    )
    title = Text("The eight cells, each at its chosen strength and rate", "여덟 조합, 각각 고른 세기와 학습률에서")
    return Table(title, columns, tuple(rows))
