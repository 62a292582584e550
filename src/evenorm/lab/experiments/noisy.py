"""Is less shift why batch norm works? Put the shift back by noise and see (Santurkar et al. 2018, section 2.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import mean

import torch
from torch import Tensor, nn

from evenorm.lab import plots
from evenorm.lab.data import digits
from evenorm.lab.experiment import Experiment, Scale
from evenorm.lab.grid import Grid
from evenorm.lab.language import Text
from evenorm.lab.networks import initialise_, perceptron
from evenorm.lab.noise import Shaken
from evenorm.lab.results import Analysis, Claim, Endpoint, Figure, Published, Table
from evenorm.lab.statistics import Comparison, Kind, combine, judge
from evenorm.lab.training import Curves, batch_order, descend, diverged, final_loss, grade, training_samples
from evenorm.lab.trials import Record, Trial, settings

NAME, TITLE = "noisy", Text("Shift put back by noise", "잡음으로 되돌린 변화")
CLAIM = Claim(
    korean="",
    english=Text(
        "Batch norm does not owe its success to steadier distributions: with noise that makes them jump at every "
        "step it trains as well.",
        "배치 정규화의 성공은 안정된 분포 덕이 아니다. 걸음마다 분포가 뛰도록 잡음을 넣어도 그만큼 잘 학습된다.",
    ),
    source=Text("Santurkar et al. 2018, section 2.1 and appendix A.2.1", "Santurkar 외 2018, 2.1절과 부록 A.2.1"),
    question=Text(
        "Is the reduction of internal covariate shift why batch norm works: does its gain vanish when the shift is "
        "put back?",
        "배치 정규화가 듣는 까닭은 내부 공변량 변화를 줄이기 때문인가: 변화를 되돌려 놓으면 이득이 사라지는가?",
    ),
)

ARMS = {
    "none": Text("standard", "표준"),
    "batch norm": Text("batch norm", "배치 정규화"),
    "noisy batch norm": Text("batch norm + noise", "배치 정규화 + 잡음"),
    "noisy none": Text("standard + noise", "표준 + 잡음"),
}
COLOURS = dict(zip(ARMS, (plots.VERMILION, plots.BLUE, plots.GREEN, plots.ORANGE), strict=True))
RATE = 0.1  # half the largest rate at which the standard net trains: pilot seeds trained at 0.1 and 0.2, not at 0.4
EVERY, LAST, BATCH = 10, 50, 60  # accuracy in means over 10 steps; the final one over 50 steps, 3000 images
# Pilot seeds 1000-1002 gave -2.0, -2.5, -2.9 points (noise), +3.2, +4.2, +0.8 (against standard), +0.9, +0.8, +0.9
# and +0.4, +0.9, +0.5 doublings (jumps), and 34, 22, 38 % for the standard net with noise.
ALIKE = 3.0  # margin of “as well as”, in points
BETTER = 1.0  # margin of “better than standard”, in points
JUMPS = 0.0  # margin on log₂ of the jumps: larger at all
CHANCE = 20.0  # twice chance, in per cent: below it a net counts as not trained at all
RULE = Text(
    "Measure: accuracy on the training batches as they are trained on, noise included, over the last 50 steps, all "
    "arms at the same rate. REPRODUCED if (1) batch norm with noise is as good as without, the 95 % interval "
    "within ±3 percentage points, (2) it is better than the standard net, the interval above 1 point, and (3) its "
    "distributions are less steady than the standard net's: log₂ of the ratio of |μₜ₊₁ − μₜ|, the mean over units "
    "of a step's jump of the mean, above 0. Otherwise the worst verdict of the three. Beside it, under Holm's rule "
    "for all five: (4) the same of the variance's jumps, and (5) whether the noise keeps the standard net from "
    "training at all: 20 % (twice chance) − its accuracy, above 0.",
    "잰 것: 학습하는 배치에서 잡음까지 넣은 채로의 정확도, 마지막 50걸음의 평균, 모두 같은 학습률. (1) 잡음을 넣은 "
    "배치 정규화가 넣지 않은 것만큼 좋고(95 % 구간이 ±3점 안), (2) 표준 신경망보다 좋고(구간이 1점보다 위), (3) 그 "
    "분포가 표준 신경망보다 덜 안정하면(평균이 한 걸음에 뛰는 크기 |μₜ₊₁ − μₜ|의 단위 평균의 비의 log₂가 0보다 위) "
    "REPRODUCED, 아니면 셋 가운데 가장 나쁜 판정. 덧붙여, 다섯 모두에 Holm의 규칙을 적용해: (4) 분산이 뛰는 크기에 "
    "대해서도 같은 것, (5) 잡음이 표준 신경망의 학습을 아예 막는가: 20 %(우연의 두 배) − 그 정확도가 0보다 위.",
)
PUBLISHED = (
    Published(
        Text(
            "the difference between batch norm with and without noise is almost non-existent; both are far better "
            "than the standard net, which the same noise keeps from training entirely",
            "잡음을 넣은 배치 정규화와 넣지 않은 것의 차이는 거의 없고, 둘 다 표준 신경망보다 훨씬 좋다. 같은 "
            "잡음은 표준 신경망의 학습을 완전히 막는다",
        ),
        Text(
            "VGG on CIFAR-10; noise 0.5, 1.25, 0.1 as here",
            "CIFAR-10의 VGG; 잡음 0.5, 1.25, 0.1은 여기와 같다",
        ),
        Text("Santurkar et al. 2018, figures 2 and 8", "Santurkar 외 2018, 그림 2와 8"),
    ),
)


def plan(scale: Scale) -> list[Trial]:
    """Four arms at one rate."""
    steps = settings(steps=100 if scale.quick else 200)
    return [Trial(NAME, 1, arm, seed, RATE, steps) for arm in ARMS for seed in scale.paired]


def train(trials: Sequence[Trial]) -> list[Record]:
    """Train 64-(100 × 10)-10 with ReLU, W ~ N(0, 2/inputs), and noise, if any, before each ReLU."""
    members, arm, steps = len(trials), trials[0].arm, trials[0]["steps"]
    seeds = [trial.seed for trial in trials]
    samples = training_samples([digits()] * members)
    network, shaken = _network(seeds, normalise="batch norm" in arm, noisy="noisy" in arm)
    answers: list[Tensor] = []
    network[-1].register_forward_hook(lambda module, inputs, output: answers.append(output.detach()))
    order = torch.stack([batch_order(seed, samples.y.shape[1], BATCH, steps) for seed in seeds])
    curves, losses, accuracies, jumps = Curves(members), [], [], []
    before: list[tuple[Tensor, Tensor]] = []
    for step, loss in descend(network, samples, trials, batch=BATCH, steps=steps):
        losses.append(loss)
        accuracies.append(grade(answers.pop(), samples.batch(order[:, step - 1]).y)[0])
        now = [(layer.mean, layer.variance) for layer in shaken]
        if step % EVERY == 0:
            curves.append(accuracy=_rows_mean(torch.stack(accuracies[-EVERY:], 1)))
            jumps.append(_jumps(before, now))
        before = now
    history, (means, variances) = torch.stack(losses), torch.stack(jumps, 2)
    curves.put(
        final=_rows_mean(torch.stack(accuracies[-LAST:], 1)),
        jump_of_mean=_rows_mean(means),
        jump_of_variance=_rows_mean(variances),
        loss=final_loss(history),
        first_loss=history[0],
        diverged=diverged(history),
        steps=torch.full((members,), float(steps)),
    )
    return curves.records()


def _network(seeds: Sequence[int], *, normalise: bool, noisy: bool) -> tuple[nn.Sequential, list[Shaken]]:
    plain = perceptron(len(seeds), (64, *[100] * 10, 10), nn.ReLU, normalise=normalise)
    initialise_(plain, seeds, lambda inputs: math.sqrt(2 / inputs))
    layers: list[nn.Module] = []
    shaken: list[Shaken] = []
    for layer in plain:
        if isinstance(layer, nn.ReLU):
            shaken.append(Shaken(seeds, f"noise {len(shaken)}", noisy=noisy))
            layers.append(shaken[-1])
        layers.append(layer)
    return nn.Sequential(*layers), shaken


def _jumps(before: Sequence[tuple[Tensor, Tensor]], now: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the mean over all units of |μₜ₊₁ − μₜ| and of |σ²ₜ₊₁ − σ²ₜ|, (2, S)."""
    return torch.stack(
        [
            _rows_mean(torch.cat([(new[part] - old[part]).abs() for old, new in zip(before, now, strict=True)], 1))
            for part in (0, 1)
        ]
    )


