"""The answers in plain words: what a user wants to know first, before any table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean
from typing import TypeAlias

from evenorm.lab.language import Text
from evenorm.lab.own.answers import POINTS, Seen, final
from evenorm.lab.results import Analysis, Endpoint, Verdict

REPRODUCED, WEAK = Verdict.REPRODUCED, Verdict.WEAK
INCONCLUSIVE, CONTRADICTED = Verdict.INCONCLUSIVE, Verdict.CONTRADICTED
NOTHING = 0.02  # of score above chance: a network that reaches no more has learned nothing

PACE = {
    REPRODUCED: Text("faster", "더 빠르다"),
    WEAK: Text("somewhat faster", "조금 더 빠르다"),
    INCONCLUSIVE: Text("neither measurably faster nor slower", "더 빠른지 느린지 알 수 없다"),
    CONTRADICTED: Text("slower", "더 느리다"),
}
END = {
    REPRODUCED: Text("better", "더 낫다"),
    WEAK: Text("a little better", "조금 더 낫다"),
    INCONCLUSIVE: Text("neither measurably better nor worse", "더 나은지 못한지 알 수 없다"),
    CONTRADICTED: Text("worse", "더 못하다"),
}
Tell: TypeAlias = "Callable[[Seen, Sequence[Endpoint]], Text]"


def told(name: str, seen: Seen, endpoints: Sequence[Endpoint]) -> Text:
    """Return the answer to a question in a sentence or two."""
    return _TELL[name](seen, endpoints)


def _points(endpoint: Endpoint) -> tuple[str, str]:
    values = (endpoint.estimate, endpoint.low, endpoint.high)
    numbers = [f"{round(value, 1) + 0.0:+.1f}" for value in values]  # + 0.0: no minus before a zero
    return "{} points ({} to {})".format(*numbers), "{}점 ({} ~ {})".format(*numbers)


def _speed(seen: Seen, endpoints: Sequence[Endpoint]) -> Text:
    steps, end = endpoints
    if seen.goal - seen.data.chance < NOTHING:
        return Text(
            "No answer: without batch norm the network learned nothing here beyond chance, so there is no pace to "
            "compare.",
            "답이 없다. 배치 정규화 없는 신경망이 우연 이상을 배우지 못해 속도를 비교할 수 없다.",
        )
    good = {endpoint.verdict for endpoint in endpoints} & {REPRODUCED, WEAK}
    bad = CONTRADICTED in {endpoint.verdict for endpoint in endpoints}
    lead = {
        (True, False): Text("Yes", "그렇다"),
        (True, True): Text("In part", "일부만 그렇다"),
        (False, True): Text("No", "아니다"),
        (False, False): Text("Not that this run could tell", "이 실행으로는 알 수 없다"),
    }[bool(good), bad]
    ratio, low, high = (2**value for value in (steps.estimate, steps.low, steps.high))
    points = _points(end)
    return Text(
        f"{lead}: with batch norm it trains {PACE[steps.verdict]} ({ratio:.1f} times fewer steps to "
        f"{100 * seen.goal:.0f} %, {low:.1f} to {high:.1f}) and ends {END[end.verdict]}, {points[0]}.",
        f"{lead.korean}: 배치 정규화를 쓰면 학습은 {PACE[steps.verdict].korean} ({100 * seen.goal:.0f} %까지의 "
        f"단계가 {ratio:.1f}분의 1, {low:.1f} ~ {high:.1f}). 끝은 {END[end.verdict].korean}, {points[1]}.",
    )


def _placement(seen: Seen, endpoints: Sequence[Endpoint]) -> Text:
    (difference,) = endpoints
    english, korean = _points(difference)
    if difference.verdict is INCONCLUSIVE:
        before, after = (mean(seen.grid.values(seen.best(arm), final)) for arm in ("before", "after"))
        return Text(
            f"No difference was seen, so either side is a fair choice: {before:.1f} % before the activation and "
            f"{after:.1f} % after it, {english}.",
            f"차이가 보이지 않았으니 어느 쪽이든 된다: 활성화 앞 {before:.1f} %, 뒤 {after:.1f} %, {korean}.",
        )
    side = ("after", "뒤") if difference.verdict is CONTRADICTED else ("before", "앞")
    return Text(
        f"Put it {side[0]} the activation: before − after gave {english}.",
        f"활성화 {side[1]}에 둔다. 앞 − 뒤는 {korean}이다.",
    )


def _max_rate(seen: Seen, endpoints: Sequence[Endpoint]) -> Text:
    rates = [seen.usable_to(arm) for arm in ("before", "none")]
    with_, without = (("no rate", "없음") if rate is None else (f"{rate:.2g}", f"{rate:.2g}") for rate in rates)
    top = (" (the highest one tried)", " (시험한 가장 큰 값)") if rates[0] == seen.grid.rates[-1] else ("", "")
    return Text(
        f"Up to a rate of {with_[0]}{top[0]} with batch norm, up to {without[0]} without: the largest rates, in "
        f"steps of × {seen.factor:g}, at which four of five seeds trained.",
        f"배치 정규화가 있으면 학습률 {with_[1]}{top[1]}까지, 없으면 {without[1]}까지다. 다섯 시드 중 넷이 학습된 "
        f"가장 큰 값이며, 칸은 × {seen.factor:g}이다.",
    )


def _init(seen: Seen, endpoints: Sequence[Endpoint]) -> Text:
    cost = {
        arm: mean((*seen.gain(arm, f"{arm}, small"), *seen.gain(arm, f"{arm}, large")))
        for arm in ("none", "before")
    }
    return Text(
        f"Weights ten times too small or too large cost {cost['none']:.1f} points without batch norm and "
        f"{cost['before']:.1f} with it.",
        f"가중치가 열 배 작거나 크면 배치 정규화가 없을 때 {cost['none']:.1f}점, 있을 때 {cost['before']:.1f}점을 "
        f"잃는다.",
    )


def _input_scale(seen: Seen, endpoints: Sequence[Endpoint]) -> Text:
    standardised, first = (_points(endpoint) for endpoint in endpoints)
    return Text(
        f"Against raw columns, standardising gave {standardised[0]}, and batch norm as the first layer {first[0]}.",
        f"원래 값의 열에 견주어 표준화는 {standardised[1]}, 첫 층의 배치 정규화는 {first[1]}이다.",
    )


def _overfitting(seen: Seen, endpoints: Sequence[Endpoint]) -> Text:
    gain = endpoints[1]
    english, korean = _points(gain)
    if gain.low > 0:
        lead = Text(
            "Yes, dropout still helps with batch norm", "그렇다. 배치 정규화가 있어도 드롭아웃이 도움이 된다"
        )
    elif gain.high < POINTS:
        lead = Text("No, not with batch norm", "아니다. 배치 정규화가 있으면 필요 없다")
    else:
        lead = Text("This run cannot tell", "이 실행으로는 알 수 없다")
    return Text(
        f"{lead}: there dropout changed the score by {english}.",
        f"{lead.korean}: 그때 드롭아웃은 점수를 {korean} 바꾸었다.",
    )


_TELL: dict[str, Tell] = {
    "speed": _speed,
    "placement": _placement,
    "max-rate": _max_rate,
    "init": _init,
    "input-scale": _input_scale,
    "overfitting": _overfitting,
}

ASKED = {
    "speed": Text("Does batch norm help here?", "배치 정규화가 여기서 도움이 되는가?"),
    "placement": Text("Where to put it?", "어디에 두는가?"),
    "max-rate": Text("Up to which rate?", "어느 학습률까지인가?"),
    "overfitting": Text("Is dropout still needed?", "드롭아웃이 아직 필요한가?"),
}


def advice(analyses: Sequence[Analysis]) -> tuple[tuple[Text, str], ...]:
    """Return what a user wants to know first, of the questions that were put."""
    found = {analysis.experiment: analysis.answer for analysis in analyses}
    return tuple((question, found[name]) for name, question in ASKED.items() if name in found)
