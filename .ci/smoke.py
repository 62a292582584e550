"""Run in an empty environment, from an empty folder: is the wheel whole, and does it work without extras?"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

import evenorm

packages = Path(sysconfig.get_paths()["purelib"]).resolve()
home = Path(evenorm.__file__).resolve().parent
assert packages in home.parents, f"imported from {home}, not from the wheel"

inside = {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}
assert "py.typed" in inside
assert not [name for name in inside if name.startswith("csrc")], "sources of the engine are in the wheel"
assert not list(packages.glob("tests")), "tests are in the wheel"
assert any(name.endswith(".so") for name in inside), "the engine is not in the wheel"

torch.manual_seed(0)
x = torch.randn(8, 3, 5, 5, requires_grad=True)
cotangent = torch.randn(8, 3, 5, 5)
ours, theirs = evenorm.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
for layer in (ours, theirs):
    (layer(x) * cotangent).sum().backward()
    torch.testing.assert_close(layer(x), theirs(x))
torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)

command = Path(sys.executable).parent / "evenorm"
answer = subprocess.run([command, "info"], capture_output=True, text=True)
assert "Traceback" not in answer.stderr, answer.stderr
assert answer.stdout.strip() or "evenorm[lab]" in answer.stderr, "neither an answer nor what to install"

print(f"the wheel works: {len(inside)} files in {home}")
