from __future__ import annotations

import dataclasses
import hashlib
import json

from hypothesis import given
from hypothesis import strategies as st

from evenorm.lab.trials import PILOT_SEEDS, Trial, random_seed, settings, stacks

TRIAL = Trial("speed", 1, "none", 3, 0.1, settings(steps=100, width=5))


def test_digest_is_the_hash_of_the_canonical_configuration() -> None:
    text = (
        '{"arm":"none","experiment":"speed","protocol":1,"rate":0.1,"seed":3,'
        '"settings":{"steps":100,"width":5},"version":1}'
    )
    assert TRIAL.digest() == hashlib.sha256(text.encode()).hexdigest()
    assert json.loads(text) == TRIAL.configuration()


def test_every_part_of_the_configuration_changes_the_digest() -> None:
    others = [
        dataclasses.replace(TRIAL, **change)
        for change in (
            {"experiment": "inference"},
            {"version": 2},
            {"arm": "batch norm"},
            {"seed": 4},
            {"rate": 0.2},
            {"settings": settings(steps=101, width=5)},
        )
    ]
    assert len({trial.digest() for trial in (TRIAL, *others)}) == 7


def test_settings_have_one_order() -> None:
    assert settings(b=1, a=2) == settings(a=2, b=1)
    assert TRIAL["steps"] == 100


def test_streams_of_random_numbers_are_apart() -> None:
    seeds = {random_seed(seed, stream) for seed in (0, 1, *PILOT_SEEDS) for stream in ("weight 0", "batch order")}
    assert len(seeds) == 10
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert random_seed(0, "weight 0") == random_seed(0, "weight 0")


@given(
    st.sets(st.tuples(st.sampled_from(["none", "batch norm"]), st.integers(0, 20), st.sampled_from([0.1, 1.0]))),
    st.integers(1, 9),
    st.randoms(use_true_random=False),
)
def test_stacks_hold_every_trial_once_and_do_not_depend_on_order(
    cells: set[tuple[str, int, float]], size: int, random: object
) -> None:
    trials = [Trial("speed", 1, arm, seed, rate) for arm, seed, rate in cells]
    found = list(stacks(trials, size))
    assert sorted((t.arm, t.seed, t.rate) for stack in found for t in stack) == sorted(cells)
    assert all(1 <= len(stack) <= size and len({trial.arm for trial in stack}) == 1 for stack in found)
    random.shuffle(trials)  # type: ignore[attr-defined]
    assert list(stacks(trials, size)) == found


def test_stacks_are_even() -> None:
    trials = [Trial("speed", 1, "none", seed, 0.1) for seed in range(17)]
    assert [len(stack) for stack in stacks(trials, 16)] == [8, 9]
