"""Which statistics should a trained network be evaluated with: averages, exact ones, or the test batch's own?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

import torch
from torch import Tensor, nn

import evenorm
from evenorm.averages import Average
from evenorm.lab import plots
from evenorm.lab.data import digits
from evenorm.lab.evaluation import Statistics, by_member, exact_statistics, logits, own_statistics, track
from evenorm.lab.experiment import Experiment, Scale
from evenorm.lab.experiments import inference_lag
from evenorm.lab.language import Text
from evenorm.lab.layer_page import LayerView
from evenorm.lab.networks import BatchNorm, Sigmoid, initialise_, perceptron
from evenorm.lab.results import Analysis, Claim, Endpoint, Figure, Published, Table
from evenorm.lab.statistics import Comparison, Kind, combine, judge
from evenorm.lab.training import (
    Curves,
    Samples,
    descend,
    grade,
    test_samples,
    training_samples,
)
from evenorm.lab.trials import Record, Trial, random_seed, settings

NAME, TITLE = "inference", Text("Statistics at inference", "추론 때의 통계")
CLAIM = Claim(
    korean="추론 단계의 배치 정규화: 평균과 분산에 고정값을 사용한다. 테스트 단계에서는 배치 단위로 "
    "평균/분산을 구하기 어렵다. 고정된 평균과 분산은 학습 과정에서 이동 평균 or 지수 평균을 통하여 계산한 값이다.",
    english=Text(
        "At inference mean and variance are fixed values, since they are hard to get batch by batch in the "
        "test phase; the fixed values are computed during training by a moving average or an exponential average.",
        "추론할 때 평균과 분산은 고정값이다. 시험 단계에서는 배치마다 구하기 어렵기 때문이다. 고정값은 학습하는 "
        "동안 이동 평균이나 지수 평균으로 계산한다.",
    ),
    source=Text(
        "The document, “batch normalisation at inference”; Ioffe & Szegedy 2015, algorithm 2",
        "문서의 “추론 단계의 배치 정규화”; Ioffe & Szegedy 2015, 알고리즘 2",
    ),
    question=Text(
        "Do the averages kept in training serve as well as exact statistics of the training set, and how "
        "large must a test batch be for its own statistics to do?",
        "학습 중에 유지한 평균이 학습 집합의 정확한 통계만큼 쓸 만한가? 시험 배치 자신의 통계가 쓸 만하려면 "
        "배치가 얼마나 커야 하는가?",
    ),
)

# One trained network a seed; an arm is a way to get its statistics.
AVERAGES: dict[str, Average] = {
    "exponential 0.1": evenorm.Exponential(0.1),
    "exponential 0.01": evenorm.Exponential(0.01),
    "debiased 0.01": evenorm.Exponential(0.01, debias=True),
    "cumulative": evenorm.Cumulative(),
    "window 100": evenorm.Window(100),
}
EXACT = "exact"  # of the whole training set in one batch, with the weights as they are
SIZES = (1, 2, 4, 8, 15, 30, 60, 120, 180, 360)  # of test batches; each divides the test set of 360
MOMENTS = (5, 10, 20, 50, 100, 200, 500, 1000)  # training steps after which all are evaluated
RATE, SMALL, EARLY = 0.3, 4, 10
ALIKE = 0.5  # margin of “as well as”, two test images of 360; pilot seeds 1000-1002 gave 0.0, -0.3, 0.0
WORSE = 5.0  # margin of “worse”; they gave +14, +20, +15 for batches of 4, and +52, +52, +74 after 10 steps
RULE_EN = (
    "Measure: accuracy on the 360 test images after training. REPRODUCED if (1) the exponential average (momentum "
    "0.1) and (2) the moving average of the last 100 batches both equal exact statistics, the 95 % interval of "
    "the difference within ±0.5 percentage points, and (3) a test batch's own statistics at size 4 are worse than "
    "exact ones, the interval above 5 points. Otherwise the worst of the three verdicts. Beside it, under Holm's "
    "rule for all five: the plain average of all batches (within ±0.5), and after only 10 steps the exponential "
    "average, which is then still 35 % its initial 0 and 1, against exact statistics (above 5 points)."
)
RULE_KO = (
    "잰 것: 학습 뒤 시험 그림 360장의 정확도. (1) 지수 평균(모멘텀 0.1)과 (2) 마지막 100개 배치의 이동 평균이 "
    "모두 정확한 통계와 같고(차이의 95 % 구간이 ±0.5 퍼센트포인트 안), (3) 크기 4인 시험 배치 자신의 통계가 "
    "정확한 통계보다 나쁘면(구간이 5포인트보다 위) 재현됨. 아니면 셋 중 가장 나쁜 판정이다. 덧붙여, 다섯 모두에 "
    "Holm의 규칙을 적용해: 모든 배치의 단순 평균(±0.5 안), 그리고 10단계 뒤, 아직 35 %가 처음의 0과 1인 지수 "
    "평균을 정확한 통계와 비교한다(5포인트보다 위)."
)
RULE = Text(RULE_EN + inference_lag.RULE, RULE_KO + inference_lag.RULE.korean)
ALONE = Text(
    "A batch of one value per channel cannot be normalised: its mean is itself and its variance 0, so every image "
    "gets the same answer, made of the biases alone. Chance is 10 %.",
    "채널마다 값이 하나인 배치는 정규화할 수 없다. 평균이 자기 자신이고 분산이 0이라, 모든 그림이 편향만으로 된 "
    "같은 답을 얻는다. 우연은 10 %다.",
)
PUBLISHED = (
    Published(
        Text(
            "fixed statistics re-estimated over 200 batches, by default",
            "고정 통계를 기본 200개 배치로 다시 추정한다",
        ),
        Text(
            "fvcore's precise batch norm, the code of Wu & Johnson 2021",
            "fvcore의 precise batch norm, Wu & Johnson 2021의 코드",
        ),
        "facebookresearch/fvcore, precise_bn.py",
    ),
    Published(
        Text(
            "m/(m − 1) · E[batch variance] over several batches, moving averages to follow training",
            "여러 배치에 걸친 m/(m − 1) · E[배치 분산], 학습을 따라가는 이동 평균",
        ),
        Text("the original inference rule", "처음의 추론 규칙"),
        Text("Ioffe & Szegedy 2015, section 3.1 and algorithm 2", "Ioffe & Szegedy 2015, 3.1절과 알고리즘 2"),
    ),
)
WORDS = {
    EXACT: Text("exact", "정확한 통계"),
    "exponential 0.1": Text("exponential 0.1", "지수 평균 0.1"),
    "exponential 0.01": Text("exponential 0.01", "지수 평균 0.01"),
    "debiased 0.01": Text("debiased 0.01", "치우침을 없앤 지수 평균 0.01"),
    "cumulative": Text("cumulative", "누적 평균"),
    "window 100": Text("window 100", "배치 100개의 창"),
    **{f"batch of {size}": Text(f"batch of {size}", f"크기 {size}의 배치") for size in SIZES},
}
ACCURACY = Text("percentage points of test accuracy", "시험 정확도의 퍼센트포인트")
WORSE_CHANGE = Text("an interval that reaches below +5 points", "+5포인트보다 아래에 이르는 구간")


def plan(scale: Scale) -> list[Trial]:
    """Train one network a seed, and one with few batches an epoch."""
    steps = settings(steps=200 if scale.quick else 1000)
    return [
        *(Trial(NAME, 1, "one network", seed, RATE, steps) for seed in scale.paired),
        *inference_lag.plan(scale),
    ]


def train(trials: Sequence[Trial]) -> list[Record]:
    """Train 64-100-100-100-10 with batch norm and sigmoids, batch 60, and evaluate it in every way."""
    if trials[0].arm == inference_lag.ARM:
        return inference_lag.train(trials)
    members = len(trials)
    splits = [digits()] * members
    training, test = training_samples(splits), test_samples(splits)
    network = perceptron(members, (64, 100, 100, 100, 10), Sigmoid, normalise=True)
    initialise_(network, [trial.seed for trial in trials], lambda inputs: 0.1)
    trackers = {name: track(network, average) for name, average in AVERAGES.items()}
    curves = Curves(members)
    for step, _ in descend(network, training, trials, batch=60, steps=trials[0]["steps"]):
        if step not in MOMENTS:
            continue
        for name, layers in trackers.items():
            fixed = [
                (by_member(layer.running_mean, members), by_member(layer.running_var, members)) for layer in layers
            ]
            # B023: the lambda is called and forgotten before `fixed` changes.
            _evaluate(curves, name, logits(network, test.x, lambda index, x: fixed[index]), test)  # noqa: B023
        _evaluate(curves, EXACT, logits(network, test.x, exact_statistics(network, training)), test)
    curves.put(**_unit(network, training, test))
    shuffled = _shuffled(test, trials)
    for size in SIZES:
        _evaluate(curves, f"batch of {size}", logits(network, shuffled.x, own_statistics(size)), shuffled)
    return curves.records()


def _unit(network: nn.Sequential, training: Samples, test: Samples) -> dict[str, Tensor]:
    """Return what the report takes apart: the last hidden layer's first unit, its inputs and four numbers."""
    exact, seen = exact_statistics(network, training), list[Tensor]()

    def keep(index: int, x: Tensor) -> Statistics:
        seen.append(x)
        return exact(index, x)

    logits(network, test.x, keep)
    layer = [module.layer for module in network if isinstance(module, BatchNorm)][-1]
    average, variance = exact(len(seen) - 1, seen[-1])
    affine = (by_member(parameter, test.x.shape[0]) for parameter in (layer.weight, layer.bias))
    numbers = torch.cat([*affine, average, torch.sqrt(variance + layer.eps)], dim=2)
    return {"unit inputs": seen[-1][:, 0], "unit": numbers[:, 0]}


