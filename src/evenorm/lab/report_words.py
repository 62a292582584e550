"""The fixed words of the report, in each language it is written in: one table, one switch."""

from __future__ import annotations

_ENGLISH = {
    "laboratory": "evenorm laboratory",
    "title": "Batch norm, claim by claim",
    "lede": (
        "What a Korean introduction to batch normalisation and the papers around it say, sentence by "
        "sentence, each as an experiment on real data. The rule for judging was written down before the "
        "first run, both sides of every comparison share their seeds, and what did not hold is shown as not "
        "holding."
    ),
    "advice": "In plain words",
    "skip": "Skip to the verdicts",
    "contents": "Contents",
    "verdicts": "Verdicts at a glance",
    "theme": "Light or dark",
    "download_json": "All numbers (JSON)",
    "download_csv": "Comparisons (CSV)",
    "no_script": (
        "The plots and the sliders need JavaScript, which is switched off. All verdicts and numbers below "
        "stand without it."
    ),
    "REPRODUCED": "Reproduced",
    "WEAK": "Weak",
    "INCONCLUSIVE": "Inconclusive",
    "CONTRADICTED": "Contradicted",
    "REPRODUCED_means": (
        "the whole interval lies beyond the margin: the effect is there, and large enough to matter. For a "
        "claim of no difference: the whole interval lies within the margin on either side"
    ),
    "WEAK_means": (
        "the interval excludes zero in the direction of the claim, but not the margin: there, but perhaps small"
    ),
    "INCONCLUSIVE_means": (
        "the interval contains zero: this run cannot tell, which does not say that there is no effect"
    ),
    "CONTRADICTED_means": (
        "the whole interval lies on the other side: the opposite was measured. For a claim of no difference: "
        "the whole interval lies beyond the margin"
    ),
    "how_to_read": "How to read the verdicts and the little plots",
    "glyph_means": (
        "Dot: the estimate over paired seeds. Bar: its 95 % interval. Solid line: no difference. Dashed "
        "line: the margin fixed beforehand. Tinted zone: differences too small to matter. The verdict is the "
        "interval's, under Holm's rule where there are several; p is of a second test, an exact one, and cannot be "
        "small with few seeds."
    ),
    "claim": "The claim",
    "claim_later": "What later work says",
    "published": "What was published",
    "published_value": "Published value",
    "published_setting": "Measured in",
    "published_source": "Source",
    "published_none": "No number was published for this claim.",
    "ours": "What we measured, from paired seeds",
    "comparison": "Comparison",
    "estimate": "Estimate",
    "interval": "95 % interval",
    "margin": "Margin",
    "p_value": "p (exact sign-flip)",
    "seeds": "Seeds",
    "verdict": "Verdict",
    "beyond_margin": "Beyond the margin means",
    "rule": "The rule, fixed before the run",
    "would_change": "What would change the verdict",
    "limits": "Limits of this measurement",
    "repeat": "Repeat it",
    "protocol": "Protocol",
    "configuration": "Configuration",
    "command": "Command",
    "copy_command": "Copy",
    "command_copied": "Copied",
    "figure_data": "Data of this plot (CSV)",
    "to_top": "Back to the verdicts",
    "layer": "A layer taken apart",
    "layer_lede": (
        "One unit of a trained network, and the four steps that its values go through. Move γ and β. With γ "
        "= 1 and β = 0 most inputs fall on or near the stretch from −1 to 1, where a sigmoid is almost a "
        "straight line: a layer that hardly bends. That is why batch norm learns a scale and a shift; “As "
        "learned” shows how far training took this unit."
    ),
    "layer_korean": (
        "위 그림과 같이 Scaling & Shifting을 적용하지 않으면 sigmoid의 입력값이 -1~1 사이로 출력 값의 형태가 "
        "거의 직선이다."
    ),
    "layer_english": (
        "As in the figure above, without scaling and shifting the sigmoid's inputs lie between −1 and 1, and "
        "its output is almost a straight line."
    ),
    "gamma": "γ, the scale",
    "beta": "β, the shift",
    "activation": "Activation",
    "neutral": "γ = 1, β = 0",
    "learned": "As learned",
    "stage_before": "Before",
    "stage_standardised": "Standardised",
    "stage_scaled": "Scaled and shifted",
    "stage_after": "After the activation",
    "straight_share": "of the inputs lie between −1 and 1",
    "straight_fit": "of the output is explained by a straight line",
    "saturated_share": "of the inputs are saturated",
    "cut_share": "of the inputs are cut to zero",
    "straight_stretch": "straight stretch",
    "best_line": "best straight line",
    "input": "input of the activation",
    "output": "output",
    "beyond_axis": "beyond the axis",
    "mean_std": "mean {mean}, std {std}",
    "environment": "How these numbers came about",
    "environment_lede": (
        "The machine and the versions that wrote this report; trials that were stored before may come from others. "
        "Other machines and versions of torch round differently: a verdict near its border may change with them."
    ),
    "standalone": (
        "This page is one file. It asks for nothing from outside, and every number in it can be downloaded above."
    ),
}

