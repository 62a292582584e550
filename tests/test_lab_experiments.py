"""Each experiment's analysis on made-up trials whose answer is known, and a short real training of each."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable

import numpy as np
import pytest

from evenorm.lab.evaluation import by_member, logits, own_statistics
from evenorm.lab.experiment import Experiment, Scale
from evenorm.lab.experiments import EXPERIMENTS, inference, inference_lag, input_scale, speed
from evenorm.lab.language import korean
from evenorm.lab.results import Analysis, Endpoint, Verdict
from evenorm.lab.statistics import Comparison, judge
from evenorm.lab.trials import PILOT_SEEDS, Record, Trial, settings, stacks
from readers_sentences import untranslated

TEN = Scale(10)


def analyse(experiment: Experiment, record: Callable[[Trial], Record], scale: Scale = TEN) -> Analysis:
    return experiment.analyse({trial: record(trial) for trial in experiment.plan(scale)}, scale)


def noise(trial: Trial) -> float:
    """Return the same number in (-1, 1) for the same arm and seed."""
    return float(np.random.default_rng([trial.seed, len(trial.arm)]).uniform(-1, 1))


def speed_record(steps: float, accuracy: float = 0.97) -> Record:
    count = 120  # evaluations of 3000 steps
    curve = [accuracy if 25 * (index + 2) >= steps else 0.5 for index in range(count)]
    return {"accuracy": curve, "test_loss": [0.1] * count, "diverged": 0.0, "train_loss": 0.1}


@pytest.mark.parametrize(
    ("with_", "spread", "expected"),
    [
        (100, 0.2, Verdict.REPRODUCED),  # 8 times faster
        (600, 0.1, Verdict.WEAK),  # a third faster
        (800, 0.5, Verdict.INCONCLUSIVE),
        (1600, 0.1, Verdict.CONTRADICTED),
        (400, 3.0, Verdict.INCONCLUSIVE),  # twice as fast, and too noisy to say
    ],
)
def test_speed_gives_the_verdict_of_made_up_trials(with_: float, spread: float, expected: Verdict) -> None:
    def record(trial: Trial) -> Record:
        steps = 800.0 if trial.arm == "none" else with_
        off_best = abs(math.log10(trial.rate / 0.3))  # 0.3 is the best rate for both
        return speed_record(max(50.0, steps * 2 ** (spread * noise(trial)) * (1 + off_best)))

    analysis = analyse(speed.EXPERIMENT, record)
    assert analysis.verdict is expected
    assert analysis.configuration["best"] == {"none": 0.3, "batch norm": 0.3}


def test_speed_is_exact_where_the_trials_are() -> None:
    analysis = analyse(speed.EXPERIMENT, lambda trial: speed_record(800 if trial.arm == "none" else 100))
    estimates = [endpoint.estimate for endpoint in analysis.endpoints[:3]]
    assert estimates == pytest.approx([3.0, 3.0, 0.0])
    assert analysis.endpoints[0].p_value == 2 / 2**10
    assert "8.0 times fewer steps" in analysis.answer
    assert re.search(r"95 % 구간 [\d.]+ ~ [\d.]+\)", korean(analysis.answer))


def test_speed_counts_a_seed_that_never_gets_there_as_the_last_step() -> None:
    analysis = analyse(speed.EXPERIMENT, lambda trial: speed_record(9e9 if trial.arm == "none" else 1500))
    assert analysis.endpoints[0].estimate == pytest.approx(1.0)  # 3000 against 1500
    assert "≥ 3000" in {cell for row in analysis.tables[0].rows for cell in row}


def test_pilot_seeds_choose_the_rate_and_enter_no_verdict() -> None:
    def record(trial: Trial) -> Record:
        pilot = trial.seed in PILOT_SEEDS
        best = 1.0 if pilot else 0.1  # what the pilots say is chosen, though the paired seeds say otherwise
        return speed_record((100 if trial.rate == best else 1000) if trial.arm == "batch norm" else 1000)

    analysis = analyse(speed.EXPERIMENT, record)
    assert analysis.configuration["best"]["batch norm"] == 1.0
    assert analysis.endpoints[0].estimate == pytest.approx(0.0)
    assert analysis.endpoints[0].seeds == 10


def wine_record(accuracy: float, *, learned: bool = True, lost: bool = False, loss: float | None = 0.1) -> Record:
    count = 60
    loss = None if lost else loss
    return {
        "accuracy": [accuracy] * count,
        "train_accuracy": [0.99 if learned else 0.4] * count,
        "test_loss": [loss] * count,
        "diverged": float(lost),
        "first_loss": 1.1,
        "train_loss": loss,
    }


@pytest.mark.parametrize(
    ("gain", "spread", "expected"),
    [
        (0.25, 0.03, Verdict.REPRODUCED),
        (0.04, 0.01, Verdict.WEAK),
        (0.0, 0.05, Verdict.INCONCLUSIVE),
        (-0.25, 0.03, Verdict.CONTRADICTED),
        (0.1, 0.6, Verdict.INCONCLUSIVE),
    ],
)
def test_input_scale_gives_the_verdict_of_made_up_trials(gain: float, spread: float, expected: Verdict) -> None:
    def record(trial: Trial) -> Record:
        best = 0.0 if trial.rate == 4.0**-3 else -0.2
        return wine_record(0.7 + best + spread * noise(trial) + (gain if trial.arm != "raw" else 0.0))

    analysis = analyse(input_scale.EXPERIMENT, record)
    assert analysis.verdict is expected


def test_input_scale_counts_usable_rates() -> None:
    def record(trial: Trial) -> Record:
        lost = trial.rate >= 1.0
        trains = trial.rate >= (4.0**-2 if trial.arm == "raw" else 4.0**-5)
        if trial.seed % 2:  # either half of “trained” that fails is enough
            return wine_record(0.9, loss=0.1 if trains else 0.9, lost=lost)
        return wine_record(0.9, learned=trains, lost=lost)

    analysis = analyse(input_scale.EXPERIMENT, record)
    usable = analysis.endpoints[2]
    assert (usable.estimate, usable.low, usable.high) == (3.0, 3.0, 3.0)  # 2 rates for raw, 5 for batch norm
    assert usable.verdict is Verdict.REPRODUCED
    assert analysis.tables[0].rows[0][-1] == "2.0"


def test_input_scale_widens_its_intervals_for_overlapping_splits() -> None:
    analysis = analyse(input_scale.EXPERIMENT, lambda trial: wine_record(0.7 + 0.02 * noise(trial)))
    first = analysis.endpoints[0]
    differences = np.array(
        [
            100 * 0.02 * (noise(Trial("", 1, "standardised", seed, 0)) - noise(Trial("", 1, "raw", seed, 0)))
            for seed in range(10)
        ]
    )
    half = 2.262157 * differences.std(ddof=1) * math.sqrt(1 / 10 + 36 / 142)
    assert first.high - first.estimate == pytest.approx(half, rel=1e-6)


@pytest.mark.parametrize(
    ("gain", "expected"), [(0.2, Verdict.REPRODUCED), (0.03, Verdict.WEAK), (-0.2, Verdict.CONTRADICTED)]
)
def test_badly_scaled_digits_are_judged_apart(gain: float, expected: Verdict) -> None:
    def record(trial: Trial) -> Record:
        digits = "data" in dict(trial.settings)
        more = (gain if digits else 0.2) if trial.arm != "raw" else 0.0
        return {**wine_record(0.7 + more + 0.005 * noise(trial)), "classes": 10.0 if digits else 3.0}

    analysis = analyse(input_scale.EXPERIMENT, record)
    assert analysis.verdict is Verdict.REPRODUCED  # wine's
    assert [endpoint.verdict for endpoint in analysis.endpoints[4:]] == [expected, expected]
    assert len(analysis.tables) == 2


def lag_record(trial: Trial, unsteady: float = 0.03, fewer: float = 0.0) -> Record:
    waves = [unsteady * (-1) ** epoch * (1 + 0.1 * noise(trial)) for epoch in range(40)]
    steady = [0.001 * (-1) ** epoch for epoch in range(40)]
    record: Record = {f"error {count}": [0.03 + wave for wave in steady] for count in inference_lag.COUNTS}
    record["error 300"] = [0.03 + fewer + 0.001 * noise(trial)] * 40
    for momentum in inference_lag.MOMENTA:
        record |= {f"error {momentum}": [0.05 + wave for wave in waves], f"off {momentum}": [0.1] * 40}
    return record


@pytest.mark.parametrize(
    ("unsteady", "fewer", "expected"),
    [
        (0.03, 0.0, (Verdict.REPRODUCED, Verdict.REPRODUCED)),
        (0.0002, 0.0, (Verdict.CONTRADICTED, Verdict.REPRODUCED)),  # steadier than exact statistics
        (0.03, 0.02, (Verdict.REPRODUCED, Verdict.CONTRADICTED)),  # 300 samples are worse
    ],
)
def test_the_lag_of_averages_is_judged_apart(
    unsteady: float, fewer: float, expected: tuple[Verdict, Verdict]
) -> None:
    def record(trial: Trial) -> Record:
        if trial.arm == inference_lag.ARM:
            return lag_record(trial, unsteady, fewer)
        return inference_record(trial, 0.0, 0.15, 0.002)

    analysis = analyse(inference.EXPERIMENT, record)
    assert analysis.verdict is Verdict.REPRODUCED
    assert tuple(endpoint.verdict for endpoint in analysis.endpoints[5:]) == expected


def test_the_rule_says_which_comparisons_share_holms_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    together: list[int] = []

    def counting(comparisons: list[Comparison]) -> tuple[Endpoint, ...]:
        together.append(len(comparisons))
        return judge(comparisons)

    monkeypatch.setattr(inference, "judge", counting)

    def record(trial: Trial) -> Record:
        return lag_record(trial) if trial.arm == inference_lag.ARM else inference_record(trial, 0.0, 0.15, 0.002)

    rule = analyse(inference.EXPERIMENT, record).rule
    assert together == [5, 2]
    assert "under Holm's rule for all five" in rule
    assert "under Holm's rule for the two" in rule


def test_a_stack_of_the_lag_equals_its_members_alone() -> None:
    stack = [dataclasses.replace(trial, settings=settings(steps=6)) for trial in inference_lag.plan(Scale(3))]
    together = inference.train(stack)
    assert together == [inference.train([trial])[0] for trial in stack]
    assert len(together[0]["error 300"]) == 2  # epochs
    assert together[0]["error 300"] != together[1]["error 300"]


def inference_record(trial: Trial, behind: float, small: float, spread: float) -> Record:
    record: Record = lag_record(trial)
    for source in (inference.EXACT, *inference.AVERAGES):
        lag = 0.0 if source == inference.EXACT else behind + spread * noise(trial)
        record[f"{source}, accuracy"] = [0.97 - lag] * 8
        record[f"{source}, loss"] = [0.1] * 8
    for size in inference.SIZES:
        record[f"batch of {size}, accuracy"] = [0.97 - (small if size <= 4 else 0.0)]
        record[f"batch of {size}, loss"] = [0.1]
    return record


@pytest.mark.parametrize(
    ("behind", "small", "spread", "expected"),
    [
        (0.0, 0.15, 0.002, Verdict.REPRODUCED),
        (0.0, 0.03, 0.002, Verdict.WEAK),  # batches of 4 are worse, by less than the margin
        (0.0, 0.15, 0.05, Verdict.INCONCLUSIVE),
        (0.03, 0.15, 0.002, Verdict.CONTRADICTED),  # the averages are not as good
        (0.0, -0.15, 0.002, Verdict.CONTRADICTED),  # batches of 4 are better
    ],
)
def test_inference_gives_the_verdict_of_made_up_trials(
    behind: float, small: float, spread: float, expected: Verdict
) -> None:
    analysis = analyse(inference.EXPERIMENT, lambda trial: inference_record(trial, behind, small, spread))
    assert analysis.verdict is expected


OF_LATER_PAPERS = {"noisy", "weight-decay"}  # the document does not say it


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_real_records_are_json_and_can_be_analysed(name: str) -> None:
    import plotly.graph_objects

    experiment, scale = EXPERIMENTS[name], Scale(2, quick=True)
    planned = [
        dataclasses.replace(trial, settings=settings(**{**dict(trial.settings), "steps": 50}))
        for trial in experiment.plan(scale)
    ]
    records: dict[Trial, Record] = {}
    for stack in stacks(planned, experiment.stack_size):
        records.update(zip(stack, experiment.train(stack), strict=True))
    assert json.loads(json.dumps(list(records.values()), allow_nan=False)) == list(records.values())
    analysis = experiment.analyse(records, scale)
    for figure in analysis.figures:
        plotly.graph_objects.Figure(figure.plotly)  # raises where plotly knows no such property
        json.dumps(figure.plotly, allow_nan=False)
    assert analysis.experiment == name
    assert analysis.claim.korean or name in OF_LATER_PAPERS
    assert analysis.rule
    assert analysis.command == f"evenorm lab run {name} --quick --seeds 2"
    assert any("2 seeds are a look" in note for note in analysis.notes) or not analysis.seeds
    assert untranslated(analysis) == []


def test_the_documents_sentences_are_its_own() -> None:
    words = (
        "학습 속도 & 학습 결과가 개선된다 (Higer learning rate 적용 가능)",
        "핵심은 학습 속도의 향상이다.",
        "전반적으로 model의 성능이 높아진다.",
        "평균과 분산에 고정값을 사용한다",
    )
    korean = " ".join(experiment.claim.korean for experiment in EXPERIMENTS.values())
    assert all(sentence in korean for sentence in words)


def test_a_batch_of_one_is_normalised_to_its_bias() -> None:
    import torch

    choose = own_statistics(1)
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    average, variance = choose(0, x)
    assert torch.equal(average, x)
    assert not variance.any()


def test_fixed_statistics_give_what_the_layer_itself_gives() -> None:
    import torch

    from evenorm.lab.networks import BatchNorm, Sigmoid, initialise_, perceptron

    network = perceptron(2, (8, 5, 5, 3), Sigmoid, normalise=True)
    initialise_(network, [0, 1], lambda inputs: 0.3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(2, 8, 20, generator=generator))
    fixed = [
        (by_member(layer.layer.running_mean, 2), by_member(layer.layer.running_var, 2))
        for layer in network
        if isinstance(layer, BatchNorm)
    ]
    x = torch.randn(2, 8, 20, generator=generator)
    network.eval()
    torch.testing.assert_close(logits(network, x, lambda index, _: fixed[index]), network(x))
    network.train()
    torch.testing.assert_close(logits(network, x, own_statistics(20)), network(x))


def test_the_layer_taken_apart_is_one_of_the_network() -> None:
    trials = [dataclasses.replace(inference.plan(Scale(1))[0], settings=settings(steps=50))]
    view = inference.layer_view(inference.train(trials)[0])
    standardised = (np.array(view.pre_activations) - view.mean) / view.std
    assert len(standardised) == 360
    assert abs(standardised.mean()) < 0.3  # test images, training statistics
    assert 0.7 < standardised.std() < 1.3
