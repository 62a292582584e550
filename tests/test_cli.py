from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len

import evenorm.cli
from evenorm.lab import run
from evenorm.lab.experiment import Scale
from evenorm.lab.experiments import EXPERIMENTS
from evenorm.lab.language import Text, translate
from evenorm.lab.machines import Machines
from evenorm.lab.report_words import WORDS
from evenorm.lab.results import Analysis, Claim, Endpoint, Verdict
from evenorm.lab.store import Store

SOURCE = Path(__file__).parent.parent / "src"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}


def call(*arguments: str) -> int:
    """Run a command in this process and return its exit status."""
    with pytest.raises(SystemExit) as exit_:
        evenorm.cli.main(arguments)
    return int(exit_.value.code or 0)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )


ENDPOINT = Endpoint(
    name="[steps]", unit="doublings", estimate=3.25, low=3.0, high=3.5, p_value=0.002, margin=1.0,
    verdict=Verdict.REPRODUCED, seeds=10, favours="more", would_change="less",
)  # fmt: skip
ANALYSIS = Analysis(
    experiment="speed", title="Speed", claim=Claim("속도", "speed", "the document", "how fast?"), protocol="p",
    rule="r", verdict=Verdict.REPRODUCED, answer=Text("Ten times.", "열 배."), endpoints=(ENDPOINT,), figures=(),
    published=(), command="evenorm lab run speed",
)  # fmt: skip


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """A lab whose runs are finished before they begin."""
    calls: list[tuple[object, ...]] = []

    def instantly(*arguments: object, watch: object = None) -> list[Analysis]:
        calls.append(arguments)
        return [ANALYSIS]

    monkeypatch.setattr(run, "run", instantly)
    monkeypatch.setattr(run, "report", instantly)
    monkeypatch.setattr(run, "write", lambda analyses, scale, store, folder, language: folder / "report.html")
    return calls


def test_list_shows_questions_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("lab", "list", "--out", str(tmp_path)) == 0
    output = capsys.readouterr().out
    for name, experiment in EXPERIMENTS.items():
        assert name in output
        assert f"0 of {len(experiment.plan(Scale(10)))}" in output
    assert list(tmp_path.iterdir()) == []


def test_list_as_json_counts_what_is_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path)
    store.prepare(["inference"])
    planned = EXPERIMENTS["inference"].plan(Scale(3))
    store.save(planned[0], {})
    assert call("lab", "list", "--json", "--seeds", "3", "--out", str(tmp_path)) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert (listed["inference"]["stored"], listed["inference"]["trials"]) == (1, len(planned))
    assert listed["speed"]["stored"] == 0


