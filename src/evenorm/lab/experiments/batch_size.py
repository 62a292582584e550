"""How small may the batch be that gives the statistics? Wu & Johnson 2021 on digits, and the end at two samples."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from statistics import mean

import torch
from scipy import stats
from torch import Tensor, nn

import evenorm
from evenorm.lab.data import split_of
from evenorm.lab.evaluation import Choice, exact_statistics, logits, own_statistics
from evenorm.lab.experiment import Experiment, Scale
from evenorm.lab.experiments import batch_size_page as page
from evenorm.lab.language import Text
from evenorm.lab.networks import BatchNorm, Linear, initialise_, perceptron
from evenorm.lab.results import Analysis
from evenorm.lab.statistics import Comparison, combine, judge
from evenorm.lab.training import Curves, Samples, descend, final_loss, grade, test_samples, training_samples
from evenorm.lab.trials import Record, Trial, random_seed, settings

NAME, TITLE = "batch-size", Text("Size of the batch that gives the statistics", "통계를 내는 배치의 크기")
SIZES = (2, 4, 8, 16, 32, 64, 128, 256)  # samples normalised together; the gradient's batch is 256 throughout
RATE, BATCH, WIDTH, FROZEN = 0.3, 256, 64, 0.8  # of the training, after which statistics are frozen in a copy
DRAWN = 1536  # test images drawn with replacement, a multiple of every size
POINTS = 1.0  # margin on errors; the pilot seeds gave -10.7, -12.0, -11.6 at size 4
ORDER = 0.5  # margin on minus Spearman's ρ; they gave -0.96, -1.00, -0.96
REPAIR = 0.5  # margin on what freezing repairs at sizes 4 and 8; they gave 0.0, -0.4, 0.0
DOUBLE = 1.0  # margin on log₂ of training losses; they gave 2.1, 2.0, 2.0
RULE = Text(
    "Measure: errors on test images with the statistics of the whole training set (population) and with those of "
    "test batches of the size trained with (own). REPRODUCED if four 95 % intervals lie above their margins, "
    "else the worst verdict of the four, all under Holm's rule: (1) population − own error at size 4, above 1 "
    "percentage point; (2) minus Spearman's ρ of that gap and the size, over sizes 4 to 256, above 0.5; (3) the "
    "population error at sizes 4 and 8 that freezing the statistics for the last fifth of training takes away, "
    "above 0.5 points; (4) at size 2, where x̂ is ±1 and no gradient passes (but for ε), the final training loss "
    "over that at size 4, above a factor of 2.",
    "잰 것: 학습 집합 전체의 통계(모집단)로, 그리고 학습 때와 같은 크기의 시험 배치 자신의 통계로 잰 시험 오류. "
    "네 95 % 구간이 기준 폭보다 위에 있으면 재현됨, 아니면 넷 중 가장 나쁜 판정. 모두 Holm의 규칙을 따른다. (1) "
    "크기 4에서 모집단 − 자신의 오류가 1 퍼센트포인트보다 위, (2) 크기 4에서 256까지 이 차이와 크기의 Spearman "
    "ρ에 음의 부호를 붙인 값이 0.5보다 위, (3) 학습의 마지막 5분의 1 동안 통계를 고정하면 크기 4와 8에서 "
    "줄어드는 모집단 오류가 0.5포인트보다 위, (4) x̂이 ±1이고 (ε을 빼면) 기울기가 지나지 못하는 크기 2에서 "
    "마지막 학습 손실이 크기 4의 2배보다 위.",
)


def plan(scale: Scale) -> list[Trial]:
    """Every size for every seed."""
    sizes = SIZES[:3] + SIZES[4::3] if scale.quick else SIZES
    steps = settings(steps=100 if scale.quick else 250)
    return [Trial(NAME, 1, str(size), seed, RATE, steps) for size in sizes for seed in scale.paired]


def train(trials: Sequence[Trial]) -> list[Record]:
    """Train 64-64-64-10 with ReLU, W ~ N(0, 2/inputs), batch 256, normalised by `size` samples at a time.

    One by one: products of matrices this large are rounded otherwise in a stack, and have little overhead to save.
    """
    return [record for trial in trials for record in _train([trial])]


def _train(trials: Sequence[Trial]) -> list[Record]:
    size, members, steps = int(trials[0].arm), len(trials), trials[0]["steps"]
    splits = [split_of(trial, "digits") for trial in trials]
    training, test = training_samples(splits), _drawn(test_samples(splits), trials)
    network = perceptron(members, (splits[0].features, WIDTH, WIDTH, splits[0].classes), nn.ReLU, normalise=True)
    for index, layer in enumerate(network):
        if isinstance(layer, BatchNorm):
            network[index] = SubBatchNorm(members, WIDTH, size)
    initialise_(network, [trial.seed for trial in trials], lambda inputs: math.sqrt(2 / inputs))
    before = _first_weights(network)
    curves, losses = Curves(members), []
    for step, loss in descend(network, training, trials, batch=BATCH, steps=steps):
        losses.append(loss)
        if step == round(FROZEN * steps):
            frozen = _frozen(network, training)
    for _ in descend(frozen, training, trials, batch=BATCH, steps=steps, start=round(FROZEN * steps)):
        pass
    curves.put(train_loss=final_loss(torch.stack(losses)), moved=_moved(before, _first_weights(network)))
    _grade(curves, "own", network, test, own_statistics(size))
    _grade(curves, "population", network, test, exact_statistics(network, training))
    _grade(curves, "frozen", frozen, test, None)
    return curves.records()


class SubBatchNorm(BatchNorm):
    """S batch norms side by side, each normalising `size` samples of its batch at a time."""

    def __init__(self, members: int, channels: int, size: int) -> None:
        """Take the number of members, the channels of each, and how many samples are normalised together."""
        super().__init__(members, channels)
        self.layer = evenorm.BatchNorm1d(members * channels, virtual_batch_size=size)

    def forward(self, x: Tensor) -> Tensor:
        """Return (S, C, N): the first `size` samples normalised together, then the next."""
        normalised: Tensor = self.layer(x.reshape(-1, x.shape[2]).t()).t()
        return normalised.reshape(x.shape)


def _drawn(test: Samples, trials: Sequence[Trial]) -> Samples:
    order = []
    for trial in trials:
        generator = torch.Generator().manual_seed(random_seed(trial.seed, "test batches"))
        order.append(torch.randint(test.y.shape[1], (DRAWN,), generator=generator))
    return test.batch(torch.stack(order))


def _frozen(network: nn.Sequential, training: Samples) -> nn.Sequential:
    """Return a copy that from now on normalises by the statistics of the whole training set."""
    frozen, exact = copy.deepcopy(network), exact_statistics(network, training)
    layers = [layer.layer for layer in frozen if isinstance(layer, BatchNorm)]
    for index, layer in enumerate(layers):
        average, variance = exact(index, training.x)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(average.flatten())
        layer.running_var.copy_(variance.flatten())
    evenorm.freeze(frozen)
    return frozen


def _first_weights(network: nn.Sequential) -> Tensor:
    """Return the weights of the first layer, (S, weights)."""
    first = next(layer for layer in network if isinstance(layer, Linear))
    return first.weight.detach().flatten(1).clone()


def _moved(before: Tensor, after: Tensor) -> Tensor:
    """Return how far training moved the weights, |W − W₀| / |W₀|, (S,)."""
    moved: Tensor = (after - before).norm(dim=1) / before.norm(dim=1)
    return moved


def _grade(curves: Curves, name: str, network: nn.Sequential, samples: Samples, choice: Choice | None) -> None:
    """Put accuracy and loss with the chosen statistics, with the running ones if none are chosen."""
    network.eval()
    with torch.no_grad():
        answers = network(samples.x) if choice is None else logits(network, samples.x, choice)
    accuracy, loss = grade(answers, samples.y)
    curves.put(**{f"{name} accuracy": accuracy, f"{name} loss": loss})


def analyse(records: Mapping[Trial, Record], scale: Scale) -> Analysis:
    """Compare errors with population and own statistics over the sizes."""
    sizes = [size for size in SIZES if any(trial.arm == str(size) for trial in records)]
    found = {(int(trial.arm), trial.seed): record for trial, record in records.items()}
    runs = {size: [found[size, seed] for seed in scale.paired] for size in sizes}
    steps = next(iter(records))["steps"]
    endpoints = judge(_comparisons(runs))
    return Analysis(
        experiment=NAME,
        title=TITLE,
        claim=page.CLAIM,
        protocol=page.protocol(sizes, RATE, BATCH, steps, DRAWN, scale.seeds),
        rule=RULE,
        verdict=combine(endpoint.verdict for endpoint in endpoints[:4]),
        answer=page.answer(runs, endpoints),
        endpoints=endpoints,
        figures=(page.error_figure(runs), page.loss_figure(runs)),
        published=(),
        command=scale.command(NAME),
        tables=(page.table(runs),),
        notes=(*page.NOTES, *scale.notes()),
        seeds=scale.seeds,
        configuration={"steps": steps, "rate": RATE, "sizes": sizes},
    )


def _gap(record: Record) -> float:
    return page.error(record, "population") - page.error(record, "own")


def _order(sizes: Sequence[int], gaps: Sequence[float]) -> float:
    """Return Spearman's ρ, 0 where all gaps are equal."""
    return float(stats.spearmanr(sizes, gaps).statistic) if len(set(gaps)) > 1 else 0.0


