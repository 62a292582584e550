"""The benchmark: what it compares is right and alike, what it prints says so, and bad options are refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from rich.console import Console

from evenorm.bench import command, options, table
from evenorm.bench.contenders import floor_in_clones, make_inputs
from evenorm.bench.measure import Plan, Result, compare, interleave
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


@pytest.mark.parametrize("row", SMALL[1:], ids=lambda row: row.name)
def test_inputs_lie_in_memory_as_the_row_says(row):
    inputs = make_inputs(row, BLOCKS["bn-add-relu"], torch.float32)
    for values in (inputs.x, inputs.residual, inputs.cotangent):
        assert values.is_contiguous(memory_format=torch.channels_last) == row.channels_last


def test_a_wrong_result_is_called_wrong():
    row, block = SMALL[0], BLOCKS["bn"]
    plan = Plan([row], [block], rounds=3, seconds=1e-4)
    result = dataclasses.replace(compare(row, block, plan), right=False, error_ours=1.0, error_theirs=0.5)
    assert "WRONG" in table._errors(result)


def test_all_columns_fit_into_80(capsys):
    plan = Plan(list(ROWS), [BLOCKS["bn"]], compiled=True)
    longest = Result(
        row="", elements=10**7, block="bn", ours=123e-6, theirs=1.234e-3, compiled=1.234e-3, ratio=10.01,
        spread=0.12, clones=2.0, share=1.01, error_ours=1.2, error_theirs=1.0, right=False,
    )  # fmt: skip
    results = [dataclasses.replace(longest, row=row.name) for row in ROWS]
    Console(width=80).print(table.as_table(results, plan, "bn"))
    lines = capsys.readouterr().out.splitlines()
    assert "compiled" in lines[3]
    rows = [line for line in lines if "WRONG" in line]
    assert len(rows) == len(ROWS)
    assert all(line.count("1.23 ms") == 2 and "123 µs" in line for line in rows)


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
        (["options", "bn"], "options compares the layer with itself"),
        (["options", "--eval"], "options compares the layer with itself"),
    ],
)
def test_bad_options(options, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *options])
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("option", options.OPTIONS, ids=lambda option: option.name)
def test_an_option_is_measured_as_it_is_named(option):
    """What is not used answers as the plain layer does, bit for bit; what is used does something."""
    row = Row((16, 3, 4))
    plain, found = (options.step(one, row, torch.float32)() for one in (options.OPTIONS[0], option))
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in plain]
    # The others are about running statistics alone.
    changes = {"mask, 3/4 valid", "virtual_batch_size=8", "renorm", "freeze"}
    equal = all(one.equal(other) for one, other in zip(found, plain, strict=True))
    assert equal == (option.name not in changes)


def test_each_option_has_a_price():
    plan = dataclasses.replace(command.plan(["options"], "60", "float32", True, False, 3), seconds=1e-4)
    found = list(options.prices(plan))
    assert [(price.row, price.option) for price in found] == [("60×100", option.name) for option in options.OPTIONS]
    assert found[0].price == 1
    assert all(price.price > 0 for price in found)


def test_a_price_is_the_median_of_the_rounds_own_ratios(monkeypatch):
    times = {option.name: [2.0, 3.0, 8.0] for option in options.OPTIONS} | {options.PLAIN: [1.0, 1.0, 2.0]}
    monkeypatch.setattr(options, "interleave", lambda *given: times)
    plan = command.plan(["options"], "", "float32", True, False, 3)
    assert plan.rows == list(options.ROWS)
    found = list(options.prices(dataclasses.replace(plan, rows=[Row((6, 5))])))
    assert [price.price for price in found] == [1, *[3] * (len(found) - 1)]
    assert found[1].seconds == 3


def shown(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--rounds", "3", "--threads", "1", *arguments])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["bn-relu", "--rows", "60x100"], ["BatchNorm + ReLU, float32, training", "of copy", "geometric mean"]),
        (["bn", "--rows", "60x100", "--eval"], ["evaluation, forward"]),
        (["bn", "--rows", "60x100", "--dtype", "bfloat16"], ["bfloat16"]),
        (["bn", "--rows", "60x100", "--compile"], ["compiled"]),
        (
            ["options", "--rows", "60x100"],
            ["60×100, float32, training", "all given, none used", "renorm", "freeze"],
        ),
    ],
    ids=lambda given: " ".join(given),
)
def test_what_is_printed_fits_a_terminal(arguments, told, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: module)
    printed = shown(capsys, *arguments)
    assert max(map(len, printed.splitlines())) <= 80
    for text in told:
        assert text in printed
    assert "…" not in printed  # nothing was cut off


def test_a_pipe_gets_whole_cells(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: module)
    monkeypatch.setattr(table, "_time", lambda seconds: "1234567.89 microseconds")
    line = next(
        line for line in shown(capsys, "bn", "--rows", "60x100", "--compile").splitlines() if "60×100" in line
    )
    assert line.count("1234567.89 microseconds") == 3


def test_each_row_is_compiled_for_its_own_size(monkeypatch):
    """Torch gives up on a function after its eighth size, and from the second on it compiles for any."""
    sizes = []

    def backend(graph, inputs):
        sizes.extend({tuple(t.shape) for t in inputs if isinstance(t, torch.Tensor) and t.dim() == 2})
        return graph

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **given: real(module, backend=backend, **given))
    rows = [Row((4 + size, 3)) for size in range(10)]
    for row in rows:
        compare(row, BLOCKS["bn"], Plan([row], [], training=False, compiled=True, rounds=3, seconds=1e-4))
    assert sizes == [row.shape for row in rows]


def test_every_row_is_named_once():
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert command.plan([], "last", "float32", True, False, 3).rows == [row for row in ROWS if row.channels_last]
