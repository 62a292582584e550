"""Every way that data can take through one forward, as graphs of torch.fx.

A trace goes one way through each ``if``. Here a forward is traced once for each answer to each question it asks
about values nobody knows before it runs: whether a number is true, whether something is a list. Its arguments are
given and left out, None and something, True and False. A way that ends in an error of the forward's own is none.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from types import TracebackType
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from evenorm.models.intact import remember_random

WAYS = 64  # through one forward in one mode; a trace takes milliseconds, and who asks more is not worth it
RAISE = dis.opmap["RAISE_VARARGS"]
LAYERS = ("torch.nn.", "evenorm.")  # where classes live that call nothing of the user's
UNKNOWN = object()  # an argument of which nothing is known


class Tracer(fx.Tracer):
    """Goes one way through a forward: gives the answers it was told first, and no to every further question."""

    def __init__(self, is_leaf: Callable[[nn.Module], bool]) -> None:
        """Take the question whether a module is to be seen as a whole."""
        super().__init__()
        self.is_leaf = is_leaf
        self.told: tuple[bool, ...] = ()
        self.given: dict[object, bool] = {}  # to each question, in the order in which they came

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether a module is seen as a whole."""
        return self.is_leaf(m)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Answer whether an unknown value is true."""
        return self.answer(obj.node)

    def answer(self, question: object) -> bool:
        """Answer a question, the same one always in the same way."""
        if question not in self.given:
            number = len(self.given)
            if number > WAYS:
                raise RecursionError(f"it asks more than {WAYS} questions about values")
            self.given[question] = self.told[number] if number < len(self.told) else False
        return self.given[question]


def ways(tracer: Tracer, module: nn.Module) -> list[fx.Graph]:
    """Return a graph for each way through a module's forward, in the mode that it is in.

    Raises:
        Exception: whatever a trace raises that is not an error of the forward's own.
    """
    found: dict[str, fx.Graph] = {}
    count = 0
    for arguments in _arguments(module):
        waiting: list[tuple[bool, ...]] = [()]
        while waiting:
            count += 1
            if count > WAYS:
                raise RecursionError(f"there are more than {WAYS} ways through it")
            told = waiting.pop()
            graph = _trace(tracer, module, arguments, told)
            given = tuple(tracer.given.values())
            waiting += [(*given[:number], True) for number in range(len(told), len(given))]
            if graph is not None:
                found[str(graph)] = graph
    return list(found.values())


def _arguments(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield all that a forward may be called with, as what is known of its arguments."""
    choices: dict[str, tuple[Any, ...]] = {}
    for parameter in list(inspect.signature(type(module).forward).parameters.values())[1:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            raise TypeError(f"it takes any arguments, **{parameter.name}")
        if parameter.kind is parameter.VAR_POSITIONAL:
            continue
        if parameter.default is parameter.empty:
            choices[parameter.name] = (UNKNOWN, None)
        elif isinstance(parameter.default, bool):
            choices[parameter.name] = (parameter.default, not parameter.default)
        else:
            choices[parameter.name] = (parameter.default, UNKNOWN)
    for values in product(*choices.values()):
        given = zip(choices, values, strict=True)
        yield {name: value for name, value in given if value is not UNKNOWN}


def _trace(tracer: Tracer, module: nn.Module, arguments: dict[str, Any], told: tuple[bool, ...]) -> fx.Graph | None:
    """Trace one way; None if the forward refuses to go it. Random numbers that it draws are given back."""
    restore_random = remember_random()
    tracer.told, tracer.given = told, {}
    try:
        with warnings.catch_warnings(), _asking(tracer):
            warnings.simplefilter("ignore")
            graph = tracer.trace(module, concrete_args=arguments or None)
    except Exception as error:
        if _own(error.__traceback__) or (None in arguments.values() and "NoneType" in str(error)):
            return None
        raise
    finally:
        restore_random()
    return None if _works_on_none(graph, module) else graph


def _own(trace: TracebackType | None) -> bool:
    """Tell whether an error was raised by a statement of the user's, an assertion too."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or str(trace.tb_frame.f_globals.get("__name__")).startswith("torch."):
        return False
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] == RAISE


def _works_on_none(graph: fx.Graph, module: nn.Module) -> bool:
    """Tell whether a layer of torch's or ours is called with None, which none of them takes."""
    calls = [node for node in graph.nodes if node.op == "call_module" and node.args[:1] == (None,)]
    called = [module.get_submodule(str(node.target)) for node in calls]
    return any(isinstance(one, _BatchNorm) or type(one).__module__.startswith(LAYERS) for one in called)


@contextmanager
def _asking(tracer: Tracer) -> Iterator[None]:
    """Let the tracer answer whether an unknown value is of some class, or has an attribute.

    Python has no other place for it: a proxy that claims to be a Tensor is taken for one by torch's C++ too. While
    a trace runs, torch.fx replaces functions of nn.Module in the same manner.
    """
    real = {name: getattr(builtins, name) for name in ("isinstance", "hasattr")}

    def asks(name: str) -> Callable[[object, Any], bool]:
        function = real[name]

        def ask(thing: object, what: Any, /) -> bool:
            if real["isinstance"](thing, fx.Proxy):
                asker = str(sys._getframe(1).f_globals.get("__name__"))
                if not asker.startswith("torch."):
                    return tracer.answer((name, thing.node, what))  # type: ignore[attr-defined]  # mypy does not know `real`
            return bool(function(thing, what))

        return ask

    try:
        for name in real:
            setattr(builtins, name, asks(name))
        yield
    finally:
        for name, function in real.items():
            setattr(builtins, name, function)
