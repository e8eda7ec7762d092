"""What people look at: the description of a graph agrees with its jaxpr and its cost; pages, DOT, diffs and notebooks hold it."""

from __future__ import annotations

import graphlib
import html
import json
import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from funcgrad.transforms.core import subjaxprs
from jax import lax

import funcgrad as fg
from funcgrad.notebooks import LARGEST
from funcgrad.viewing import page
from funcgrad.viewing.schema import graph_data

from ...corpus import CORPUS

ROOT = Path(__file__).parents[3]
PARAMS = {"hidden": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}
X = jnp.ones((8, 3))


def loss(params, x):
    with jax.named_scope("hidden"):
        h = jnp.tanh(x @ params["hidden"])
    with jax.named_scope("out"):
        return jnp.sum((h @ params["out"]) ** 2)


GRAPH = fg.trace(loss, PARAMS, X)


def children(data, node=None):
    return [n for n in data["nodes"] if n["parent"] == (node and node["id"])]


def chain(data, node):
    """A node's boxes from the inside out, itself first."""
    found = [node["id"]]
    while (parent := data["nodes"][found[-1]]["parent"]) is not None:
        found.append(parent)
    return found


# ------------------------------------------------------------------------------------------------ the description


@pytest.mark.parametrize("p", CORPUS, ids=str)
def test_the_description_is_the_jaxpr(p):
    graph = fg.trace(p.f, *p.args)
    data = json.loads(graph.to_json())
    assert [n["id"] for n in data["nodes"]] == list(range(len(data["nodes"])))
    nodes = [n for n in data["nodes"] if n["kind"] == "equation"]
    eqns = [eqn for _, eqn in fg.walk(graph)]
    assert [n["primitive"] for n in nodes] == [eqn.primitive.name for eqn in eqns]

    results_of = Counter(value["node"] for value in data["values"])
    read = Counter(edge["target"] for edge in data["edges"])
    for node, eqn in zip(nodes, eqns, strict=True):
        assert results_of[node["id"]] == sum(type(v).__name__ != "DropVar" for v in eqn.outvars)
        if not subjaxprs.bodies(eqn):
            assert read[node["id"]] + len(node.get("literals", ())) == len(eqn.invars)
    labels = [n["label"] for n in children(data) if n["kind"] == "argument"]
    assert labels == list(graph.paths)
    assert len([n for n in children(data) if n["kind"] == "output"]) == len(graph.out_avals)
    for edge in data["edges"]:
        assert data["values"][edge["value"]]["node"] == edge["source"]


@pytest.mark.parametrize("p", CORPUS, ids=str)
def test_the_costs_are_those_of_cost(p):
    graph = fg.trace(p.f, *p.args)
    work = fg.cost(graph).work
    nodes = [n for n in graph_data(graph)["nodes"] if n.get("flops") is not None]
    for key in ("flops", "transcendentals", "bytes_read", "bytes_written"):
        assert sum(n[key] for n in nodes) == pytest.approx(getattr(work, key))


@pytest.mark.parametrize("p", CORPUS, ids=str)
def test_data_flows_one_way_between_boxes(p):
    graph = fg.trace(p.f, *p.args)
    for what in [graph] if "grad" in p.lacks else [graph, fg.halves(graph, p.diff)]:
        data = graph_data(what)
        after = {}
        for edge in data["edges"]:
            source, target = (chain(data, data["nodes"][edge[end]]) for end in ("source", "target"))
            while source and target and source[-1] == target[-1]:
                source.pop(), target.pop()
            if source and target:  # where the two boxes, or nodes, stand beside each other
                after.setdefault(target[-1], set()).add(source[-1])
        list(graphlib.TopologicalSorter(after).static_order())  # raises CycleError


def test_a_scope_is_one_box_unless_data_leaves_it_and_comes_back():
    def f(x):
        with jax.named_scope("a"):
            y = jnp.sin(x)
            u = jnp.cos(x)
        z = jnp.exp(x)
        with jax.named_scope("a"):
            z = jnp.tanh(z) + u  # nothing outside of the box lies between
        y = jnp.exp(y)
        with jax.named_scope("a"):
            return jnp.tanh(y) + z  # it waits for the exp, which waits for the first box

    data = graph_data(fg.trace(f, 1.0))
    boxes = [[n["label"] for n in children(data, box)] for box in children(data) if box["kind"] == "scope"]
    assert boxes == [["sin", "cos", "tanh", "add"], ["tanh", "add"]]