_KOREAN = {
    "laboratory": "evenorm 실험실",
    "title": "배치 정규화, 주장 하나하나",
    "lede": (
        "배치 정규화를 소개하는 글 한 편과 관련 논문의 주장을 한 문장씩 실제 데이터로 실험했다. 판정 규칙은 "
        "첫 실행 전에 적어 두었고, 비교하는 양쪽은 같은 시드를 쓴다. 맞지 않은 주장은 맞지 않았다고 그대로 "
        "보여 준다."
    ),
    "advice": "쉬운 말로",
    "skip": "판정으로 건너뛰기",
    "contents": "차례",
    "verdicts": "한눈에 보는 판정",
    "theme": "밝게 또는 어둡게",
    "download_json": "모든 수치 (JSON)",
    "download_csv": "비교 결과 (CSV)",
    "no_script": ("JavaScript가 꺼져 있어 그림과 슬라이더가 보이지 않는다. 판정과 수치는 그대로 읽을 수 있다."),
    "REPRODUCED": "재현됨",
    "WEAK": "약함",
    "INCONCLUSIVE": "판단 보류",
    "CONTRADICTED": "반대로 나옴",
    "REPRODUCED_means": (
        "구간 전체가 기준 폭을 넘는다. 효과가 있고, 의미 있을 만큼 크다. 차이가 없다는 주장이면 구간 전체가 "
        "양쪽 기준 폭 안에 있다"
    ),
    "WEAK_means": "구간이 주장한 방향으로 0을 벗어나지만 기준 폭은 넘지 못한다. 있기는 하나 작을 수 있다",
    "INCONCLUSIVE_means": "구간이 0을 포함한다. 이 실행으로는 알 수 없으며, 효과가 없다는 뜻은 아니다",
    "CONTRADICTED_means": (
        "구간 전체가 반대쪽에 있다. 주장과 반대로 측정되었다. 차이가 없다는 주장이면 구간 전체가 기준 폭 밖에 있다"
    ),
    "how_to_read": "판정과 작은 그림 읽는 법",
    "glyph_means": (
        "점: 짝지은 시드에서 얻은 추정값. 막대: 95 % 구간. 실선: 차이 없음. 점선: 미리 정한 기준 폭. 옅은 "
        "영역: 의미를 두기에는 작은 차이. 판정은 구간이 정하며, 비교가 여럿이면 Holm의 규칙을 "
        "따른다. p는 따로 하는 정확 검정의 것으로, 시드가 적으면 작아질 수 없다."
    ),
    "claim": "주장",
    "claim_later": "이후 연구의 주장",
    "published": "발표된 값은",
    "published_value": "발표된 값",
    "published_setting": "측정 조건",
    "published_source": "출처",
    "published_none": "이 주장에 대해 발표된 수치는 없다.",
    "ours": "우리가 잰 값 (짝지은 시드)",
    "comparison": "비교",
    "estimate": "추정값",
    "interval": "95 % 구간",
    "margin": "기준 폭",
    "p_value": "p (정확 부호 뒤집기 검정)",
    "seeds": "시드",
    "verdict": "판정",
    "beyond_margin": "기준 폭을 넘으면",
    "rule": "실행 전에 정한 판정 규칙",
    "would_change": "무엇이 판정을 바꾸는가",
    "limits": "이 측정의 한계",
    "repeat": "다시 해 보기",
    "protocol": "실험 방법",
    "configuration": "설정",
    "command": "명령",
    "copy_command": "복사",
    "command_copied": "복사됨",
    "figure_data": "이 그림의 수치 (CSV)",
    "to_top": "판정으로 돌아가기",
    "layer": "층 하나를 뜯어보기",
    "layer_lede": (
        "학습된 신경망의 유닛 하나와, 그 값이 거치는 네 단계다. γ와 β를 움직여 보라. γ = 1, β = 0이면 입력 "
        "대부분이 −1과 1 사이나 그 가까이에 놓이는데, 여기서 sigmoid는 거의 직선이다. 거의 휘지 않는 층이 "
        "되므로 배치 정규화는 크기와 이동을 학습한다. 「학습된 값」을 누르면 이 유닛이 학습에서 얼마나 "
        "움직였는지 보인다."
    ),
    "layer_korean": _ENGLISH["layer_korean"],
    "layer_english": _ENGLISH["layer_english"],
    "gamma": "γ, 크기 (scale)",
    "beta": "β, 이동 (shift)",
    "activation": "활성화 함수",
    "neutral": "γ = 1, β = 0",
    "learned": "학습된 값",
    "stage_before": "정규화 전",
    "stage_standardised": "표준화 후",
    "stage_scaled": "크기와 이동 적용 후",
    "stage_after": "활성화 함수 통과 후",
    "straight_share": "입력 가운데 −1과 1 사이에 있는 비율",
    "straight_fit": "출력 변동 가운데 직선으로 설명되는 비율",
    "saturated_share": "입력 가운데 포화된 비율",
    "cut_share": "입력 가운데 0으로 잘린 비율",
    "straight_stretch": "직선 구간",
    "best_line": "가장 가까운 직선",
    "input": "활성화 함수의 입력",
    "output": "출력",
    "beyond_axis": "축 밖",
    "mean_std": "평균 {mean}, 표준편차 {std}",
    "environment": "이 수치가 나온 환경",
    "environment_lede": (
        "이 보고서를 쓴 컴퓨터와 버전이다. 먼저 저장된 시행은 다른 컴퓨터에서 왔을 수 있다. 다른 컴퓨터와 "
        "다른 버전의 torch는 반올림이 다르므로, 경계에 가까운 판정은 달라질 수 있다."
    ),
    "standalone": (
        "이 페이지는 파일 하나다. 바깥에 아무것도 요청하지 않으며, 모든 수치를 위에서 내려받을 수 있다."
    ),
}

WORDS = {"en": _ENGLISH, "ko": _KOREAN}


def words(language: str) -> dict[str, str]:
    """The table of `language`, "en" or "ko".

    Raises:
        ValueError: a language that the report is not written in.
    """
    if language not in WORDS:
        raise ValueError(f"language must be one of {', '.join(sorted(WORDS))}, got {language!r}")
    return WORDS[language]
