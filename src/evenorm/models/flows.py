"""What stands before and behind a layer: how data flow through the forwards of a network.

Each module's own forward is followed by torch.fx, its children being leaves, so that one that cannot be followed
spoils no other. A plain nn.Sequential is gone through as part of whoever calls it. A forward is followed in each
mode and in every way through it; what is to hold has to hold in all of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from evenorm.models.intact import remember_random
from evenorm.models.reach import held_beside, may_reach
from evenorm.models.sources import Reader
from evenorm.models.walk import LeftAloneError, hooked, names, twin
from evenorm.models.ways import GRADIENT, KEPT, Tracer, following, ways


@dataclass(frozen=True)
class Flow:
    """One module's own forward as graphs, one for each way through it; none where it cannot be followed."""

    module: nn.Module
    name: str
    graphs: tuple[fx.Graph, ...]
    trouble: str = ""

    def called(self, node: object) -> nn.Module | None:
        """Return the module that a node calls, as it is now; None for any other node."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        return self.module.get_submodule(str(node.target))

    @property
    def forward(self) -> str:
        """The forward's name for a message."""
        return f"{type(self.module).__name__}.forward"


@dataclass(frozen=True)
class Site:
    """A place in a forward at which a module is called."""

    flow: Flow
    node: fx.Node

    def reader(self) -> fx.Node:
        """Return the one node that reads the output."""
        self.check_let_go(self.node, "its output")
        users = list(self.node.users)
        if len(users) != 1:
            times = f"in {len(users)} places" if users else "nowhere"
            raise LeftAloneError(f"its output is read {times} in {self.flow.forward}")
        if users[0].op == "output":
            raise LeftAloneError(f"its output leaves {self.flow.forward}")
        return users[0]

    def check_let_go(self, node: fx.Node, what: str) -> None:
        """Raise LeftAloneError if the forward leaves a value where others may find it."""
        if KEPT in node.meta:
            raise LeftAloneError(f"{what} is kept by {self.flow.forward}")

    def same_gradient(self, node: fx.Node) -> bool:
        """Tell whether gradients pass through another call of the forward as they do through this one."""
        return self.node.meta.get(GRADIENT) == node.meta.get(GRADIENT)

    def only_input(self) -> fx.Node:
        """Return the node that the call reads, which must be its one argument."""
        if len(self.node.args) != 1 or self.node.kwargs or not isinstance(self.node.args[0], fx.Node):
            given = ", ".join(self.node.kwargs) or "several arguments"
            raise LeftAloneError(f"it is called with {given} in {self.flow.forward}")
        return self.node.args[0]


class Flows:
    """All flows of a network, and where in them each module is called."""

    def __init__(self, model: nn.Module, modes: Sequence[bool | None] = (True, False)) -> None:
        """Follow every forward that has batch norm below it; a mode of None leaves each module in its own."""
        self.names = names(model)
        self.flows = _all_flows(model, modes, self.names)
        self.held = self._held_beside(model)
        self.calls: dict[nn.Module, list[list[Site]]] = {}  # of a module, for each graph that calls it
        self.read: set[str] = set()  # the parameters and buffers that a forward reads by itself, by dotted name
        for flow in self.flows:
            for graph in flow.graphs:
                self._index(flow, graph)

    def sites(self, module: nn.Module) -> list[Site]:
        """Return where a module is called, once for each way through the one forward that calls it.

        Raises:
            LeftAloneError: it is called in several places, or in none that could be followed.
        """
        places = self.names.get(module, [])
        if len(places) > 1:
            raise LeftAloneError(f"it is used in several places: {', '.join(places)}")
        calls = self.calls.get(module, [])
        if any(len(sites) > 1 for sites in calls) or len({sites[0].flow.name for sites in calls}) > 1:
            raise LeftAloneError("it is called in several places")
        if not calls:
            raise LeftAloneError(self._why_not(places[0] if places else ""))
        flow = calls[0][0].flow
        if len(calls) < len(flow.graphs):
            raise LeftAloneError(f"{flow.forward} does not call it in every mode and with all arguments")
        if any(name.startswith(f"{places[0]}.") for name in self.read):
            raise LeftAloneError("a forward reads its parameters or buffers directly")
        for beginning, by in self.held.items():
            if f"{places[0]}.".startswith(beginning):
                raise LeftAloneError(by)
        for around in self._around(places[0]):
            inside = f"{around.name}.".lstrip(".")
            if may_reach(around.module, places[0].removeprefix(inside), past=not flow.name.startswith(inside)):
                raise LeftAloneError(f"{around.forward} cannot be followed ({around.trouble}) and may reach it")
        return [sites[0] for sites in calls]

    def _index(self, flow: Flow, graph: fx.Graph) -> None:
        here: dict[nn.Module, list[Site]] = {}
        for node in graph.nodes:
            module = flow.called(node)
            if module is not None:
                here.setdefault(module, []).append(Site(flow, node))
            elif node.op == "get_attr":
                self.read.add(f"{flow.name}.{node.target}".lstrip("."))
        for module, sites in here.items():
            self.calls.setdefault(module, []).append(sites)

    def _held_beside(self, model: nn.Module) -> dict[str, str]:
        """Return the beginnings of names of modules that others may call unseen, and what is to be said of it."""
        followed = {flow.module for flow in self.flows if flow.graphs}
        found: dict[str, str] = {}
        for holder in model.modules():
            if holder in followed or type(holder).__module__.startswith(("torch.nn.", "evenorm.")):
                continue
            for held, attribute in held_beside(holder).items():
                for name in self.names.get(held, []):
                    by = f"{type(holder).__name__} holds {name or 'the model'} in {attribute!r} and may call it"
                    found[f"{name}." if name else ""] = by
        return found

    def _around(self, name: str) -> list[Flow]:
        """Return the forwards around a module that cannot be followed."""
        return [flow for flow in self.flows if flow.trouble and f"{name}.".startswith(f"{flow.name}.".lstrip("."))]

    def _why_not(self, name: str) -> str:
        """Say why nobody is seen to call a module: the nearest forward around it that could not be followed."""
        around = self._around(name)
        if not around:
            return "no forward is seen to call it"
        nearest = max(around, key=lambda flow: len(flow.name))
        return f"{nearest.forward} cannot be followed ({nearest.trouble})"