def test_a_box_that_comes_to_depend_on_another_takes_what_depends_on_it_along():
    def f(x):
        with jax.named_scope("a"):
            y = jnp.sin(x)
        with jax.named_scope("b"):
            z = jnp.cos(x)
        with jax.named_scope("c"):
            w = jnp.exp(z)
        with jax.named_scope("b"):
            y = jnp.tan(y)  # now b, and so c, waits for a
        with jax.named_scope("a"):
            return jnp.sqrt(w), y

    data = graph_data(fg.trace(f, 1.0))
    boxes = [(box["label"], len(children(data, box))) for box in children(data) if box["kind"] == "scope"]
    assert boxes == [("a", 1), ("b", 2), ("c", 1), ("a", 1)]


def test_what_ends_a_loop_is_no_result_of_it():
    data = graph_data(fg.trace(lambda x: lax.while_loop(lambda x: x < 3, lambda x: x + 1, x), 0))
    bodies = {n["label"]: n for n in data["nodes"] if n["kind"] == "body"}
    results = lambda label: [n["result"] for n in children(data, bodies[label]) if n["kind"] == "output"]
    assert results("cond_jaxpr") == [None]
    (results_of,) = (v["id"] for v in data["values"] if data["nodes"][v["node"]].get("primitive") == "while")
    assert results("body_jaxpr") == [results_of]


def test_sub_graphs_are_boxes_and_say_what_runs():
    def f(c, xs):
        return lax.scan(lambda c, x: (c * x, jnp.sin(c)), c, xs)

    data = graph_data(fg.trace(f, jnp.float32(2), jnp.ones(5)))
    (scan,) = (n for n in data["nodes"] if n["label"] == "scan ×5")
    inside = children(data, scan)
    assert [n["label"].split()[0] for n in inside if n["kind"] == "input"] == ["carry", "xs"]
    assert {n["primitive"]: n["times"] for n in inside if n["kind"] == "equation"} == {"mul": 5, "sin": 5}
    results = [data["values"][n["result"]] for n in inside if n["kind"] == "output"]
    assert [(v["node"], v["shape"], v["bytes"]) for v in results] == [(scan["id"], [], 4), (scan["id"], [5], 20)]
    assert scan["line"] == inside[2]["line"]


def test_what_jax_wrote_lies_at_the_users_line():
    nodes = graph_data(fg.trace(lambda x: jax.nn.silu(x), 1.0))["nodes"]
    lines = {(n["file"], n["line"]) for n in nodes if n["kind"] == "equation"}
    assert len(lines) == 1
    assert next(iter(lines))[0] == __file__


def test_a_backward_equation_knows_its_forward_ones():
    data = graph_data(fg.grad(GRAPH))
    named = {n["name"]: n for n in data["nodes"] if n["kind"] == "equation"}
    of = lambda name: {data["nodes"][k]["name"] for k in named[name]["forward"]}
    assert of("transpose/out/dot_general#0") == {"out/dot_general#0"}
    assert "hidden/tanh#0" in of("transpose/hidden/mul#0")
    assert not named["hidden/tanh#0"]["forward"]


def test_layers_written_as_a_loop_come_back_in_reverse():
    def f(x, w):
        for _ in range(3):
            x = jnp.sin(x @ w)
        return x.sum()

    data = graph_data(fg.grad(fg.trace(f, jnp.ones((2, 2)), jnp.ones((2, 2)))))
    nodes = [n for n in data["nodes"] if n["kind"] == "equation"]
    cosines = [n["id"] for n in nodes if n["primitive"] == "cos"]
    backward = [n for n in nodes if n["primitive"] == "mul" and n["scope"] == "transpose"]
    assert [set(n["forward"]) & set(cosines) for n in backward] == [{k} for k in reversed(cosines)]


