"""What other tools make of the same networks and data: run it, and it prints the tables of docs/peers.md.

A column is a tool, a row a question, a cell a phrase with measured numbers. The networks hold torch.nn's layers,
which all tools take.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable

import torch
from fvcore.nn.precise_bn import update_bn_stats
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.optim.swa_utils import update_bn

import evenorm

logging.getLogger("fvcore.nn.precise_bn").setLevel(logging.ERROR)
Batches = list[Tensor]
Tool = Callable[[nn.Module, Iterable[Tensor], int], object]

UPDATERS: dict[str, Tool] = {
    "torch `update_bn`": lambda model, data, count: update_bn(data, model),
    "fvcore `update_bn_stats`": lambda model, data, count: update_bn_stats(model, data, num_iters=count),
    "`evenorm.calibrate`": lambda model, data, count: evenorm.calibrate(model, data),
}


def samples() -> Batches:
    """Return batches of 100 and 10 samples whose means and variances differ."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(110, 3, generator=generator, dtype=torch.float64)
    x[100:] = 3 + 2 * x[100:]
    return [x[:100].float(), x[100:].float()]


def layer() -> nn.BatchNorm1d:
    """Return a layer with a past."""
    bn = nn.BatchNorm1d(3)
    bn.running_mean.fill_(5)
    bn.running_var.fill_(7)
    bn.num_batches_tracked.fill_(1000)
    return bn.train()


def state(bn: nn.BatchNorm1d) -> str:
    """Say what a layer's statistics have become."""
    mean, var = float(bn.running_mean.mean()), float(bn.running_var.mean())
    if (mean, var) == (5, 7):
        return "kept"
    return f"overwritten: mean {mean:.2g}, variance {var:.2g}"


def short_last_batch(tool: Tool) -> str:
    bn, data = layer(), samples()
    tool(bn, data, 2)
    x = torch.cat(data).double()
    shift = ((bn.running_mean - x.mean(0)) / x.std(0)).abs().max()
    ratio = float((bn.running_var / x.var(0)).mean()) - 1
    return f"mean off by {_number(shift)} std, variance by {_number(abs(ratio))} of it"


def leftovers(bn: nn.BatchNorm1d) -> str:
    """Say what a tool has left behind on a layer that was in training with momentum 0.1."""
    kept = [state(bn)]
    if bn.momentum != 0.1:
        kept.append(f"momentum {bn.momentum}")
    if bn._forward_pre_hooks or bn._forward_hooks:
        kept.append("hooks stay on")
    if not bn.training:
        kept.append("in evaluation")
    return ", ".join(kept)


def failing(tool: Tool, data: Iterable[Tensor]) -> str:
    bn = layer()
    try:
        tool(bn, data, 3)
    except Exception as error:
        kind = "ValueError" if isinstance(error, ValueError) else type(error).__name__
        return f"{kind}; {leftovers(bn)}"
    return f"no error; {leftovers(bn)}"


def raising_loader(tool: Tool) -> str:
    def data() -> Iterable[Tensor]:
        yield from samples()
        raise OSError("the disk is gone")

    return failing(tool, data())


def empty_loader(tool: Tool) -> str:
    return failing(tool, [])


def poisoned(tool: Tool) -> str:
    return failing(tool, [*samples(), torch.full((10, 3), math.nan)])


def in_eval(tool: Tool) -> str:
    model = nn.Sequential(layer(), nn.BatchNorm1d(3))
    model[0].eval()
    tool(model, samples(), 2)
    return "kept" if state(model[0]) == "kept" else "computed anew"


def frozen(tool: Tool) -> str:
    model = nn.Sequential(layer(), nn.BatchNorm1d(3))
    evenorm.freeze(model[0])
    tool(model, samples(), 2)
    return state(model[0])


def unreached(tool: Tool) -> str:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.BatchNorm1d(3), layer()

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Partly()
    tool(model, samples(), 2)
    return state(model.idle)