def _comparisons(runs: page.Runs) -> list[Comparison]:
    """Return what is compared, with the margins that were fixed before the run."""
    sizes = [size for size in runs if size >= 4]
    seeds = range(len(runs[2]))
    order = [_order(sizes, [_gap(runs[size][seed]) for size in sizes]) for seed in seeds]
    repaired = [
        [page.error(run, "population") - page.error(run, "frozen") for run in runs[size]] for size in (4, 8)
    ]
    both = zip(runs[2], runs[4], strict=True)
    doublings = [math.log2(page.loss(a, "train_loss") / page.loss(b, "train_loss")) for a, b in both]
    points = Text("percentage points", "퍼센트포인트")
    return [
        Comparison(
            name=Text("Error at size 4, population − own statistics", "크기 4의 오류, 모집단 통계 − 자신의 통계"),
            unit=points,
            differences=tuple(_gap(run) for run in runs[4]),
            margin=POINTS,
            favours=Text(
                "the net errs more with statistics it was not trained with", "학습 때와 다른 통계에서 더 틀린다"
            ),
            would_change=Text("an interval that lies above 0", "0보다 위에 있는 구간"),
        ),
        Comparison(
            name=Text(
                "The gap falls with size: minus Spearman's ρ", "차이는 크기에 따라 줄어든다: Spearman ρ에 음의 부호"
            ),
            unit=Text("rank correlation", "순위 상관"),
            differences=tuple(-rho for rho in order),
            margin=ORDER,
            favours=Text("the smaller the batch, the larger the gap", "배치가 작을수록 차이가 크다"),
            would_change=Text("an interval that lies above 0", "0보다 위에 있는 구간"),
        ),
        Comparison(
            name=Text(
                "Error that freezing takes away at sizes 4 and 8", "통계를 고정하면 크기 4와 8에서 줄어드는 오류"
            ),
            unit=points,
            differences=tuple(mean(pair) for pair in zip(*repaired, strict=True)),
            margin=REPAIR,
            favours=Text(
                "training on with fixed statistics repairs the net", "통계를 고정하고 더 학습하면 나아진다"
            ),
            would_change=Text("an interval that lies above +0.5 points", "+0.5포인트보다 위에 있는 구간"),
        ),
        Comparison(
            name=Text("Final training loss, size 2 over size 4", "마지막 학습 손실, 크기 2 / 크기 4"),
            unit=Text("doublings: log₂ of the ratio", "두 배의 횟수: 비의 log₂"),
            differences=tuple(doublings),
            margin=DOUBLE,
            favours=Text("batches of two hardly train", "크기 2의 배치로는 거의 학습되지 않는다"),
            would_change=Text("an interval that reaches below 1", "1보다 아래에 이르는 구간"),
        ),
    ]


EXPERIMENT = Experiment(NAME, TITLE, page.CLAIM, plan, train, analyse, cost=4.0)