def layer_view(record: Record) -> LayerView:
    """Return the unit that the report takes apart."""
    gamma, beta, average, deviation = record["unit"]
    return LayerView(
        Text("hidden layer 3, unit 1", "은닉층 3, 유닛 1"),
        record["unit inputs"],
        gamma,
        beta,
        average,
        deviation,
        "sigmoid",
    )


def _shuffled(test: Samples, trials: Sequence[Trial]) -> Samples:
    """Return the test set in each seed's own order: which images share a batch is part of the draw."""
    orders = []
    for trial in trials:
        generator = torch.Generator().manual_seed(random_seed(trial.seed, "test order"))
        orders.append(torch.randperm(test.y.shape[1], generator=generator))
    return test.batch(torch.stack(orders))


def _evaluate(curves: Curves, name: str, answers: Tensor, samples: Samples) -> None:
    accuracy, loss = grade(answers, samples.y)
    curves.append(**{f"{name}, accuracy": accuracy, f"{name}, loss": loss})


def analyse(records: Mapping[Trial, Record], scale: Scale) -> Analysis:
    """Compare every source of statistics with exact ones."""
    by_seed = sorted(records, key=lambda trial: trial.seed)
    trials = [trial for trial in by_seed if trial.arm != inference_lag.ARM]
    runs, lagging = ([records[trial] for trial in by_seed if (trial in trials) == own] for own in (True, False))
    steps = [step for step in MOMENTS if step <= trials[0]["steps"]]
    endpoints = judge(_comparisons(runs, steps))
    beside = judge(inference_lag.comparisons(lagging))
    return Analysis(
        experiment=NAME,
        title=TITLE,
        claim=CLAIM,
        protocol=_protocol(scale, steps[-1]),
        rule=RULE,
        verdict=combine(endpoint.verdict for endpoint in endpoints[:3]),
        answer=_answer(runs, endpoints),
        endpoints=(*endpoints, *beside),
        figures=(_size_figure(runs), _lag_figure(runs, steps), inference_lag.figure(lagging)),
        published=PUBLISHED,
        command=scale.command(NAME),
        tables=(_table(runs),),
        notes=(
            ALONE,
            Text("One test image of 360 is 0.28 points.", "시험 그림 360장 가운데 한 장은 0.28포인트다."),
            *scale.notes(),
        ),
        seeds=scale.seeds,
        configuration={"steps": steps[-1], "rate": RATE},
    )


