"""The benchmarks: whether each part measures what it says, and what a check does with its bounds."""

from __future__ import annotations

import importlib
import json
import math
import warnings

import jax
import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import bounds, check, gradients, interleaving, loops, models

from .corpus import CORPUS

PARTS = {name: importlib.import_module(f"benchmarks.{name}") for name in command.PARTS}
DIFFERENTIABLE = [p for p in CORPUS if "grad" not in p.lacks]
# XLA fuses these otherwise: a Graph adds up the same cotangents in another order, as JAX does for a traced function.
FUSED_OTHERWISE = {("derivatives_inside", "graph")}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmarks") / "quick.json"
    with jax.numpy_dtype_promotion("standard"), warnings.catch_warnings():
        warnings.simplefilter("default")
        assert command.main(["--quick", "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_all_parts_are_run(quick):
    assert list(quick["parts"]) == list(PARTS)
    assert {"jax", "jaxlib", "python", "device", "cpus", "load"} < quick.keys()


@pytest.mark.parametrize("name", PARTS)
def test_rows_are_sensible(quick, name):
    rows, figures = (quick["parts"][name][key] for key in ("rows", "figures"))
    assert rows
    assert figures
    for row in rows:
        assert row.keys() >= PARTS[name].COLUMNS.keys()
        assert all(math.isfinite(x) for x in row.values() if isinstance(x, float))
    assert all(isinstance(figure["is_met"], bool) for figure in figures)


@pytest.mark.slow
def test_rows_of_loops_that_a_quick_run_leaves_out():
    rows = loops.beside_equinox(loops.matmul, 1024, (100,), quick=True) + loops.of_lanes_and_second_order(4, quick=True)
    assert [row["beside"] for row in rows] == ["equinox", "lanes", "first order"]
    for row in rows:
        assert row.keys() == loops.COLUMNS.keys()
        assert all(math.isfinite(x) and x > 0 for x in row.values() if isinstance(x, float))
    assert len(loops.figures(rows)) == 5


def test_what_is_counted_meets_its_target(quick):
    figures = {f["name"]: f for part in quick["parts"].values() for f in part["figures"]}
    counted = [f for name, f in figures.items() if "programs with different" in name]
    assert len(counted) == 6
    assert all(f["value"] == 0 and f["is_met"] for f in counted)
    assert [row["equations"] for row in quick["parts"]["rewriting"]["rows"]] == [1000, 1000]


def test_a_part_that_is_none_is_named(capsys):
    with pytest.raises(SystemExit) as error:
        command.main(["gradient"])
    assert error.value.code == 2
    assert f"no part is named gradient: there are {', '.join(PARTS)}" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "status", "verdict"), [(1.0, 0, "ok"), (1.2, 1, "missed")])
def test_a_check_ends_with_a_table_and_a_status(value, status, verdict, monkeypatch, capsys):
    name = "function: cold trace, geomean"
    monkeypatch.setattr(check, "figures", lambda quick: [bounds.figure(name, value)])
    assert command.main(["--check"]) == status
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.strip().startswith(name))
    assert row.split()[-4:] == [f"{value:.3f}", "≤", "1.1", verdict]


@pytest.mark.slow
def test_a_check_holds_the_bounds_of_the_table():
    names = [figure.name for figure in check.figures(quick=True)]
    assert len(names) == len(set(names))
    assert set(names) <= set(bounds.BOUNDS)


def test_ways_take_turns():
    calls = []
    took = interleaving.interleaved(lambda: calls.append("a"), lambda: calls.append("b"), rounds=2, calls=2)
    assert calls == [*"bbaa", *"aabb"]
    assert took.wall_s.shape == took.cpu_s.shape == (2, 2)


def test_targets():
    assert interleaving.Figure("a", 1.02, least=0.98, most=1.02).is_met
    assert not interleaving.Figure("a", 1.03, least=0.98, most=1.02).is_met
    texts = [interleaving.Figure("a", 1.0, *bounds).target for bounds in ((0.98,), (0.98, 1.02), (0, 0))]
    assert texts == ["≥ 0.98", "≥ 0.98, ≤ 1.02", "0"]


@pytest.mark.slow
@pytest.mark.parametrize("model", models.MODELS, ids=lambda m: m.name.split()[0])
def test_both_sides_train_the_same_model(model):
    params, ((x, _),) = model.params(), model.batches(1)
    ours, theirs = jax.jit(model.layer)(params, x), jax.jit(model.by_hand)(params, x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("p", DIFFERENTIABLE, ids=str)
def test_gradients_compile_to_the_program_of_jax(p):
    jitted = [make() for make in gradients.gradients(p)]
    for form, row in zip(gradients.FORMS, gradients.compiled(p, jitted), strict=True):
        assert (row["stablehlo"], row["temp_bytes"]) == ("same", 0)
        assert row["hlo"] == "same" or (p.name, form) in FUSED_OTHERWISE
