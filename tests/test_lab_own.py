"""The questions put to a user's own data: training, answers on made-up trials, the budget, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import polars
import pytest

import evenorm.cli
from evenorm.lab import run
from evenorm.lab.experiment import Scale
from evenorm.lab.machines import Machines
from evenorm.lab.own import budget
from evenorm.lab.own.asking import Plan, experiments
from evenorm.lab.own.preparing import OwnData, prepare
from evenorm.lab.own.questions import QUESTIONS
from evenorm.lab.own.raw import Raw
from evenorm.lab.own.training import ARMS, EVALUATIONS, TASKS, train
from evenorm.lab.own.words import advice
from evenorm.lab.results import Analysis, Verdict
from evenorm.lab.store import Store
from evenorm.lab.trials import Record, Trial, settings
from readers_sentences import untranslated

SMALL = Plan(seeds=6, steps=EVALUATIONS, factor=8.0)


def own(task: str = "classification", rows: int = 80, columns: int = 5) -> OwnData:
    draw = np.random.default_rng(0)
    numbers = draw.normal(size=(rows, columns)).astype(np.float32)
    target = (numbers[:, 0] > 0).astype(float) if task == "classification" else numbers[:, 0].astype(np.float64)
    categories = np.empty((rows, 0), np.str_)
    return prepare(Raw("made up.csv", numbers, categories, target, tuple("abcde"[:columns])))


def numbers(records: list[Record]) -> Iterator[float | None]:
    for record in records:
        for value in record.values():
            yield from value if isinstance(value, list) else [value]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("columns", [1, 5])
@pytest.mark.parametrize("arm", ["none", "before", "after", "raw, first", "before, dropout", "before, large"])
def test_a_stack_trains_as_its_members_alone(arm: str, columns: int, task: str) -> None:
    data, named = own(task, columns=columns), settings(data="x", steps=EVALUATIONS)
    trials = [Trial("own-data", 1, arm, seed, rate, named) for seed in (0, 1, 1000) for rate in (0.01, 8.0)]
    together = train(trials, data)
    apart = [train([trial], data)[0] for trial in trials]
    assert [record.keys() for record in together] == [record.keys() for record in apart]
    ours, theirs = (list(numbers(records)) for records in (together, apart))
    assert [value is None for value in ours] == [value is None for value in theirs]
    # Some processors multiply a stack of matrices in another order; records keep seven digits.
    for value, alone in zip(ours, theirs, strict=True):
        assert value is None or value == pytest.approx(alone, rel=1e-5, abs=1e-6)
    assert json.loads(json.dumps(together, allow_nan=False)) == together


def test_the_network_learns_a_line_and_a_class() -> None:
    for task in TASKS:
        named = settings(data="x", steps=5 * EVALUATIONS)
        (record,) = train([Trial("own-data", 1, "before", 0, 0.1, named)], own(task, rows=400))
        assert record["final"] > 0.85


Made = Callable[[Trial], Record]


def made_up(final: Callable[[str], float], spread: float, steps: Callable[[str], int] = lambda arm: 4) -> Made:
    """Return records whose scores are known: at rate 1 the arm's own, lower beside it; some noise by seed."""

    def record(trial: Trial) -> Record:
        noise = spread * np.random.default_rng([trial.seed, len(trial.arm)]).uniform(-1, 1)
        height = float(np.clip(final(trial.arm) + noise - 0.02 * abs(np.log(trial.rate)), 0, 1))
        first = steps(trial.arm)
        return {
            "score": [height if index + 1 >= first else 0.1 for index in range(EVALUATIONS)],
            "final": height,
            "first_loss": 1.0,
            "train_loss": 0.1,
            "diverged": 0.0,
        }

    return record


def analyse(name: str, record: Made, data: OwnData | None = None) -> Analysis:
    data = data or own(rows=2000)
    (experiment,) = experiments({name: QUESTIONS[name]}, data, SMALL, "evenorm lab run")
    scale = Scale(SMALL.seeds)
    return experiment.analyse({trial: record(trial) for trial in experiment.plan(scale)}, scale)


def arms(**scores: float) -> Callable[[str], float]:
    return lambda arm: scores.get(arm.replace(", ", "_"), scores.get(arm.split(",")[0], 0.7))


R, W, I, C = Verdict.REPRODUCED, Verdict.WEAK, Verdict.INCONCLUSIVE, Verdict.CONTRADICTED  # noqa: E741


