"""Each check finds what was planted, in numbers, and nothing in a network that is well."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import evenorm
from evenorm.doctor.findings import Finding, Severity, alike, counted, ranked
from evenorm.doctor.measure import scored
from evenorm.doctor.streams import _within
from evenorm.inputs import load_weights


def network(**options) -> nn.Sequential:
    """Return a network whose batch norm has seen a hundred batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, **options), nn.ReLU(), nn.Linear(6, 3))
    for batch in 4 * torch.randn(100, 16, 4):
        model(batch)
    return model


def only(diagnosis, code: str):
    found = [finding for finding in diagnosis.findings if finding.code == code]
    assert len(found) == 1, diagnosis
    return found[0]


def test_a_healthy_network_has_no_finding():
    assert evenorm.diagnose(network()).findings == ()
    assert evenorm.diagnose(network().state_dict()).findings == ()
    assert evenorm.diagnose(network()).summary == "nothing is wrong in 1 batch norm layer"


def plant(key: str, value, entries=slice(None)):
    def change(state) -> None:
        state[key][entries] = value

    return change


def halve(state) -> None:
    state["1.running_mean"], state["1.running_var"] = (
        state[f"1.running_{kind}"].half() for kind in ("mean", "var")
    )


def reset(state) -> None:
    state["1.running_mean"].zero_()
    state["1.running_var"].fill_(1)


PLANTED = [
    ("not-finite", Severity.ERROR, plant("1.running_mean", math.nan, 2), {"tensor": "running_mean", "channels": 1}),
    ("not-finite", Severity.ERROR, plant("1.weight", math.inf, 0), {"tensor": "weight", "channels": 1}),
    ("not-finite", Severity.ERROR, plant("3.weight", math.nan, 0), {"tensor": "weight", "values": 6, "of": 18}),
    ("negative-variance", Severity.ERROR, plant("1.running_var", -0.5, 1), {"channels": 1, "smallest": -0.5}),
    ("zero-variance", Severity.WARNING, plant("1.running_var", 0.0, 1), {"channels": 1, "of": 6}),
    ("never-updated", Severity.ERROR, reset, {"updates": 100}),
    ("never-updated", Severity.WARNING, plant("1.num_batches_tracked", 0, ...), {"updates": 0}),
    (
        "stale-statistics",
        Severity.ERROR,
        plant("1.num_batches_tracked", 10, ...),
        {"momentum": 0.1, "updates": 10, "initial value left in %": 34.9},
    ),
    ("stale-statistics", Severity.WARNING, plant("1.num_batches_tracked", 20, ...), {"updates": 20}),
    ("dead-channels", Severity.NOTE, plant("1.weight", 0.0, slice(2)), {"channels": 2, "of": 6}),
    ("dead-channels", Severity.WARNING, plant("1.weight", 0.0, slice(4)), {"channels": 4, "of": 6}),
    ("eps-dominates", Severity.NOTE, plant("1.running_var", 1e-6, 0), {"channels": 1, "eps": 1e-5}),
    ("half-precision-statistics", Severity.WARNING, halve, {"dtype": "torch.float16"}),
    ("out-of-scale", Severity.WARNING, plant("1.running_var", 1e12, 0), {"tensor": "running_var", "largest": 1e12}),
    ("out-of-scale", Severity.WARNING, plant("1.weight", 1e9, 0), {"tensor": "weight"}),
]


@pytest.mark.parametrize(
    ("code", "severity", "change", "evidence"),
    PLANTED,
    ids=lambda value: getattr(value, "__name__", str(value))[:24],
)
def test_what_is_planted_in_a_checkpoint_is_found(code, severity, change, evidence):
    state = network().state_dict()
    change(state)
    found = next(finding for finding in evenorm.diagnose(state).findings if finding.code == code)
    assert found.severity == severity
    assert found.layer == ("3" if "values" in evidence else "1")
    for name, value in evidence.items():
        assert found.evidence[name] == (pytest.approx(value) if isinstance(value, float) else value)
    assert found.cause
    assert found.cure


