"""Removing batch norm for inference: with fixed statistics it is affine, and merges with the layer next to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from evenorm.activations import module_of
from evenorm.layers import Layer
from evenorm.models import certificate
from evenorm.models.affine import (
    DIMENSIONS,
    Merged,
    affine_of,
    check_mergeable,
    check_unpadded,
    merge_before,
    merge_behind,
)
from evenorm.models.certificate import Certificate, Fold, Inputs, Refusal
from evenorm.models.convert import fuse_again_, unfuse_
from evenorm.models.flows import Flows, Site
from evenorm.models.fuse import taken
from evenorm.models.reach import held_beside
from evenorm.models.spellings import word
from evenorm.models.walk import LeftAloneError, batch_norms, hooked, kind, put_, shown, twin

FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, Layer.forward)  # those that are known to be affine

PASSING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass(frozen=True)
class Folded:
    """A network without the batch norm that could be folded away, and the `Certificate` that says what was done.

    >>> import torch, evenorm
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).eval()
    >>> folded = evenorm.fold(model, torch.randn(8, 4))
    >>> folded.model[1], folded.certificate.examples.relative < 1e-5
    (Identity(), True)
    """

    model: nn.Module
    certificate: Certificate


def fold(model: nn.Module, example_inputs: object, *, tolerance: float | None = None) -> Folded:
    r"""Fold batch norm into the layers next to it, in a copy of the network, and compare the answers.

    .. math:: W' = (w s)\, W, \quad c' = w s\, (c - \mu) + b \qquad \text{or behind it} \qquad
              W' = W\, (w s), \quad c' = c + W (b - w s\, \mu)

    A layer goes into the convolution, transposed convolution, linear layer or batch norm before it, or into the
    linear layer or unpadded convolution behind it. In its place stands nn.Identity, or the activation that it
    applied. What cannot be folded exactly stays, with the reason in the certificate.

    Args:
        model: a network in evaluation.
        example_inputs: a tensor, a tuple of arguments, or a dict of named ones, such as the network is called with.
        tolerance: the largest relative difference of the outputs that is allowed; None: the square root of the
            coarsest rounding unit among parameters and buffers, 3e-4 in float32.

    Returns:
        Folded, with the new network and its certificate. The original is untouched.

    Raises:
        TypeError: examples of another type.
        ValueError: no batch norm to fold, examples that the network does not take or on which it returns
            nothing, or answers that differ by more than the tolerance.

    Note:
        The arithmetic is float64, cast once. Each batch norm has to be reached by the examples.

    >>> import torch, evenorm
    >>> conv, norm = torch.nn.Conv2d(3, 8, 3), evenorm.BatchNorm2d(8, activation="relu")
    >>> model = torch.nn.Sequential(conv, norm).eval()
    >>> print(evenorm.fold(model, torch.randn(2, 3, 9, 9)).model[1])
    ReLU()

    Source: docs/math.md, eq. 17 and 18.
    """
    inputs = certificate.inputs_of(example_inputs)
    if not batch_norms(model):
        raise ValueError(f"{kind(model)} has no batch norm to fold")
    lazy = [shown(name) for name, module in model.named_modules() if any(map(is_lazy, _own_tensors(module)))]
    if lazy:
        raise ValueError(f"{', '.join(lazy)} has not seen any input yet; call the network once, then fold it")
    allowed = certificate.tolerance_for(model) if tolerance is None else tolerance
    if not allowed > 0:
        raise ValueError(f"tolerance is the largest relative difference allowed, above 0; got {tolerance}")
    try:
        reference, folded = twin(model), twin(model, share=False)
    except Exception as error:
        raise ValueError(f"the network cannot be copied ({error}), and fold works on a copy") from error
    work = _Work(folded, _observe(reference, inputs))
    work.run_()
    trial = twin(folded)  # what a forward leaves behind is not to be in the network that is returned
    examples, probes = certificate.compare(reference, trial, inputs)
    found = Certificate(tuple(work.folds), work.refusals(), examples, probes, allowed)
    worst = examples | probes
    if not examples.compared:
        raise ValueError(
            "the network's outputs on the examples hold no values, so nothing shows that the folded network "
            "answers the same; give examples on which it returns something"
        )
    if not worst.relative <= allowed:
        raise ValueError(
            f"the folded network's answers differ from the original's by {worst.relative:.2g} of the largest value "
            f"({worst.absolute:.2g} absolute), and {allowed:.2g} is allowed; fold it in float64 to see whether "
            f"that is rounding, or give another tolerance. What was folded:\n{found}"
        )
    return Folded(folded, found)


@dataclass(frozen=True)
class _Seen:
    """What a batch norm was called with on the examples: numbers of dimensions, and names of further arguments."""

    dimensions: set[int] = field(default_factory=set)
    others: set[str] = field(default_factory=set)


def _observe(model: nn.Module, inputs: Inputs) -> dict[str, _Seen]:
    """Run a network on the examples; return what its batch norm layers were called with."""
    found = {name: _Seen() for name, _ in batch_norms(model)}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def look(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            found[name].dimensions.update(x.dim() for x in given[:1] if isinstance(x, Tensor))
            found[name].others.update(named)

        return look

    trial = twin(model)
    unfuse_(trial)
    for name, layer in batch_norms(trial):
        layer.register_forward_pre_hook(watch(name), with_kwargs=True)
    try:
        inputs.run(trial)
    except Exception as error:  # of the user's forward: it may raise anything
        raise ValueError(
            f"the network does not take the example inputs: {type(error).__name__}: {error}"
        ) from error
    return found


class _Work:
    """The folding of one network, in place, layer by layer until none is left that can be folded."""

    def __init__(self, model: nn.Module, seen: dict[str, _Seen]) -> None:
        self.model = model
        self.seen = seen
        self.fused = [layer for _, layer in batch_norms(model) if taken(layer) is not None]
        unfuse_(model)
        self.flows = Flows(model, (None,))
        self.left = {layer: name for name, layer in batch_norms(model)}
        self.beside = {
            held: f"{type(holder).__name__} holds it in {attribute!r} as well, where it would stay"
            for holder in model.modules()
            for held, attribute in held_beside(holder).items()
        }
        self.folds: list[Fold] = []
        self.reasons: dict[str, str] = {}

    def run_(self) -> None:
        """Fold what can be folded. One fold may open the way for another, so go on until nothing changes."""
        before = len(self.left) + 1
        while len(self.left) < before:
            before = len(self.left)
            for layer, name in list(self.left.items()):
                try:
                    into = self._fold_(layer, name)
                except LeftAloneError as reason:
                    self.reasons[name] = str(reason)
                    continue
                self.folds.append(Fold(shown(name), into))
                del self.left[layer]
        fuse_again_(self.model, [layer for layer in self.fused if layer in self.left])

    def refusals(self) -> tuple[Refusal, ...]:
        """Return what is left, and why."""
        return tuple(Refusal(shown(name), self.reasons[name]) for name in self.left.values())

    def _fold_(self, layer: _BatchNorm, name: str) -> str:
        """Fold one layer, in place; return the name of the layer that it went into."""
        self._check_fixed(layer, name)
        if layer in self.beside:
            raise LeftAloneError(self.beside[layer])
        affine = affine_of(layer)
        try:
            neighbour = self._before(layer, name)
            merged = merge_before(neighbour, affine)
        except LeftAloneError as nothing_before:
            try:
                neighbour = self._behind(layer, name)
                merged = merge_behind(neighbour, affine)
            except LeftAloneError as nothing_behind:
                raise LeftAloneError(f"{nothing_before}; {nothing_behind}") from None
        _write_(neighbour, merged)
        activation = module_of(layer.activation) if isinstance(layer, Layer) else None
        put_(self.model, layer, activation or nn.Identity().train(layer.training))
        return self._name(neighbour)

    def _check_fixed(self, layer: _BatchNorm, name: str) -> None:
        """Raise LeftAloneError unless a layer is, wherever it is called, one and the same affine map."""
        known = type(layer).forward in FORWARDS and "forward" not in vars(layer)
        if not known or "parametrizations" in layer._modules:
            raise LeftAloneError(f"it is a {kind(layer)}, which may compute anything")
        if layer.training and not getattr(layer, "frozen", False):
            raise LeftAloneError("it is in training mode; call model.eval() first")
        if hooked(layer):
            raise LeftAloneError("a hook looks at what goes in or out")
        if not self.seen[name].dimensions:
            raise LeftAloneError("the example inputs do not reach it")
        if self.seen[name].others:
            raise LeftAloneError(f"it is called with {', '.join(sorted(self.seen[name].others))}")

    def _before(self, layer: _BatchNorm, name: str) -> nn.Module:
        """Return the layer that always and only feeds a batch norm."""
        found = []
        for site in self.flows.sites(layer):
            node = site.only_input()
            while _passes(site.flow.called(node)):
                _check_single(site, node)
                node = Site(site.flow, node).only_input()
            found.append(self._called(site, node, "before"))
            _check_single(site, node)
        return self._accept(found, layer, name, "before")

    def _behind(self, layer: _BatchNorm, name: str) -> nn.Module:
        """Return the layer that always and only reads a batch norm."""
        if isinstance(layer, Layer) and layer.activation is not None:
            raise LeftAloneError("behind it stands its activation")
        found = []
        for site in self.flows.sites(layer):
            reader = site.reader()
            while _passes(site.flow.called(reader)):
                reader = Site(site.flow, reader).reader()
            found.append(self._called(site, reader, "behind"))
            Site(site.flow, reader).only_input()
        neighbour = self._accept(found, layer, name, "behind")
        if isinstance(neighbour, _BatchNorm):  # which goes into this one, when its turn comes
            raise LeftAloneError(f"behind it stands {self._name(neighbour)} ({type(neighbour).__name__})")
        check_unpadded(neighbour, self._name(neighbour))
        return neighbour

    def _called(self, site: Site, node: fx.Node, where: str) -> nn.Module:
        called = site.flow.called(node)
        if called is None:
            what = f"the input of {site.flow.forward}" if node.op == "placeholder" else word(node)
            raise LeftAloneError(f"{where} it stands {what}")
        return called

    def _accept(self, found: list[nn.Module], layer: _BatchNorm, name: str, where: str) -> nn.Module:
        """Return the neighbour that was found in every way through the network, if a layer can go into it."""
        neighbour = found[0]
        label = self._name(neighbour)
        if any(other is not neighbour for other in found):
            raise LeftAloneError("its neighbour depends on the arguments")
        if isinstance(neighbour, _BatchNorm):
            if neighbour not in self.left:
                raise LeftAloneError(f"{where} it stands {label}")
            self._check_fixed(neighbour, self.left[neighbour])
            affine_of(neighbour)
            if isinstance(neighbour, Layer) and neighbour.activation is not None:
                raise LeftAloneError(f"between it and {label} stands an activation")
        else:
            check_mergeable(neighbour, label, where)
            expected = next(count for kind, count in DIMENSIONS.items() if isinstance(neighbour, kind))
            if self.seen[name].dimensions != {expected}:
                found_here = " and ".join(f"{count}D" for count in sorted(self.seen[name].dimensions))
                raise LeftAloneError(
                    f"the channels of {label} are not dimension 1 of its input, which is {found_here}"
                )
        if hooked(neighbour):
            raise LeftAloneError(f"a hook looks at its neighbour {label}")
        try:
            self.flows.sites(neighbour)
        except LeftAloneError as reason:
            raise LeftAloneError(f"of its neighbour {label}: {reason}") from None
        return neighbour

    def _name(self, module: nn.Module) -> str:
        return shown(self.flows.names.get(module, [type(module).__name__])[0])


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _passes(module: nn.Module | None) -> bool:
    """Tell whether a module gives on what it gets: dropout does, at inference."""
    if module is None or type(module) not in PASSING or hooked(module) or "forward" in vars(module):
        return False
    return isinstance(module, nn.Identity) or not module.training


def _check_single(site: Site, node: fx.Node) -> None:
    site.check_let_go(node, f"what it reads, {word(node)},")
    if len(node.users) != 1:
        raise LeftAloneError(f"what it reads, {word(node)}, is read in {len(node.users)} places")


def _write_(layer: nn.Module, merged: Merged) -> None:
    """Give a layer new parameters, so that others which share the old ones keep them, in place."""
    old = layer._parameters.get("weight")
    learns = old is None or old.requires_grad
    weight = merged.weight if old is None else old.detach().clone().copy_(merged.weight)  # keeps the memory format
    layer.weight = nn.Parameter(weight, requires_grad=learns)
    layer.bias = nn.Parameter(merged.bias, requires_grad=learns)
    if isinstance(layer, _BatchNorm):
        layer.affine = True