@pytest.mark.parametrize(
    ("name", "record", "expected", "says"),
    [
        ("speed", made_up(arms(), 0.0, lambda arm: 20 if arm == "none" else 4), R, "Yes: .*5.0 times fewer"),
        ("speed", made_up(arms(), 0.0, lambda arm: 6 if arm == "none" else 4), W, "Yes: .*somewhat faster"),
        ("speed", made_up(arms(), 0.01), I, "Not that this run could tell"),
        ("speed", made_up(arms(), 0.0, lambda arm: 4 if arm == "none" else 20), C, "No: .*slower"),
        ("speed", made_up(arms(none=0.5, before=0.5), 0.0), I, "learned nothing here beyond chance"),
        ("placement", made_up(arms(before=0.9), 0.01), R, "Put it before the activation"),
        ("placement", made_up(arms(after=0.9), 0.01), C, "Put it after the activation"),
        ("placement", made_up(arms(), 0.05), I, "either side is a fair choice"),
        ("init", made_up(arms(none_small=0.4, none_large=0.5), 0.01), R, r"\d points without batch norm and"),
        ("init", made_up(arms(none_small=0.66, none_large=0.67), 0.005), W, "points without"),
        ("init", made_up(arms(), 0.05), I, ""),
        ("init", made_up(arms(before_small=0.4, before_large=0.5), 0.01), C, ""),
        ("input-scale", made_up(arms(raw=0.4), 0.01), R, r"standardising gave \+30"),
        ("input-scale", made_up(arms(raw=0.9), 0.01), C, ""),
        ("overfitting", made_up(arms(none_dropout=0.8), 0.001), R, "No, not with batch norm"),
        ("overfitting", made_up(arms(before_dropout=0.8), 0.001), C, "Yes, dropout still helps"),
        ("overfitting", made_up(arms(), 0.1), I, "cannot tell"),
    ],
)
def test_a_question_gets_the_answer_of_made_up_trials(
    name: str, record: Made, expected: Verdict, says: str
) -> None:
    import re

    analysis = analyse(name, record)
    assert analysis.verdict is expected, analysis.endpoints
    assert re.search(says, analysis.answer), analysis.answer
    assert untranslated(analysis) == []


def with_rates(highest: dict[str, float], spread: float = 0.0) -> Made:
    def record(trial: Trial) -> Record:
        noise = 8.0 ** round(spread * np.random.default_rng([trial.seed, len(trial.arm)]).uniform(-1, 1))
        trained = trial.rate <= highest[trial.arm] * noise * 1.01
        return {**made_up(arms(), 0.0)(trial), "train_loss": 0.1 if trained else 0.9, "diverged": 0.0}

    return record


@pytest.mark.parametrize(
    ("highest", "spread", "expected", "says"),
    [
        ({"none": 0.01, "before": 4.0}, 0.0, R, "Up to a rate of 4 .* up to 0.0078 without"),
        ({"none": 0.5, "before": 0.5}, 0.0, I, "Up to a rate of 0.5 .* up to 0.5 without"),
        ({"none": 4.0, "before": 0.01}, 0.0, C, ""),
        ({"none": 0.01, "before": 0.1}, 3.0, I, ""),
    ],
)
def test_the_highest_rate_of_made_up_trials(
    highest: dict[str, float], spread: float, expected: Verdict, says: str
) -> None:
    import re

    analysis = analyse("max-rate", with_rates(highest, spread))
    assert analysis.verdict is expected, analysis.endpoints
    assert re.search(says, analysis.answer), analysis.answer
    assert untranslated(analysis) == []


def test_a_small_tables_intervals_are_those_of_overlapping_splits() -> None:
    record = made_up(arms(before=0.8), 0.02)
    small, large = (analyse("placement", record, own(rows=rows)).endpoints[0] for rows in (100, 60_000))
    assert small.high - small.low > 1.5 * (large.high - large.low)


def test_questions_share_their_trials() -> None:
    data = own()
    planned = [set(e.plan(Scale(6))) for e in experiments(QUESTIONS, data, SMALL, "")]
    whole = set().union(*planned)
    assert len(whole) == len(ARMS) * len(SMALL.rates) * 9
    assert sum(map(len, planned)) > 1.5 * len(whole)


