"""The scale of the initial weights: the verdict of made-up trials, and a short real training."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evenorm.lab.data import dataset
from evenorm.lab.experiment import Scale
from evenorm.lab.experiments import init
from evenorm.lab.results import Analysis, Verdict
from evenorm.lab.trials import Record, Trial, settings
from readers_sentences import untranslated


def analyse(wider: float, *, spread: float = 0.0, bump: float = 0.0) -> Analysis:
    """Analyse trials of which batch norm's train up to `wider` powers of ten further; `bump` is not flat."""

    def record(trial: Trial) -> Record:
        noise = np.random.default_rng([trial.seed, len(trial.arm)]).uniform(-1, 1)
        power = math.log10(trial["scale"])
        reach = -1.01 + (spread * noise if trial.arm == "none" else wider)
        accuracy = 0.95 + (bump * (2 + noise) / 2 if trial.arm == "rate by scale" and power > 1.9 else 0)
        return {
            "trained": float(-2.1 < power <= reach),
            "train_accuracy": accuracy - (0.2 if trial.arm == "batch norm" and power > 1.9 else 0),
        }

    scale = Scale(10)
    return init.EXPERIMENT.analyse({trial: record(trial) for trial in init.plan(scale)}, scale)


@pytest.mark.parametrize(
    ("wider", "spread", "bump", "expected"),
    [
        (2.0, 0.5, 0.0, Verdict.REPRODUCED),
        (0.5, 0.0, 0.0, Verdict.WEAK),  # wider by half a power of ten
        (0.0, 3.0, 0.0, Verdict.INCONCLUSIVE),
        (-1.0, 0.0, 0.0, Verdict.CONTRADICTED),
        (2.0, 0.0, -0.05, Verdict.CONTRADICTED),  # wide, and not flat
        (2.0, 0.0, -0.02, Verdict.INCONCLUSIVE),  # wide, and about as flat as the margin
    ],
)
def test_the_verdict_of_made_up_trials(wider: float, spread: float, bump: float, expected: Verdict) -> None:
    assert analyse(wider, spread=spread, bump=bump).verdict is expected


def test_the_ranges_are_exact_where_the_trials_are() -> None:
    analysis = analyse(2.0)
    assert [endpoint.estimate for endpoint in analysis.endpoints] == pytest.approx([2.0, 0.0, 20.0])
    assert "over 3.0 powers of ten of the initial scale, without it over 1.0" in analysis.answer


def test_every_sentence_has_its_korean() -> None:
    assert not untranslated(analyse(2.0))


def trial(arm: str, seed: int, factor: float, rate: float = 0.125, **other: str) -> Trial:
    return Trial(init.NAME, 1, arm, seed, rate, settings(scale=factor, steps=30, **other))


@pytest.mark.parametrize("arm", init.ARMS)
def test_a_stack_equals_separate_trainings(arm: str) -> None:
    stack = [trial(arm, seed, 10.0, rate) for seed, rate in ((0, 0.125), (1, 0.125), (1, 16.0))]
    assert init.train(stack) == [init.train([member])[0] for member in stack]


def test_a_rate_by_scale_makes_the_same_training_of_every_scale() -> None:
    same = [init.train([trial("rate by scale", 0, factor)])[0] for factor in (2.0**-3, 1.0, 2.0**5)]
    fixed = [init.train([trial("batch norm", 0, factor)])[0] for factor in (1.0, 2.0**5)]
    assert same[1] == fixed[0]
    assert same[2]["train_loss"] == pytest.approx(same[1]["train_loss"], rel=0.01)
    assert same[0]["train_loss"] == pytest.approx(same[1]["train_loss"], rel=0.02)  # ε is felt
    assert fixed[1]["train_loss"] > 1.3 * fixed[0]["train_loss"]


def test_other_data_set_the_widths() -> None:
    assert dataset("wine", 0).features != dataset("digits").features
    (record,) = init.train([trial("batch norm", 0, 1.0, data="wine")])
    assert 0 <= record["train_accuracy"] <= 1
