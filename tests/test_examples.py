"""The examples, run as a user runs them. The default tier trains them for a few steps; `slow` runs them whole."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = pytest.mark.standard_promotion


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_digits_learns_in_a_few_steps(tmp_path, capsys, monkeypatch):
    digits = load("digits")
    monkeypatch.setattr(digits, "STEPS", 60)
    accuracy = digits.main(str(tmp_path / "digits.png"))
    lines = capsys.readouterr().out.splitlines()
    assert accuracy > 0.8
    assert lines[-1] == f"accuracy {accuracy:.4f}"
    assert lines[0].startswith("classify(params['batch_norm_0']['bias']: f32[32]")
    assert "    conv_0:" in lines
    assert any(re.fullmatch(r"[\d,]+ parameters", line) for line in lines)
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_charlm_learns_in_a_few_steps(tmp_path, capsys, monkeypatch):
    charlm = load("charlm")
    for option, value in {"STEPS": 30, "CONTEXT": 16, "BATCH": 8, "FEATURES": 32, "LAYERS": 1}.items():
        monkeypatch.setattr(charlm, option, value)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    assert charlm.main(str(text)) < 3.2
    assert "nats per character" in capsys.readouterr().out.splitlines()[-1]


def test_adaptive_ode_finds_the_rates_of_the_literature(tmp_path, capsys, monkeypatch):
    """Carpenter 2018, Predator-Prey Population Dynamics: 0.545, 0.028, 0.80, 0.024, by Hamiltonian Monte Carlo."""
    ode = load("adaptive_ode")
    monkeypatch.setattr(ode, "STEPS", 150)
    assert ode.main(str(tmp_path / "ode.png")) < 0.06
    lines = capsys.readouterr().out.splitlines()
    rates = [float(line.split()[-3]) for line in lines if line.endswith("a year") and "step" not in line]
    assert rates == pytest.approx([0.545, 0.028, 0.80, 0.024], rel=0.15)
    assert (tmp_path / "ode.png").read_bytes().startswith(b"\x89PNG")


def test_static_vs_dynamic_compares_three_networks(tmp_path, capsys):
    studies = load("static_vs_dynamic").main(str(tmp_path / "page.html"))
    assert [row["function"] for row in studies.rows] == ["mlp", "rnn", "tree"]
    assert all(row["tracing"] == "ok" and row["traces"] == "2" for row in studies.rows)
    lines = capsys.readouterr().out.splitlines()
    assert sum("differ by at most" in line for line in lines) == 2
    assert "sentences[0][2]  tree absent" in "\n".join(lines)
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="XLA for CPU drops the barriers between unrolled stages")
def test_budget_trains_in_a_part_of_its_memory(tmp_path, capsys, monkeypatch):
    budget = load("budget")
    small = {"LAYERS": 2, "FEATURES": 16, "HEADS": 2, "CONTEXT": 32, "BATCH": 16, "VOCABULARY": 16}
    for option, value in {**small, "BUDGET": "80%", "BUDGETS": ("80%",), "STEPS": 3, "TIMED": 1}.items():
        monkeypatch.setattr(budget, option, value)
    monkeypatch.setattr(budget, "POLICIES", {"no remat": budget.POLICIES["no remat"]})
    block = budget.nn.serial(
        budget.nn.residual(budget.nn.layer_norm(), budget.nn.attention(2, causal=True)),
        budget.nn.residual(budget.nn.layer_norm(), budget.nn.dense(64), jax.nn.gelu, budget.nn.dense(16)),
    )
    monkeypatch.setattr(budget, "BLOCK", block)
    assert budget.main(str(tmp_path / "budget.png")) < 4
    text = capsys.readouterr().out
    assert "computed again" in text
    sizes = [float(line.split()[-4]) for line in text.splitlines() if line.startswith("by budget")]
    default = next(float(line.split()[-4]) for line in text.splitlines() if "no remat" in line)
    assert len(sizes) == 1
    assert sizes[0] <= 0.81 * default
    assert (tmp_path / "budget.png").read_bytes().startswith(b"\x89PNG")


WHOLE = ["digits", "charlm", "adaptive_ode"] + ["budget"] * (jax.__version_info__ >= (0, 11))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", WHOLE)
def test_whole(name, tmp_path):
    out = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout
    last = out.splitlines()[-1]
    if name == "digits":
        assert re.fullmatch(r"accuracy 0\.\d{4}", last)
        assert float(last.split()[1]) >= 0.98
    elif name == "adaptive_ode":
        assert float(last.split()[1]) < 0.05
    elif name == "budget":
        mib = lambda label: float(re.search(rf"{label} +([\d.]+) MiB", out)[1])
        assert mib("by budget +25%") <= mib("no remat") / 4
        assert mib("by budget +10%") <= mib("no remat") / 10
    else:
        assert float(re.search(r"([\d.]+) in training", last)[1]) < 2.0