def test_the_advice_comes_in_the_order_of_the_users_questions() -> None:
    told = advice([analyse(name, made_up(arms(), 0.01)) for name in QUESTIONS])
    assert [question.split()[0] for question, _ in told] == ["Does", "Where", "Up", "Is"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which a step of a stack takes a millisecond."""
    monkeypatch.setattr(budget, "measure", lambda data: budget.Speed(0.0, 0.001))


def choose(seconds: float, store: Store, jobs: int = 1) -> Plan:
    return budget.choose_plan(QUESTIONS, own(), seconds, Machines(jobs), store)


def test_the_largest_plan_that_fits_is_taken(measured: None, tmp_path: Path) -> None:
    store, data = Store(tmp_path), own()
    plans = [choose(seconds, store) for seconds in (10, 30, 100, 1000)]
    assert [budget.LADDER.index(plan) for plan in plans] == sorted(
        (budget.LADDER.index(plan) for plan in plans), reverse=True
    )
    assert plans[0] != plans[-1] == budget.LADDER[0]
    for seconds, plan in zip((10, 30, 100), plans, strict=False):
        count = len(budget._left(QUESTIONS, data, plan, store))
        assert budget.seconds(count, plan, budget.Speed(0.0, 0.001), Machines(1)) <= seconds


def test_a_budget_too_small_for_anything_names_the_least(measured: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--budget 1 is too small.*takes about \d+ s; give --budget \d+"):
        choose(1, Store(tmp_path))


def test_a_plan_that_was_begun_is_gone_on_with(measured: None, tmp_path: Path) -> None:
    store, data = Store(tmp_path), own()
    store.prepare(["own-data"])
    begun = choose(10, store)
    trials = sorted(budget._left(QUESTIONS, data, begun, store), key=Trial.digest)
    store.save(trials[0], {})
    assert choose(100, store) == begun
    for trial in trials[1:]:
        store.save(trial, {})
    assert choose(10, store) == begun  # finished: nothing is left to train
    assert choose(1000, store) == budget.LADDER[0]  # but a larger one fits by far


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        evenorm.cli.main(arguments)
    return int(exit_.value.code or 0)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    size = draw.normal(size=60)
    path = tmp_path / "table.csv"
    polars.DataFrame({"size": size, "kind": ["big" if value > 0 else "small" for value in size]}).write_csv(path)
    return path


@pytest.fixture
def tiny(measured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "LADDER", (Plan(seeds=2, steps=EVALUATIONS, factor=64.0),))


def test_the_command_answers_in_plain_words_and_trains_nothing_twice(
    tiny: None, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--data", str(table), "--target", "kind", "--out", str(tmp_path / "results")]
    assert call("lab", "run", *arguments, "--jobs", "1") == 0
    first = capsys.readouterr()
    assert first.out.startswith("Does batch norm help here? ")
    assert "Is dropout still needed? " in first.out
    assert "100 %" in first.err
    page = (tmp_path / "results" / "report-table.html").read_text(encoding="utf-8")
    assert "Batch norm on table.csv" in page

    def trained(*arguments: object, **more: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(run, "train", trained)
    assert call("lab", "run", *arguments, "--jobs", "1") == 0
    assert capsys.readouterr().out == first.out
    assert call("lab", "report", *arguments, "--lang", "ko") == 0
    assert capsys.readouterr().out.startswith("배치 정규화가 여기서 도움이 되는가? ")
    assert call("lab", "report", "placement", *arguments, "--json") == 0
    (told,) = json.loads(capsys.readouterr().out)["experiments"]
    assert told["experiment"] == "placement"
    assert told["command"].endswith(f"--data {table} --target kind")


def test_a_report_without_trials_names_the_command(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("lab", "report", "--data", str(table), "--target", "kind", "--out", str(tmp_path / "r")) == 2
    assert f"evenorm lab run --data {table} --target kind --out {tmp_path / 'r'}" in capsys.readouterr().err


def text(table: Path, lines: str) -> None:
    table.write_text(lines)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--target", "kind"], "--target is for your own data: give it with --data"),
        (["--budget", "9"], "--budget is for your own data"),
        (["--data", "table.csv"], "--target must name the column"),
        (["--data", "none.csv", "--target", "kind"], "there is nothing at"),
        (["--data", "table.csv", "--target", "sort"], "no column 'sort'"),
        (["--data", "table.csv", "--target", "kind", "--task", "ranking"], "--task must be classification"),
        (["--data", "table.csv", "--target", "kind", "--task", "regression"], "leave out --task"),
        (["--data", "table.csv", "--target", "kind", "--quick"], "--quick and --seeds are for the built-in"),
        (["--data", "table.csv", "--target", "kind", "--budget", "0"], "more than 0"),
        (["--data", "table.csv", "--target", "kind", "--budget", "nan"], "more than 0"),
        (["--data", "table.csv", "--target", "kind", "--budget", "1", "--jobs", "1"], "--budget 1 is too small"),
        (["exact", "--data", "table.csv", "--target", "kind"], "'exact' is no question to your own data"),
        (["--data", "table.csv", "--target", "kind", "--drop", "size"], "nothing to predict it from"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: Sequence[str],
    says: str,
    measured: None,
    table: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(table.parent)
    assert call("lab", "run", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert [path.name for path in table.parent.iterdir()] == ["table.csv"]