def test_halves_are_joined_by_their_residuals():
    halves = fg.halves(GRAPH)
    data = graph_data(halves)
    forward, backward = children(data)
    assert (data["kind"], forward["label"], backward["label"]) == ("halves", "forward", "backward")
    side = lambda k: chain(data, data["nodes"][k])[-1]
    across = {e["value"] for e in data["edges"] if side(e["source"]) != side(e["target"])}
    assert all(side(data["values"][k]["node"]) == forward["id"] for k in across)
    kept = [r for r in halves.residuals if r.path != "constant"]
    assert sorted(data["values"][k]["bytes"] for k in across) == sorted(r.bytes for r in kept)
    makers = {data["nodes"][data["values"][k]["node"]].get("name") for k in across}
    assert {r.path for r in kept if r.eqn is not None} <= makers
    assert not [n for n in children(data, backward) if n["label"].startswith("kept")]


def test_times_are_taken_by_name():
    data = graph_data(GRAPH, {"hidden/tanh#0": 2e-6})
    assert {n["name"]: n["time_s"] for n in data["nodes"] if n.get("time_s")} == {"hidden/tanh#0": 2e-6}
    with pytest.raises(fg.OptionError, match="hidden/tanh#7"):
        graph_data(GRAPH, {"hidden/tanh#7": 1.0})


def test_the_schema_is_documented():
    text = (ROOT / "docs" / "viewing.md").read_text()
    data = graph_data(fg.grad(GRAPH))
    scan = graph_data(fg.trace(lambda xs: lax.scan(lambda c, x: (c + 1.0, x), 0.0, xs), X))
    fields = {key for d in (data, scan) for part in ("nodes", "values", "edges") for row in d[part] for key in row}
    assert not {key for key in {*data, *fields} if f"`{key}`" not in text}
    kinds = {n["kind"] for n in [*data["nodes"], *scan["nodes"]]}
    assert not {kind for kind in kinds if f'"{kind}"' not in text}


# ------------------------------------------------------------------------------------------------ DOT


def test_dot_has_every_node_edge_and_box():
    graph = fg.trace(lambda c, xs: lax.scan(lambda c, x: (jnp.sin(c * x), c), c, xs), 2.0, jnp.ones(5))
    text = graph.to_dot()
    data = graph_data(graph)
    assert text.count("{") == text.count("}")
    assert text.count(" -> ") == len(data["edges"])
    boxes = {n["parent"] for n in data["nodes"]} - {None}
    assert {int(k) for k in re.findall(r"subgraph cluster_(\d+)", text)} == boxes
    assert {int(k) for k in re.findall(r"^ *n(\d+) \[", text, re.M)} == {n["id"] for n in data["nodes"]} - boxes
    assert 'label="scan ×5"' in text


# ------------------------------------------------------------------------------------------------ pages


def embedded(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def test_show_writes_the_file_that_it_is_told(tmp_path):
    path = tmp_path / "loss.html"
    path.write_text("old")
    assert fg.show(GRAPH, path) == path
    data = embedded(path.read_text(encoding="utf-8"))
    expected = graph_data(GRAPH)
    assert [n["label"] for n in data["nodes"]] == [n["label"] for n in expected["nodes"]]
    assert data["edges"] == expected["edges"]
    file = Path(__file__).name
    line = next(n["line"] for n in data["nodes"] if n.get("primitive") == "tanh")
    assert data["source"][file][str(line)].strip() == 'h = jnp.tanh(x @ params["hidden"])'
    assert str(Path(__file__).parent) not in path.read_text(encoding="utf-8")


def test_show_without_a_path_writes_a_temporary_file_and_opens_nothing(monkeypatch):
    monkeypatch.setattr(page.webbrowser, "open", lambda url: pytest.fail("a browser was opened"))
    path = fg.show(fg.halves(GRAPH))
    assert embedded(path.read_text(encoding="utf-8"))["kind"] == "halves"
    path.unlink()


def test_show_opens_the_browser_where_python_is_interactive(monkeypatch):
    opened = []
    monkeypatch.setattr(page.webbrowser, "open", opened.append)
    monkeypatch.setattr(page, "_is_interactive", lambda: True)
    path = fg.show(GRAPH)
    assert opened == [path.as_uri()]
    path.unlink()


def test_a_page_is_one_file():
    text = page.html_page(GRAPH)
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]* (?:src|href)=\"(?!data:)", text)
    assert "Permission is hereby granted" in text
    assert "@import" not in text


def test_a_name_cannot_end_the_script():
    def f(x):
        with jax.named_scope("</script><script>alert(1)"):
            return jnp.sin(x)

    text = page.html_page(fg.trace(f, 1.0))
    assert "</script><script>alert" not in text
    assert any("alert(1)" in n["label"] for n in embedded(text)["nodes"])


