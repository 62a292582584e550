"""Taking the activation behind a batch norm into it, and giving it back.

The activation's module stays the same object in the same place and becomes an `Applied`, which passes its input on:
whoever holds a reference to it, or calls it by another name, meets the same change. The layer keeps the module
beside its parameters, so that copies and pickles know the way back.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from evenorm.activations import IDENTITY, NAMES, TABLE, resolve
from evenorm.layers import Layer
from evenorm.models.flows import Flows, Site
from evenorm.models.spellings import ADDITIONS, activation_at, word
from evenorm.models.walk import LeftAloneError, hooked, shown


@dataclass(frozen=True)
class Taken:
    """What a layer has taken in: words for it, and the way back, an activation's module or a graph as it was."""

    words: tuple[str, ...]
    origin: nn.Module | fx.Graph | None

    def __getstate__(self) -> dict[str, Any]:
        """Leave a graph out of pickles: its functions need not have names that a pickle could find them by."""
        kept = None if isinstance(self.origin, fx.Graph) else self.origin
        return {"words": self.words, "origin": kept}

    def __deepcopy__(self, memo: dict[int, Any]) -> Taken:
        """Copy the module with the network that is being copied."""
        return Taken(self.words, copy.deepcopy(self.origin, memo))


class Applied(nn.Module):
    """An activation module whose work the batch norm before it does; passes its input on."""

    was: type[nn.Module]

    def forward(self, input: Tensor) -> Tensor:
        """Return the input."""
        return input

    def extra_repr(self) -> str:
        """Return the name of the activation."""
        return self.was.__name__

    def _get_name(self) -> str:
        return Applied.__name__


# Each is still of the class it was, too: networks collect what comes out behind an ``isinstance(layer, nn.ReLU)``.
APPLIED = {
    row.module: type(
        f"Applied{row.module.__name__}", (Applied, row.module), {"was": row.module, "__module__": __name__}
    )
    for row in TABLE[1:]
}
globals().update({kind.__name__: kind for kind in APPLIED.values()})  # where pickles look for them


def find_activation(layer: _BatchNorm, flows: Flows) -> nn.Module:
    """Return the activation module that always follows a layer, and follows nothing else.

    Raises:
        LeftAloneError: there is none, or it cannot be taken in without changing what others see.
    """
    check_open(layer)
    followers: list[nn.Module] = []
    for site in flows.sites(layer):
        site.only_input()
        follower = site.flow.called(site.reader())
        if follower is None:
            _refuse_call(site)
        if not site.same_gradient(site.reader()):
            raise LeftAloneError(
                f"gradients do not pass through it as they pass through what follows it in {site.flow.forward}"
            )
        followers.append(follower)
    activation = followers[0]
    if any(follower is not activation for follower in followers):
        raise LeftAloneError("what follows it depends on the mode or the arguments")
    name = shown(flows.names[activation][0])
    if isinstance(activation, Applied) or resolve(activation) in (None, IDENTITY):
        raise LeftAloneError(
            f"what follows it, {name} ({type(activation).__name__}), is no activation it can apply"
        )
    if hooked(activation) or "forward" in vars(activation):
        raise LeftAloneError(f"a hook on its activation {name} looks at what goes in or out")
    try:
        for site in flows.sites(activation):
            site.only_input()
    except LeftAloneError as reason:
        raise LeftAloneError(f"of its activation {name}: {reason}") from None
    return activation


def check_open(layer: _BatchNorm) -> None:
    """Raise LeftAloneError if something besides the network looks at a layer's output, or it has an activation."""
    if isinstance(layer, Layer):
        if layer.activation is not None:
            raise LeftAloneError("it has an activation already")
        if type(layer).forward is not Layer.forward or "forward" in vars(layer):
            raise LeftAloneError("its forward was overridden")
    if layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        raise LeftAloneError("a hook looks at its output, which the activation would change")


def taken(layer: nn.Module) -> Taken | None:
    """Return what a layer has taken in."""
    found: Taken | None = vars(layer).get("taken")
    return found


def keep_(layer: Layer, record: Taken, activation: nn.Module | None) -> None:
    """Let a layer apply an activation, if there is one, and remember the way back, in place."""
    if activation is not None:
        layer.activation = brief(activation)
    vars(layer)["taken"] = record  # not by assignment, which would make a module in it a child


def forget_(layer: Layer) -> None:
    """Leave a layer without an activation, and without a trace of one in its attributes."""
    layer._modules.pop("activation", None)
    for name in ("_activation", "taken"):
        vars(layer).pop(name, None)


def take_in_(layer: Layer, activation: nn.Module, name: str) -> None:
    """Let a layer apply the activation, whose module passes its input on from now, in place."""
    keep_(layer, Taken((name,), activation), activation)
    activation.__class__ = APPLIED[type(activation)]


def give_back_(layer: Layer, activation: nn.Module) -> None:
    """Undo `take_in_`, in place."""
    assert isinstance(activation, Applied)
    activation.__class__ = activation.was  # type: ignore[assignment]  # mypy knows no object that changes its class
    forget_(layer)


def brief(activation: nn.Module) -> str | nn.Module:
    """Return the name of an activation, or a copy of the module where it has parameters that no name says."""
    for name in NAMES:
        if resolve(name) == resolve(activation):
            return name
    return copy.deepcopy(activation)


def _refuse_call(site: Site) -> NoReturn:
    """Say that what follows is no module, and how it can be fused nevertheless if it can."""
    reader = site.reader()
    if reader.target not in ADDITIONS and activation_at(reader, site.flow) is None:
        raise LeftAloneError(f"what follows it, {word(reader)}, is no activation it can apply")
    raise LeftAloneError(
        f"{word(reader)} stands in the code of {site.flow.forward}, which is not touched; "
        "torch.fx.symbolic_trace(model) gives a network whose code can be rewritten"
    )
