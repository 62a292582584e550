"""The ladder of rates: what made-up trials give, a short real training, and what it leaves alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evenorm.lab.experiment import Scale
from evenorm.lab.experiments import speed, speed_ladder
from evenorm.lab.experiments.speed_ladder import BN, BN_5, BN_30, BN_SIGMOID, NONE, NONE_5, SIGMOID, Ladder
from evenorm.lab.results import Verdict
from evenorm.lab.trials import Record, Trial, settings
from readers_sentences import untranslated

TEN = Scale(10)
STEPS = {NONE: 320, NONE_5: 9999, BN: 80, BN_5: 40, BN_30: 160, SIGMOID: 9999, BN_SIGMOID: 200}


def record(trial: Trial, steps: float) -> Record:
    """Return a curve that jumps from chance to 96 % at the given step."""
    return {"accuracy": [0.96 if 10 * (index + 1) >= steps else 0.1 for index in range(60)], "diverged": 0.0}


def climb(steps: dict[str, float], spread: float = 0.0) -> Ladder:
    def noise(trial: Trial) -> float:
        return float(np.random.default_rng([trial.seed, len(trial.arm)]).uniform(-1, 1))

    trials = speed_ladder.plan("speed", TEN)
    return Ladder({trial: record(trial, steps[trial.arm] * 2 ** (spread * noise(trial))) for trial in trials}, TEN)


def test_the_ladder_is_exact_where_the_trials_are() -> None:
    found = speed_ladder.endpoints(climb(STEPS))
    assert [endpoint.estimate for endpoint in found] == pytest.approx([2, 1, math.log2(600 / 320), 86])
    assert {endpoint.verdict for endpoint in found} == {Verdict.REPRODUCED}
    rows = {row[0]: row[1:] for row in speed_ladder.table(climb(STEPS)).rows}
    assert rows["with, rate × 5"] == ("40", "8.00", "14.8", "96.0")
    assert rows["without, rate × 5"] == ("≥ 600", "≤ 0.53", "–", "10.0")


@pytest.mark.parametrize(
    ("same", "spread", "expected"),
    [
        (80, 0.5, Verdict.REPRODUCED),
        (320, 0.5, Verdict.INCONCLUSIVE),
        (250, 3.0, Verdict.INCONCLUSIVE),  # too noisy to say
        (550, 0.2, Verdict.CONTRADICTED),
    ],
)
def test_the_first_rung_is_judged(same: float, spread: float, expected: Verdict) -> None:
    assert speed_ladder.endpoints(climb({**STEPS, BN: same}, spread))[0].verdict is expected


def test_the_goal_is_a_share_of_the_best_without_batch_norm() -> None:
    ladder = climb(STEPS)
    trial = next(trial for trial in speed_ladder.plan("speed", TEN) if trial.arm == BN and trial.seed == 0)
    almost = record(trial, 80)
    almost["accuracy"] = [0.95 * 0.96 - 0.001 if value > 0.5 else value for value in almost["accuracy"]]
    ladder._records[BN, 0] = almost
    assert ladder.steps(BN)[:2] == [600.0, 80.0]


def test_the_ladder_leaves_the_verdict_alone() -> None:
    def whole(rungs: dict[str, float]) -> tuple[Verdict, tuple[object, ...]]:
        records = {}
        for trial in speed.plan(TEN):
            if trial.arm in rungs:
                records[trial] = record(trial, rungs[trial.arm])
            else:
                jump = 5 if trial.arm == "batch norm" else 40
                curve = [0.97 if index >= jump + trial.seed % 3 else 0.5 for index in range(120)]
                records[trial] = {"accuracy": curve, "test_loss": [0.1] * 120, "diverged": 0.0, "train_loss": 0.1}
        analysis = speed.EXPERIMENT.analyse(records, TEN)
        assert len(analysis.endpoints) == 7
        assert not untranslated(analysis)
        return analysis.verdict, analysis.endpoints[:3]

    assert whole(STEPS) == whole({**STEPS, BN: 600.0, BN_5: 600.0})


@pytest.mark.parametrize("arm", [NONE_5, BN_30, BN_SIGMOID])
def test_a_stack_equals_separate_trainings(arm: str) -> None:
    rate = speed_ladder.BASE * speed_ladder.RUNGS[arm].times
    stack = [Trial("speed", 1, arm, seed, rate, settings(steps=20)) for seed in (0, 1, 2)]
    assert speed.train(stack) == [speed.train([trial])[0] for trial in stack]