def test_show_takes_graphs_only():
    with pytest.raises(TypeError, match=r"show takes a Graph or Halves, and got function\."):
        fg.show(loss)


# ------------------------------------------------------------------------------------------------ diff


def marked(diff):
    return [(mark, text.strip()) for mark, text in diff.lines if mark != " "]


def test_nothing_changed():
    second = fg.trace(loss, PARAMS, X)
    assert not fg.diff(GRAPH, second)
    assert str(fg.diff(GRAPH, second)) == "loss -> loss: the same"


def test_a_diff_shows_what_went_what_came_and_who_reads_it():
    changed = fg.replace(GRAPH, lambda x: jnp.tanh(x), lambda x: jnp.sin(x))
    diff = fg.diff(GRAPH, changed)
    assert diff
    assert diff.primitives == {"sin": 1, "tanh": -1}
    lines = marked(diff)
    operations = [(mark, text.split(" = ")[1].split("[")[0].split()[0]) for mark, text in lines]
    assert operations == [("-", "tanh"), ("+", "sin"), ("-", "dot_general"), ("+", "dot_general")]
    assert "-1 tanh" in str(diff)


def test_a_diff_goes_into_sub_graphs():
    graph = fg.trace(lambda c, xs: lax.scan(lambda c, x: (jnp.tanh(c * x), c), c, xs), 2.0, jnp.ones(5))
    changed = fg.replace(graph, lambda x: jnp.tanh(x), lambda x: jnp.sin(x))
    lines = marked(fg.diff(graph, changed))
    assert [text for mark, text in lines if "scan" in text] == []
    assert [(mark, text.split(" = ")[1].split()[0]) for mark, text in lines if "=" in text] == [
        ("-", "tanh"),
        ("+", "sin"),
    ]


def test_a_diff_as_html_holds_the_same_lines():
    changed = fg.replace(GRAPH, lambda x: jnp.tanh(x), lambda x: jnp.sin(x))
    diff = fg.diff(GRAPH, changed)
    text = html.unescape(re.sub("<[^>]*>", "", diff.html()))
    assert all(line in text for _, line in marked(diff))
    assert diff._repr_html_() == diff.html()


def test_diff_takes_two_graphs():
    with pytest.raises(TypeError, match=r"diff takes two Graphs, and got function\."):
        fg.diff(GRAPH, loss)


# ------------------------------------------------------------------------------------------------ notebooks


def test_a_notebook_shows_the_page_in_a_frame():
    for what in (GRAPH, fg.halves(GRAPH)):
        frame = what._repr_html_()
        document = html.unescape(re.search(r'srcdoc="([^"]*)"', frame)[1])
        assert document == page.html_page(what)


def test_a_notebook_shows_a_large_graph_as_text():
    def f(x):
        for _ in range(LARGEST + 1):
            x = x * 2.0
        return x

    graph = fg.trace(f, 1.0)
    assert "<iframe" not in graph._repr_html_()
    assert html.escape(str(graph)) in graph._repr_html_()


def test_results_are_tables():
    cost = fg.cost(GRAPH)
    rows = re.findall(r"<tr>(.*?)</tr>", cost._repr_html_())
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    assert cells[0] == ["share", "FLOP", "transc.", "read", "written", "params", "scope"]
    assert [row[-1] for row in cells[1:]] == [group.name for group in cost.by()]

    double = fg.jit(lambda x: 2.0 * x)
    double(jnp.ones(3)), double(jnp.ones(4))
    assert "shape (3,) -&gt; (4,)" in double.retraces._repr_html_()
    layer = lambda x, w: (jnp.tanh(x @ w), None)
    f = lambda ws, x: lax.scan(layer, x, ws)[0].sum()
    plan = fg.plan(f, jnp.ones((16, 32, 32)), jnp.ones((512, 32)), memory="50%")
    assert "<table>" in plan._repr_html_()
    assert "<table>" in cost.timeline()._repr_html_()


def test_constants_are_compared_by_value():
    w, x = jnp.ones((5, 5)), jnp.ones((3, 5))
    graph = lambda w: fg.trace(lambda x: x @ w + jax.random.uniform(jax.random.key(0), (5,)), x)
    assert not fg.diff(graph(w), graph(w + 0))
    assert fg.diff(graph(w), graph(5 * w))
