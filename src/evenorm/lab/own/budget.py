"""How much can be trained in a given time: the machine is measured, then the largest plan that fits is taken."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sized
from dataclasses import dataclass

import torch

from evenorm.lab.machines import Machines
from evenorm.lab.own.asking import NAME, STACK, VERSION, Plan, trials
from evenorm.lab.own.preparing import OwnData
from evenorm.lab.own.questions import Question
from evenorm.lab.own.training import EVALUATIONS, train
from evenorm.lab.store import Store
from evenorm.lab.trials import Trial, settings

SECONDS = 300.0  # where no budget is given
WORKERS_START = 6.0  # seconds until worker processes have imported torch, measured: 3 to 5
ROOM_TO_SPARE = 0.7
SAFETY = (
    1.3  # two workers on two cores share caches and memory; the machine may be busier than when it was measured
)

# The largest plan first. Seeds go before steps, and steps before the fineness of the rates: fewer seeds widen the
# intervals, which the reader sees, but a network that has not learned yet answers another question.
LADDER = (
    Plan(seeds=10, steps=1000, factor=4.0),
    Plan(seeds=7, steps=1000, factor=4.0),
    Plan(seeds=7, steps=600, factor=4.0),
    Plan(seeds=5, steps=600, factor=4.0),
    Plan(seeds=5, steps=400, factor=4.0),
    Plan(seeds=5, steps=400, factor=8.0),
    Plan(seeds=4, steps=200, factor=8.0),
    Plan(seeds=4, steps=120, factor=8.0),
)


@dataclass(frozen=True)
class Speed:
    """What a stack costs on this machine: seconds = fixed + steps · step, of an arm with batch norm."""

    fixed: float
    step: float


def measure(data: OwnData) -> Speed:
    """Time two short trainings of a whole stack, on one thread, after one that nobody times."""
    named = {steps: settings(data=data.name, steps=steps) for steps in (EVALUATIONS, 3 * EVALUATIONS)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = {}
        for steps in (EVALUATIONS, *named):
            stack = [Trial(NAME, VERSION, "before", seed, 0.01, named[steps]) for seed in range(STACK)]
            begin = time.perf_counter()
            train(stack, data)
            times[steps] = time.perf_counter() - begin
    finally:
        torch.set_num_threads(threads)
    short, long = times.values()
    step = max(1e-9, long - short) / (2 * EVALUATIONS)
    return Speed(max(0.0, short - EVALUATIONS * step), step)


def choose_plan(
    questions: Mapping[str, Question],
    data: OwnData,
    budget: float,
    machines: Machines,
    store: Store,
    deadline: float | None = None,
) -> Plan:
    """Return the plan to train within the budget, in seconds, of which some may be gone: the deadline says.

    A plan that was begun is gone on with, if what is left of it fits; a finished one is kept, unless a larger one
    fits with room to spare: measured twice, a machine is never equally fast.

    Raises:
        ValueError: a budget too small for the smallest plan; the message names the least that will do.
    """
    speed = measure(data)
    left = {plan: _left(questions, data, plan, store) for plan in LADDER}
    needed = {plan: seconds(len(left[plan]), plan, speed, machines) for plan in LADDER}
    room = budget if deadline is None else deadline - time.monotonic()
    begun = _begun(questions, data, left)
    if begun is not None and needed[begun] <= room:
        larger = [plan for plan in LADDER[: LADDER.index(begun)] if needed[plan] <= ROOM_TO_SPARE * room]
        return larger[0] if larger and not left[begun] else begun
    for plan, time_needed in needed.items():
        if time_needed <= room:
            return plan
    least = min(needed.values()) + budget - room
    raise ValueError(
        f"--budget {budget:g} is too small: on this machine the smallest plan ({len(questions)} questions, "
        f"{LADDER[-1].seeds} seeds, {LADDER[-1].steps} steps) takes about {least:.0f} s; give --budget "
        f"{math.ceil(1.1 * least) + 1}, or fewer questions by name"
    )


def finished_plan(questions: Mapping[str, Question], data: OwnData, store: Store) -> Plan | None:
    """Return the largest plan whose trials are all stored, or None."""
    return next((plan for plan in LADDER if not _left(questions, data, plan, store)), None)


def seconds(count: int, plan: Plan, speed: Speed, machines: Machines) -> float:
    """Return how long so many trials of a plan take, the start of the workers included."""
    if not count:
        return 0.0
    workers = min(machines.jobs, os.cpu_count() or 1)
    start = WORKERS_START if machines.jobs > 1 else 0.0
    return start + SAFETY * math.ceil(count / STACK / workers) * (speed.fixed + plan.steps * speed.step)


def _left(questions: Mapping[str, Question], data: OwnData, plan: Plan, store: Store) -> set[Trial]:
    wanted = {trial for question in questions.values() for trial in trials(question, data, plan)}
    return {trial for trial in wanted if not store.path(trial).exists()}


def _begun(questions: Mapping[str, Question], data: OwnData, left: Mapping[Plan, Sized]) -> Plan | None:
    """Return the plan of which most trials are stored, the larger of two; None where none is."""
    stored = {plan: _planned(questions, data, plan) - len(left[plan]) for plan in LADDER}
    most = max(stored.values())
    return next(plan for plan, count in stored.items() if count == most) if most else None


def _planned(questions: Mapping[str, Question], data: OwnData, plan: Plan) -> int:
    return len({trial for question in questions.values() for trial in trials(question, data, plan)})
