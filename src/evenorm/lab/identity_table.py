"""The exact statements about batch norm by name: what each compares, where it stands, and how far off it may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from evenorm.lab import identities, symmetries, variance_rounding
from evenorm.lab.identities import LAYER64, LAYERS, PRINTED, ROUNDINGS, ROUTES, Route
from evenorm.lab.language import Text


@dataclass(frozen=True)
class Identity:
    """One statement: what is compared, where it stands, and by which routes it is tested."""

    label: Text
    statement: str
    source: Text
    error: Callable[[Route], float]
    routes: tuple[Route, ...] = ROUTES
    limit: float = 0.0  # 0: so many roundings of the route's type

    def bound(self, route: Route) -> float:
        """Return the largest error that still counts as rounding."""
        return self.limit or ROUNDINGS * route.rounding


ALGORITHM_1 = Text("Ioffe & Szegedy 2015, algorithm 1", "Ioffe & Szegedy 2015, 알고리즘 1")
ALGORITHM_2 = Text("Ioffe & Szegedy 2015, algorithm 2", "Ioffe & Szegedy 2015, 알고리즘 2")


def _section(number: str) -> Text:
    return Text(f"Ioffe & Szegedy 2015, section {number}", f"Ioffe & Szegedy 2015, {number}절")


def _equation(number: str) -> Text:
    return Text(f"docs/math.md, equation {number}", f"docs/math.md, 식 {number}")


IDENTITIES = {
    "forward": Identity(Text("forward", "순전파"), "y = γx̂ + β", ALGORITHM_1, identities.forward, LAYERS),
    "backward printed": Identity(
        Text("backward, six lines", "역전파, 여섯 줄"),
        "∂ℓ/∂x̂, ∂ℓ/∂σ², ∂ℓ/∂μ, ∂ℓ/∂x, ∂ℓ/∂γ, ∂ℓ/∂β",
        _section("3"),
        identities.backward_printed,
    ),
    "backward short": Identity(
        Text("backward, one line", "역전파, 한 줄"),
        "dx = γs(g − ⟨g⟩ − x̂⟨gx̂⟩)",
        _equation("8"),
        identities.backward_short,
    ),
    "two": Identity(
        Text("batch of two", "크기 2인 배치"), "m = 2, ε = 0: dx = 0", _equation("8"), identities.backward_of_two
    ),
    "double backward": Identity(
        Text("double backward", "두 번 미분"),
        "∂Φ/∂x = −γs²(c x̂ + ⟨gx̂⟩Au + ⟨ux̂⟩Ag) + a s Ag",
        _equation("12–16"),
        identities.double_backward,
    ),
    "central differences": Identity(
        Text("… by differences", "… 차분으로"),
        "⟨∂Φ/∂x, d⟩ = (Φ(x + hd) − Φ(x − hd)) / 2h",
        _equation("12–16"),
        identities.central_differences,
        (LAYER64, PRINTED),
        limit=1e-6,
    ),
    "inference": Identity(
        Text("inference", "추론"),
        "y = γ/√(V + ε) · x + (β − γE/√(V + ε))",
        ALGORITHM_2,
        identities.inference,
        LAYERS,
    ),
    "folding": Identity(
        Text("folding", "합치기"), "BN(Wx + b) = W′x + b′", _section("3.1"), identities.folding, LAYERS
    ),
    "cumulative": Identity(
        Text("plain average", "단순 평균"),
        "E = E[μ_B], V = m/(m − 1) · E[σ²_B]",
        ALGORITHM_2,
        identities.cumulative,
        LAYERS,
    ),
    "with replacement": Identity(
        Text("all batches, redrawn", "모든 배치, 복원"),
        "m/(m − 1) · E[σ²_B] = σ²",
        _section("3.1"),
        identities.with_replacement,
    ),
    "without replacement": Identity(
        Text("all batches, distinct", "모든 배치, 비복원"),
        "m/(m − 1) · E[σ²_B] = N/(N − 1) · σ²",
        _section("3.1"),
        identities.without_replacement,
    ),
    "total variance": Identity(
        Text("total variance", "전체 분산"),
        "σ² = E[σ²_B] + V[μ_B]",
        _equation("5"),
        identities.total_variance,
        LAYERS,
    ),
    "any order": Identity(
        Text("merging in any order", "순서 없는 병합"),
        "(A + B) + C = C + (B + A)",
        _equation("4"),
        identities.any_order,
        LAYERS,
    ),
    "variance": Identity(
        Text("variance, κ to 10⁵", "분산, κ ≤ 10⁵"),
        "σ² = Σ(x − μ)² / m",
        Text("Chan, Golub & LeVeque 1983; truth exact", "Chan, Golub & LeVeque 1983; 참값은 정확"),
        variance_rounding.worst,
        LAYERS,
    ),
    "constant": Identity(
        Text("constant channel", "상수 채널"), "x = c: y = β", _equation("2"), symmetries.constant_channel, LAYERS
    ),
    "largest": Identity(
        Text("largest value", "가장 큰 값"), "|x̂| ≤ √(m − 1)", _equation("1"), symmetries.largest_value
    ),
    "own channel": Identity(
        Text("NaN stays at home", "NaN은 제 채널에만"), "x₅ = NaN: Δy₁ = 0", _equation("1"), symmetries.own_channel
    ),
    "scaled weights": Identity(
        Text("scaled weights", "가중치의 배율"),
        "BN((aW)u) = BN(Wu), ∂/∂(aW) = (1/a) ∂/∂W",
        _section("3.3"),
        symmetries.scaled_weights,
    ),
    "scaled training": Identity(
        Text("scaled training", "배율을 둔 학습"),
        "ℓₜ(aW₀, a²η) = ℓₜ(W₀, η)",
        Text("Arora, Li & Lyu 2018; here 50 steps, two layers", "Arora, Li & Lyu 2018; 여기서는 50걸음, 두 층"),
        symmetries.scaled_training,
    ),
    "radial": Identity(
        Text("gradient along w", "w 방향의 기울기"),
        "⟨w, ∂ℓ/∂w⟩ = ε/(σ² + ε) · γ ∂ℓ/∂γ",
        _equation("8"),
        symmetries.radial_gradient,
    ),
    "theorem 4.1": Identity(
        Text("theorem 4.1, 1/m", "정리 4.1, 1/m"),
        "‖∂ℓ/∂x‖² = γ²/σ² (‖g‖² − ⟨1, g⟩²/m − ⟨g, x̂⟩²/m)",
        Text("Santurkar et al. 2018, theorem 4.1, corrected", "Santurkar et al. 2018, 고친 정리 4.1"),
        symmetries.theorem_corrected,
    ),
    "theorem 4.2": Identity(
        Text("theorem 4.2", "정리 4.2"),
        "vᵀHₓv = γ²/σ² vᵀHv − γ/(mσ²) ⟨g, x̂⟩‖v‖², v = ∂ℓ/∂x",
        Text("Santurkar et al. 2018, theorem 4.2, an equality", "Santurkar et al. 2018, 정리 4.2, 등식으로"),
        symmetries.curvature,
    ),
}