def test_a_bias_that_does_nothing():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6))
    found = [finding for finding in evenorm.diagnose(model.state_dict()).findings if finding.code == "idle-bias"]
    assert [(one.layer, one.evidence) for one in found] == [("1", {"parameter": "0.bias"})]
    assert found == [one for one in evenorm.diagnose(model).findings if one.code == "idle-bias"]


class Block(nn.Module):
    """Batch norm in front of the convolution: nothing is idle here, though "conv1" comes before "norm1" by name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1)

    def forward(self, x):
        return self.conv1(self.norm1(x))


def test_findings_do_not_depend_on_the_order_of_keys(tmp_path):
    pairs = [nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)) for _ in range(6)]
    model = nn.Sequential(*(layer for pair in pairs for layer in pair), Block())
    state = model.state_dict()
    torch.save(state, tmp_path / "w.pt")
    save_file(state, tmp_path / "w.safetensors")
    backwards = dict(reversed(state.items()))
    told = [evenorm.diagnose(load_weights(tmp_path / name)).to_dict() for name in ("w.pt", "w.safetensors")]
    assert told[0] == told[1] == evenorm.diagnose(backwards).to_dict()
    assert [layer["name"] for layer in told[0]["layers"]] == [*map(str, range(1, 12, 2)), "12.norm1"]
    idle = [found["evidence"]["parameter"] for found in told[0]["findings"] if found["code"] == "idle-bias"]
    assert idle == [f"{index}.bias" for index in range(0, 12, 2)]


@pytest.mark.parametrize("live", [True, False])
def test_a_bias_with_an_activation_behind_it_does_something(live):
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.BatchNorm1d(6))
    findings = evenorm.diagnose(model if live else model.state_dict()).findings
    assert [found.code for found in findings] == ["never-updated"]


def test_names_of_any_length_are_no_trouble():
    state = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6)).state_dict()
    long = "9" * 6000
    state = {f"{long}.{name}": tensor for name, tensor in state.items()} | {f"{long}1.bias": torch.zeros(6)}
    assert [layer.name for layer in evenorm.diagnose(state).layers] == [f"{long}.1"]


def test_momentum_is_the_layers_own_where_there_is_one():
    """0.99 ** 100 is 37 %; debiased and cumulative averages leave nothing of the initial value."""
    model = network(momentum=0.01)
    assert only(evenorm.diagnose(model), "stale-statistics").evidence["initial value left in %"] == 36.6
    assert (
        evenorm.diagnose(model).summary
        == "the running statistics of 1 layer are stale (momentum 0.01, 100 updates)"
    )
    evenorm.convert(model)
    model[1].average = evenorm.Exponential(0.01, debias=True)
    assert evenorm.diagnose(model).findings == ()
    assert evenorm.diagnose(network(momentum=None)).findings == ()


def test_one_is_not_said_in_the_plural():
    layer = nn.BatchNorm1d(1)
    layer(torch.randn(8, 1))
    told = str(evenorm.diagnose(layer))
    assert "(momentum 0.1, 1 update)" in told
    assert "after 1 update with momentum 0.1" in told
    with torch.no_grad():
        layer.running_var.fill_(0)
    assert "nothing varies in 1 channel:" in str(evenorm.diagnose(layer))
    assert [counted(number, "batch", "batches") for number in (0, 1, 2)] == ["0 batches", "1 batch", "2 batches"]
    assert [counted(number, "layer") for number in (0, 1, 2)] == ["0 layers", "1 layer", "2 layers"]


def test_calibrated_statistics_are_not_stale():
    """Ten batches at momentum 0.1 would leave 35 %, but calibration counts its batches and leaves nothing."""
    model, data = network(momentum=0.1), [torch.randn(64, 4) / 3 for _ in range(10)]
    evenorm.calibrate(model, data)
    assert evenorm.diagnose(model, data).findings == ()
    assert float(model[1].running_var.min()) < 0.9**10
    assert evenorm.diagnose(model.state_dict()).findings == ()
    model[1].running_var.clamp_(min=0.9**10)
    assert only(evenorm.diagnose(model.state_dict()), "stale-statistics").severity == Severity.ERROR


def test_one_layer_tells_that_the_others_were_calibrated_with_it():
    """A variance above what is left of 1 refutes nothing; a neighbour's below it does, with the same counter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6))
    evenorm.calibrate(model, [100 * torch.randn(64, 4) for _ in range(10)])
    assert float(model[0].running_var.min()) > 0.9**10 > float(model[2].running_var.min())
    assert evenorm.diagnose(model.state_dict()).findings == ()
    model[0].num_batches_tracked.fill_(11)
    assert only(evenorm.diagnose(model.state_dict()), "stale-statistics").layer == "0"


