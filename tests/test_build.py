"""How the engine is built: setup.py, with compilers that only write down what they are asked."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

COMPILER = """#!{python}
import sys
if "--version" in sys.argv:
    print({version!r})
    sys.exit()
with open({asked!r}, "a") as asked:
    print(*sys.argv[1:], file=asked)
if {fails} and "-c" in sys.argv:
    sys.exit("kernels.cpp:1: error: too tired")
open(sys.argv[sys.argv.index("-o") + 1], "w").close()
"""


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Build with a compiler of this version; returns the engine, and what the compiler was asked, call by call."""

    def run(version, fails=False, before=""):
        compiler, asked, engine = tmp_path / "c++", tmp_path / "asked", tmp_path / "evenorm/_engine.so"
        text = COMPILER.format(python=sys.executable, version=version, asked=str(asked), fails=fails)
        compiler.write_text(text)
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", f"{before} {compiler} -DOURS".strip())
        monkeypatch.delenv("EVENORM_SANITIZE", raising=False)
        setup = runpy.run_path(str(ROOT / "setup.py"))
        try:
            setup["build_engine"](engine, tmp_path / "objects")
        except setup["CannotBuildError"] as reason:
            return engine, str(reason)
        return engine, asked.read_text().splitlines()

    return run


@pytest.mark.parametrize("version", ["Apple clang version 17.0.0", "Debian clang version 14.0.6"])
def test_clang_is_asked_nothing_that_only_gcc_knows(build, version):
    engine, asked = build(version)
    assert engine.exists()
    assert not any("-fvect-cost-model" in call or "-Wno-maybe" in call for call in asked)


def test_gcc_vectorises_as_it_does_at_its_highest_level(build):
    engine, asked = build("g++ (GCC) 13.2.0")
    assert engine.exists()
    kernels = [call for call in asked if "kernels.cpp" in call]
    assert kernels
    assert all("-fvect-cost-model=dynamic" in call for call in kernels)


def test_a_compiler_that_fails_is_quoted_and_leaves_no_engine(build):
    engine, reason = build("g++ (GCC) 13.2.0", fails=True)
    assert reason == "the compiler failed: kernels.cpp:1: error: too tired"
    assert not engine.exists()


def test_the_compiler_may_have_options_and_a_cache_before_it(build):
    engine, asked = build("g++ (GCC) 13.2.0", before="env")
    assert engine.exists()
    assert all(call.startswith("-DOURS ") for call in asked)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")
@pytest.mark.parametrize("wrong", [False, True], ids=["ours", "a wrong one"])
def test_what_we_declare_of_torch_is_what_torch_declares(wrong, tmp_path):
    """A compiler that sees both refuses a function with two types."""
    include = Path(torch.__file__).parent / "include"
    both = tmp_path / "both.cpp"
    both.write_text(
        "#include <torch/csrc/stable/c/shim.h>\n"
        f'#include "{ROOT}/src/evenorm/csrc/torch_abi.h"\n'
        + ('extern "C" AOTITorchError torch_get_num_threads(int64_t*);\n' if wrong else "")
    )
    command = ["c++", "-std=c++20", "-fsyntax-only", "-isystem", str(include), str(both)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert ("torch_get_num_threads" in done.stderr) if wrong else done.returncode == 0, done.stderr
