"""Whether a forward that cannot be followed may call a layer inside one of its modules, past that module's forward.

What cannot be run on unknown values is read: the source of the forward, and of the methods it names. It leaves a
layer alone if it calls its modules as they are, ``self.block(x)``, also those of a list, and if the names by which
the layer would be reached stand nowhere else. Where there is doubt, or no source, it may do anything.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from types import FunctionType, MethodType

from torch import nn

from evenorm.models.sources import Source, enclosed, methods

LISTS = (nn.ModuleList, nn.ModuleDict)
WHOLE = ("children", "modules", "named_children", "named_modules", "get_submodule", "_modules")
ORDINARY = vars(nn.Module()).keys()  # the attributes that torch gives to each module


def may_reach(module: nn.Module, path: str, *, past: bool = False) -> bool:
    """Tell whether a module's own forward may call the layer at a path below it by itself.

    Args:
        module: whose forward cannot be followed.
        path: the layer's name in the module.
        past: whether the calls that are known come from outside, past the module: then a call of the layer, or of
            what it is in, as it is, is one more.
    """
    if type(module).__module__.startswith("torch."):
        return False  # wrappers of torch's, which call what they wrap
    if "forward" in vars(module):
        return True
    try:
        return any(_reaches(source, module, path.split("."), past) for source in methods(type(module)))
    except (OSError, TypeError, SyntaxError):
        return True


def held_beside(module: nn.Module) -> dict[nn.Module, str]:
    """Return the modules that another holds without being their parent, each with the name of the attribute.

    Lists, dicts and functions that hold modules are looked into.
    """
    found: dict[nn.Module, str] = {}
    for name in vars(module).keys() - ORDINARY:
        for held in _modules_in(vars(module)[name], set()):
            found.setdefault(held, name)
    return found


def _modules_in(value: object, seen: set[int]) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    if isinstance(value, (str, bytes, int, float, nn.Module)) or value is None or id(value) in seen:
        return
    seen.add(id(value))
    parts: list[object] = []
    if isinstance(value, dict):
        parts = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = list(value)
    elif isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, MethodType):
        parts = [value.__self__, value.__func__]
    elif isinstance(value, FunctionType):
        parts = list(enclosed(value).values())
    for part in parts:
        yield from _modules_in(part, seen)


def _reaches(source: Source, module: nn.Module, path: list[str], past: bool) -> bool:
    """Tell whether a method uses a name on the way to a layer for anything but calling a module of its own."""
    me, tree = source.me, source.tree
    above = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    names = {name for name in path if not name.isdecimal()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == me and not _is_base(node, above[node]):
            return True  # given to somebody else, who may look for anything
        if not isinstance(node, ast.Attribute):
            continue
        if node.attr in WHOLE:
            return True
        if node.attr in names:
            own = isinstance(node.value, ast.Name) and node.value.id == me and node.attr == path[0]
            if past or not own or not (_is_called(node, above) or _gone_through(node, above, module, path)):
                return True
    return False


def _is_base(node: ast.Name, parent: ast.AST) -> bool:
    """Tell whether "self" stands before a dot, or in super()."""
    if isinstance(parent, ast.Call):
        return isinstance(parent.func, ast.Name) and parent.func.id == "super"
    return isinstance(parent, ast.Attribute)


def _is_called(node: ast.AST, above: dict[ast.AST, ast.AST]) -> bool:
    parent = above[node]
    return isinstance(parent, ast.Call) and node is parent.func


def _gone_through(node: ast.Attribute, above: dict[ast.AST, ast.AST], module: nn.Module, path: list[str]) -> bool:
    """Tell whether a list of modules is gone through, and its entries are only called."""
    if not isinstance(module.get_submodule(path[0]), LISTS):
        return False
    parent = above[node]
    if isinstance(parent, ast.Subscript):
        return parent.value is node and _is_called(parent, above)
    if not isinstance(parent, (ast.For, ast.comprehension)) or parent.iter is not node:
        return False
    entry = parent.target
    if not isinstance(entry, ast.Name):
        return False
    uses = [other for other in above if isinstance(other, ast.Name) and other.id == entry.id and other is not entry]
    return all(_is_called(use, above) for use in uses)