def test_modes():
    model = network().eval()
    model[1].train()
    assert only(evenorm.diagnose(model), "wrong-mode").severity == Severity.ERROR
    model.train()
    model[1].eval()
    assert only(evenorm.diagnose(model), "wrong-mode").severity == Severity.WARNING


def test_frozen_by_halves():
    model = network()
    model[1].requires_grad_(False)
    assert only(evenorm.diagnose(model), "frozen-weights").severity == Severity.WARNING
    assert only(evenorm.diagnose(evenorm.freeze(network())), "frozen-statistics").severity == Severity.NOTE
    assert evenorm.diagnose(evenorm.freeze(network(), affine=True)).findings == ()


def test_statistics_that_are_not_kept():
    assert only(evenorm.diagnose(network(track_running_stats=False)), "no-running-statistics").severity == 2
    model = network()
    model[1].track_running_stats = False
    assert "switched off" in only(evenorm.diagnose(model), "no-running-statistics").cause


def test_one_layer_in_two_places():
    shared = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared)
    data = [torch.randn(16, 4) for _ in range(4)]
    assert only(evenorm.diagnose(model), "shared-layer").evidence == {"places": 2}
    found = [one for one in evenorm.diagnose(model, data).findings if one.code == "shared-layer"]
    assert {"uses a batch": 2.0} in [one.evidence for one in found]


@pytest.mark.parametrize(
    ("between", "severity", "size"), [([], Severity.WARNING, 0.5), ([nn.Linear(4, 4)], Severity.NOTE, "up to 1")]
)
def test_dropout_upstream(between, severity, size):
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), *between, nn.BatchNorm1d(4))
    found = only(evenorm.diagnose(model), "dropout-in-front")
    assert (found.severity, found.evidence["variance in eval() / train()"]) == (severity, size)


def test_the_shift_that_dropout_makes_is_measured():
    """Inputs of mean 0: the variance in eval() is 1 - p of that in train() (Li et al. 2018, case a)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 3))
    data = list(torch.randn(200, 64, 4))
    for batch in data:
        model(batch)
    found = only(evenorm.diagnose(model, data), "dropout-shift")
    assert found.evidence["exact / running variance"] == pytest.approx(0.5, rel=0.1)
    assert found.evidence["expected where the mean is 0"] == 0.5


def test_weight_decay_that_reaches_batch_norm():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
    found = only(evenorm.diagnose(model, optimizer=optimizer), "weight-decay")
    assert found.evidence == {"layers": 1, "of": 1, "weight_decay": 0.01}
    spared = torch.optim.SGD(
        [{"params": model[0].parameters(), "weight_decay": 0.01}, {"params": model[1].parameters()}], lr=0.1
    )
    assert evenorm.diagnose(model, optimizer=spared).findings == ()


def test_workers_that_do_not_pool(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    model = nn.Sequential(*network(), nn.BatchNorm1d(3))
    assert only(evenorm.diagnose(model), "not-pooled").severity == Severity.NOTE
    evenorm.convert(model)
    model[1].process_group = "world"
    found = only(evenorm.diagnose(model), "not-pooled")
    assert (found.severity, found.layer, found.evidence["layers"]) == (Severity.WARNING, "4", 1)


def test_checkpointed_blocks():
    model = nn.Sequential(network())
    model[0].gradient_checkpointing = True
    assert only(evenorm.diagnose(model), "recomputed").evidence == {"block": "0"}
    assert evenorm.diagnose(evenorm.convert(model, fuse=False)).findings == ()


@pytest.mark.parametrize(
    ("activation", "code"), [(nn.ReLU(), "dead-relu"), (nn.Sigmoid(), "saturated"), (nn.Tanh(), "saturated")]
)
def test_channels_that_the_activation_loses(activation, code):
    model = network()
    model[2] = activation
    with torch.no_grad():
        model[1].bias[:2] = -20
    found = only(evenorm.diagnose(model, [torch.randn(16, 4) for _ in range(4)]), code)
    assert (found.layer, found.evidence["channels"], found.evidence["of"]) == ("1", 2, 6)


def test_a_relu_that_is_fused_is_seen():
    model = evenorm.convert(network())
    with torch.no_grad():
        model[1].bias[:2] = -20
    assert only(evenorm.diagnose(model, [torch.randn(16, 4)]), "dead-relu").evidence["channels"] == 2


class Dropping(nn.Module):
    """Dropout as a function: no module tells of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.norm(nn.functional.dropout(self.first(x), 0.5, self.training)))


