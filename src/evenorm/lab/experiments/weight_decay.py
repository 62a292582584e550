"""What weight decay does under batch norm: it sets by what angle weights turn a step, as a growing rate would."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from evenorm.lab.data import Split, split_of
from evenorm.lab.experiment import Experiment, Scale
from evenorm.lab.experiments import weight_decay_page as page
from evenorm.lab.language import Text
from evenorm.lab.networks import BatchNorm, Linear, initialise_, perceptron
from evenorm.lab.regularisers import Ridge
from evenorm.lab.results import Analysis
from evenorm.lab.statistics import Comparison, Kind, combine, judge
from evenorm.lab.training import Curves, Samples, batch_order, cross_entropy, descend, training_samples
from evenorm.lab.trials import Record, Trial, random_seed, settings

NAME, TITLE = "weight-decay", Text("Weight decay", "가중치 감쇠")
TURNING, GROWING = "equilibrium", "growing rate"
PRODUCTS = (4e-4, 1.6e-3, 6.4e-3)  # rate times decay
RATE, BATCH, WIDTH, NOISE = 0.1, 32, 32, 0.2
POINTS = 100  # at which angle and length are measured; the last 40 % count
SLOPE = 0.1  # margin around ½; the pilot seeds gave 0.49, 0.50, 0.46
QUARTER = math.log(1.25)  # margin on the ratio; its log in the pilot seeds: -0.06 to +0.07
PLACES = 9.0  # margin: 1e-9; they gave 14.7 to 14.8 places
RULE = Text(
    "Measure: the angle by which a layer's weights turn in one step, the median over the three layers and the "
    "last 40 % of training. REPRODUCED if the 95 % intervals of (1) the slope of its log on log(ηλ) lie within ½ "
    "± 0.1 and of (2) its ratio to √(2ηλ) at each of the products within 0.8 to 1.25, and (3) 200 steps of "
    "weight decay in float64 without ε give the losses of 200 steps without decay at the rate η (1 − ηλ)^-(2t+1) "
    "to 9 decimal places. Otherwise the worst verdict of these, all under Holm's rule.",
    "잰 것: 한 층의 가중치가 한 단계에 도는 각, 세 층과 학습의 마지막 40 %에 대한 중앙값. (1) 그 로그의 "
    "log(ηλ)에 대한 기울기의 95 % 구간이 ½ ± 0.1 안에, (2) 곱마다 √(2ηλ)에 대한 비의 구간이 0.8에서 1.25 안에 "
    "있고, (3) ε 없는 float64에서 가중치 감쇠 200단계의 손실이 감쇠 없이 학습률 η (1 − ηλ)^-(2t+1)로 한 "
    "200단계의 손실과 소수 9자리까지 같으면 재현됨. 아니면 이 가운데 가장 나쁜 판정. 모두 Holm의 규칙을 따른다.",
)


def plan(scale: Scale) -> list[Trial]:
    """Every product of rate and decay for 8 relaxation times of 1 / (4 rate decay), and the exact comparison."""
    products = PRODUCTS[1:] if scale.quick else PRODUCTS
    lengths = {product: round(2 / product) for product in products}
    return [
        *(
            Trial(NAME, 1, TURNING, seed, RATE, settings(product=product, steps=steps))
            for product, steps in lengths.items()
            for seed in scale.paired
        ),
        *(Trial(NAME, 1, GROWING, seed, RATE, settings(product=products[-1], steps=200)) for seed in scale.paired),
    ]


def train(trials: Sequence[Trial]) -> list[Record]:
    """Train 64-32-32-32-10 with ReLU and batch norm, W ~ N(0, 1/(8 inputs)), a fifth of the labels random."""
    splits = [noisy(split_of(trial, "digits"), trial.seed) for trial in trials]
    widths = (splits[0].features, WIDTH, WIDTH, WIDTH, splits[0].classes)
    network = perceptron(len(trials), widths, nn.ReLU, normalise=True)
    initialise_(network, [trial.seed for trial in trials], lambda inputs: math.sqrt(2 / inputs) / 4)
    return (_turning if trials[0].arm == TURNING else _growing)(network, trials, splits)


def noisy(split: Split, seed: int) -> Split:
    """Return the split with a fifth of its training labels drawn anew, so that loss and gradients stay."""
    generator = torch.Generator().manual_seed(random_seed(seed, "label noise"))
    count = len(split.y_train)
    drawn = torch.randint(split.classes, (count,), generator=generator)
    y = torch.where(torch.rand(count, generator=generator) < NOISE, drawn, split.y_train)
    return Split(split.x_train, y, split.x_test, split.y_test)


def scale_free(network: nn.Sequential) -> list[nn.Parameter]:
    """Return the weights before a batch norm, (S, out, in): multiplied by a number they give the same function."""
    return [
        one.weight for one, then in pairwise(network) if isinstance(one, Linear) and isinstance(then, BatchNorm)
    ]


def _turning(network: nn.Sequential, trials: Sequence[Trial], splits: Sequence[Split]) -> list[Record]:
    """Train with weight decay, and measure at 100 steps by what angle each layer's weights turn."""
    weights, steps = scale_free(network), trials[0]["steps"]
    decay = Ridge(trials[0]["product"] / RATE)
    curves, every = Curves(len(trials)), max(1, steps // POINTS)
    run = descend(
        network, training_samples(splits), trials, batch=BATCH, steps=steps, penalties=dict.fromkeys(weights, decay)
    )
    before = [weight.detach().clone() for weight in weights]
    for step, loss in run:
        if step % every == 0:
            for layer, (weight, old) in enumerate(zip(weights, before, strict=True), 1):
                curves.append(**{f"angle {layer}": angle(old, weight.detach())})
                curves.append(**{f"length {layer}": weight.detach().flatten(1).norm(dim=1)})
            curves.append(loss=loss)
        if (step + 1) % every == 0:
            before = [weight.detach().clone() for weight in weights]
    return curves.records()


def angle(before: Tensor, after: Tensor) -> Tensor:
    """Return the angle between each member's weights before and after, (S,); exact to float32 however small."""
    a, b = before.flatten(1).double(), after.flatten(1).double()
    along = (a * b).sum(1) / a.square().sum(1)
    across = (b - along[:, None] * a).norm(dim=1)
    return torch.atan2(across, along * a.norm(dim=1))


def _growing(network: nn.Sequential, trials: Sequence[Trial], splits: Sequence[Split]) -> list[Record]:
    """Train one copy with weight decay λ, one with the rate η a^-(2t+1), a = 1 − ηλ; in float64 and without ε."""
    steps, product = trials[0]["steps"], trials[0]["product"]
    given = training_samples(splits)
    samples = Samples(given.x.double(), given.y)
    order = torch.stack([batch_order(trial.seed, given.y.shape[1], BATCH, steps) for trial in trials])
    for layer in network:
        if isinstance(layer, BatchNorm):
            layer.layer.eps = 1e-30  # nothing beside the variance
    decayed = network.double()
    grown = copy.deepcopy(decayed)
    difference = []
    for step in range(steps):
        drawn = samples.batch(order[:, step])
        growth = (1 - product) ** -(2 * step + 1)
        one = _step_(decayed, drawn, decay=product / RATE, growth=1.0)
        other = _step_(grown, drawn, decay=0.0, growth=growth)
        difference.append((one - other).abs())
    curves = Curves(len(trials))
    curves.put(difference=torch.stack(difference).amax(0), growth=torch.full((len(trials),), growth))
    return curves.records()


def _step_(network: nn.Sequential, drawn: Samples, *, decay: float, growth: float) -> Tensor:
    """Descend one step; scale-free weights decay, and have a rate so many times higher. Return the losses, (S,)."""
    free = {id(weight) for weight in scale_free(network)}
    parameters = list(network.parameters())
    loss = cross_entropy(network(drawn.x), drawn.y).mean(1)
    gradients = torch.autograd.grad(loss.sum(), parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if id(parameter) in free:
                parameter.sub_(RATE * growth * (gradient + decay * parameter))
            else:
                parameter.sub_(RATE * gradient)
    return loss.detach()


def analyse(records: Mapping[Trial, Record], scale: Scale) -> Analysis:
    """Compare the angles with √(2ηλ), and decay with a growing rate."""
    runs: page.Runs = {}
    for trial, record in sorted(records.items(), key=lambda item: item[0].seed):
        if trial.arm == TURNING:
            runs.setdefault(trial["product"], []).append(record)
    runs = dict(sorted(runs.items()))
    exact = [record for trial, record in records.items() if trial.arm == GROWING]
    endpoints = judge(_comparisons(runs, exact))
    steps = {trial["product"]: trial["steps"] for trial in records if trial.arm == TURNING}
    return Analysis(
        experiment=NAME,
        title=TITLE,
        claim=page.CLAIM,
        protocol=page.protocol(steps, RATE, BATCH, scale.seeds),
        rule=RULE,
        verdict=combine(endpoint.verdict for endpoint in endpoints),
        answer=page.answer(runs, endpoints, exact),
        endpoints=endpoints,
        figures=(page.angle_figure(runs), page.length_figure(runs, steps)),
        published=page.PUBLISHED,
        command=scale.command(NAME),
        tables=(page.table(runs),),
        notes=(*page.NOTES, *scale.notes()),
        seeds=scale.seeds,
        configuration={"rate": RATE, "products": list(runs), "steps": list(steps.values())},
    )


def _comparisons(runs: page.Runs, exact: Sequence[Record]) -> list[Comparison]:
    """Return what is compared, with the margins that were fixed before the run."""
    logs = {product: [math.log(page.ratio(record, product)) for record in seeds] for product, seeds in runs.items()}
    x = np.log(list(runs))
    slopes = [
        float(
            np.polyfit(x, [log + math.log(2 * product) / 2 for log, product in zip(seed, runs, strict=True)], 1)[0]
        )
        for seed in zip(*logs.values(), strict=True)
    ]
    return [
        Comparison(
            name=Text(
                "Slope of log(angle a step) on log(ηλ), minus ½", "log(한 단계의 각)의 log(ηλ)에 대한 기울기 빼기 ½"
            ),
            unit=Text("power of ηλ", "ηλ의 거듭제곱"),
            differences=tuple(slope - 0.5 for slope in slopes),
            margin=SLOPE,
            favours=Text("the angle grows otherwise than as √(ηλ)", "각이 √(ηλ)와 다르게 커진다"),
            would_change=Text("an interval not wholly within ±0.1", "±0.1 안에 다 들지 않는 구간"),
            kind=Kind.EQUIVALENCE,
        ),
        *(
            Comparison(
                name=Text(
                    f"ln(angle a step / √(2ηλ)) at ηλ = {product:g}",
                    f"ηλ = {product:g}에서 ln(한 단계의 각 / √(2ηλ))",
                ),
                unit=Text("log ratio (0.1 is some 10 %)", "비의 로그 (0.1은 약 10 %)"),
                differences=tuple(values),
                margin=QUARTER,
                favours=Text("the angle is another", "각이 다르다"),
                would_change=Text("an interval not wholly within ±0.22", "±0.22 안에 다 들지 않는 구간"),
                kind=Kind.EQUIVALENCE,
            )
            for product, values in logs.items()
        ),
        Comparison(
            name=Text(
                "Decimal places to which decay and a growing rate give the same loss",
                "가중치 감쇠와 커지는 학습률의 손실이 일치하는 소수 자릿수",
            ),
            unit=Text("−log₁₀ of the largest difference", "가장 큰 차이의 −log₁₀"),
            differences=tuple(page.places(record) for record in exact),
            margin=PLACES,
            favours=Text("the two are the same training", "둘은 같은 학습이다"),
            would_change=Text("a difference above 1e-9", "1e-9보다 큰 차이"),
        ),
    ]


EXPERIMENT = Experiment(NAME, TITLE, page.CLAIM, plan, train, analyse, cost=1.0)
