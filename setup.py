"""Build the engine, evenorm/_engine.so, with whatever C++ compiler is there; install without it where that fails.

The engine is a plain shared library: it uses PyTorch's stable C interface and no part of Python, so one build
serves every CPython and every torch from 2.10 on. PyTorch itself need not be there: pip builds before it installs.

Environment:
    CXX                  the compiler; else c++, g++ or clang++
    EVENORM_ENGINE=off   build no engine
    EVENORM_SANITIZE=1   build the engine with AddressSanitizer and UBSan; `make test-sanitize` does, and runs it
                         with EVENORM_RECYCLE=off: a sanitizer cannot check memory that is not malloc's
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel as BdistWheel  # noqa: N812
from setuptools.command.build_ext import build_ext as BuildExt  # noqa: N812

ROOT = Path(__file__).parent
SOURCES = Path("src/evenorm/csrc")
ENGINE, MISSING = "_engine.so", "_engine_missing.txt"

COMMON = [
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-uninitialized",
]
# No -ffast-math: the kernels rely on NaN and on the order of their sums. These only let loops be vectorised.
FAST = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
# Twice as fast to compile as -O3, and the same code: what must be inlined is marked, and loops are vectorised.
KERNELS = ["-O2", "-ftree-vectorize"]
# Names that Clang does not know; its -O2 vectorises by such costs anyway.
OF_GCC = ["-Wno-maybe-uninitialized", "-fvect-cost-model=dynamic"]
SANITIZED = [
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-ffp-contract=fast",
    "-fexpensive-optimizations",  # which fuse most products and sums, as the engine that is tested otherwise does
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
]

# The kernels are compiled once for each of these; the processor chooses when the library is first used.
X86_LEVELS = {
    "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "v3": ["-march=x86-64-v3"],
    "baseline": [],
}


class CannotBuildError(Exception):
    """Why there will be no engine, in a line that tells the user what to install."""


def find_compiler() -> list[str]:
    """Return the command of the C++ compiler; CXX may hold options, or a cache before the name."""
    own = os.environ.get("CXX", "").strip()
    wanted = [own] if own else ["c++", "g++", "clang++"]
    for command in wanted:
        name, *options = shlex.split(command)
        found = shutil.which(name)
        if found and os.name == "posix":
            return [found, *options]
    raise CannotBuildError(
        f"no C++ compiler ({', '.join(wanted)}); install GCC 11 or Clang 14 or newer, then evenorm again"
    )


def is_clang(compiler: list[str]) -> bool:
    """Tell whether it is Clang, which macOS calls c++ and g++ too."""
    return "clang" in run([*compiler, "--version"])


def run(command: list[str]) -> str:
    """Run one command of the compiler and return its output; raise its first error message if it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CannotBuildError(f"the compiler does not run: {error}") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[-1])
        raise CannotBuildError(f"the compiler failed: {first}")
    return done.stdout


def stand_in(compiler: list[str], folder: Path) -> list[str]:
    """Return how to link with torch's library, known by name alone: at run time it is the one already loaded."""
    empty = ["-x", "c++", os.devnull, "-o"]
    if sys.platform == "darwin":
        library = folder / "libtorch_cpu.dylib"
        run([*compiler, "-dynamiclib", "-install_name", f"@rpath/{library.name}", *empty, str(library)])
        return [f"-L{folder}", "-ltorch_cpu", "-undefined", "dynamic_lookup"]
    library = folder / "libtorch_cpu.so"
    run([*compiler, "-shared", f"-Wl,-soname,{library.name}", *empty, str(library)])
    return [f"-L{folder}", "-Wl,--no-as-needed", "-ltorch_cpu"]


def build_engine(target: Path, objects: Path) -> None:
    """Compile and link the engine; two compilers at a time."""
    compiler = find_compiler()
    sanitize = os.environ.get("EVENORM_SANITIZE") == "1"
    flags = COMMON + ([] if is_clang(compiler) else OF_GCC) + (SANITIZED if sanitize else FAST)
    levels = X86_LEVELS if platform.machine().lower() in ("x86_64", "amd64") else {"baseline": []}
    objects.mkdir(parents=True, exist_ok=True)
    tuned = [] if sanitize else KERNELS
    units = {
        f"kernels_{level}": ["kernels.cpp", f"-DEVENORM_TARGET={level}", *tuned, *extra]
        for level, extra in levels.items()
    }
    units["dispatch"] = ["dispatch.cpp", *(["-DEVENORM_X86_LEVELS"] if len(levels) > 1 else [])]
    units["track"] = ["track.cpp"]
    units["binding"] = ["binding.cpp"]
    commands = [
        [*compiler, *flags, "-c", str(SOURCES / source), *extra, "-o", str(objects / f"{name}.o")]
        for name, (source, *extra) in units.items()
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, commands))
    link = stand_in(compiler, objects)
    link += ["-fsanitize=address,undefined"] if sanitize else ["-s"] * (sys.platform != "darwin")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_suffix(".new")  # renamed when whole, since a running process may have the old one open
    run([*compiler, "-shared", *(str(objects / f"{name}.o") for name in units), *link, "-o", str(fresh)])
    fresh.replace(target)


class build_ext(BuildExt):  # noqa: N801
    """Put either the engine or a text that says why it is missing into the package."""

    def run(self) -> None:
        """Build the engine; a failure is told, not raised."""
        package = (ROOT / "src" if self.inplace else Path(self.build_lib).absolute()) / "evenorm"
        engine, missing = package / ENGINE, package / MISSING
        package.mkdir(parents=True, exist_ok=True)
        try:
            if os.environ.get("EVENORM_ENGINE", "").lower() == "off":
                raise CannotBuildError("not built: EVENORM_ENGINE=off when evenorm was installed")
            build_engine(engine, Path(self.build_temp).absolute() / "engine")
            missing.unlink(missing_ok=True)
        except CannotBuildError as reason:
            engine.unlink(missing_ok=True)
            missing.write_text(f"{reason}\n")
            print(f"evenorm: installing without its engine: {reason}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        """Return what `run` has made."""
        package = Path(self.build_lib) / "evenorm"
        return [str(package / name) for name in (ENGINE, MISSING) if (package / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """Return nothing: an editable install builds straight into the source tree."""
        return {}

    def get_source_files(self) -> list[str]:
        """Return what the source distribution has to hold."""
        return [str(path) for path in sorted(SOURCES.iterdir())]


class bdist_wheel(BdistWheel):  # noqa: N801
    """One wheel for every CPython of a platform; for every platform when it holds no engine."""

    def run(self) -> None:
        """Build first: what came of it decides the wheel's kind."""
        self.run_command("build")
        build = self.get_finalized_command("build_ext")
        self.root_is_pure = not (Path(build.build_lib) / "evenorm" / ENGINE).exists()
        if self.root_is_pure:
            self.distribution.ext_modules = None  # or all files would be filed under the platform
        self.skip_build = True  # or installing into the wheel would compile it all once more
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Return the interpreter, ABI and platform in the wheel's name."""
        if self.root_is_pure:
            return "py3", "none", "any"
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("evenorm._engine", [])],
        cmdclass={"build_ext": build_ext, "bdist_wheel": bdist_wheel},
    )