def test_a_dropout_that_is_called_is_seen():
    torch.manual_seed(0)
    model, data = Dropping(), list(torch.randn(200, 64, 4))
    for batch in data:
        model(batch)
    found = only(evenorm.diagnose(model, data), "dropout-shift")
    assert (found.layer, found.evidence["p"]) == ("norm", 0.5)
    assert found.evidence["exact / running variance"] == pytest.approx(0.5, rel=0.1)


def test_statistics_of_the_last_few_batches():
    """Momentum 0.9 leaves about the last batch alone: by chance as far off as a batch's own mean, and as bad."""
    model, data = network(momentum=0.9), list(4 * torch.randn(40, 12, 4))
    evenorm.calibrate(model, data)
    with torch.no_grad():
        labelled = [(batch, model.eval()(batch).argmax(1)) for batch in data]
        model.train()(4 * torch.randn(12, 4))
    diagnosis = evenorm.diagnose(model, labelled)
    found, scores = diagnosis.findings[0], diagnosis.scores
    assert (found.code, found.severity, found.evidence["momentum"]) == ("noisy-statistics", Severity.ERROR, 0.9)
    assert found.harm == 1
    assert scores.exact == 1
    assert scores.lost == 1 - scores.running > scores.batch - scores.running
    assert "those of the last few batches (momentum 0.9)" in diagnosis.summary


@pytest.mark.parametrize(("momentum", "told"), [(None, "None"), (0.004, 0.004), (0.1, "")])
def test_statistics_of_older_weights(momentum, told):
    torch.manual_seed(0)
    model, data = network(momentum=momentum), list(4 * torch.randn(20, 64, 4))
    model[1].num_batches_tracked.fill_(2000)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    found = evenorm.diagnose(model, data).findings[0]
    assert found.code == ("lagging-statistics" if told else "foreign-statistics")
    assert found.evidence.get("momentum", "") == told


@pytest.mark.parametrize("streams", [1, 2, 3, 4])
def test_streams_are_counted(streams):
    torch.manual_seed(0)
    model = network()
    data = [4 * torch.randn(16, 4) + 6 * (number % streams) * torch.ones(4) for number in range(40)]
    for batch in 5 * data:
        model(batch)
    found = [one for one in evenorm.diagnose(model, data).findings if one.code == "mixed-streams"]
    assert [one.evidence["clusters of batches"] for one in found[:1]] == ([] if streams == 1 else [streams])
    if found:
        assert {2: "two", 3: "three", 4: "four"}[streams] + " streams" in found[0].cause


def test_statistics_of_the_last_of_two_streams():
    """One stream after the other: the running statistics are the second's, exact ones are good for both."""
    model = network()
    data = [4 * torch.randn(16, 4) + 8 * (number >= 20) for number in range(40)]
    for batch in data:
        model(batch)
    exact = copy.deepcopy(model)
    evenorm.calibrate(exact, data)
    with torch.no_grad():
        labelled = [(batch, exact.eval()(batch).argmax(1)) for batch in data]
    diagnosis = evenorm.diagnose(model, labelled)
    found = diagnosis.findings[0]
    assert (found.code, found.layer, found.severity) == ("mixed-streams", "1", Severity.ERROR)
    assert found.harm == 1
    assert found.evidence["mean off by (standard deviations)"] > 0.3
    assert diagnosis.summary.endswith("batches are sorted, or of several streams that share one layer (1)")


