"""The rules of the house, read off the source: arrows, sizes, names, docstrings, and what an import costs."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import typer

import evenorm
from evenorm.commands import app

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / "src" / "evenorm"

# Each module, or package, imports from the tiers above its own; within a package modules are free but for circles.
TIERS = (
    {"activations", "atomic", "moments", "tables"},
    {"averages", "formulas", "renorm"},
    {"engines"},
    {"workers"},
    {"checks"},
    {"autograd", "environment", "inputs", "kept", "outputs", "printing", "updates"},
    {"command_line"},
    {"functional"},
    {"layers"},
    {"lazy", "verify"},
    {"models"},
    {"bench", "calibrate_command", "fold_command", "lab"},
    {"doctor"},
    {"doctor_command", "lab_command"},
    {"commands"},
    {"cli"},
)
TIER = {part: tier for tier, parts in enumerate(TIERS) for part in parts}
USERS_OF_THE_FACADE = {
    "bench",
    "commands",
    "environment",
    "lab",
}  # `import evenorm`, as a user does; or its version

LONGEST_FILE = 400
LONGEST_KERNEL_FILE = 550
LONGEST_FUNCTION = 60
MEANINGLESS = {"base", "common", "helper", "helpers", "misc", "util", "utils"}


def modules() -> dict[str, Path]:
    """Return every module of the package: its dotted name without ``evenorm.``, and its file."""
    found = {}
    for path in HOME.rglob("*.py"):
        parts = path.relative_to(HOME).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """Yield what a module imports of ours, wherever in the file: dotted names; "" is the package's facade."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: write imports in full, from evenorm..."
            if node.module == "evenorm" or (node.module or "").startswith("evenorm."):
                source = node.module[len("evenorm.") :] if "." in node.module else ""
                for alias in node.names:
                    deeper = f"{source}.{alias.name}".lstrip(".")
                    yield deeper if deeper in MODULES else source
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "evenorm" or alias.name.startswith("evenorm."):
                    yield alias.name[len("evenorm.") :] if "." in alias.name else ""


def part(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize("name", [name for name in sorted(MODULES) if name])
def test_arrows_point_one_way(name):
    assert part(name) in TIER, f"{part(name)} has no place yet: give it one in TIERS"
    for other in imports(name):
        if other == "":
            assert part(name) in USERS_OF_THE_FACADE, (
                f"{name} imports from the facade, not from the module it needs"
            )
        elif part(other) != part(name):
            assert TIER[part(other)] < TIER[part(name)], f"{name} must not import {other}"


def test_no_module_imports_itself_in_a_circle():
    inner = {name: {other for other in imports(name) if other not in ("", name)} for name in MODULES if name}
    TopologicalSorter(inner).prepare()


@pytest.mark.parametrize("folder", ["src", "tests"])
def test_files_are_named_after_what_they_hold(folder):
    for path in (ROOT / folder).rglob("*"):
        assert path.stem.strip("_") not in MEANINGLESS, f"{path.relative_to(ROOT)} says nothing"


def test_files_can_be_read_in_a_sitting():
    limits = {".py": LONGEST_FILE, ".cpp": LONGEST_KERNEL_FILE, ".h": LONGEST_KERNEL_FILE}
    for path in HOME.rglob("*"):
        if path.suffix in limits:
            lines = path.read_text(encoding="utf-8").count("\n")
            assert lines <= limits[path.suffix], f"{path.relative_to(ROOT)} has {lines} lines"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_functions_fit_on_a_screen(name):
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documentation = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
            lines = node.end_lineno - node.lineno + 1 - documentation
            assert lines <= LONGEST_FUNCTION, f"{name}.{node.name} has {lines} lines"


@pytest.mark.parametrize("name", evenorm.__all__)
def test_a_public_name_has_an_example(name):
    text = inspect.getdoc(getattr(evenorm, name)) or ""
    assert ">>> " in text, f"evenorm.{name} shows no example"


def test_the_facade_re_exports_name_by_name():
    assert sorted(evenorm.__all__) == evenorm.__all__
    assert not any(name.startswith("_") for name in evenorm.__all__)


def commands(app: typer.Typer, path: str = "evenorm") -> Iterator[str]:
    for command in app.registered_commands:
        yield f"{path} {command.name or command.callback.__name__}"
    for group in app.registered_groups:
        yield from commands(group.typer_instance, f"{path} {group.name}")


@pytest.mark.parametrize("command", sorted(commands(app)))
def test_a_command_is_in_the_documentation(command):
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    assert any(command in page.read_text(encoding="utf-8") for page in pages), f"no page shows `{command}`"


IMPORT_PROBE = """
import json, os, sys
import torch

before, reads, commands = set(sys.modules), [], []
home = {home!r}

class Watched(type(os.environ)):
    def __getitem__(self, key):
        frame = sys._getframe(1)
        while "os.py" in frame.f_code.co_filename or "_collections_abc" in frame.f_code.co_filename \\
                or frame.f_code.co_filename.startswith("<frozen"):
            frame = frame.f_back
        if frame.f_code.co_filename.startswith(home):
            reads.append(str(key))
        return super().__getitem__(key)

os.environ.__class__ = Watched
sys.addaudithook(lambda event, _: commands.append(event) if event in {{
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"}} else None)
import evenorm
assert evenorm.__file__.startswith(home), evenorm.__file__
loaded = sorted(set(sys.modules) - before)
print(json.dumps({{"loaded": loaded, "reads": reads, "commands": commands, "cuda": torch.cuda.is_initialized()}}))
"""


def test_import_is_free():
    probe = IMPORT_PROBE.format(home=str(HOME))
    answer = subprocess.run(
        [sys.executable, "-c", probe],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT / "src")},
    )
    found = json.loads(answer.stdout.splitlines()[-1])
    strangers = {part(name) for name in found["loaded"]} - {"evenorm", "torch", *sys.stdlib_module_names}
    assert not strangers, f"importing evenorm loads {strangers}"
    heavy = ("torch._inductor", "torch._dynamo", "torch.utils.cpp_extension", "evenorm.lab", "evenorm.cli")
    needless = [name for name in found["loaded"] if name.startswith(heavy)]
    assert not needless, f"importing evenorm loads {needless}, which a layer does not need"
    assert found["reads"] == []
    assert found["commands"] == []
    assert found["cuda"] is False


def pins() -> dict[str, set[str]]:
    """Return the pinned versions of each distribution; two where an old Python needs its own."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = re.fullmatch(r"([a-z0-9-]+)==([^; ]+)(?:; .*)?", line).groups()
            found.setdefault(name, set()).add(version)
    return found


def test_one_list_pins_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["lab"]]
    wanted += [
        entry for group in project["dependency-groups"].values() for entry in group if isinstance(entry, str)
    ]
    unpinned = {re.match(r"[A-Za-z0-9-]+", entry)[0] for entry in wanted} - set(pins())
    assert not unpinned, f"{unpinned} have no line in constraints.txt"


@pytest.mark.parametrize("tool", ["ruff", "mypy"])
def test_the_tools_that_judge_are_the_pinned_ones(tool):
    assert pins()[tool] == {importlib.metadata.version(tool)}


def test_hook_and_ci_run_what_make_runs():
    hook = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.findall(r"repo: (.*)", hook) == ["local"]
    assert re.findall(r"entry: (.*)", hook) == ["make check"]
    assert "make check" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert re.findall(r"- run: (.*)", workflow) == [".ci/run"]


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert evenorm.__version__ == project["version"]
    assert f"\n## {project['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
