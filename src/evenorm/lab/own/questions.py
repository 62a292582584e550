"""Six questions put to a user's data, by trials that they share: an arm at a rate serves all that ask for it."""

from __future__ import annotations

from dataclasses import dataclass

from evenorm.lab.language import Text
from evenorm.lab.own import answers
from evenorm.lab.own.answers import Compare, Draw, by_rate, by_weights, curves


@dataclass(frozen=True)
class Question:
    """One question: the claim behind it, the arms it compares, and how."""

    title: Text
    korean: str
    english: str
    question: Text
    arms: tuple[str, ...]
    compare: Compare
    draw: tuple[Draw, ...]
    rule: Text


QUESTIONS = {
    "speed": Question(
        Text("Training speed", "학습 속도"),
        "학습 속도 & 학습 결과가 개선된다 (Higer learning rate 적용 가능). 핵심은 학습 속도의 향상이다.",
        "Training speed and the trained result improve (higher learning rates become usable). The core is faster "
        "training.",
        Text(
            "Does batch norm train faster on this data, and end better?",
            "이 데이터에서 배치 정규화를 쓰면 더 빨리, 더 좋게 학습되는가?",
        ),
        ("none", "before"),
        answers.speed,
        (curves("none", "before"),),
        Text(
            "REPRODUCED if the 95 % interval of log₂(steps without / steps with) lies above 1, WEAK if above 0. "
            "The goal is 90 % of the way from chance to the final score without batch norm; never reached counts "
            "as the last step. Beside it the final score, margin 1 point.",
            "log₂(없을 때의 단계 / 있을 때의 단계)의 95 % 구간이 1보다 크면 재현됨, 0보다 크면 약함. 목표는 우연 "
            "수준에서 배치 정규화 없는 마지막 점수까지의 90 % 지점이고, 닿지 못하면 마지막 단계로 센다. 그 밖에 "
            "마지막 점수, 기준 폭 1점.",
        ),
    ),
    "max-rate": Question(
        Text("Highest learning rate", "가장 큰 학습률"),
        "Higer learning rate 적용 가능",
        "Higher learning rates become usable.",
        Text(
            "Up to which rate does a network train on this data, with batch norm and without?",
            "이 데이터에서 신경망은 어느 학습률까지 학습되는가?",
        ),
        ("none", "before"),
        answers.max_rate,
        (by_rate("none", "before"),),
        Text(
            "A rate is usable for a seed if training does not diverge and the training loss falls below halfway "
            "from an untrained network's to the lowest of the pilot seeds. REPRODUCED if the interval of the "
            "difference lies above one step of the grid, WEAK if above 0.",
            "발산하지 않고 학습 손실이 학습 전과 예비 시드의 최저값의 중간보다 낮아지면 그 시드에서 쓸 수 있는 "
            "학습률이다. 차이의 구간이 격자 한 칸보다 크면 재현됨, 0보다 크면 약함.",
        ),
    ),
    "init": Question(
        Text("Initial weights", "초기 가중치"),
        "가중치 초기값에 크게 의존하지 않는다 (매 layer마다 정규화를 진행하므로 초기화의 중요도 감소)",
        "Training depends little on the initial weights (each layer is normalised, so initialisation matters "
        "less).",
        Text(
            "What do initial weights ten times too small or too large cost on this data?",
            "이 데이터에서 초기 가중치가 열 배 작거나 크면 무엇을 잃는가?",
        ),
        ("none", "before", "none, small", "none, large", "before, small", "before, large"),
        answers.init,
        (by_weights,),
        Text(
            "Every scale of the weights has its own best rate. REPRODUCED if the interval of (loss of score "
            "without − with) lies above 5 points, WEAK if above 0.",
            "가중치의 크기마다 가장 좋은 학습률을 따로 고른다. 잃는 점수의 차이(없음 − 있음)의 구간이 5점보다 크면 "
            "재현됨, 0보다 크면 약함.",
        ),
    ),
    "input-scale": Question(
        Text("Columns of different scale", "크기가 다른 열"),
        "input data에 대해 Standardization과 같은 Normalization을 적용하면 전반적으로 model의 성능이 높아진다. "
        "데이터 내 Column들의 Scale에 모델이 너무 민감해지는 것을 막아주기 때문이다.",
        "Normalising the input data, by standardisation for instance, raises a model's performance in general, "
        "because it keeps the model from being too sensitive to the scales of the columns.",
        Text(
            "Must this data be standardised, and can batch norm do it?",
            "이 데이터를 표준화해야 하는가, 배치 정규화가 대신할 수 있는가?",
        ),
        ("none", "raw", "raw, first"),
        answers.input_scale,
        (by_rate("raw", "none", "raw, first"),),
        Text(
            "REPRODUCED if the interval of (standardised − raw) lies above 1 point, WEAK if above 0.",
            "표준화한 열 − 원래 값의 열의 구간이 1점보다 크면 재현됨, 0보다 크면 약함.",
        ),
    ),
    "placement": Question(
        Text("Before or after the activation", "활성화 앞 또는 뒤"),
        "Activation function을 적용하기 전에 Batch normalization을 먼저 적용한다 (앞과 뒤 중 어느 쪽에 삽일할 지는 "
        "논의/실험 중)",
        "Batch normalisation is applied before the activation function (which side to insert it on is under "
        "debate).",
        Text("Where should batch norm stand on this data?", "이 데이터에서 배치 정규화는 어디에 두어야 하는가?"),
        ("before", "after"),
        answers.placement,
        (curves("before", "after"), by_rate("before", "after")),
        Text(
            "REPRODUCED if the interval of (before − after) lies above 1 point, WEAK if above 0, CONTRADICTED if "
            "below 0: then after is better. INCONCLUSIVE: no difference was seen.",
            "앞 − 뒤의 구간이 1점보다 크면 재현됨, 0보다 크면 약함, 0보다 작으면 반대로 나옴(뒤가 낫다). 판단 "
            "보류: 차이가 보이지 않았다.",
        ),
    ),
    "overfitting": Question(
        Text("Overfitting and dropout", "과적합과 드롭아웃"),
        "Overfitting을 억제한다 (dropout, L1/L2 regularization 등의 필요성 감소)",
        "Overfitting is suppressed (dropout, L1 and L2 regularisation are needed less).",
        Text(
            "Is dropout still needed with batch norm on this data?",
            "이 데이터에서 배치 정규화를 쓰면 드롭아웃이 아직 필요한가?",
        ),
        ("none", "before", "none, dropout", "before, dropout"),
        answers.overfitting,
        (by_rate("none", "none, dropout", "before", "before, dropout"),),
        Text(
            "REPRODUCED if the interval of (gain of dropout without batch norm − with) lies above 1 point, WEAK if "
            "above 0. Beside it: with batch norm dropout changes the score by less than 1 point.",
            "드롭아웃으로 얻는 점수의 차이(배치 정규화 없음 − 있음)의 구간이 1점보다 크면 재현됨, 0보다 크면 약함. "
            "그 밖에, 배치 정규화가 있으면 드롭아웃이 점수를 1점 넘게 바꾸지 않는다.",
        ),
    ),
}
