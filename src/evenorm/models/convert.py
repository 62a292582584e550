"""Our layers in place of torch.nn's, with what follows them taken in; and the way back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from evenorm.activations import resolve
from evenorm.layers import Layer
from evenorm.models import graphs
from evenorm.models.adopt import adopt_, release_, why_not_ours, why_not_theirs
from evenorm.models.flows import Flows
from evenorm.models.fuse import Applied, find_activation, forget_, give_back_, take_in_, taken
from evenorm.models.walk import LeftAloneError, all_or_nothing, batch_norms, shown


@dataclass(frozen=True)
class LayerConversion:
    """What `convert` makes of one layer, by its dotted name.

    ``converted`` says whether it is one of evenorm's afterwards, ``fused`` what it takes in (the dotted name of an
    activation, or words), ``reason`` why it is left alone, or why nothing is taken in.
    """

    name: str
    converted: bool
    fused: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Conversion:
    """What `convert` makes of each batch norm layer of a network; see `conversion`. Printed, it is a table.

    >>> import torch, evenorm
    >>> found = evenorm.conversion(torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.ReLU()))
    >>> found.layers[0]
    LayerConversion(name='0', converted=True, fused=('1',), reason='')
    """

    layers: tuple[LayerConversion, ...]

    def __str__(self) -> str:
        """Return a line a layer."""
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines = []
        for layer in self.layers:
            done = "converted" if layer.converted else "left alone"
            more = f"takes in {' and '.join(layer.fused)}" if layer.fused else layer.reason
            lines.append(f"{layer.name:<{width}}  {done:<10}  {more}".rstrip())
        return "\n".join(lines) or "no batch norm"


def conversion(model: nn.Module, *, fuse: bool = True) -> Conversion:
    """Return what `convert` would make of a network, or has made of it; changes nothing.

    Args:
        model: a network, or a single layer.
        fuse: as for `convert`.

    Returns:
        An entry for each batch norm layer: whether it is converted, what it takes in, and if not, why.

    >>> import torch, evenorm
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.ReLU())
    >>> print(evenorm.conversion(model))
    1  converted   takes in 2
    """
    return _plan(model, fuse, batch_norms(model)).conversion


def convert(model: nn.Module, *, fuse: bool = True) -> nn.Module:
    r"""Put evenorm's layers in the place of torch.nn's, in place, and let them do what follows them.

    A layer stays the same object, with its parameters, buffers, hooks and mode, and becomes one of evenorm's class:
    an optimizer made before keeps working. With ``fuse``, an activation module that always and only follows one
    batch norm is applied by the layer, and passes its input on. It is found by neighbourhood in an nn.Sequential,
    elsewhere by torch.fx. Activations called as functions, and additions, stand in the code of a forward, which is
    not touched; in a `torch.fx.GraphModule` they are taken in as well.

    Args:
        model: a network, or a single layer.
        fuse: take in what follows a layer.

    Returns:
        The same model. `conversion` says what is done to which layer, and why one is left alone.

    Note:
        A fused layer's output is what came out behind the activation before. Forward hooks that are there keep a
        layer from being fused; one added later sees the activation's output.

    >>> import torch, evenorm
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.SiLU())
    >>> evenorm.convert(model)[1].activation
    'silu'
    """
    _carry_out_(_plan(model, fuse, batch_norms(model)))
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert`, in place: plain torch.nn layers, and activations and additions back where they were.

    Converting and reverting is the identity, for every class, key and attribute.

    Args:
        model: a network, or a single layer.

    Returns:
        The same model.

    Raises:
        ValueError: a layer does what torch.nn has no word for: an option such as renorm, an activation that it was
            constructed with, a mask or a residual that it is called with. All such layers are named, nothing is
            changed.

    >>> import torch, evenorm
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.SiLU())
    >>> [type(layer).__name__ for layer in evenorm.convert(model)], isinstance(model[1], evenorm.BatchNorm1d)
    (['Linear', 'BatchNorm1d', 'AppliedSiLU'], True)
    >>> [type(layer).__name__ for layer in evenorm.revert(model)], isinstance(model[1], evenorm.BatchNorm1d)
    (['Linear', 'BatchNorm1d', 'SiLU'], False)
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Layer)]
    called = _called_with(model)
    here, owned = set(model.modules()), set(_owners(model))
    why = {shown(name): _why_not_back(layer, here, owned) or called.get(layer, "") for name, layer in layers}
    refused = [f"{name}: {reason}" for name, reason in why.items() if reason]
    if refused:
        raise ValueError("this network cannot be reverted to torch.nn: " + "; ".join(refused))
    with all_or_nothing(model.modules()):
        unfuse_(model)
        for _, layer in layers:
            release_(layer)
    return model


def unfuse_(model: nn.Module) -> None:
    """Put back what `convert` let the layers take in, in place; they stay evenorm's."""
    owners = _owners(model)
    before: dict[fx.GraphModule, fx.Graph] = {}
    for layer in [layer for layer in model.modules() if isinstance(layer, Layer)]:
        record = taken(layer)
        if record is None or record.origin is None:
            continue
        if isinstance(record.origin, fx.Graph):
            before.update(dict.fromkeys(owners.get(layer, []), record.origin))
            forget_(layer)
        else:
            give_back_(layer, record.origin)
    for module, graph in before.items():
        graphs.restore_(module, graph)