def _protocol(scale: Scale, steps: int) -> Text:
    return Text(
        f"Data: scikit-learn's digits, x/16, one stratified split 1437/360. Network: 64-100-100-100-10, batch "
        f"norm before each sigmoid, W ~ N(0, 0.1²). Plain SGD, rate {RATE:g}, batch 60, {steps} steps. One "
        f"network a seed, {scale.seeds} seeds; all averages watch the same training. Test batches are drawn "
        f"at random. {inference_lag.PROTOCOL}",
        f"데이터: scikit-learn의 digits, x/16, 고정된 층화 분할 1437/360. 신경망: 64-100-100-100-10, 각 sigmoid "
        f"앞에 배치 정규화, W ~ N(0, 0.1²). 단순 SGD, 학습률 {RATE:g}, 배치 60, {steps}단계. 시드마다 신경망 "
        f"하나, 시드 {scale.seeds}개. 모든 평균이 같은 학습을 지켜본다. 시험 배치는 무작위로 뽑는다. "
        f"{inference_lag.PROTOCOL.korean}",
    )


def _comparisons(runs: Sequence[Record], steps: Sequence[int]) -> list[Comparison]:
    """Return what is compared, with the margins that were fixed before the run."""
    average = Text("the exponential average (momentum 0.1)", "지수 평균(모멘텀 0.1)")
    return [
        _alike(runs, "exponential 0.1", average),
        _alike(
            runs, "window 100", Text("the moving average of the last 100 batches", "마지막 100개 배치의 이동 평균")
        ),
        Comparison(
            name=Text(
                f"Exact statistics − the test batch's own at size {SMALL}",
                f"정확한 통계 − 크기 {SMALL}인 시험 배치 자신의 통계",
            ),
            unit=ACCURACY,
            differences=_difference(runs, EXACT, f"batch of {SMALL}"),
            margin=WORSE,
            favours=Text(
                "a small test batch's own statistics are worse than fixed ones",
                "작은 시험 배치 자신의 통계는 고정 통계보다 나쁘다",
            ),
            would_change=WORSE_CHANGE,
        ),
        _alike(runs, "cumulative", Text("the plain average of all batches", "모든 배치의 단순 평균")),
        Comparison(
            name=Text(
                f"After {EARLY} steps: exact statistics − the exponential average (momentum 0.1)",
                f"{EARLY}단계 뒤: 정확한 통계 − 지수 평균(모멘텀 0.1)",
            ),
            unit=ACCURACY,
            differences=_difference(runs, EXACT, "exponential 0.1", at=steps.index(EARLY)),
            margin=WORSE,
            favours=Text(
                "early in training the exponential average lags behind", "학습 초기에 지수 평균은 뒤처진다"
            ),
            would_change=WORSE_CHANGE,
        ),
    ]


