"""Every way that data can take through one forward, as graphs of torch.fx.

A trace goes one way through each ``if``. Here a forward is traced once for each answer to each question it asks
about values nobody knows before it runs: whether a number is true, whether something is a list. Of its arguments
nothing is known; those that may be None are given as None too. A way that ends in an error of the forward's own is
none.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from types import FunctionType, MethodType, TracebackType
from typing import Any, NoReturn, TypeVar

import torch
from torch import fx, nn
from torch.fx.proxy import Attribute
from torch.nn.modules.batchnorm import _BatchNorm

from evenorm.models.intact import remember_random

WAYS = 64  # through one forward in one mode; a trace takes milliseconds, and who asks more is not worth it
TRIES = 3  # until random numbers that are drawn are taken for the forward's own, and not for another thread's
RAISE, UNPACK = dis.opmap["RAISE_VARARGS"], dis.opmap["UNPACK_SEQUENCE"]
LAYERS = ("torch.nn.", "evenorm.")  # where classes live that call nothing of the user's
UNKNOWN = object()  # an argument of which nothing is known
# What is noted about a node: whether gradients pass through it, whether something holds its value.
GRADIENT, KEPT = "gradient", "kept"

T = TypeVar("T")
_one_at_a_time = threading.RLock()  # torch.fx and we replace functions that all threads call


class Unknown(fx.Proxy):
    """A value of which nothing is known."""

    def __hash__(self) -> NoReturn:
        """Raise: a set or a dict would be looked into for a value that is not there yet."""
        raise TypeError("it looks an unknown value up in a set or a dict")

    def __getattr__(self, k: str) -> Part:
        """Return an attribute, or a method."""
        return Part(self, k)

    def __iter__(self) -> Iterator[Any]:
        """Return as many parts as are asked for; torch.fx would keep the frame that asks, and all values in it."""
        asker = sys._getframe(1)
        operation, count = asker.f_code.co_code[asker.f_lasti :][:2]
        if operation != UNPACK:
            raise TypeError("it goes through an unknown value")
        parts: Any = self
        return iter([parts[number] for number in range(count)])


class Part(Unknown, Attribute):
    """An attribute or a method of an unknown value."""


class Tracer(fx.Tracer):
    """Goes one way through a forward: gives the answers it was told first, and no to every further question.

    What other threads call meanwhile is none of its business, and runs as ever.
    """

    def __init__(self) -> None:
        """Stay in this thread."""
        super().__init__()
        self.thread = threading.get_ident()
        self.call = nn.Module()  # is called in the place of the module that is followed
        self.is_leaf: Callable[[nn.Module], bool] = lambda _: True
        self.told: tuple[bool, ...] = ()
        self.given: dict[object, bool] = {}  # to each question, in the order in which they came
        self.parameters: dict[str, fx.Proxy] = {}
        self.proxies: list[weakref.ref[fx.Proxy]] = []

    def begin(self, module: nn.Module, told: tuple[bool, ...]) -> None:
        """Start on a new way through a module's forward."""
        self.root, self.submodule_paths = module, {part: name for name, part in module.named_modules()}
        self.graph, self.tensor_attrs = fx.Graph(), {}
        self.told, self.given, self.parameters, self.proxies = told, {}, {}, []

    def end(self) -> fx.Graph:
        """Return the graph, in which it is noted what values outlive the way: something else may read them."""
        self.parameters.clear()
        for reference in self.proxies:
            value = reference()
            if value is not None:
                value.node.meta[KEPT] = True
        return self.graph

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record the call of a module that is seen as a whole, and go through any other."""
        if threading.get_ident() != self.thread or m is self.call:
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        return self.create_proxy("call_module", name, args, kwargs) if self.is_leaf(m) else forward(*args, **kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return what a module's attribute is: an unknown value for a parameter."""
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, self.parameters)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Note whether gradients pass through a node."""
        node = super().create_node(*args, **kwargs)
        node.meta[GRADIENT] = torch.is_grad_enabled()
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return the value of a node."""
        value = Unknown(node, self)
        self.proxies.append(weakref.ref(value))
        return value

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


def following(work: Callable[[Tracer], Iterable[T]]) -> list[T]:
    """Return what some work yields that goes `ways`, under one replacement of functions for all of them.

    torch.fx replaces those of nn.Module and more for each trace, which takes longer than most traces. So all ways
    are parts of one trace: of the work.
    """
    found: list[T] = []

    def session() -> None:
        found.extend(work(tracer))
        tracer.graph = fx.Graph()  # to which the trace of the work itself adds its output

    with _one_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tracer = Tracer()
        with _asking(tracer):
            tracer.trace(session)
    return found


