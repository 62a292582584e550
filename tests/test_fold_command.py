"""`evenorm fold`: what it prints, writes and refuses."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import evenorm
from evenorm.cli import main
from evenorm.inputs import load_object

MODULE = """
import torch
from torch import nn

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.bn = nn.Linear(4, 3), nn.BatchNorm1d(3)
    def forward(self, x, scale):
        return self.bn(self.fc(x)) * scale

def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3))
    for index in (1, 3):
        model[index].running_mean.normal_()
        model[index].running_var.uniform_(0.5, 2)
    return model

def scaled(): return Scaled()
def plain(): return nn.Linear(4, 3)
def branching():
    model = make()
    model.forward = None
    return model
def batches(): return [(torch.randn(8, 4), torch.zeros(8))]
def pairs(): return [(torch.randn(8, 4), torch.rand(8, 1), torch.zeros(8))]
def named(): return [{"x": torch.randn(8, 4), "scale": 2.0, "label": torch.zeros(8)}]
def narrow(): return [torch.randn(8, 5)]
def empty(): return []
def breaks():
    raise LookupError("the disk is gone")
    yield
"""


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder with a module of networks and loaders."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folding_shop.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("folding_shop", None)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["fold", *arguments])
    out, err = capsys.readouterr()
    return left.value.code, out, err


def given(model: str, data: str) -> tuple[str, ...]:
    return "--model", f"folding_shop:{model}", "--data", f"folding_shop:{data}" if data.isidentifier() else data


@pytest.mark.parametrize("out", ["folded.safetensors", "folded.pt"])
def test_the_certificate_and_a_file_of_weights(shop, capsys, out):
    status, printed, err = run(capsys, *given("make", "batches"), "--out", out)
    assert (status, err) == (0, "")
    lines = printed.splitlines()
    assert lines[:2] == [
        "1  folded into 0",
        "3  left: before it stands 2 (ReLU); its output leaves Sequential.forward",
    ]
    assert lines[2].startswith("largest difference on examples: ")
    assert lines[-1] == f"written: {out}"
    model, x = load_object("folding_shop:make", "--model")().eval(), torch.randn(8, 4)
    state = load_file(out) if out.endswith("safetensors") else torch.load(out, weights_only=True)
    other = torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.ReLU(), torch.nn.BatchNorm1d(3)
    folded = evenorm.fold(torch.nn.Sequential(*other).eval(), x).model
    folded.load_state_dict(state)
    torch.testing.assert_close(folded(x), model(x))


def test_json_weights_and_files_of_data(shop, capsys):
    state = load_object("folding_shop:make", "--model")().state_dict()
    save_file({**state, "0.bias": torch.ones(3)}, "old.safetensors")
    (shop / "arrays").mkdir()
    np.save(shop / "arrays" / "x.npy", np.random.default_rng(0).normal(size=(30, 4)))
    status, printed, err = run(
        capsys, *given("make", "./arrays"), "--weights", "old.safetensors", "--json", "--batch-size", "5"
    )
    assert (status, err) == (0, "")
    content = json.loads(printed)
    assert content["folds"] == [{"layer": "1", "into": "0"}]
    assert content["refusals"][0]["layer"] == "3"
    assert content["out"] is None
    assert content["probes"]["relative"] < content["tolerance"]


@pytest.mark.parametrize("data", ["pairs", "named"])
def test_a_batch_is_taken_apart_as_calibrate_does(shop, capsys, data):
    status, printed, _ = run(capsys, *given("scaled", data))
    assert status == 0
    assert printed.startswith("bn  folded into fc")
    assert printed.splitlines()[-1] == "nothing was written; --out FILE keeps the folded weights"


REFUSED = {
    "no batch norm": (given("plain", "batches"), "torch.nn.modules.linear.Linear has no batch norm to fold"),
    "wrong shape": (
        given("make", "narrow"),
        "the network does not take the example inputs: RuntimeError: mat1 and mat2",
    ),
    "no data": (given("make", "empty"), "--data folding_shop:empty holds no batch"),
    "broken data": (given("make", "breaks"), "failed at batch 0: LookupError: the disk is gone"),
    "too strict": ((*given("make", "batches"), "--tolerance", "1e-30"), "answers differ from the original's"),
    "no module": (("--model", "nowhere:make", "--data", "folding_shop:batches"), "importing nowhere failed"),
    "file there": ((*given("make", "batches"), "--out", "folding_shop.pt"), "is there already; --force overwrites"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_folded_exits_with_2_and_writes_nothing(shop, capsys, case):
    arguments, message = REFUSED[case]
    (shop / "folding_shop.pt").write_text("precious")
    before = sorted(name for name in os.listdir(shop) if name != "__pycache__")
    out = () if "--out" in arguments else ("--out", "new.pt")
    status, printed, err = run(capsys, *arguments, *out)
    assert (status, printed) == (2, "")
    assert message in err
    assert sorted(name for name in os.listdir(shop) if name != "__pycache__") == before
    assert (shop / "folding_shop.pt").read_text() == "precious"
