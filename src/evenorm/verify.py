"""A diagnosis where others hang: before workers pool, they compare notes on what each of them is about to do."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from evenorm import workers
from evenorm.layers import Layer

_GO = "go"
# How many blocks this worker has opened, by the members of a group that it pools with in the block: the same on all
# of them, who run the same program, whatever workers outside the group run.
_blocks: Counter[str] = Counter()


@contextmanager
def verify_workers(model: nn.Module, timeout: float = 30.0) -> Iterator[None]:
    """Compare, before each pooling inside the block, what the workers are about to pool.

    Each worker writes down the layer's name, the number of the call, the channels, dtype and mode, and reads what
    the others wrote. Where they differ, or one does not come, every worker that lives raises an error that names
    who diverged and where, before anything is sent that could hang. Networks run without what torch.compile made of
    them. Meant for finding a fault: each call costs round trips to the store that torch.distributed keeps, so do
    not train a whole run inside the block. A backward that one worker leaves out is not seen.

    Args:
        model: a network with evenorm layers that have a ``process_group``.
        timeout: how long to wait for the others before each pooling, in seconds, above 0.

    Raises:
        ValueError: a timeout that is no number of seconds, before anything is done.
        RuntimeError: from a forward inside the block, on every worker, when the workers disagree.

    >>> import torch, evenorm
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), evenorm.BatchNorm1d(3))
    >>> with evenorm.verify_workers(model, timeout=10):
    ...     _ = model(torch.randn(8, 4))
    """
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
        raise ValueError(f"timeout must be a number of seconds, above 0 and finite, got {timeout!r}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Layer)}
    pooling = {name: layer for name, layer in layers.items() if layer.process_group is not None}
    if not pooling:
        yield
        return
    ledger = _Ledger(timeout, pooling.values())
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # what was compiled before knows nothing of hooks
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        turn = _Turn(ledger)
        workers.before_pooling.append(turn.compare)
        stack.callback(workers.before_pooling.remove, turn.compare)
        for name, layer in pooling.items():
            stack.callback(layer.register_forward_pre_hook(turn.begin(name)).remove)
            stack.callback(layer.register_forward_hook(turn.end(name), with_kwargs=True).remove)
        try:
            yield
            ledger.leave("left the block")
        except BaseException as error:
            ledger.leave(f"stopped with {type(error).__name__}")
            raise


class _Turn:
    """Which layer runs, and whether it has been compared in this forward.

    A layer that pools is compared as it is about to, when its arguments have been found right; one that does not,
    in evaluation say, when its forward is over.
    """

    def __init__(self, ledger: _Ledger) -> None:
        self.ledger = ledger
        self.current: tuple[str, Layer] | None = None
        self.due: set[str] = set()

    def begin(self, name: str) -> Any:
        def remember(layer: Layer, inputs: Any) -> None:
            self.current = name, layer
            self.due.add(name)

        return remember

    def compare(self, group: dist.ProcessGroup, x: Tensor) -> None:
        if self.current is not None and self.current[0] in self.due:
            name, layer = self.current
            self.due.discard(name)
            self.ledger.compare(group, _note(name, layer, x))

    def end(self, name: str) -> Any:
        def compare_rest(layer: Layer, inputs: Any, keywords: dict[str, Any], y: Any) -> None:
            if name in self.due:
                self.due.discard(name)
                x = inputs[0] if inputs else keywords["input"]
                group = _others(layer)
                if group is not None:
                    self.ledger.compare(group, _note(name, layer, x))

        return compare_rest


def _note(name: str, layer: Layer, x: Tensor) -> dict[str, str]:
    mode = "frozen" if layer.frozen else "train" if layer.training else "eval"
    return {"layer": name or "the model", "channels": str(x.shape[1]), "dtype": str(x.dtype), "mode": mode}


class _Ledger:
    """What this worker has written for the others to read, call by call and group by group."""

    def __init__(self, timeout: float, layers: Iterable[Layer]) -> None:
        self.timeout = timedelta(seconds=timeout)
        self.names: dict[str, str] = {}  # what a group calls this block in the store, by the group's members
        self.calls: dict[str, int] = {}  # by that name
        for layer in layers:  # those who hear of it if this worker leaves at once
            group = _others(layer)
            if group is not None:
                self._name(group)

    def _name(self, group: dist.ProcessGroup) -> str:
        members = "-".join(map(str, dist.get_process_group_ranks(group)))
        if members not in self.names:
            _blocks[members] += 1
            self.names[members] = f"evenorm/verify/{members}/{_blocks[members]}"
            self.calls[self.names[members]] = 0
        return self.names[members]

    def compare(self, group: dist.ProcessGroup, note: dict[str, str]) -> None:
        ranks, block, mine = dist.get_process_group_ranks(group), self._name(group), dist.get_rank()
        call = self.calls[block] = self.calls[block] + 1
        self._write(block, call, mine, note)
        verdict = f"{block}/{call}/verdict"

        def read() -> dict[int, dict[str, str]]:
            return {rank: self._read(block, call, rank, note) for rank in ranks if rank != mine}

        try:
            notes = read()
        except BaseException as error:
            reason = str(error) if isinstance(error, RuntimeError) else type(error).__name__
            if _decide(verdict, f"rank {mine} stopped: {reason}") != _GO or not isinstance(error, RuntimeError):
                raise
            notes = read()  # the last one has come while this worker gave up, and others go on already
        differing = {rank: other for rank, other in notes.items() if other != note}
        if differing:
            found = "; ".join(f"rank {rank}: {_words(other)}" for rank, other in sorted(differing.items()))
            raise RuntimeError(
                f"workers diverged at pooling number {call}: rank {mine}: {_words(note)}; {found}. "
                "All workers must run the same layers equally often, in the same mode"
            )
        decided = _decide(verdict, _GO)
        if decided != _GO:  # this worker came too late
            raise RuntimeError(f"workers stopped at pooling number {call}: {decided}")

    def leave(self, how: str) -> None:
        """Tell those who will wait for this worker that it is not coming."""
        for block, call in self.calls.items():
            try:
                self._write(block, call + 1, dist.get_rank(), {"gone": how})
            except RuntimeError:  # the store is gone with its host: nobody is left to read
                return

    def _write(self, block: str, call: int, rank: int, note: dict[str, str]) -> None:
        text = json.dumps(note)
        store = _store()
        store.set(f"{block}/{call}/{rank}", text)
        store.set(f"{block}/last/{rank}", text)

    def _read(self, block: str, call: int, rank: int, mine: dict[str, str]) -> dict[str, str]:
        store, key = _store(), f"{block}/{call}/{rank}"
        try:
            store.wait([key], self.timeout)
            note: dict[str, str] = json.loads(store.get(key))
            return note
        except RuntimeError as error:
            last = f"{block}/last/{rank}"
            try:
                seen = _words(json.loads(store.get(last))) if store.check([last]) else "nowhere in this block"
            except RuntimeError:
                seen = "unknown, since the store's host is gone too"
            raise RuntimeError(
                f"rank {rank} did not come to pooling number {call}, {_words(mine)}, within "
                f"{self.timeout.total_seconds():g} s; last seen: {seen}"
            ) from error


def _others(layer: Layer) -> dist.ProcessGroup | None:
    """Return the group that a layer would pool with in training; None where it is alone, or could not."""
    group = layer.process_group
    if group is None or not (dist.is_available() and dist.is_initialized()):
        return None
    found = dist.group.WORLD if isinstance(group, str) else group
    return found if found is not None and dist.get_rank(found) >= 0 and dist.get_world_size(found) > 1 else None


def _decide(key: str, wanted: str) -> str:
    """Return what was decided under the key, which is what the first worker to come wanted, so that all agree.

    Without that, one that came as another gave up would find the other's note and wait for its message.
    """
    try:
        decided: bytes = _store().compare_set(key, "", wanted)
        return decided.decode()
    except RuntimeError:  # the store is gone with its host
        return wanted


def _store() -> Any:
    return distributed_c10d._get_default_store()


def _words(note: dict[str, str]) -> str:
    if "gone" in note:
        return note["gone"]
    return f"layer {note['layer']}, {note['channels']} channels, {note['dtype']}, {note['mode']} mode"
