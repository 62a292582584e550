"""Whether a forward that cannot be followed may call a layer inside one of its modules, past that module's forward.

What cannot be run on unknown values is read: the source of the forward, and of the methods it names. It leaves a
layer alone if it calls its modules as they are, ``self.block(x)``, or goes through a list of them, and if the names
by which the layer would be reached stand nowhere else. Where there is doubt, or no source, it may do anything.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn

LISTS = (nn.ModuleList, nn.ModuleDict)
WHOLE = ("children", "modules", "named_children", "named_modules", "get_submodule", "_modules")


def may_reach(module: nn.Module, path: str) -> bool:
    """Tell whether a module's own forward may call the layer at a path below it by itself."""
    if type(module).__module__.startswith("torch."):
        return False  # wrappers of torch's, which call what they wrap
    if "forward" in vars(module):
        return True
    try:
        return any(_reaches(method, module, path.split(".")) for method in _methods(type(module)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return True


def _methods(kind: type[nn.Module]) -> Iterator[ast.FunctionDef]:
    """Yield a class's forward and the methods that it names, in every class that they may come from, parsed."""
    waiting, known = ["forward"], {"forward"}
    while waiting:
        name = waiting.pop()
        for owner in kind.__mro__[: kind.__mro__.index(nn.Module)]:
            function = vars(owner).get(name)
            function = getattr(function, "fget", getattr(function, "__func__", function))
            if not inspect.isfunction(function):
                continue
            tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
            if not isinstance(tree, ast.FunctionDef):
                raise TypeError(f"{name} is no plain function")
            yield tree
            named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} - known
            known |= named
            waiting += named


def _reaches(method: ast.FunctionDef, module: nn.Module, path: list[str]) -> bool:
    """Tell whether a method uses a name on the way to a layer for anything but calling a module of its own."""
    arguments = [*method.args.posonlyargs, *method.args.args]
    me = arguments[0].arg if arguments else ""
    above = {child: parent for parent in ast.walk(method) for child in ast.iter_child_nodes(parent)}
    names = {name for name in path if not name.isdecimal()}
    for node in ast.walk(method):
        if isinstance(node, ast.Name) and node.id == me and not _is_base(node, above[node]):
            return True  # given to somebody else, who may look for anything
        if not isinstance(node, ast.Attribute):
            continue
        if node.attr in WHOLE:
            return True
        if node.attr in names:
            own = isinstance(node.value, ast.Name) and node.value.id == me and node.attr == path[0]
            parent = above[node]
            called = isinstance(parent, ast.Call) and node is parent.func
            if not own or not (called or _gone_through(node, parent, module, path)):
                return True
    return False


def _is_base(node: ast.Name, parent: ast.AST) -> bool:
    """Tell whether "self" stands before a dot, or in super()."""
    if isinstance(parent, ast.Call):
        return isinstance(parent.func, ast.Name) and parent.func.id == "super"
    return isinstance(parent, ast.Attribute)


def _gone_through(node: ast.Attribute, parent: ast.AST, module: nn.Module, path: list[str]) -> bool:
    """Tell whether a list of modules is gone through whose entries nobody can take apart without naming a part."""
    if not isinstance(module.get_submodule(path[0]), LISTS) or len(path) < 2:
        return False
    entry = module.get_submodule(".".join(path[:2]))
    if isinstance(entry, (nn.Sequential, *LISTS)):
        return False
    loop = isinstance(parent, (ast.For, ast.comprehension)) and parent.iter is node
    return loop or (isinstance(parent, ast.Subscript) and parent.value is node)
