"""`evenorm doctor`: table, JSON and page, what it writes and refuses, and files and names from strangers."""

from __future__ import annotations

import contextlib
import html
import io
import json
import random
import re
import resource
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

import evenorm
from evenorm.cli import main
from evenorm.inputs import load_object, load_weights

MODULE = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, momentum=0.01), nn.ReLU(), nn.Linear(6, 3))

def batches():
    inputs = torch.randn(1200, 4, generator=torch.Generator().manual_seed(1)) + 2
    labels = make().train()(inputs).argmax(1)
    return list(zip(inputs.split(100), labels.split(100)))

def counted():
    print("read")
    return batches()
def counted_anew():
    print("read")
    return iter(batches())

def plain(): return nn.Linear(4, 3)
def broken(): raise RuntimeError("no such backbone")
def breaks():
    yield batches()[0]
    raise LookupError("the disk is gone")
once = iter(batches())
def narrow(): return [torch.ones(5, 3)]
"""
NASTY = "<script>alert(1)</script>\x1b[31m\u202e[bold]&amp;"


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder with a module of networks and loaders, and weights for them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != ""])
    (tmp_path / "clinic.py").write_text(MODULE)
    sys.modules.pop("clinic", None)
    yield tmp_path
    sys.modules.pop("clinic", None)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["doctor", *arguments])
    out, err = capsys.readouterr()
    return left.value.code, out, err


def trained() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    for batch in 4 * torch.randn(100, 16, 4):
        model(batch)
    return model


WRAPPED = [
    ("w.pt", lambda state: state),
    ("w.pth", lambda state: {"state_dict": state, "epoch": 3}),
    ("w.pt", lambda state: {"model": state}),
    ("w.pt", lambda state: {"model_state_dict": state, "optimizer": {"lr": 0.1}}),
]


def test_the_share_of_the_loss_has_a_column_where_it_was_measured(shop, capsys):
    torch.save(load_object("clinic:make", "--model")().state_dict(), "w.pt")
    assert "share of the loss" not in run(capsys, "w.pt")[1]
    assert "share of the loss" in run(capsys, "--model", "clinic:make", "--data", "clinic:batches")[1]


def test_the_page_says_a_severity_once_and_keeps_a_number_on_its_line(shop, capsys):
    state = trained().state_dict()
    state["1.running_var"][0] = -1
    torch.save(state, "w.pt")
    run(capsys, "w.pt", "--html", "page.html")
    page = Path("page.html").read_text()
    assert "<h3>negative-variance in 1</h3>" in page
    assert page.count("negative-variance in 1") == 2  # the heading, and the table's name
    assert '<td class="number">−1.0</td>' in page
    assert "Running statistics of each channel." in page
    assert "exact statistics of each" not in page


@pytest.mark.parametrize(("name", "wrap"), WRAPPED)
def test_a_checkpoint_of_torch_is_examined(shop, capsys, name, wrap):
    state = trained().state_dict()
    torch.save(wrap(state), name)
    assert run(capsys, name)[:2] == (0, "nothing is wrong in 1 batch norm layer\n")
    state["1.running_var"][0] = -1
    torch.save(wrap(state), name)
    status, out, _ = run(capsys, name)
    assert status == 1
    assert "negative-variance" in out


def test_safetensors_and_the_threshold(shop, capsys):
    state = trained().state_dict()
    state["1.num_batches_tracked"].fill_(20)
    save_file(state, "w.safetensors")
    assert run(capsys, "w.safetensors")[0] == 1
    assert run(capsys, "w.safetensors", "--fail-on", "error")[0] == 0
    assert run(capsys, "w.safetensors", "--fail-on", "note")[0] == 1
    assert run(capsys, "w.safetensors", "--fail-on", "never")[0] == 2


def test_json_is_the_diagnosis(shop, capsys):
    status, out, _ = run(capsys, "--model", "clinic:make", "--data", "clinic:batches", "--json")
    clinic = load_object("clinic:make", "--model"), load_object("clinic:batches", "--data")
    diagnosis = evenorm.diagnose(clinic[0](), clinic[1]())
    assert status == 1
    assert json.loads(out) == json.loads(json.dumps(diagnosis.to_dict()))
    assert list(json.loads(out)) == ["schema", "healthy", "findings", "layers", "summary", "scores"]
    assert json.loads(out)["schema"] == 1


def test_the_first_line_is_the_answer(shop, capsys):
    _, out, _ = run(capsys, "--model", "clinic:make", "--data", "clinic:batches")
    assert re.match(r"eval\(\) loses \d+ points; (all|\d+) of them come back with exact statistics: ", out)


@pytest.mark.parametrize("out", ["cured.safetensors", "cured.pt"])
def test_fix_writes_a_calibrated_copy(shop, capsys, out):
    torch.save(load_object("clinic:make", "--model")().state_dict(), "w.pt")
    before = Path("w.pt").read_bytes()
    given = "--model", "clinic:make", "--weights", "w.pt", "--data", "clinic:batches"
    status, shown, _ = run(capsys, *given, "--fix", "--out", out)
    assert status == 0
    assert "after the cure: eval() loses nothing" in shown
    assert f"written: {out}" in shown
    assert Path("w.pt").read_bytes() == before
    expected = load_object("clinic:make", "--model")()
    evenorm.calibrate(expected, load_object("clinic:batches", "--data")())
    torch.testing.assert_close(load_weights(Path(out)), dict(expected.state_dict()), rtol=0, atol=0)
    assert sorted(path.name for path in shop.iterdir() if path.suffix == ".tmp") == []
    assert run(capsys, *given, "--fix", "--out", out)[0] == 2  # it is there already
    assert run(capsys, *given, "--fix", "--out", "w.pt", "--force")[0] == 2
    assert Path("w.pt").read_bytes() == before
    status, shown, _ = run(capsys, *given, "--fix", "--out", out, "--force", "--json")
    assert json.loads(shown)["after"]["healthy"]


@pytest.mark.parametrize(
    ("data", "fix", "times"), [("counted", 1, 1), ("counted_anew", 1, 3), ("counted_anew", 0, 1)]
)
def test_fix_makes_data_anew_only_where_they_are_an_iterator(shop, capsys, data, fix, times):
    cure = ["--fix", "--out", "cured.pt"] if fix else []
    _, out, _ = run(capsys, "--model", "clinic:make", "--data", f"clinic:{data}", *cure)
    assert out.count("read\n") == times


def test_the_page_stands_alone(shop, capsys):
    status, _, _ = run(capsys, "--model", "clinic:make", "--data", "clinic:batches", "--html", "page.html")
    page = Path("page.html").read_text(encoding="utf-8")
    assert status == 1
    assert "default-src 'none'" in html.unescape(page)
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"https?://|@import|url\(", own)
    data = json.loads(re.search(r'id="report-data">(.*?)</script>', page, re.DOTALL)[1])
    titles = [figure["title"] for figure in data["analyses"][0]["figures"]]
    assert titles == ["Accuracy by three kinds of statistics", "Running against exact statistics, by depth", "1"]
    assert run(capsys, "--model", "clinic:make", "--html", "page.html")[0] == 2


def test_names_from_strangers_are_escaped_everywhere(shop, capsys):
    state = {f"{NASTY}.{key}": value for key, value in nn.BatchNorm1d(3).state_dict().items()}
    torch.save(state, "w.pt")
    forbidden = "\x1b[31m", "\u202e", "<script>alert"
    status, out, _ = run(capsys, "w.pt", "--html", "page.html")
    assert status == 1
    assert not any(text in out for text in forbidden[:2])
    _, out, _ = run(capsys, "w.pt", "--json")
    assert not any(text in out for text in forbidden)
    assert json.loads(out)["findings"][0]["layer"] == NASTY
    page = Path("page.html").read_text(encoding="utf-8")
    assert not any(text in page for text in forbidden)
    assert not any(text in str(evenorm.diagnose(state)) for text in forbidden[:2])
    state[f"{NASTY}.weight"] = torch.ones(2)
    torch.save(state, "w.pt")
    status, _, err = run(capsys, "w.pt")
    assert status == 2
    assert not any(text in err for text in forbidden[:2])


def test_a_network_without_batch_norm_is_healthy(shop, capsys):
    status, out, _ = run(capsys, "--model", "clinic:plain")
    assert (status, out) == (0, "nothing to examine: there is no batch norm\n")


REFUSED = [
    ([], "give a file of weights"),
    (["missing.pt"], "there is no file"),
    (["half.pt"], "damaged"),
    (["half.safetensors"], "damaged"),
    (["code.pt"], "refused"),
    (["text.pt"], "refused"),
    (["w.pt", "--model", "clinic:make"], "not both"),
    (["w.pt", "--data", "clinic:batches"], "--data need --model"),
    (["--model", "clinic:broken"], "no such backbone"),
    (["--model", "clinic:absent"], "has no absent"),
    (["--model", "clinic:make", "--data", "clinic:breaks"], "at batch 1: LookupError: the disk is gone"),
    (["--model", "clinic:make", "--data", "clinic:narrow"], "batch 0, a tensor (5, 3)"),
    (["--model", "clinic:make", "--fix"], "--fix computes"),
    (["w.pt", "--html", "w.pt", "--force"], "--html must end in .html or .htm, got w.pt"),
    (["page.html", "--html", "./page.html", "--force"], "is a file of weights, which a page never replaces"),
    (["--model", "clinic:make", "--weights", "page.html", "--html", "page.html", "--force"], "never replaces"),
    (["w.pt", "--html", "absent/page.html"], "there is no folder absent"),
    (["w.pt", "--target", "label"], "--target is for a network with data"),
    (["w.pt", "--forward", "clinic:make"], "--forward is for a network with data"),
    (["w.pt", "--max-batches", "3"], "--max-batches is for a network with data"),
    (
        ["--model", "clinic:make", "--data", "clinic:batches", "--max-batches", "0"],
        "--max-batches must be at least 1",
    ),
    (["--model", "clinic:make", "--data", "clinic:once", "--fix", "--out", "x.pt"], "can be read once only"),
    (["--model", "clinic:make", "--out", "x.pt"], "--out is where --fix writes"),
]


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=lambda value: " ".join(value)[:40])
def test_what_it_refuses(shop, capsys, arguments, words):
    state = trained().state_dict()
    torch.save(state, "w.pt")
    torch.save(state, "page.html")  # weights may have any name
    save_file(state, "w.safetensors")
    for suffix in ("pt", "safetensors"):
        content = Path(f"w.{suffix}").read_bytes()
        Path(f"half.{suffix}").write_bytes(content[: len(content) // 2])
    torch.save({"state_dict": Bomb()}, "code.pt")
    Path("text.pt").write_text("no checkpoint at all")
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert "Traceback" not in err
    assert not Path("ran").exists()
    assert load_weights(Path("page.html")).keys() == state.keys()
    assert load_weights(Path("w.pt")).keys() == state.keys()


def test_debug_shows_the_traceback(shop):
    with pytest.raises(ValueError, match="no such backbone"):
        main(["doctor", "--model", "clinic:broken", "--debug"])
    with pytest.raises(ValueError, match="the disk is gone"):
        main(["doctor", "--debug", "--model", "clinic:make", "--data", "clinic:breaks"])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_how_far_it_is(shop, capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    given = "--model", "clinic:make", "--data", "clinic:batches", "--fix", "--out", "cured.pt"
    assert run(capsys, *given)[0] == 0
    told = terminal.getvalue()
    assert all(task in told for task in ("examining", "calibrating", "examining again"))
    assert "100%" in told
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    run(capsys, *given, "--force")
    assert sys.stderr.getvalue() == ""


def test_a_table_of_80_columns_holds_cures_whole(shop, capsys, monkeypatch):
    """What is to be copied stands in lines of its own, not cut into a column's width."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, out, _ = run(capsys, "--model", "clinic:make", "--data", "clinic:batches")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert max(map(len, plain.splitlines())) <= 80
    assert "cure: evenorm.calibrate(model, data)" in plain
    assert plain.count("never-updated") == 2  # in the table, and above its cause