def _accuracy(run: Record, source: str, at: int = -1) -> float:
    return 100 * float(run[f"{source}, accuracy"][at])


def _difference(runs: Sequence[Record], more: str, less: str, at: int = -1) -> tuple[float, ...]:
    def last(source: str) -> int:
        return -1 if source.startswith("batch") else at

    return tuple(_accuracy(run, more, last(more)) - _accuracy(run, less, last(less)) for run in runs)


def _alike(runs: Sequence[Record], source: str, words: Text) -> Comparison:
    return Comparison(
        name=Text(
            f"{words[0].upper()}{words[1:]} − exact statistics: no difference",
            f"{words.korean} − 정확한 통계: 차이 없음",
        ),
        unit=ACCURACY,
        differences=_difference(runs, source, EXACT),
        margin=ALIKE,
        favours=Text("the two differ", "둘은 다르다"),
        would_change=Text("an interval not wholly within ±0.5 points", "±0.5포인트 안에 다 들지 않는 구간"),
        kind=Kind.EQUIVALENCE,
    )


def _answer(runs: Sequence[Record], endpoints: Sequence[Endpoint]) -> Text:
    def percent(source: str) -> str:
        return f"{mean(_accuracy(run, source) for run in runs):.1f} %"

    behind = f"{endpoints[4].estimate:.0f}"
    alone, four, thirty = (percent(f"batch of {size}") for size in (1, 4, 30))
    exact, average, window, plain = (
        percent(name) for name in (EXACT, "exponential 0.1", "window 100", "cumulative")
    )
    return Text(
        f"Exact statistics gave {exact} test accuracy, the exponential average "
        f"{average}, the window {window}, the plain average of all batches "
        f"{plain}. A test batch's own statistics gave {alone} alone, "
        f"{four} in batches of 4 and {thirty} in batches of 30. After {EARLY} "
        f"steps the exponential average was {behind} points behind exact statistics.",
        f"시험 정확도는 정확한 통계로 {exact}, 지수 평균으로 {average}, 창으로 {window}, 모든 배치의 단순 "
        f"평균으로 {plain}였다. 시험 배치 자신의 통계로는 하나씩 {alone}, 4개씩 {four}, 30개씩 {thirty}였다. "
        f"{EARLY}단계 뒤 지수 평균은 정확한 통계보다 {behind}포인트 뒤졌다.",
    )