@pytest.mark.parametrize("command", ["run", "report"])
def test_run_and_report_print_verdicts_and_path(
    command: str, finished: list[tuple[object, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("lab", command, "speed", "--out", str(tmp_path)) == 0
    output = capsys.readouterr().out
    assert "REPRODUCED" in output
    assert "[steps]" in output  # square brackets are text, not markup
    assert "3.25 (3.00 to 3.50)" in output
    assert f"report: {tmp_path / 'report.html'}" in output


@pytest.mark.parametrize(("language", "between"), [("en", "to"), ("ko", "~")])
def test_a_terminal_of_80_columns_gets_sentences(
    language: str,
    between: str,
    finished: list[tuple[object, ...]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sentence = Text(" ".join(["The best rate was lower."] * 4), " ".join(["가장 좋은 학습률이 낮았다."] * 4))
    names = [Text(f"{sentence} {size}", f"{sentence.korean} {size}") for size in range(20, 60)]
    endpoints = [dataclasses.replace(ENDPOINT, name=name, estimate=-3.25, low=-3.5, high=-3.0) for name in names]
    exact = dataclasses.replace(ENDPOINT, name="exactly", low=3.25, high=3.25, p_value=math.nan, seeds=0)
    analysis = dataclasses.replace(ANALYSIS, answer=sentence, endpoints=(*endpoints, exact))
    monkeypatch.setattr(run, "report", lambda *arguments, **more: [analysis])
    for name, value in (("FORCE_COLOR", "1"), ("COLUMNS", "80"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    assert call("lab", "report", "--lang", language, "--out", str(tmp_path)) == 0
    output = re.sub("\x1b.*?m", "", capsys.readouterr().out)
    verdicts = output[: output.index("report: ")]
    assert max(map(cell_len, verdicts.splitlines())) <= 80
    words = WORDS[language]
    verdict = words["REPRODUCED"] if language == "ko" else "REPRODUCED"
    found = " ".join(verdicts.split())
    for name in names:
        numbers = f"−3.25, {words['interval']} −3.50 {between} −3.00, {words['margin'].lower()} 1, p = 0.002"
        assert f"{verdict} {translate(name, language)} [doublings] {numbers}" in found
    assert f"{verdict} exactly [doublings] 3.25, {words['margin'].lower()} 1" in found
    assert found.startswith(f"speed: {verdict}. {translate(sentence, language)} {verdict} ")


@pytest.mark.parametrize("command", ["run", "report"])
def test_json_is_json(
    command: str, finished: list[tuple[object, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("lab", command, "--json", "--out", str(tmp_path)) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["report"] == str(tmp_path / "report.html")
    assert content["experiments"][0]["verdict"] == "REPRODUCED"
    assert content["experiments"][0]["endpoints"][0]["low"] == 3.0


@pytest.mark.parametrize("command", ["run", "report"])
def test_json_holds_no_nan(
    command: str,
    finished: list[tuple[object, ...]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exactly = dataclasses.replace(ENDPOINT, p_value=float("nan"), high=float("inf"))
    analysis = dataclasses.replace(ANALYSIS, endpoints=(exactly,), configuration={"rate": float("nan")})
    monkeypatch.setattr(run, command, lambda *arguments, **more: [analysis])
    assert call("lab", command, "--json", "--out", str(tmp_path)) == 0
    (told,) = json.loads(capsys.readouterr().out)["experiments"]
    assert (told["endpoints"][0]["p_value"], told["endpoints"][0]["high"]) == (None, None)
    assert told["verdict"] == "REPRODUCED"
    assert "figures" not in told


@pytest.mark.parametrize("command", ["run", "report"])
def test_verdicts_in_korean(
    command: str, finished: list[tuple[object, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("lab", command, "speed", "--lang", "ko", "--out", str(tmp_path)) == 0
    assert "speed: 재현됨. 열 배." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], Scale(10, quick=False)),
        (["--quick"], Scale(4, quick=True)),
        (["--seeds", "20"], Scale(20, quick=False)),
        (["--quick", "--seeds", "2"], Scale(2, quick=True)),
    ],
)
def test_options_make_the_scale(
    options: list[str], expected: Scale, finished: list[tuple[object, ...]], tmp_path: Path
) -> None:
    assert call("lab", "run", "speed", *options, "--jobs", "1", "--out", str(tmp_path)) == 0
    ((experiments, scale, store, machines),) = finished
    assert (experiments, scale, machines) == ([EXPERIMENTS["speed"]], expected, Machines(1))
    assert isinstance(store, Store)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["lab", "run", "sped"], "no experiment named 'sped'; choose from speed, "),
        (["lab", "report", "sped"], "no experiment named 'sped'"),
        (["lab", "run", "--seeds", "1"], "--seeds must lie between 2"),
        (["lab", "run", "--seeds", "0"], "--seeds must lie between 2"),
        (["lab", "list", "--seeds", "-3"], "--seeds must lie between 2"),
        (["lab", "run", "--jobs", "0"], "--jobs is the number of stacks"),
        (["lab", "run", "--backend", "slurm"], "--backend must be one of processes, dask, ray"),
        (["lab", "run", "--backend", "dask"], "needs the scheduler's --address"),
        (["lab", "run", "--backend", "ray"], "pip install ray"),
        (["lab", "run", "--address", "tcp://host:1"], "--backend dask or --backend ray"),
        (["lab", "run", "--seeds", "many"], "--seeds"),
        (["lab", "fly"], "fly"),
        (["lab", "run", "--fly"], "--fly"),
        (["lab", "report", "--lang", "fr"], "--lang"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path)] if "fly" not in arguments else []
    assert call(*arguments, *out) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_results_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results").write_text("a file, not a folder")
    assert call("lab", "run", "speed", "--out", str(tmp_path / "results")) == 2
    captured = capsys.readouterr()
    assert str(tmp_path / "results") in captured.err
    assert captured.err.count("\n") == 1


def test_a_report_without_trials_names_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("lab", "report", "speed", "--quick", "--out", str(tmp_path)) == 2
    captured = capsys.readouterr()
    assert f"evenorm lab run speed --quick --seeds 4 --out {tmp_path}" in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("command", ["run", "report"])
def test_a_place_that_cannot_be_written_is_told_before_the_training(
    command: str, finished: list[tuple[object, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for name, says in (("file/new.md", "file/new.md cannot be written: Not a dir"), (".", "is a folder; give")):
        assert call("lab", command, "--markdown", str(tmp_path / name), "--out", str(tmp_path)) == 2
        captured = capsys.readouterr()
        assert says in captured.err
        assert captured.err.count("\n") == 1
    assert finished == []


def test_a_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "run", full)
    assert call("lab", "run", "--out", str(tmp_path)) == 2
    assert "No space left" in capsys.readouterr().err


def test_debug_shows_the_traceback_wherever_it_stands(tmp_path: Path) -> None:
    for arguments in (["lab", "run", "sped", "--debug"], ["--debug", "lab", "run", "sped"]):
        with pytest.raises(ValueError, match="sped"):
            evenorm.cli.main([*arguments, "--out", str(tmp_path)])


def test_our_own_faults_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*arguments: object, **more: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(run, "run", fault)
    with pytest.raises(AssertionError, match="a bug"):
        evenorm.cli.main(["lab", "run", "--out", str(tmp_path)])


@pytest.mark.parametrize("missing", ["typer", "rich", "joblib", "sklearn", "scipy", "plotly", "jinja2"])
def test_a_missing_extra_is_one_line_that_says_what_to_install(missing: str, tmp_path: Path) -> None:
    code = f"""
import sys, importlib.abc
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Refuse())
from evenorm.cli import main
main()
"""
    result = python(code, "lab", "run", "--quick", "--seeds", "2", "--out", str(tmp_path))
    assert result.returncode == 2, result.stderr
    assert 'pip install "evenorm[lab]"' in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.rglob("*.json")) == []  # found missing before hours of training, not after


def test_importing_evenorm_loads_nothing_of_the_lab() -> None:
    code = """
import sys, evenorm
extra = {"typer", "rich", "joblib", "sklearn", "scipy", "plotly", "jinja2", "polars", "safetensors"}
found = sorted(extra & set(sys.modules)) + [name for name in sys.modules if name.startswith("evenorm.lab")]
sys.exit(str(found) if found else 0)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_help_loads_nothing_heavy() -> None:
    code = """
import sys
from evenorm.cli import main
try:
    main()
except SystemExit as exit_:
    assert exit_.code == 0, exit_.code
heavy = sorted({"joblib", "sklearn", "scipy", "plotly", "jinja2"} & set(sys.modules))
sys.exit(str(heavy) if heavy else 0)
"""
    for arguments in (["--help"], ["lab", "--help"], ["lab", "run", "--help"]):
        result = python(code, *arguments)
        assert result.returncode == 0, result.stderr
    assert "--quick" in result.stdout


def test_a_closed_standard_output_is_one_line() -> None:
    code = "import sys; sys.stdout = None; from evenorm.cli import main; main()"
    result = python(code, "info")
    assert result.returncode == 2
    assert result.stderr == "evenorm: standard output is closed, and results go there; leave it open\n"


def test_without_a_command_there_is_help_and_no_empty_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["lab"]):
        assert call(*arguments) == 2
        captured = capsys.readouterr()
        assert "Usage" in captured.out + captured.err
        assert "evenorm: \n" not in captured.err


def test_code_that_leaves_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(*arguments: object, **more: object) -> None:
        raise SystemExit(0)

    monkeypatch.setattr(run, "run", leave)
    assert call("lab", "run", "--out", str(tmp_path)) == 2
    assert capsys.readouterr().err == "evenorm: code that was called for left with exit(0)\n"


def test_an_error_of_the_system_has_a_name_and_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(*arguments: object, **more: object) -> None:
        (tmp_path / "absent").read_text()

    monkeypatch.setattr(run, "run", absent)
    assert call("lab", "run", "--out", str(tmp_path)) == 2
    assert capsys.readouterr().err == f"evenorm: {tmp_path / 'absent'}: No such file or directory\n"


def test_ctrl_c_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "choose", interrupt)
    assert call("lab", "report", "--out", str(tmp_path)) == 130
    assert capsys.readouterr().err.strip() == "evenorm: interrupted"


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_sigterm_is_answered_by_a_running_command_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: signal.Handlers
) -> None:
    seen = []
    monkeypatch.setattr(run, "choose", lambda names: seen.append(signal.getsignal(signal.SIGTERM)) or [])
    found = signal.signal(signal.SIGTERM, before)
    try:
        assert call("lab", "list", "--out", str(tmp_path)) == 0
        assert signal.getsignal(signal.SIGTERM) == before
    finally:
        signal.signal(signal.SIGTERM, found)
    assert callable(seen[0]) == (before is signal.SIG_DFL)


def test_the_guide_tells_every_exit_status() -> None:
    guide = (SOURCE.parent / "docs" / "guide.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| (\d+) \|", guide, re.MULTILINE)) == {
        *("0", "1", "2"),
        str(evenorm.cli.INTERRUPTED),
        str(evenorm.cli.TERMINATED),
    }


def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    code = "from evenorm.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "lab", "list", "--out", str(tmp_path)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 1
    assert errors == b""