def plain_sequential(module: nn.Module) -> bool:
    """Tell whether a module calls its children one after the other and nobody looks at the whole."""
    ordinary = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return ordinary and "forward" not in vars(module) and not hooked(module)


def _all_flows(model: nn.Module, modes: Sequence[bool | None], places: dict[nn.Module, list[str]]) -> list[Flow]:
    """Return the flows, outer forwards before inner ones; random numbers that they draw are given back."""
    restore_random = remember_random()
    try:
        clone = twin(model, hooks=False)
    except Exception:  # then only plain Sequentials can be followed: on the network itself, as they do nothing else
        clone, modes = model, (None,)
    try:
        return following(lambda tracer: _flows(tracer, model, clone, modes, places))
    finally:
        restore_random()


def _flows(
    tracer: Tracer,
    model: nn.Module,
    clone: nn.Module,
    modes: Sequence[bool | None],
    places: dict[nn.Module, list[str]],
) -> Iterator[Flow]:
    originals = {module: model.get_submodule(name) for name, module in clone.named_modules()}
    entered: set[nn.Module] = set()  # Sequentials that a forward calls, and is followed through
    called: set[nn.Module] = set()
    follower = _Follower(tracer, Reader(), modes, originals)
    for name, module in clone.named_modules():
        original = originals[module]
        if not _has_own_forward(original):
            continue
        if isinstance(original, fx.GraphModule):
            yield Flow(original, name, (original.graph,))
        elif clone is model and not plain_sequential(original):
            yield Flow(original, name, (), "the network cannot be copied")
        elif plain_sequential(original) and (original in entered or _taken_apart(original, called, places)):
            continue
        else:
            flow, sequentials = follower.follow(module, name)
            if flow.graphs:
                entered.update(sequentials)
                called.update(filter(None, (flow.called(node) for graph in flow.graphs for node in graph.nodes)))
            yield flow


def _taken_apart(sequential: nn.Module, called: set[nn.Module], places: dict[nn.Module, list[str]]) -> bool:
    """Tell whether a forward around a Sequential calls its children one by one, as a list."""
    return any(child in called and len(places[child]) == 1 for child in sequential.children())


def _has_own_forward(module: nn.Module) -> bool:
    """Tell whether a module has a forward of its own that may call batch norm."""
    if type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential):
        return False  # torch's layers and its lists, which call nothing of ours
    inside = any(isinstance(child, _BatchNorm) for child in module.modules() if child is not module)
    return inside and type(module).forward is not nn.Module.forward


@dataclass(frozen=True)
class _Follower:
    """Follows the forwards of a network, in the modules of a copy."""

    tracer: Tracer
    reader: Reader
    modes: Sequence[bool | None]
    originals: dict[nn.Module, nn.Module]

    def follow(self, module: nn.Module, name: str) -> tuple[Flow, list[nn.Module]]:
        """Follow one forward in every mode and way; return the plain Sequentials that it goes through as well.

        One way that cannot be followed leaves nothing that always holds, so then there is no graph.
        """
        original = self.originals[module]
        entered: list[nn.Module] = []

        def is_leaf(child: nn.Module) -> bool:
            if plain_sequential(self.originals[child]):
                entered.append(self.originals[child])
                return False
            return True

        replaced = "it was replaced on the instance" if "forward" in vars(module) else ""
        trouble = replaced or ("" if plain_sequential(original) else self.reader.unseen(module))
        if trouble:
            return Flow(original, name, (), trouble), []
        graphs: dict[str, fx.Graph] = {}
        for mode in self.modes:
            if mode is not None:
                for part in module.modules():
                    part.training = mode
            try:
                graphs.update((str(graph), graph) for graph in ways(self.tracer, module, is_leaf))
            except Exception as error:
                trouble = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                return Flow(original, name, (), trouble), []
        return Flow(original, name, tuple(graphs.values())), entered