def ways(tracer: Tracer, module: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> list[fx.Graph]:
    """Return a graph for each way through a module's forward, in the mode that it is in.

    Args:
        tracer: of the work that is `following`.
        module: whose forward is gone through.
        is_leaf: whether a module that is called is seen as a whole.

    Raises:
        Exception: whatever a trace raises that is not an error of the forward's own.
    """
    tracer.is_leaf = is_leaf
    for _ in range(TRIES):
        restore_random = remember_random()
        try:
            found = _all_ways(tracer, module)
        finally:
            drawn = restore_random()
        if not drawn:
            return found
    raise ValueError("it draws random numbers, on which its way may depend")


def _all_ways(tracer: Tracer, module: nn.Module) -> list[fx.Graph]:
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
        may_be_none = (
            parameter.default in (parameter.empty, None) and parameter.kind is not parameter.VAR_POSITIONAL
        )
        choices[parameter.name] = (UNKNOWN, None) if may_be_none else (UNKNOWN,)
    for values in product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def _trace(tracer: Tracer, module: nn.Module, arguments: dict[str, Any], told: tuple[bool, ...]) -> fx.Graph | None:
    """Trace one way; None if the forward refuses to go it. The module keeps the attributes that it has."""
    attributes = dict(vars(module))
    tracer.begin(module, told)
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            _go(tracer, module, arguments)
    except Exception as error:
        if _own(error.__traceback__, module) or (None in arguments.values() and "NoneType" in str(error)):
            return None
        raise
    else:
        graph = tracer.end()
    finally:
        for name in vars(module).keys() - attributes.keys():
            del vars(module)[name]
        vars(module).update(attributes)
    return None if _works_on_none(graph, module) else graph


def _go(tracer: Tracer, module: nn.Module, arguments: dict[str, Any]) -> None:
    """Call a module's own forward with unknown values, and let the tracer record where it goes."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType):
        raise TypeError("it is no function")
    parameters = inspect.signature(forward).parameters
    several = [name for name in arguments if parameters[name].kind is inspect.Parameter.VAR_POSITIONAL]
    if several:
        forward = _several_as_one(forward)
    given = {
        name: value if value is None else tracer.create_proxy("placeholder", name, (), {})
        for name, value in arguments.items()
    }
    named = {name: given.pop(name) for name in arguments if parameters[name].kind is inspect.Parameter.KEYWORD_ONLY}
    vars(tracer.call)["forward"] = MethodType(forward, module)
    if several:  # which stand behind those that are named
        last = given.pop(several[0])
        result = tracer.call(*given.values(), *named.values(), last)
    else:
        result = tracer.call(*given.values(), **named)
    tracer.create_node("output", "output", (tracer.create_arg(result),), {})


def _several_as_one(forward: FunctionType) -> FunctionType:
    """Return a forward whose ``*args`` are one argument, the last: nobody knows how many there are."""
    if hasattr(forward, "__wrapped__"):
        raise TypeError("it is wrapped, and takes any number of arguments")
    code = forward.__code__
    one = code.replace(
        co_argcount=code.co_argcount + code.co_kwonlyargcount + 1,
        co_posonlyargcount=0,
        co_kwonlyargcount=0,
        co_flags=code.co_flags & ~inspect.CO_VARARGS,
    )
    return FunctionType(one, forward.__globals__, forward.__name__, None, forward.__closure__)


def _own(trace: TracebackType | None, module: nn.Module) -> bool:
    """Tell whether an error was raised by a statement, an assertion too, in the package of the forward.

    What another library raises may be about values that are unknown, which it would not be given.
    """
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    mine = {_package(kind.__module__) for kind in type(module).__mro__[: type(module).__mro__.index(nn.Module)]}
    raised_in = _package(trace.tb_frame.f_globals.get("__name__"))
    by_statement = trace.tb_frame.f_code.co_code[trace.tb_lasti] == RAISE
    return by_statement and raised_in in mine - {"torch", "evenorm"}


def _package(name: object) -> str:
    return str(name).partition(".")[0]


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
            if type(thing) in (Unknown, Part):
                asker = str(sys._getframe(1).f_globals.get("__name__"))
                if not asker.startswith("torch."):
                    return tracer.answer((name, thing.node, what))  # type: ignore[attr-defined]  # mypy reads no `in`
            return bool(function(thing, what))

        return ask

    try:
        for name in real:
            setattr(builtins, name, asks(name))
        yield
    finally:
        for name, function in real.items():
            setattr(builtins, name, function)
