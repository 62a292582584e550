"""The questions to a user's data as experiments that the laboratory can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from evenorm.lab.experiment import Experiment, Scale
from evenorm.lab.grid import Grid
from evenorm.lab.language import Text
from evenorm.lab.own.answers import Seen, columns_of
from evenorm.lab.own.preparing import OwnData
from evenorm.lab.own.questions import QUESTIONS, Question
from evenorm.lab.own.training import ARMS, DROPPED, HIDDEN, batch_size, train
from evenorm.lab.own.words import told
from evenorm.lab.results import Analysis, Claim, Table
from evenorm.lab.statistics import judge
from evenorm.lab.trials import PILOT_SEEDS, Record, Trial, settings

NAME, VERSION = "own-data", 1  # of the trials: they belong to no one question
LOWEST, HIGHEST = 4.0**-5, 16.0  # rates
COST = 2.0  # of a member's step, in units of `speed`'s
STACK = 16


@dataclass(frozen=True)
class Plan:
    """How much is trained."""

    seeds: int
    steps: int  # a multiple of the evaluations during training
    factor: float  # between neighbouring rates

    @property
    def rates(self) -> tuple[float, ...]:
        """Return the rates, each a factor above the one before."""
        rates = [LOWEST]
        while rates[-1] * self.factor <= HIGHEST * 1.001:
            rates.append(rates[-1] * self.factor)
        return tuple(rates)


def choose(names: Sequence[str]) -> dict[str, Question]:
    """Return the named questions in the order of the page, all where none is named.

    Raises:
        ValueError: a name that is no question to a user's data.
    """
    unknown = [name for name in names if name not in QUESTIONS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no question to your own data; choose from {', '.join(QUESTIONS)}")
    return {name: question for name, question in QUESTIONS.items() if not names or name in names}


def trials(question: Question, data: OwnData, plan: Plan) -> list[Trial]:
    """Return what a question reads: each of its arms at every rate, for the pilot seeds and the paired ones."""
    named = settings(data=data.name, steps=plan.steps)
    seeds = (*PILOT_SEEDS, *range(plan.seeds))
    return [
        Trial(NAME, VERSION, arm, seed, rate, named)
        for arm in question.arms
        for rate in plan.rates
        for seed in seeds
    ]


def experiments(questions: Mapping[str, Question], data: OwnData, plan: Plan, command: str) -> list[Experiment]:
    """Return the questions as experiments; where two read the same trials, those are trained once."""
    return [
        Experiment(
            name,
            question.title,
            _claim(question),
            lambda scale, question=question: trials(question, data, plan),  # type: ignore[misc]
            partial(train, data=data),
            partial(_analyse, name=name, question=question, data=data, plan=plan, command=command),
            cost=COST,
            stack_size=STACK,
        )
        for name, question in questions.items()
    ]


def _claim(question: Question) -> Claim:
    source = Text("The document, on the advantages of batch normalisation", "원문 「Batch Normalization」")
    return Claim(question.korean, question.english, source, question.question)


def _analyse(
    records: Mapping[Trial, Record],
    scale: Scale,
    name: str,
    question: Question,
    data: OwnData,
    plan: Plan,
    command: str,
) -> Analysis:
    seen = Seen(data, Grid(records, scale), plan.factor)
    endpoints = judge(question.compare(seen))
    best = {arm: seen.best(arm) for arm in question.arms}
    words = {arm: ARMS[arm].words for arm in question.arms}
    return Analysis(
        experiment=name,
        title=question.title,
        claim=_claim(question),
        protocol=_protocol(data, plan),
        rule=question.rule,
        verdict=endpoints[0].verdict,
        answer=told(name, seen, endpoints),
        endpoints=endpoints,
        figures=tuple(draw(seen) for draw in question.draw),
        published=(),
        command=command,
        tables=(_table(seen, question.arms),),
        notes=(*data.notes, *_notes(data), *seen.grid.notes(best, words), *scale.notes()),
        seeds=plan.seeds,
        configuration={
            "data": data.name,
            "steps": plan.steps,
            "rates": list(plan.rates),
            "best": dict(best.values()),
        },
    )


def _notes(data: OwnData) -> list[Text]:
    if data.redrawn:
        return [
            Text(
                "Every seed has a split of its own; since splits overlap, the intervals are Nadeau and Bengio's, "
                "and the exact p is too small.",
                "시드마다 나누기를 따로 했다. 나눈 것이 겹치므로 구간은 Nadeau–Bengio의 것이고, 정확 검정의 p는 "
                "너무 작다.",
            )
        ]
    return [
        Text(
            "One split for all seeds: the intervals say nothing of what another split would give.",
            "모든 시드가 한 번 나눈 것을 같이 쓴다. 다르게 나누었을 때의 결과는 구간에 들어 있지 않다.",
        )
    ]


def _protocol(data: OwnData, plan: Plan) -> Text:
    split = data.split(0)
    layers = "-".join(str(width) for width in (split.features, *HIDDEN, data.outputs))
    rates = f"{plan.rates[0]:.2g} … {plan.rates[-1]:.2g} (× {plan.factor:g})"
    batch = batch_size(data.train_rows)
    return Text(
        f"Data: {data.name.rsplit(' ', 1)[0]}, {len(data.target)} rows ({data.train_rows} for training, "
        f"{data.test_rows} for testing), {split.features} inputs after preprocessing; {data.task}. Columns are "
        f"standardised by the training part, but in the arms that say raw. Network: {layers}, ReLU, weights "
        f"N(0, 2/inputs), biases 0; dropout {DROPPED:g} after each hidden layer where named. Plain SGD, batch "
        f"{batch}, {plan.steps} steps, rates {rates}; best rates by the pilot seeds 1000-1002, which enter no "
        f"verdict. {plan.seeds} paired seeds: the same split, initial weights and batches in all arms.",
        f"데이터: {data.name.rsplit(' ', 1)[0]}, {len(data.target)}행 (학습 {data.train_rows}, 테스트 "
        f"{data.test_rows}), 전처리 뒤 입력 {split.features}개; {data.task}. 원래 값이라고 적은 경우 말고는 학습 "
        f"부분으로 열을 표준화한다. 신경망: {layers}, ReLU, 가중치 N(0, 2/입력 수), 편향 0; 적은 경우에만 "
        f"은닉층마다 드롭아웃 {DROPPED:g}. 단순 SGD, 배치 {batch}, {plan.steps}단계, 학습률 {rates}; 가장 좋은 "
        f"학습률은 판정에 쓰지 않는 예비 시드 1000-1002로 고른다. 짝지은 시드 {plan.seeds}개: 나누기, 초기 가중치, "
        f"배치가 모두 같다.",
    )


def _table(seen: Seen, arms: Sequence[str]) -> Table:
    rows = tuple(
        (ARMS[arm].words, f"{rate:.2g}", f"{score:.1f}") for arm, (rate, score) in columns_of(seen, arms).items()
    )
    title = Text("Each at its best rate, mean over seeds", "각각 가장 좋은 학습률에서, 시드의 평균")
    columns = (
        Text("network", "신경망"),
        Text("best rate", "가장 좋은 학습률"),
        Text(f"{seen.score} %", f"{seen.score.korean} %"),
    )
    return Table(title, columns, rows)