def test_tensors_that_are_larger_than_their_storage_are_refused(shop, capsys):
    """A file of a few bytes may claim a tensor that no memory holds."""
    torch.save({"bn.running_mean": torch.zeros(1).expand(1 << 40), "bn.running_var": torch.ones(1)}, "w.pt")
    status, _, err = run(capsys, "w.pt")
    assert status == 2
    assert "its storage holds fewer" in err


def mutated(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        kind, place = draw.random(), draw.randrange(len(changed) + 1)
        if kind < 0.6 and changed:
            changed[place % len(changed)] = draw.randrange(256)
        elif kind < 0.7:
            del changed[place:]
        elif kind < 0.9:
            changed[place:place] = draw.randbytes(draw.randrange(1, 9))
        else:
            del changed[place : place + draw.randrange(1, 64)]
    return bytes(changed)


def inner_mutated(content: bytes, draw: random.Random) -> bytes:
    """Mutate the pickle inside, with checksums that fit, so that reading gets further."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(result, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, mutated(data, draw) if name.endswith("data.pkl") else data)
    return result.getvalue()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(3))
def test_no_mutation_of_a_checkpoint_crashes_the_reader(tmp_path, seed):
    """1000 each of safetensors, of .pt files, and of the pickle in one: an answer or a clean error, soon."""
    draw, state = random.Random(seed), trained().state_dict()
    buffer = io.BytesIO()
    torch.save({"state_dict": state}, buffer)
    makers = (
        ("a.safetensors", lambda: mutated(save(state), draw)),
        ("a.pt", lambda: mutated(buffer.getvalue(), draw)),
        ("a.pt", lambda: inner_mutated(buffer.getvalue(), draw)),
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, make in makers:
        for _ in range(334):
            path = tmp_path / name
            path.write_bytes(make())
            start = time.monotonic()
            with contextlib.suppress(ValueError, OSError):
                json.dumps(evenorm.diagnose(load_weights(path)).to_dict(), allow_nan=False)
            assert time.monotonic() - start < 30, "one small file took half a minute"
    assert len(list(tmp_path.iterdir())) == 2  # nothing ran that wrote a file
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 500, f"{grown:.0f} MiB for files of a few kB"