def _rows_mean(rows: Tensor) -> Tensor:
    """Return the mean of each row, (S,), rounded alike however many rows there are."""
    return torch.stack([row.mean() for row in rows.contiguous()])


def analyse(records: Mapping[Trial, Record], scale: Scale) -> Analysis:
    """Compare the arms, seed by seed."""
    grid = Grid(records, scale)
    endpoints = judge(_comparisons(grid))
    return Analysis(
        experiment=NAME,
        title=TITLE,
        claim=CLAIM,
        protocol=Text(
            f"Data: digits, x/16, training set of 1437. Network: 64-(100 × 10)-10, ReLU, W ~ N(0, 2/inputs). "
            f"Before each ReLU, behind batch norm if there is one: x ← s x + m, for each unit and step μ ~ "
            f"U(±0.5), σ ~ U(1, 1.25), for each value m ~ U(μ ± 0.1), s ~ N(σ, 0.1²). Plain SGD, batch 60, rate "
            f"{RATE:g} (half the largest at which standard nets train), {grid.steps} steps. {scale.seeds} paired "
            f"seeds: the same weights, batches and noise.",
            f"데이터: digits, x/16, 학습 집합 1437개. 신경망: 64-(100 × 10)-10, ReLU, W ~ N(0, 2/입력 수). "
            f"ReLU마다 그 앞, 배치 정규화가 있으면 그 뒤에서 x ← s x + m; 단위와 걸음마다 μ ~ U(±0.5), σ ~ U(1, "
            f"1.25), 값마다 m ~ U(μ ± 0.1), s ~ N(σ, 0.1²). 순수한 SGD, 배치 60, 학습률 {RATE:g}(표준 신경망이 "
            f"학습되는 가장 큰 값의 절반), {grid.steps}걸음. 짝지은 시드 {scale.seeds}개: 가중치, 배치, 잡음이 "
            f"같다.",
        ),
        rule=RULE,
        verdict=combine(endpoint.verdict for endpoint in endpoints[:3]),
        answer=_answer(grid, endpoints),
        endpoints=endpoints,
        figures=(_accuracy_figure(grid), _jump_figure(grid)),
        published=PUBLISHED,
        command=scale.command(NAME),
        tables=(_table(grid),),
        notes=(
            Text(
                "The noise does cost something: “as good as” means within 3 points. After 300 steps of the pilot "
                "seeds all arms but the last were above 98 %.",
                "잡음에는 값이 따른다. “그만큼 좋다”는 3점 안이라는 뜻이다. 예비 시드에서 300걸음 뒤에는 마지막 "
                "조건만 빼고 모두 98 %를 넘었다.",
            ),
            Text(
                "The noise shows that a net with batch norm bears shift, not that shift never matters.",
                "잡음은 배치 정규화가 있는 신경망이 변화를 견딘다는 것을 보일 뿐, 변화가 언제나 중요하지 않다는 "
                "것을 보이지는 않는다.",
            ),
            *scale.notes(),
        ),
        seeds=scale.seeds,
        configuration={"rate": RATE, "steps": grid.steps},
    )