def test_padding_in_the_input_is_a_note_where_the_statistics_are_right():
    torch.manual_seed(0)
    parts = nn.Conv1d(2, 6, 1, bias=False), nn.BatchNorm1d(6), nn.AdaptiveMaxPool1d(1), nn.Flatten()
    model = nn.Sequential(*parts, nn.Linear(6, 3))
    data = [nn.functional.pad(torch.randn(32, 2, 20) + 1, (0, 3 * number)) for number in range(12)]
    evenorm.calibrate(model, data)
    found = only(evenorm.diagnose(model, data), "padding")
    assert (found.layer, found.severity) == ("", Severity.NOTE)
    assert found.evidence["padded positions"] == pytest.approx(
        1 - 20 * 12 / sum(20 + 3 * n for n in range(12)), abs=1e-3
    )
    assert found.evidence["between batches, more or less by"] == pytest.approx(33 / 53, abs=1e-3)


def test_batches_in_order_are_no_streams():
    model = network()
    data = [4 * torch.randn(16, 4) + number / 3 for number in range(40)]
    found = next(one for one in evenorm.diagnose(model, data).findings if one.code == "mixed-streams")
    assert found.evidence["clusters of batches"] == "none"
    assert "sorted" in found.cause


@pytest.mark.parametrize("number", [2, 3])
def test_the_best_clusters_are_found(number):
    values = torch.randn(12, generator=torch.Generator().manual_seed(number)).double().sort().values
    cuts = itertools.combinations(range(1, 12), number - 1)
    runs = [torch.tensor_split(values, cut) for cut in cuts]
    least = min(
        sum(float(run.var(correction=0)) * len(run) for run in one) for one in runs if all(map(has_two, one))
    )
    assert _within(values, number) == pytest.approx(least)


def has_two(run) -> bool:
    return len(run) >= 2


