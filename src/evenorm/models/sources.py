"""The source of a forward and of what it calls, read for what a trace of it would not see.

A trace shows the way that unknown values take, where that depends on what they answer. It does not show what Python
asks about them without asking them: which object they are, and of which class. Where there is no source, there may
be anything in it.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from torch import nn

FUNCTIONS = 200  # that are read for one forward; a network's own code is less
LOOKING = ("type", "callable", "id", "vars", "issubclass", "getattr")  # at an object, without asking it
TRUSTED = {"torch", "evenorm", *sys.stdlib_module_names}

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


class Source(NamedTuple):
    """A function that was read, and what the names mean that it takes from outside."""

    tree: Function
    names: dict[str, Any]

    @property
    def me(self) -> str:
        """The name of the first argument, which is "self" in a method."""
        arguments = [*self.tree.args.posonlyargs, *self.tree.args.args]
        return arguments[0].arg if arguments else ""


def methods(kind: type[nn.Module]) -> Iterator[Source]:
    """Yield a class's forward and the methods that it names, in every class that they may come from.

    Raises:
        TypeError: a method that is no plain function.
        OSError: no source.
        SyntaxError: a source that is none of Python's.
    """
    waiting, known = ["forward"], {"forward"}
    while waiting:
        name = waiting.pop()
        for owner in kind.__mro__[: kind.__mro__.index(nn.Module)]:
            if name not in vars(owner):
                continue
            held = vars(owner)[name]
            function: Any = getattr(held, "fget", getattr(held, "__func__", held))
            if not inspect.isfunction(function):
                if callable(function) and not isinstance(function, type):
                    raise TypeError(f"{name} is no plain function")
                continue
            for source in _read(function):
                yield source
                named = {node.attr for node in ast.walk(source.tree) if isinstance(node, ast.Attribute)} - known
                known |= named
                waiting += named


class Reader:
    """Reads the forwards of a network, those of one class once."""

    def __init__(self) -> None:
        """Have read nothing yet."""
        self.known: dict[object, str] = {}

    def unseen(self, module: nn.Module) -> str:
        """Say what a trace of a module's forward would not see; "" if it sees everything.

        Functions of torch and of Python are taken as they are.
        """
        held = {name: _plain(value) for name, value in vars(module).items() if inspect.isroutine(value)}
        kind = type(module), *held.items()
        if kind not in self.known:
            try:
                self.known[kind] = _unseen(type(module), held)
            except (OSError, TypeError, SyntaxError):
                self.known[kind] = "its source cannot be read"
        return self.known[kind]


def _unseen(kind: type[nn.Module], held: dict[str, Any]) -> str:
    waiting = list(methods(kind))
    known: set[FunctionType] = set()
    while waiting:
        source = waiting.pop()
        reason = _unseen_in(source)
        if reason:
            return reason
        for function in set(_called(source, held)) - known:
            known.add(function)
            waiting += _read(function)
        if len(known) > FUNCTIONS:
            return f"it calls more than {FUNCTIONS} functions"
    return ""


def _plain(function: Any) -> Any:
    return function.__func__ if isinstance(function, MethodType) else function


def _read(function: FunctionType) -> Iterator[Source]:
    """Yield a function's source, and those of the functions that it wraps."""
    inner: Any = function
    while inspect.isfunction(inner):
        if inner is function or not _trusted(inner):
            names = {**inner.__globals__, **enclosed(inner)}
            yield from (Source(tree, names) for tree in _trees(inner.__code__))
        inner = getattr(inner, "__wrapped__", None)


@functools.lru_cache(maxsize=1024)  # finding a source takes Python milliseconds
def _trees(code: CodeType) -> list[Function]:
    """Return a function's source as a tree; for a lambda all those in its line."""
    lines, _ = inspect.findsource(code)
    trees = _functions("".join(lines)).get((code.co_firstlineno, code.co_name))
    if not trees:
        raise OSError("the source has changed")
    return trees


@functools.lru_cache(maxsize=64)
def _functions(text: str) -> dict[tuple[int, str], list[Function]]:
    """Return the functions of a file by first line and name, as their code objects have them."""
    found: dict[tuple[int, str], list[Function]] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Lambda):
            found.setdefault((node.lineno, "<lambda>"), []).append(node)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min(part.lineno for part in (node, *node.decorator_list))
            found.setdefault((first, node.name), []).append(node)
    return found


def _trusted(function: FunctionType) -> bool:
    return str(function.__module__).partition(".")[0] in TRUSTED


def _called(source: Source, held: dict[str, Any]) -> Iterator[FunctionType]:
    """Yield the functions, other than methods, that a function names: global ones, and those its module holds."""
    for node in ast.walk(source.tree):
        found: Any = None
        if isinstance(node, ast.Name):
            found = source.names.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = source.names.get(node.value.id)
            if node.value.id == source.me:
                found = held.get(node.attr)
            elif isinstance(owner, ModuleType):
                found = vars(owner).get(node.attr)
        found = _plain(found)
        if isinstance(found, FunctionType) and not _trusted(found):
            yield found


def enclosed(function: FunctionType) -> dict[str, Any]:
    """Return the variables of the functions around it that a function uses; not those that are empty yet."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):
            found[name] = cell.cell_contents
    return found


def _unseen_in(source: Source) -> str:
    """Say what of a function a trace would not see."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Try) and node.handlers:
            return "it catches errors"
        if isinstance(node, ast.Match):
            return "it matches patterns"
        if isinstance(node, ast.Compare) and _compares_objects(node, source.me):
            return "it compares objects by `is`"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in LOOKING:
            plain = node.func.id == "getattr" and len(node.args) < 3
            if not plain and not (node.args and is_own(node.args[0], source.me)):
                return f"it calls {node.func.id}()"
        if isinstance(node, ast.Attribute):
            if node.attr == "__class__" and not is_own(node.value, source.me):
                return "it reads __class__"
            if node.attr == "isinstance":
                return "it calls torch.jit.isinstance()"
            if node.attr == "forward" and not _is_super(node.value) and not _is_name(node.value, source.me):
                return "it calls a module's forward by itself"
    return ""


def _compares_objects(node: ast.Compare, me: str) -> bool:
    """Tell whether an unknown value may be asked which object it is; none of them is None."""
    operands = [node.left, *node.comparators]
    for operator, left, right in zip(node.ops, operands, operands[1:], strict=False):
        known = any(_is_none(one) or is_own(one, me) for one in (left, right))
        if isinstance(operator, (ast.Is, ast.IsNot)) and not known:
            return True
    return False


def is_own(node: ast.AST, me: str) -> bool:
    """Tell whether an expression is "self", or something that it holds."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return _is_name(node, me)


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and _is_name(node.func, "super")