def accuracy(record: Record) -> float:
    """Return the final training accuracy in per cent."""
    return 100 * float(record["final"])


def jump(name: str, record: Record) -> float:
    """Return log₂ of the mean jump of a moment; a net that was lost does not jump."""
    return math.log2(max(record[name] or 0.0, 1e-9))


def _comparisons(grid: Grid) -> list[Comparison]:
    none, batch_norm, noisy, noisy_none = ((arm, RATE) for arm in ARMS)
    points = Text("percentage points of training accuracy", "학습 정확도의 퍼센트포인트")
    doublings = Text(
        "doublings: log₂(batch norm + noise / standard)", "두 배의 수: log₂(배치 정규화 + 잡음 / 표준)"
    )
    unsteady = Text("batch norm with noise is less steady", "잡음을 넣은 배치 정규화가 덜 안정하다")
    below = Text("an interval that reaches below 0", "0 아래에 닿는 구간")
    return [
        Comparison(
            name=Text("Batch norm with noise − without: no difference", "배치 정규화, 잡음 있음 − 없음: 차이 없음"),
            unit=points,
            differences=grid.differences(noisy, batch_norm, accuracy),
            margin=ALIKE,
            favours=Text("the noise matters", "잡음이 영향을 준다"),
            would_change=Text("an interval not wholly within ±3 points", "±3점 안에 다 들지 않는 구간"),
            kind=Kind.EQUIVALENCE,
        ),
        Comparison(
            name=Text("Batch norm with noise − standard", "잡음을 넣은 배치 정규화 − 표준"),
            unit=points,
            differences=grid.differences(noisy, none, accuracy),
            margin=BETTER,
            favours=Text("batch norm's gain survives the noise", "배치 정규화의 이득이 잡음을 견딘다"),
            would_change=Text("an interval that reaches below 1 point", "1점 아래에 닿는 구간"),
        ),
        *(
            Comparison(
                name=name,
                unit=doublings,
                differences=grid.differences(noisy, none, partial(jump, key)),
                margin=JUMPS,
                favours=unsteady,
                would_change=below,
            )
            for key, name in (
                ("jump_of_mean", Text("Jumps of the mean, |μₜ₊₁ − μₜ|", "평균이 뛰는 크기, |μₜ₊₁ − μₜ|")),
                (
                    "jump_of_variance",
                    Text("Jumps of the variance, |σ²ₜ₊₁ − σ²ₜ|", "분산이 뛰는 크기, |σ²ₜ₊₁ − σ²ₜ|"),
                ),
            )
        ),
        Comparison(
            name=Text("Twice chance, 20 % − standard with noise", "우연의 두 배, 20 % − 잡음을 넣은 표준"),
            unit=points,
            differences=tuple(CHANCE - value for value in grid.values(noisy_none, accuracy)),
            margin=0.0,
            favours=Text("the noise keeps a standard net from training", "잡음이 표준 신경망의 학습을 막는다"),
            would_change=below,
        ),
    ]


