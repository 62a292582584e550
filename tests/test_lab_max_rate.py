"""The largest usable rate: the verdict of made-up trials, and a short real training."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from evenorm.lab.experiment import Scale
from evenorm.lab.experiments import max_rate
from evenorm.lab.results import Analysis, Verdict
from evenorm.lab.training import trained
from evenorm.lab.trials import Record, Trial, settings
from readers_sentences import untranslated


def analyse(edges: dict[tuple[str, int], float], spread: float = 0.0, same: float = 0.8) -> Analysis:
    """Analyse trials in which each arm trains up to its edge; `same` is batch norm's loss at the lower rates."""

    def record(trial: Trial) -> Record:
        noise = np.random.default_rng([trial.seed, len(trial.arm), trial["depth"]]).uniform(-1, 1)
        usable = np.log2(trial.rate) <= edges[trial.arm, trial["depth"]] + spread * noise
        loss = 1.0 if trial.arm == "none" else (same if trial.rate <= 2**-3 else 0.1)
        return {
            "trained": float(usable),
            "diverged": 0.0,
            "first_loss": 2.5,
            "train_loss": loss if usable else 2.3,
        }

    scale = Scale(10)
    return max_rate.EXPERIMENT.analyse({trial: record(trial) for trial in max_rate.plan(scale)}, scale)


def edges(shallow: float, deep: float) -> dict[tuple[str, int], float]:
    """Return edges with the given gaps between the arms at 3 and 12 layers, halfway at 6."""
    gaps = dict(zip(max_rate.DEPTHS, (shallow, (shallow + deep) / 2, deep), strict=True))
    return {("none", depth): -3.0 for depth in gaps} | {
        ("batch norm", depth): -3 + gap for depth, gap in gaps.items()
    }


@pytest.mark.parametrize(
    ("shallow", "deep", "spread", "expected"),
    [
        (2, 5, 1.0, Verdict.REPRODUCED),
        (-1, 1, 0.0, Verdict.WEAK),  # twice the rate: less than the margin of 3.2 times
        (5, 2, 0.0, Verdict.CONTRADICTED),  # the gap shrinks with depth
        (0, -2, 0.0, Verdict.CONTRADICTED),
        (3, 3, 1.0, Verdict.INCONCLUSIVE),  # higher, and as much at every depth
        (0, 1, 3.0, Verdict.INCONCLUSIVE),  # too noisy to say
    ],
)
def test_the_verdict_of_made_up_trials(shallow: float, deep: float, spread: float, expected: Verdict) -> None:
    assert analyse(edges(shallow, deep), spread).verdict is expected


def test_the_edges_are_exact_where_the_trials_are() -> None:
    analysis = analyse(edges(2, 5))
    assert [endpoint.estimate for endpoint in analysis.endpoints[:2]] == [5.0, 1.5]
    assert "32 times higher" in analysis.answer
    assert "4 against 0.125; at 3 layers 4 times" in analysis.answer


@pytest.mark.parametrize(("same", "expected"), [(0.8, Verdict.REPRODUCED), (0.15, Verdict.CONTRADICTED)])
def test_the_rate_explains_the_gain_where_equal_rates_take_it_away(same: float, expected: Verdict) -> None:
    assert analyse(edges(2, 5), same=same).endpoints[2].verdict is expected


def test_where_no_rate_trains_the_edge_lies_below_the_grid_and_beyond_it_is_said() -> None:
    lowest = np.log2(max_rate.RATES[0])
    analysis = analyse({key: lowest - 1 if key[0] == "none" else 9.0 for key in edges(0, 0)})
    assert analysis.endpoints[0].estimate == 3 - (lowest - 1)
    assert any("a larger one may be usable" in note for note in analysis.notes)


def test_every_sentence_has_its_korean() -> None:
    assert not untranslated(analyse(dict.fromkeys(edges(0, 0), 9.0)))


def test_a_stack_equals_separate_trainings() -> None:
    for arm in max_rate.ARMS:
        stack = [
            Trial(max_rate.NAME, 1, arm, seed, rate, settings(depth=3, steps=30))
            for seed, rate in ((0, 0.25), (1, 0.25), (0, 64.0), (2, 0.03125))
        ]
        assert max_rate.train(stack) == [max_rate.train([trial])[0] for trial in stack]


def test_other_data_set_the_widths() -> None:
    trial = Trial(max_rate.NAME, 1, "batch norm", 0, 0.25, settings(depth=3, steps=60, data="wine"))
    digits = dataclasses.replace(trial, settings=settings(depth=3, steps=60))
    assert max_rate.train([trial]) != max_rate.train([digits])


def test_trained_means_half_the_loss_and_twice_chance_and_not_lost() -> None:
    losses = torch.tensor([[2.0, 2.0, 2.0, 2.0], [0.9, 0.9, 1.1, 21.0]]).repeat_interleave(50, 0)
    losses[-50:, 3] = 0.5
    losses[50, 3] = 21.0
    accuracy = torch.tensor([0.21, 0.19, 0.9, 0.9])
    assert trained(losses, accuracy, 10).tolist() == [True, False, False, False]
    assert trained(losses[:, :1].expand(-1, 2), torch.tensor([0.74, 0.76]), 2).tolist() == [False, True]
