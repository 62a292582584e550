"""A diagnosis where others hang: before workers pool, they compare notes on what each of them is about to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from evenorm import workers
from evenorm.layers import Layer

_blocks = count()  # how many blocks this worker has opened: the same on all of them, as they run the same program


@contextmanager
def verify_workers(model: nn.Module, timeout: float = 30.0) -> Iterator[None]:
    """Compare, before each pooling inside the block, what the workers are about to pool.

    Each worker writes down the layer's name, the number of the call, the channels, dtype and mode, and reads what
    the others wrote. Where they differ, or one does not come, every worker that lives raises an error that names
    who diverged and where, before anything is sent that could hang. Meant for finding a fault: each call costs a
    round trip to the store that torch.distributed keeps, so do not train a whole run inside the block.

    Args:
        model: a network with evenorm layers that have a ``process_group``.
        timeout: how long to wait for the others before each pooling, in seconds.

    Raises:
        RuntimeError: from a forward inside the block, on every worker, when the workers disagree.

    >>> import torch, evenorm
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), evenorm.BatchNorm1d(3))
    >>> with evenorm.verify_workers(model, timeout=10):
    ...     _ = model(torch.randn(8, 4))
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Layer)}
    pooling = {name: layer for name, layer in layers.items() if layer.process_group is not None}
    if not pooling:
        yield
        return
    ledger = _Ledger(f"evenorm/verify/{next(_blocks)}", timeout)
    hooks = [
        layer.register_forward_pre_hook(_comparing(ledger, name), with_kwargs=True)
        for name, layer in pooling.items()
    ]
    try:
        yield
        ledger.leave("left the block")
    except BaseException as error:
        ledger.leave(f"stopped with {type(error).__name__}")
        raise
    finally:
        for hook in hooks:
            hook.remove()


def _comparing(ledger: _Ledger, name: str) -> Any:
    def compare(layer: Layer, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x = arguments[0] if arguments else keywords["input"]
        group = workers.resolve(layer.process_group, x)
        if group is not None:
            ledger.compare(group, _note(name, layer, x))

    return compare


def _note(name: str, layer: Layer, x: Tensor) -> dict[str, str]:
    mode = "frozen" if layer.frozen else "train" if layer.training else "eval"
    return {"layer": name or "the model", "channels": str(x.shape[1]), "dtype": str(x.dtype), "mode": mode}


class _Ledger:
    """What this worker has written for the others to read, call by call and group by group."""

    def __init__(self, prefix: str, timeout: float) -> None:
        self.prefix, self.timeout = prefix, timedelta(seconds=timeout)
        self.calls: dict[str, int] = {}

    def compare(self, group: dist.ProcessGroup, note: dict[str, str]) -> None:
        ranks = dist.get_process_group_ranks(group)
        members = "-".join(map(str, ranks))
        call = self.calls[members] = self.calls.get(members, 0) + 1
        mine = dist.get_rank()
        self._write(members, call, mine, note)
        notes = {rank: self._read(members, call, rank, note) for rank in ranks if rank != mine}
        differing = {rank: other for rank, other in notes.items() if other != note}
        if differing:
            found = "; ".join(f"rank {rank}: {_words(other)}" for rank, other in sorted(differing.items()))
            raise RuntimeError(
                f"workers diverged at pooling number {call}: rank {mine}: {_words(note)}; {found}. "
                "All workers must run the same layers equally often, in the same mode"
            )

    def leave(self, how: str) -> None:
        """Tell those who will wait for this worker that it is not coming."""
        for members, call in self.calls.items():
            try:
                self._write(members, call + 1, dist.get_rank(), {"gone": how})
            except RuntimeError:  # the store is gone with its host: nobody is left to read
                return

    def _write(self, members: str, call: int, rank: int, note: dict[str, str]) -> None:
        text = json.dumps(note)
        store = _store()
        store.set(f"{self.prefix}/{members}/{call}/{rank}", text)
        store.set(f"{self.prefix}/{members}/last/{rank}", text)

    def _read(self, members: str, call: int, rank: int, mine: dict[str, str]) -> dict[str, str]:
        store, key = _store(), f"{self.prefix}/{members}/{call}/{rank}"
        try:
            store.wait([key], self.timeout)
            note: dict[str, str] = json.loads(store.get(key))
            return note
        except RuntimeError as error:
            last = f"{self.prefix}/{members}/last/{rank}"
            try:
                seen = _words(json.loads(store.get(last))) if store.check([last]) else "nowhere in this block"
            except RuntimeError:
                seen = "unknown, since the store's host is gone too"
            raise RuntimeError(
                f"rank {rank} did not come to pooling number {call}, {_words(mine)}, within "
                f"{self.timeout.total_seconds():g} s; last seen: {seen}"
            ) from error


def _store() -> Any:
    return distributed_c10d._get_default_store()


def _words(note: dict[str, str]) -> str:
    if "gone" in note:
        return note["gone"]
    return f"layer {note['layer']}, {note['channels']} channels, {note['dtype']}, {note['mode']} mode"