def dropout(tool: Tool) -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), layer())
    data = [torch.randn(1000, 3) + 1 for _ in range(10)]
    tool(model.train(), data, 10)
    ratio = float((model[1].running_var / torch.cat(data).var(0)).mean())
    return f"variance {ratio:.2f} times that in use"


def _number(value: Tensor | float) -> str:
    value = float(value)
    return "0" if value < 1e-6 else f"{value:.2g}"


CALIBRATION: dict[str, Callable[[Tool], str]] = {
    "batches of 100 and 10": short_last_batch,
    "dropout 0.5 before the layer": dropout,
    "loader raises after 2 batches": raising_loader,
    "loader is empty": empty_loader,
    "third batch is NaN": poisoned,
    "layer in `eval()` in a network in `train()`": in_eval,
    "layer under `evenorm.freeze`": frozen,
    "layer that the data do not reach": unreached,
}

# ------ folding


def pair(first: nn.Module, second: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(first, second).eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    if model[1].affine:
        nn.init.uniform_(model[1].weight, 0.5, 2)
        nn.init.normal_(model[1].bias)
    return model


PAIRS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "Conv2d": (lambda: pair(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), (2, 4, 6, 6)),
    "Conv2d, groups 2": (lambda: pair(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (2, 4, 6, 6)),
    "ConvTranspose2d": (lambda: pair(nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6)), (2, 4, 6, 6)),
    "ConvTranspose2d, groups 2": (
        lambda: pair(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
        (2, 4, 6, 6),
    ),
    "ConvTranspose2d, depthwise": (
        lambda: pair(nn.ConvTranspose2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)),
        (2, 4, 6, 6),
    ),
    "Linear": (lambda: pair(nn.Linear(4, 6), nn.BatchNorm1d(6)), (8, 4)),
    "Linear, `affine=False`": (lambda: pair(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False)), (8, 4)),
}


def by_fusion(model: nn.Sequential, x: Tensor) -> nn.Module:
    if isinstance(model[0], nn.Linear):
        return fuse_linear_bn_eval(*model)
    return fuse_conv_bn_eval(*model, transpose=isinstance(model[0], nn.ConvTranspose2d))


FOLDERS: dict[str, Callable[[nn.Sequential, Tensor], nn.Module]] = {
    "`torch.nn.utils.fusion`": by_fusion,
    "`torch.fx` `fuse`": lambda model, x: fuse(copy.deepcopy(model)),
    "`evenorm.fold`": lambda model, x: evenorm.fold(model, x).model,
}


@torch.no_grad()
def folding(folder: Callable[[nn.Sequential, Tensor], nn.Module], question: str) -> str:
    make, shape = PAIRS[question]
    model, x = make(), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    try:
        folded = folder(model, x)
        y, wanted = folded(x), model(x)
    except Exception as error:
        return type(error).__name__
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in folded.modules()):
        return "left as it is"
    if y.shape != wanted.shape:
        return f"wrong: {y.shape[1]} channels for {wanted.shape[1]}"
    return (
        "folded" if torch.allclose(y, wanted, rtol=1e-5, atol=1e-5) else f"wrong by {(y - wanted).abs().max():.2g}"
    )


def table(questions: Iterable[str], tools: Iterable[str], cell: Callable[[str, str], str]) -> str:
    """Return a table in Markdown."""
    tools = list(tools)
    lines = ["| | " + " | ".join(tools) + " |", "|---" * (len(tools) + 1) + "|"]
    lines += [
        f"| {question} | " + " | ".join(cell(tool, question) for tool in tools) + " |" for question in questions
    ]
    return "\n".join(lines)


def tables() -> list[str]:
    """Measure, and return both tables."""
    return [
        table(CALIBRATION, UPDATERS, lambda tool, question: CALIBRATION[question](UPDATERS[tool])),
        table(PAIRS, FOLDERS, lambda tool, question: folding(FOLDERS[tool], question)),
    ]


if __name__ == "__main__":
    print("\n\n".join(tables()))