def test_likeness_is_the_share_of_the_outputs_variance_that_is_kept():
    model, data = network(momentum=0.02), [3 * torch.randn(16, 4) + 2 for _ in range(12)]
    model[3] = nn.Unflatten(1, (2, 3))  # outputs of three dimensions are no classes
    found = evenorm.diagnose(model, data).scores
    assert (found.measure, found.batch) == ("likeness", 1.0)
    kept = []
    for batch in [batch for number, batch in enumerate(data) if scored(number)]:
        with torch.no_grad(), evenorm.no_update(model):
            wanted, got = model.train()(batch).double(), model.eval()(batch).double()
        lost = (got - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean()
        kept.append(max(0.0, 1 - float(lost)))
    assert found.running == pytest.approx(sum(kept) / len(kept), rel=1e-5)
    assert 0 < found.running < found.exact < 1
    assert found.harmful


def test_distances_are_those_of_a_direct_computation():
    model = network()
    data = [torch.randn(16, 4) + 1 for _ in range(10)]
    view = evenorm.diagnose(model, data).layers[0]
    x = model[0](torch.cat(data)).detach().double()
    mean, var = x.mean(0), x.var(0)
    norm = model[1]
    torch.testing.assert_close(torch.tensor(view.exact_mean).double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(view.exact_var).double(), var, rtol=1e-5, atol=1e-6)
    shift = ((norm.running_mean - mean) / (var + norm.eps).sqrt()).square().mean().sqrt()
    ratio = ((norm.running_var + norm.eps) / (var + norm.eps)).log().square().mean().sqrt()
    assert view.mean_shift == pytest.approx(float(shift), rel=1e-4)
    assert view.log_ratio == pytest.approx(float(ratio), rel=1e-4)
    assert 0 < view.noise < 0.3 < view.mean_shift


def test_a_loss_of_the_users_own():
    model = network(momentum=0.001)
    data = [(x := torch.randn(16, 4) + 2, model(x).detach()) for _ in range(12)]
    found = evenorm.diagnose(model, data, loss=nn.functional.mse_loss).scores
    used = [batch for number, batch in enumerate(data) if scored(number)]
    with torch.no_grad():
        expected = sum(nn.functional.mse_loss(model.eval()(x), y) for x, y in used) / len(used)
    assert found.measure == "loss"
    assert found.running == pytest.approx(float(expected), rel=1e-5)
    assert found.harmful


def test_without_labels_agreement_is_measured():
    found = evenorm.diagnose(network(momentum=0.001), [torch.randn(16, 4) + 3 for _ in range(12)]).scores
    assert (found.measure, found.batch) == ("agreement", 1.0)


def test_data_that_are_not_finite_leave_what_the_tensors_say():
    diagnosis = evenorm.diagnose(network(momentum=0.01), [torch.full((8, 4), torch.nan)])
    assert {found.code for found in diagnosis.findings} == {"stale-statistics", "not-measured"}


@pytest.mark.parametrize(
    ("data", "kind", "words"),
    [
        ([], ValueError, "no batch"),
        (torch.ones(3, 4), TypeError, r"\[batch\]"),
        ([torch.ones(3, 5)], ValueError, "batch 0.*0 .Linear"),
        ([object()], ValueError, "a batch must be"),
    ],
)
def test_data_that_do_not_fit_are_refused(data, kind, words):
    with pytest.raises(kind, match=words):
        evenorm.diagnose(network(), data)


def test_a_state_dict_cannot_run():
    with pytest.raises(TypeError, match="give the network"):
        evenorm.diagnose(network().state_dict(), [torch.ones(3, 4)])
    with pytest.raises(TypeError, match="give the network"):
        evenorm.diagnose(network().state_dict(), process_group="world")
    with pytest.raises(ValueError, match=r"torch\.distributed to be initialised"):
        evenorm.diagnose(network(), process_group="world")
    with pytest.raises(TypeError, match="a network or a state_dict"):
        evenorm.diagnose("weights.pt")


def test_the_worst_comes_first():
    """By severity, then by the share of the harm, then as they came."""
    kinds = [(Severity.NOTE, None), (Severity.ERROR, None), (Severity.WARNING, 0.9), (Severity.ERROR, 0.3)]
    kinds += [(Severity.ERROR, 0.5), (Severity.NOTE, 0.1)]
    given = [
        Finding("code", severity, str(number), {}, "", "", harm) for number, (severity, harm) in enumerate(kinds)
    ]
    assert [found.layer for found in ranked(given)] == ["4", "3", "1", "2", "5", "0"]
    assert [len(group) for group in alike(ranked(given))] == [3, 1, 2]
    model = network().eval()
    model[1].train().weight.data[0] = 0
    assert [found.code for found in evenorm.diagnose(model).findings] == ["wrong-mode", "dead-channels"]


def test_what_is_said_once_is_not_said_twice():
    """Momentum 0 leaves statistics at 0 and 1, and is why; harmless staleness is a note with data."""
    assert [found.code for found in evenorm.diagnose(network(momentum=0.0)).findings] == ["momentum-zero"]
    model, data = network(momentum=0.01), [torch.randn(16, 4) for _ in range(4)]
    same = [(batch, torch.zeros(16, dtype=torch.long)) for batch in data]
    with torch.no_grad():
        model[3].weight.zero_()
        model[3].bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    found = only(evenorm.diagnose(model, same), "stale-statistics")
    assert (found.severity, found.harm) == (Severity.NOTE, None)
    model[0].requires_grad_(False).weight.mul_(0.9)
    model.insert(2, nn.Dropout(0.5))
    model.insert(3, nn.BatchNorm1d(6, momentum=None))
    evenorm.calibrate(model, data)
    assert evenorm.diagnose(model).findings[0].severity == Severity.WARNING
    assert evenorm.diagnose(model, same).healthy


def test_no_batch_norm_is_nothing_to_examine():
    diagnosis = evenorm.diagnose(nn.Linear(3, 3), [torch.ones(2, 3)])
    assert diagnosis.summary == "nothing to examine: there is no batch norm"
    assert diagnosis.healthy
