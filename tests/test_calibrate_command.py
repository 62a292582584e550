"""`evenorm calibrate`: what it prints, writes and refuses, and that it never writes half a file."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import evenorm
from evenorm.cli import main
from evenorm.inputs import load_object

MODULE = """
import signal, time
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    first = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Dropout()
    return nn.Sequential(*first, nn.Linear(3, 3), nn.BatchNorm1d(3))

def plain(): return nn.Linear(4, 3)
def odd():
    model = make()
    model.forward = None
    return model
def batches(): return list(torch.randn(25, 4, generator=torch.Generator().manual_seed(1)).split(10))
def stream(): yield from batches()
def breaks():
    yield batches()[0]
    raise LookupError("the disk is gone")
def empty(): return []
def poison(): return [*batches(), torch.full((5, 4), torch.nan)]
def narrow(): return [torch.ones(5, 3)]
def keyed(): return [{"picture": batch} for batch in batches()]
def forward(model, batch): return model(batch["picture"])
def slow():
    for batch in batches():
        print("reading", flush=True)
        yield batch
        time.sleep(30)
"""


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder with a module of networks and loaders, and weights for them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != ""])
    (tmp_path / "shop.py").write_text(MODULE)
    sys.modules.pop("shop", None)
    yield tmp_path
    sys.modules.pop("shop", None)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["calibrate", *arguments])
    out, err = capsys.readouterr()
    return left.value.code, out, err


def expected(sequential: bool = False) -> nn.Module:
    model = load_object("shop:make", "--model")()
    evenorm.calibrate(model, load_object("shop:batches", "--data")(), sequential=sequential)
    return model


@pytest.mark.parametrize("out", ["new.safetensors", "new.pt"])
def test_a_table_and_a_file_of_weights(shop, capsys, out):
    status, printed, err = run(capsys, "--model", "shop:make", "--data", "shop:batches", "--out", out)
    assert (status, err) == (0, "")
    lines = printed.splitlines()
    assert lines[0].startswith("layer  samples")
    assert [line.split()[:2] for line in lines[2:4]] == [["1", "25"], ["5", "25"]]
    assert lines[-1] == f"written: {out}"
    found = load_file(out) if out.endswith("safetensors") else torch.load(out, weights_only=True)
    wanted = expected().state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert sorted(os.listdir(shop)) == sorted({out, "shop.py", "__pycache__"} & set(os.listdir(shop)))


def test_json(shop, capsys):
    status, printed, _ = run(
        capsys, "--model", "shop:make", "--data", "shop:batches", "--json", "--sequential", "--out", "new.pt"
    )
    content = json.loads(printed)
    assert status == 0
    assert (content["passes"], content["batches"], content["out"]) == (2, 3, "new.pt")
    assert [layer["name"] for layer in content["layers"]] == ["1", "5"]
    assert torch.equal(torch.load("new.pt")["5.running_var"], expected(sequential=True)[5].running_var)


def test_weights_in_data_from_files_and_nothing_written(shop, capsys):
    save_file(expected().state_dict() | {"0.bias": torch.ones(3)}, "old.safetensors")
    (shop / "arrays").mkdir()
    np.save(shop / "arrays" / "x.npy", np.random.default_rng(0).normal(size=(30, 4)))
    status, printed, _ = run(
        capsys, "--model", "shop:make", "--weights", "old.safetensors", "--data", "arrays", "--batch-size", "7"
    )
    assert status == 0
    assert "5 batches" in printed
    assert printed.splitlines()[-1] == "nothing was written; --out FILE keeps the new statistics"


def test_a_table_of_data(shop, capsys):
    rows = "\n".join(f"{i},{i % 3},{-i},{i * i},yes" for i in range(12))
    (shop / "rows.csv").write_text(f"a,b,c,d,label\n{rows}\n")
    given = ("--model", "shop:make", "--data", "rows.csv")
    status, printed, _ = run(capsys, *given, "--target", "label", "--max-batches", "1", "--batch-size", "8")
    assert status == 0
    assert "\n1 batch; shift" in printed
    status, _, err = run(capsys, *given)
    assert status == 2
    assert "rows.csv: column 'label' holds String" in err


def test_options_reach_the_function(shop, capsys):
    status, printed, _ = run(
        *(capsys, "--model", "shop:make", "--data", "shop:keyed", "--forward", "shop:forward"),
        *("--max-batches", "2", "--prior", "20", "--out", "new.pt", "--json"),
    )
    assert status == 0
    model = load_object("shop:make", "--model")()
    evenorm.calibrate(model, load_object("shop:batches", "--data")()[:2], prior=20)
    assert torch.equal(torch.load("new.pt")["1.running_mean"], model[1].running_mean)
    assert json.loads(printed)["batches"] == 2


REFUSED = {
    "raises": (["--data", "shop:breaks"], "--data shop:breaks failed at batch 1: LookupError: the disk is gone"),
    "empty": (["--data", "shop:empty"], "data gave no batch"),
    "NaN": (["--data", "shop:poison"], "1: its input holds NaN or inf in channel 0 of batch 3"),
    "shape": (["--data", "shop:narrow"], "batch 0, a tensor (5, 3), could not be run: 0 (Linear) raised"),
    "kind": (["--data", "shop:keyed"], "got a dict with the keys picture"),
    "no batch norm": (["--model", "shop:plain"], "the network has no batch norm layer to calibrate"),
    "broken network": (["--model", "shop:odd"], "'NoneType' object is not callable"),
    "once": (["--data", "shop:stream", "--sequential"], "a generator can be read once only"),
    "no file": (["--weights", "absent.pt"], "there is no file absent.pt"),
    "code": (["--weights", "code.pt"], "code.pt is refused"),
    "corrupt": (["--weights", "corrupt.safetensors"], "corrupt.safetensors is damaged"),
    "unfit": (["--weights", "unfit.pt"], "unfit.pt does not fit shop:make"),
    "no such data": (["--data", "nowhere"], "--data must be package.module:loader"),
    "there": (["--out", "unfit.pt"], "unfit.pt is there already; --force overwrites it"),
    "there, before any work": (["--out", "unfit.pt", "--data", "shop:breaks"], "unfit.pt is there already"),
    "no format": (["--out", "new.weights"], "--out must end in"),
    "no folder": (["--out", "absent/new.pt"], "there is no folder absent"),
    "number": (["--prior", "-1"], "prior must be 0 samples or more"),
    "usage": (["--prior", "many"], "Invalid value for '--prior'"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_ends_with_2_and_writes_nothing(shop, capsys, options, message):
    torch.save(nn.Linear(2, 2), "code.pt")
    torch.save({"weight": torch.ones(1)}, "unfit.pt")
    (shop / "corrupt.safetensors").write_bytes(b"\xff" * 300)
    before = {path.name: path.read_bytes() for path in shop.iterdir() if path.is_file()}
    given = {"--model": "shop:make", "--data": "shop:batches", "--out": "new.pt"}
    for name, value in zip(options[::2], [*options[1::2], None], strict=False):
        given |= {name: value}
    arguments = [word for pair in given.items() for word in pair if word is not None]
    status, printed, err = run(capsys, *arguments)
    assert (status, printed) == (2, "")
    assert message in err
    assert err.startswith("evenorm: ")
    assert err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in shop.iterdir() if path.is_file()} == before


def test_no_space_left(shop, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    status, printed, err = run(capsys, "--model", "shop:make", "--data", "shop:batches", "--out", "new.pt")
    assert (status, printed) == (2, "")
    assert "new.pt could not be written: No space left on device" in err
    assert not [path for path in shop.iterdir() if "new" in path.name]


def test_force_overwrites(shop, capsys):
    torch.save({"old": torch.ones(1)}, "new.pt")
    assert run(capsys, "--model", "shop:make", "--data", "shop:batches", "--out", "new.pt", "--force")[0] == 0
    assert "1.running_var" in torch.load("new.pt")


def interruptible():
    """Let Ctrl-C through, as in a terminal: what runs in the background of a shell inherits that it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def read_until(descriptor: int, word: bytes = b"") -> bytes:
    """Return what a terminal shows until it shows a word, or where there is none, to its end."""
    seen = b""
    with contextlib.suppress(OSError):  # of Linux, where the other end is closed
        while not word or word not in seen:
            if not (chunk := os.read(descriptor, 65536)):
                break
            seen += chunk
    return seen


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_shows_the_cursor_and_writes_nothing(shop, number, status):
    path = os.pathsep.join([str(Path(evenorm.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = "from evenorm.cli import main; main()"
    arguments = ["calibrate", "--model", "shop:make", "--data", "shop:slow", "--out", "new.pt"]
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", command, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=follower,
        env=os.environ | {"PYTHONPATH": path, "TERM": "xterm"},
        preexec_fn=interruptible,
    )
    os.close(follower)
    shown = read_until(leader, b"reading")
    assert b"\x1b[?25l" in shown  # hidden while the bar is there
    process.send_signal(number)
    shown = read_until(leader)
    os.close(leader)
    assert process.wait(timeout=20) == status
    assert b"\x1b[?25h" in shown
    assert b"\x1b[?25l" not in shown
    assert shown.endswith(b"evenorm: interrupted\r\n")
    assert not [path for path in shop.iterdir() if "new" in path.name]


def test_a_bar_on_a_terminal(shop, capsys, monkeypatch):
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    status, printed, _ = run(capsys, "--model", "shop:make", "--data", "shop:stream", "--json")
    assert status == 0
    assert "calibrating" in terminal.getvalue()
    json.loads(printed)