@dataclass(frozen=True)
class _Plan:
    """What is to be done to a network, all of it known before anything is done."""

    conversion: Conversion
    layers: list[_BatchNorm]
    activations: dict[_BatchNorm, tuple[nn.Module, str]]
    rewritings: list[graphs.Rewriting]

    def touched(self) -> list[nn.Module]:
        others = [activation for activation, _ in self.activations.values()]
        return [*self.layers, *others, *(rewriting.module for rewriting in self.rewritings)]


def fuse_again_(model: nn.Module, layers: list[_BatchNorm]) -> None:
    """Let some layers, evenorm's by now, take in what follows them, in place."""
    _carry_out_(_plan(model, True, [(name, layer) for name, layer in batch_norms(model) if layer in layers]))


def _carry_out_(plan: _Plan) -> None:
    with all_or_nothing(plan.touched()):
        for layer in plan.layers:
            adopt_(layer)
        for layer, (activation, name) in plan.activations.items():
            assert isinstance(layer, Layer)
            take_in_(layer, activation, name)
        for rewriting in plan.rewritings:
            graphs.apply_(rewriting)


def _plan(model: nn.Module, fuse: bool, named: list[tuple[str, _BatchNorm]]) -> _Plan:
    reasons: dict[nn.Module, str] = {layer: why_not_ours(layer) for _, layer in named}
    layers = [layer for _, layer in named if not reasons[layer]]
    fused: dict[nn.Module, tuple[str, ...]] = {
        layer: record.words for layer in layers if (record := taken(layer)) is not None
    }
    activations: dict[_BatchNorm, tuple[nn.Module, str]] = {}
    rewritings: list[graphs.Rewriting] = []
    left = [layer for layer in layers if layer not in fused]
    if fuse and left:
        flows = Flows(model)
        for flow in flows.flows:
            if isinstance(flow.module, fx.GraphModule):
                rewriting = graphs.rewrite(flow, flows, left)
                rewritings.append(rewriting)
                fused.update({layer: words for layer, (words, _) in rewriting.taken.items()})
                reasons.update(rewriting.reasons)
        for layer in left:
            if layer in fused or reasons[layer]:
                continue
            try:
                activation = find_activation(layer, flows)
            except LeftAloneError as reason:
                reasons[layer] = str(reason)
                continue
            activations[layer] = (activation, flows.names[activation][0])
            fused[layer] = (flows.names[activation][0],)
    entries = tuple(
        LayerConversion(shown(name), layer in layers, fused.get(layer, ()), reasons[layer]) for name, layer in named
    )
    return _Plan(Conversion(entries), layers, activations, rewritings)


def _called_with(model: nn.Module) -> dict[nn.Module, str]:
    """Return the layers that a forward calls with more than their input, which torch.nn's do not take."""
    found: dict[nn.Module, str] = {}
    for flow in Flows(model).flows:
        for graph in flow.graphs:
            for node in graph.nodes:
                layer = flow.called(node)
                if isinstance(layer, Layer) and node.kwargs and taken(layer) is None:
                    found[layer] = (
                        f"{flow.forward} calls it with {', '.join(node.kwargs)}, which torch.nn does not take"
                    )
    return found


def _why_not_back(layer: Layer, here: set[nn.Module], owned: set[nn.Module]) -> str:
    """Say why a layer cannot become torch.nn's with everything back in its place; "" if it can."""
    record = taken(layer)
    if record is None:
        lost = (
            "its activation has no place of its own; put a module behind it" if layer.activation is not None else ""
        )
        return lost or why_not_theirs(layer)
    if isinstance(record.origin, nn.Module):
        activation = record.origin
        if activation not in here or not isinstance(activation, Applied):
            return f"its activation {record.words[0]} has left the network"
        if resolve(layer.activation) != resolve(_as_it_was(activation)):
            return f"its activation was changed to {layer.activation!r}"
    elif record.origin is None:
        return (
            "it was fused in a graph and pickled, which the graph from before does not survive; revert, then pickle"
        )
    elif layer not in owned:
        return "the graph that it was fused in has left the network"
    return why_not_theirs(layer)


def _as_it_was(activation: Applied) -> nn.Module:
    """Return a module that does what an applied activation did before."""
    former = activation.was.__new__(activation.was)
    vars(former).update(vars(activation))
    return former


def _owners(model: nn.Module) -> dict[nn.Module, list[fx.GraphModule]]:
    """Return, for each module, the graph modules whose own graph calls it."""
    found: dict[nn.Module, list[fx.GraphModule]] = {}
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if node.op == "call_module":
                    found.setdefault(module.get_submodule(node.target), []).append(module)
    return found
