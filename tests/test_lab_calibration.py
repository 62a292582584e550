"""Null calibration: with the same arm on both sides a claim is reproduced no more often than it should be."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from evenorm.lab.experiment import Scale
from evenorm.lab.grid import Grid
from evenorm.lab.own.answers import Seen
from evenorm.lab.own.asking import Plan, trials
from evenorm.lab.own.preparing import OwnData, prepare
from evenorm.lab.own.questions import QUESTIONS
from evenorm.lab.own.raw import Raw
from evenorm.lab.own.training import EVALUATIONS, train
from evenorm.lab.results import Verdict
from evenorm.lab.statistics import judge
from evenorm.lab.trials import PILOT_SEEDS, Record, Trial, stacks

RESAMPLES, SEEDS = 200, 10
POOL = 60  # seeds that were really trained
PLAN = Plan(seeds=SEEDS, steps=EVALUATIONS, factor=64.0)
# Where nothing is to be found, the lower end of a 95 % interval lies above 0 in 2.5 % of all runs: 5 of 200. More
# than 12 come up in one of 500 such tests.
MOST = 12


@pytest.fixture(scope="module")
def data() -> OwnData:
    """Noisy classes, so that seeds differ, in one split, so that trials are independent, as an interval has it."""
    draw = np.random.default_rng(0)
    numbers = draw.normal(size=(600, 8)).astype(np.float32)
    target = (numbers[:, :4].sum(1) + draw.normal(size=600) > 0).astype(float)
    made = prepare(Raw("made up.csv", numbers, np.empty((600, 0), np.str_), target, tuple("abcdefgh")))
    return replace(made, redrawn=False)


@pytest.fixture(scope="module")
def pool(data: OwnData) -> dict[tuple[float, int], Record]:
    """The records of one arm, by rate and seed, of trials that were really trained."""
    planned = [
        trial
        for trial in trials(QUESTIONS["placement"], data, Plan(POOL, PLAN.steps, PLAN.factor))
        if trial.arm == "before"
    ]
    found: dict[tuple[float, int], Record] = {}
    for stack in stacks(planned, 16):
        for trial, record in zip(stack, train(stack, data), strict=True):
            found[trial.rate, trial.seed] = record
    return found


def verdicts(data: OwnData, pool: dict[tuple[float, int], Record], lead: float = 0.0) -> Counter[Verdict]:
    """Return the verdicts of resamples in which both arms are the same one, but for a lead in score.

    The pilot seeds are the same on both sides too: the same arm is tuned to the same rate.
    """
    question, scale = QUESTIONS["placement"], Scale(SEEDS)
    planned = trials(question, data, PLAN)
    found: Counter[Verdict] = Counter()
    for resample in range(RESAMPLES):
        drawn = np.random.default_rng(resample).permutation(POOL)
        sides = {"before": drawn[:SEEDS], "after": drawn[SEEDS : 2 * SEEDS]}
        records: dict[Trial, Record] = {}
        for trial in planned:
            seed = trial.seed if trial.seed in PILOT_SEEDS else int(sides[trial.arm][trial.seed])
            real = pool[trial.rate, seed]
            ahead = lead if trial.arm == "before" and trial.seed not in PILOT_SEEDS else 0.0
            records[trial] = {**real, "final": real["final"] + ahead}
        seen = Seen(data, Grid(records, scale), PLAN.factor)
        found[judge(question.compare(seen))[0].verdict] += 1
    return found


def test_nothing_is_reproduced_where_there_is_nothing(data: OwnData, pool: dict[tuple[float, int], Record]) -> None:
    found = verdicts(data, pool)
    assert found[Verdict.REPRODUCED] + found[Verdict.WEAK] <= MOST, found
    assert found[Verdict.CONTRADICTED] <= MOST, found
    assert len({record["final"] for record in pool.values()}) > 20  # seeds do differ


def test_a_real_lead_is_found(data: OwnData, pool: dict[tuple[float, int], Record]) -> None:
    assert verdicts(data, pool, lead=0.1)[Verdict.REPRODUCED] > 0.9 * RESAMPLES
