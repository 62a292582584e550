"""Taking what follows a batch norm in a torch.fx graph into it: an addition, an activation, or one after the other.

A GraphModule's forward is generated, so it can be rewritten, where a class's own forward stays as it is written.
The new graph is made from a copy, and the layers keep the one before, for the way back.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from evenorm.layers import Layer
from evenorm.models.flows import Flow, Flows
from evenorm.models.fuse import Taken, check_open, keep_
from evenorm.models.spellings import ADDITIONS, IN_PLACE, activation_at, word
from evenorm.models.walk import LeftAloneError

NUMBERS = (
    "size",
    "dim",
    "ndimension",
    "numel",
    "nelement",
    "item",
    "tolist",
    "stride",
    "element_size",
    "get_device",
)


@dataclass(frozen=True)
class Rewriting:
    """A graph module with its graph as it is to become, and what each layer takes in: words, and the activation."""

    module: fx.GraphModule
    graph: fx.Graph
    taken: dict[nn.Module, tuple[tuple[str, ...], nn.Module | None]]
    reasons: dict[nn.Module, str]


def rewrite(flow: Flow, flows: Flows, layers: list[_BatchNorm]) -> Rewriting:
    """Return a graph in which the layers add and activate, and why some do not; changes nothing."""
    module = flow.module
    assert isinstance(module, fx.GraphModule)
    graph = copy.deepcopy(module.graph)
    taken: dict[nn.Module, tuple[tuple[str, ...], nn.Module | None]] = {}
    reasons: dict[nn.Module, str] = {}
    for node in list(graph.nodes):
        layer = flow.called(node)
        if layer not in layers or not isinstance(layer, _BatchNorm):
            continue
        try:
            check_open(layer)
            flows.sites(layer)[0].only_input()
            words, activation = _absorb_(graph, node, flow)
            taken[layer] = (words, activation)
        except LeftAloneError as reason:
            reasons[layer] = str(reason)
    for node in graph.nodes:
        if node.target == "expand_as" and (other := flow.called(node.args[0])) in reasons:
            reasons[other] = "the layer behind the addition does it"
    graph.lint()
    return Rewriting(module, graph, taken, reasons)


def apply_(rewriting: Rewriting) -> None:
    """Give the graph module its new graph, and the layers their activations, in place."""
    if not rewriting.taken:
        return
    before = copy.deepcopy(rewriting.module.graph)
    for layer, (words, activation) in rewriting.taken.items():
        assert isinstance(layer, Layer)
        keep_(layer, Taken(words, before), activation)
    rewriting.module.graph = rewriting.graph


def restore_(module: fx.GraphModule, before: fx.Graph) -> None:
    """Undo what `apply_` did to a graph module, in place."""
    module.graph = copy.deepcopy(before)


def _absorb_(graph: fx.Graph, node: fx.Node, flow: Flow) -> tuple[tuple[str, ...], nn.Module | None]:
    """Take out of the graph what the layer at a node can do as well; return words for it and the activation."""
    words: tuple[str, ...] = ()
    reader = _reader(node)
    if reader.target == "expand_as":
        raise LeftAloneError("the layer behind the addition does it")
    why = ""
    if reader.target in ADDITIONS:
        why = _why_no_addition(reader, node, flow)
        if not why:
            other = next(operand for operand in reader.args if operand is not node)
            assert isinstance(other, fx.Node)
            with graph.inserting_before(node):
                # A view of the layer's shape: what is added may be smaller than what it is added to.
                shaped = graph.call_method("expand_as", (other, node.args[0]))
            node.kwargs = {"residual": shaped}
            _take_out_(graph, reader, node)
            words += ("addition",)
            try:
                reader = _reader(node)
            except LeftAloneError:
                return words, None
    activation = activation_at(reader, flow)
    if activation is not None:
        _take_out_(graph, reader, node)
        return (*words, type(activation).__name__), activation
    if not words:
        raise LeftAloneError(why or f"what follows it, {word(reader)}, is no addition or activation it can apply")
    return words, None


def _reader(node: fx.Node) -> fx.Node:
    """Return the one node that reads a node."""
    if len(node.users) != 1:
        raise LeftAloneError(f"its output is read in {len(node.users)} places")
    reader = next(iter(node.users))
    if reader.op == "output":
        raise LeftAloneError("nothing follows it")
    return reader


def _why_no_addition(addition: fx.Node, node: fx.Node, flow: Flow) -> str:
    """Say why the layer at a node cannot do an addition that reads it; "" if it can."""
    operands = addition.args
    if addition.kwargs or len(operands) != 2 or not all(isinstance(operand, fx.Node) for operand in operands):
        return "what is added to it is no tensor"
    other = operands[1] if operands[0] is node else operands[0]
    assert isinstance(other, fx.Node)
    if other is node:
        return "it is added to itself"
    if _may_be_number(other):
        return f"what is added to it, {word(other)}, may be a number"
    if addition.prev is not node:
        return "what is added to it is computed after it"
    target = operands[0]
    written = addition.target in IN_PLACE and target is not node
    if written and not (len(other.users) == 1 and isinstance(flow.called(other), _BatchNorm)):
        return "it is added in place to something that others may read"
    return ""


def _may_be_number(node: fx.Node) -> bool:
    """Tell whether a node may give a number of Python's, such as a shape's: then it is no tensor to add."""
    if node.op == "call_method":
        return node.target in NUMBERS
    if node.op != "call_function":
        return False
    if node.target in (operator.getitem, getattr):
        source = node.args[0]
        return node.target is getattr or not isinstance(source, fx.Node) or _may_be_number(source)
    arithmetic = getattr(node.target, "__module__", "") in ("_operator", "math", "builtins")
    return arithmetic and all(not isinstance(value, fx.Node) or _may_be_number(value) for value in node.args)


def _take_out_(graph: fx.Graph, node: fx.Node, before: fx.Node) -> None:
    node.replace_all_uses_with(before)
    graph.erase_node(node)
