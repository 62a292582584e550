"""The benchmark: what it compares is right and alike, what it prints says so, and bad options are refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

from evenorm.bench import command, table
from evenorm.bench.contenders import floor_in_clones
from evenorm.bench.measure import Plan, compare, interleave
from evenorm.bench.rows import BLOCKS, ROWS, Row
from evenorm.cli import main

SMALL = (Row((6, 5)), Row((4, 3, 5, 5)), Row((4, 3, 5, 5), channels_last=True))


@pytest.mark.parametrize("row", SMALL, ids=lambda row: row.name)
@pytest.mark.parametrize("block", BLOCKS.values(), ids=lambda block: block.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ours_is_compared_with_what_torch_computes(row, block, dtype):
    for training in (True, False):
        result = compare(row, block, Plan([row], [block], dtype, training, rounds=3, seconds=1e-4))
        assert result.right
        assert result.ours > 0
        assert result.ratio > 0
        assert not result.large


def test_a_wrong_result_is_called_wrong():
    row, block = SMALL[0], BLOCKS["bn"]
    plan = Plan([row], [block], rounds=3, seconds=1e-4)
    result = dataclasses.replace(compare(row, block, plan), right=False, error_ours=1.0, error_theirs=0.5)
    assert "WRONG" in table._errors(result)


def test_contenders_run_in_turn():
    order = []
    runs = {name: lambda name=name: order.append(name) or () for name in ("a", "b")}
    times = interleave(runs, rounds=3, seconds=0)
    assert [len(found) for found in times.values()] == [3, 3]
    assert order[-6:] == ["a", "b"] * 3


def test_the_floor_counts_reads_and_writes():
    assert floor_in_clones(BLOCKS["bn"], training=False) == 1
    assert floor_in_clones(BLOCKS["bn-add-relu"], training=True) == 3.5


def test_json_holds_machine_and_results(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "bn", "--rows", "60x100", "--rounds", "3", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert stopped.value.code == 0
    assert [result["row"] for result in found["results"]] == ["60×100"]
    assert found["machine"]["threads"] >= 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["nonsense"], "BLOCK must be one of bn"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--rows", "7x9"], "is in none of the shapes"),
        (["--rounds", "2"], "--rounds must be at least 3"),
        (["bn", "--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_bad_options(options, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *options])
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_every_row_is_named_once():
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert command.plan([], "last", "float32", True, False, 3).rows == [row for row in ROWS if row.channels_last]