COLOURS = dict(
    zip(
        (EXACT, *AVERAGES),
        ("#888888", plots.BLUE, plots.SKY, plots.PURPLE, plots.ORANGE, plots.GREEN),
        strict=True,
    )
)


def _size_figure(runs: Sequence[Record]) -> Figure:
    own = [[_accuracy(run, f"batch of {size}") for run in runs] for size in SIZES]
    traces = [plots.whiskers(Text("the test batch's own", "시험 배치 자신의 통계"), plots.VERMILION, SIZES, own)]
    for source, colour in COLOURS.items():
        height = mean(_accuracy(run, source) for run in runs)
        traces.append(plots.line(WORDS[source], colour, (SIZES[0], SIZES[-1]), (height, height), dash="dash"))
    picture = plots.figure(
        traces,
        plots.axis(Text("images in a test batch", "시험 배치의 그림 수"), logarithmic=True),
        plots.axis(Text("test accuracy (%)", "시험 정확도 (%)"), range=[0, 101]),
    )
    caption = Text(
        f"Mean over {len(runs)} seeds and its 95 % interval; dashed, the fixed statistics. A batch of one image is "
        "normalised to nothing but the biases.",
        f"시드 {len(runs)}개의 평균과 95 % 구간. 점선은 고정 통계. 그림 한 장의 배치는 정규화하면 편향만 남는다.",
    )
    return Figure(Text("Accuracy by size of the test batch", "시험 배치의 크기에 따른 정확도"), caption, picture)


def _lag_figure(runs: Sequence[Record], steps: Sequence[int]) -> Figure:
    traces: list[plots.Trace] = []
    for source, colour in COLOURS.items():
        curves = [[100 * value for value in run[f"{source}, accuracy"]] for run in runs]
        traces += plots.band(WORDS[source], colour, steps, curves)
    picture = plots.figure(
        traces,
        plots.axis(Text("training steps", "학습 단계"), logarithmic=True),
        plots.axis(Text("test accuracy (%)", "시험 정확도 (%)"), range=[0, 101]),
    )
    caption = Text(
        "The same networks, evaluated during training. After t batches an exponential average of momentum m is "
        "still (1 − m)^t its initial mean 0 and variance 1: at m = 0.01 and 100 steps 37 %. Debiased, it is not.",
        "같은 신경망을 학습하는 동안 평가했다. 배치 t개 뒤 모멘텀 m의 지수 평균은 아직 (1 − m)^t만큼이 처음의 "
        "평균 0과 분산 1이다. m = 0.01, 100단계에서 37 %다. 치우침을 없애면 그렇지 않다.",
    )
    return Figure(Text("Lag of the averages during training", "학습 중 평균의 뒤처짐"), caption, picture)


def _table(runs: Sequence[Record]) -> Table:
    rows = []
    for source in (EXACT, *AVERAGES, *(f"batch of {size}" for size in SIZES)):
        losses = [run[f"{source}, loss"][-1] for run in runs]
        behind = mean(_difference(runs, source, EXACT))
        accuracy = mean(_accuracy(run, source) for run in runs)
        rows.append((WORDS[source], f"{accuracy:.2f}", f"{behind:+.2f}", f"{mean(losses):.4f}"))
    columns = (
        Text("statistics", "통계"),
        Text("test accuracy %", "시험 정확도 %"),
        Text("− exact, points", "− 정확한 통계, 포인트"),
        Text("test loss", "시험 손실"),
    )
    return Table(Text("After training, mean over seeds", "학습 뒤, 시드에 대한 평균"), columns, tuple(rows))


EXPERIMENT = Experiment(NAME, TITLE, CLAIM, plan, train, analyse, cost=4.0, stack_size=5)