def _answer(grid: Grid, endpoints: Sequence[Endpoint]) -> Text:
    none, batch_norm, noisy, noisy_none = (f"{mean(grid.values((arm, RATE), accuracy)):.1f} %" for arm in ARMS)
    times = 2 ** endpoints[2].estimate
    return Text(
        f"After {grid.steps} steps batch norm had {batch_norm} training accuracy, with noise {noisy}, though its "
        f"means then jump {times:.1f} times as far as in the standard net, which had {none}; the standard net with "
        f"the same noise had {noisy_none}.",
        f"{grid.steps}걸음 뒤 학습 정확도는 배치 정규화 {batch_norm}, 잡음을 넣으면 {noisy}였다. 그때 평균은 표준 "
        f"신경망보다 {times:.1f}배 멀리 뛰는데도 그렇다. 표준 신경망은 {none}, 같은 잡음을 넣은 표준 신경망은 "
        f"{noisy_none}였다.",
    )


def _accuracy_figure(grid: Grid) -> Figure:
    x = [EVERY * (index + 1) for index in range(grid.steps // EVERY)]
    traces: list[plots.Trace] = []
    for arm, words in ARMS.items():
        traces += plots.band(words, COLOURS[arm], x, grid.curves((arm, RATE), "accuracy", 100))
    picture = plots.figure(
        traces,
        plots.axis(Text("training steps", "학습 걸음")),
        plots.axis(Text("training accuracy (%)", "학습 정확도 (%)"), range=[0, 101]),
    )
    return Figure(
        Text("Training accuracy, with and without noise", "잡음이 있을 때와 없을 때의 학습 정확도"),
        Text(
            f"Means over 10 steps and {grid.scale.seeds} seeds, and their 95 % interval; all at rate {RATE:g}.",
            f"10걸음과 시드 {grid.scale.seeds}개의 평균과 그 95 % 구간. 모두 학습률 {RATE:g}.",
        ),
        picture,
    )


def _jump_figure(grid: Grid) -> Figure:
    """Draw how well each arm learns against how far its means jump: a point a seed."""
    traces = []
    for arm, words in ARMS.items():
        kept = [record for record in grid.records((arm, RATE)) if record["jump_of_mean"] is not None]
        jumps = [2 ** jump("jump_of_mean", record) for record in kept]
        traces.append(plots.points(words, COLOURS[arm], jumps, list(map(accuracy, kept))))
    picture = plots.figure(
        traces,
        plots.axis(Text("jump of the mean in a step", "한 걸음에 평균이 뛰는 크기"), logarithmic=True),
        plots.axis(Text("final training accuracy (%)", "마지막 학습 정확도 (%)"), range=[0, 103]),
    )
    return Figure(
        Text("Steadiness and success", "안정됨과 성공"),
        Text(
            "A point a seed that did not diverge. Batch norm with noise jumps further than the standard net, and "
            "learns better.",
            "점 하나가 발산하지 않은 시드 하나. 잡음을 넣은 배치 정규화는 표준 신경망보다 멀리 뛰면서도 더 잘 "
            "배운다.",
        ),
        picture,
    )


def _table(grid: Grid) -> Table:
    rows = []
    for arm, words in ARMS.items():
        found = grid.records((arm, RATE))
        lost = sum(bool(record["diverged"]) for record in found)
        learned = sum(
            accuracy(record) > CHANCE and record["loss"] is not None and record["loss"] < record["first_loss"] / 2
            for record in found
        )
        jumps = (mean(2 ** jump(key, record) for record in found) for key in ("jump_of_mean", "jump_of_variance"))
        cells = (f"{mean(map(accuracy, found)):.1f}", *(f"{value:.3g}" for value in jumps), str(learned), str(lost))
        rows.append((words, *cells))
    columns = (
        Text("arm", "조건"),
        Text("final accuracy %", "마지막 정확도 %"),
        "|μₜ₊₁ − μₜ|",
        "|σ²ₜ₊₁ − σ²ₜ|",
        Text("seeds that trained", "학습된 시드"),
        Text("diverged", "발산"),
    )
    title = Text(
        "Each arm, mean over seeds (trained: loss halved, accuracy above 20 %)", "조건마다, 시드에 대한 평균"
    )
    return Table(title, columns, tuple(rows))


EXPERIMENT = Experiment(NAME, TITLE, CLAIM, plan, train, analyse, cost=10.0, stack_size=5)
