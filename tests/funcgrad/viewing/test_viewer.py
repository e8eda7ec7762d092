"""The page of `fg.show` in headless Chromium: what a person sees and does there."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import funcgrad as fg
from funcgrad.viewing.schema import graph_data

from ...corpus import CORPUS

DOCS = Path(__file__).parents[3] / "docs"
pytestmark = pytest.mark.slow


def mlp(params, x, y):
    with jax.named_scope("hidden"):
        h = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
    with jax.named_scope("out"):
        guess = h @ params["out"]["w"] + params["out"]["b"]
    with jax.named_scope("error"):
        return jnp.mean((guess - y) ** 2)


def rnn(params, xs, y):
    def cell(h, x):
        with jax.named_scope("cell"):
            return jnp.tanh(x @ params["w"] + h @ params["u"] + params["b"]), None

    h, _ = lax.scan(cell, jnp.zeros((8, 16)), xs)
    with jax.named_scope("readout"):
        return jnp.mean((h @ params["out"] - y) ** 2)


def block(params, x):
    def norm(x, scale):
        with jax.named_scope("norm"):
            return scale * (x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6))

    with jax.named_scope("attention"):
        h = norm(x, params["norm_0"])
        q, k, v = (h @ params[name] for name in "qkv")
        x = x + jax.nn.softmax(q @ k.swapaxes(-1, -2) / 8.0) @ v @ params["o"]
    with jax.named_scope("mlp"):
        return x + jax.nn.gelu(norm(x, params["norm_1"]) @ params["up"]) @ params["down"]


def transformer(params, x):
    for name, weights in params.items():
        with jax.named_scope(name):
            x = block(weights, x)
    with jax.named_scope("loss"):
        return jnp.sum(x**2)


def array(*shape):
    return jax.ShapeDtypeStruct(shape, "float32")


def weights(n):
    one = {**{name: array(64, 64) for name in "qkvo"}, "norm_0": array(64), "norm_1": array(64)}
    return {f"block_{k}": {**one, "up": array(64, 256), "down": array(256, 64)} for k in range(n)}


def mlp_gradient():
    layer = lambda n, m: {"w": array(n, m), "b": array(m)}
    return fg.grad(fg.trace(mlp, {"hidden": layer(3, 16), "out": layer(16, 2)}, array(8, 3), array(8, 2)))


def rnn_loss():
    params = {"w": array(3, 16), "u": array(16, 16), "b": array(16), "out": array(16, 2)}
    return fg.trace(rnn, params, array(20, 8, 3), array(8, 2))


def block_halves():
    return fg.halves(fg.trace(transformer, weights(1), array(4, 32, 64)))


REFERENCES = {"mlp": mlp_gradient, "rnn": rnn_loss, "halves": block_halves}


class Page:
    """A page in the browser, as a person uses it."""

    def __init__(self, driver):
        self.driver = driver
        self.js = driver.execute_script

    def open(self, what, path, **options):
        fg.show(what, path, **options)
        self.driver.get_log("performance"), self.driver.get_log("browser")
        self.driver.get(path.as_uri())
        return self

    @property
    def opening_s(self):
        return float(self.js("return document.body.dataset.ready")) / 1000

    def drawn(self):
        return self.js("return [...document.querySelectorAll('.node')].map((g) => g.getAttribute('aria-label'))")

    def having(self, name):
        """The names of the drawn nodes of this class."""
        return set(
            self.js(f"return [...document.querySelectorAll('.node.{name}')].map((g) => nodes[g.dataset.id].name)")
        )

    def id_of(self, name):
        return self.js(f"return nodes.find((node) => (node.name ?? node.label) === {json.dumps(name)}).id")

    def click(self, name):
        """On a node, or on the title of a box."""
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.by import By

        shape = self.driver.find_element(By.CSS_SELECTOR, f".node[data-id='{self.id_of(name)}'] > .shape")
        size = shape.rect
        up = min(8 - size["height"] / 2, 0)
        ActionChains(self.driver).move_to_element_with_offset(shape, 0, up).click().perform()

    def press(self, *keys):
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def element(self, css):
        from selenium.webdriver.common.by import By

        return self.driver.find_element(By.CSS_SELECTOR, css)

    def texts(self, css):
        return self.js(f"return [...document.querySelectorAll({json.dumps(css)})].map((e) => e.textContent)")

    def is_in_view(self, css):
        """Whether all such nodes lie within the canvas."""
        return self.js(f"""const c = document.getElementById('canvas').getBoundingClientRect();
          return [...document.querySelectorAll('{css} > .shape')].map((e) => e.getBoundingClientRect()).every(
            (r) => r.left > c.left && r.right < c.right && r.top > c.top && r.bottom < c.bottom);""")

    def errors(self):
        return self.driver.get_log("browser")

    def requests(self):
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


def browser():
    """Headless Chromium; None where it, its driver or selenium is missing."""
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        return None
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    tool = shutil.which("chromedriver")
    if not (binary and tool):
        return None
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1440,1000", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(tool))


@pytest.fixture(scope="module")
def driver():
    driver = browser()
    if driver is None:
        pytest.skip("needs Chromium and its driver: apt install chromium chromium-driver, pip install selenium")
    yield driver
    driver.quit()


@pytest.fixture
def page(driver):
    page = Page(driver)
    yield page
    assert page.errors() == []
    assert {url.split(":")[0] for url in page.requests()} <= {"file", "data"}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "page.html"


# Nodes that lie on one another, or out of their box.
OVERLAPPING = """
  const found = [];
  for (const box of [root, ...nodes.filter((node) => node.open)]) {
    for (const a of box.children) {
      if (a.x < 0 || a.y < 0 || a.x + a.width > box.width + 0.5 || a.y + a.height > box.height + 0.5)
        found.push([a.label, box.label]);
      for (const b of box.children)
        if (a.id < b.id && a.x < b.x + b.width && b.x < a.x + a.width && a.y < b.y + b.height && b.y < a.y + a.height)
          found.push([a.label, b.label]);
    }
  }
  return found;"""


def check_drawn(page, what):
    """Every equation is drawn, and nothing lies on something else."""
    page.js("unfold(OPEN_AT_MOST); draw()")
    graphs = [what] if isinstance(what, fg.Graph) else [what.forward, what.backward]
    count = page.js("return document.querySelectorAll('.node.equation').length")
    assert count == sum(1 for graph in graphs for _ in fg.walk(graph))
    assert page.js(OVERLAPPING) == []


@pytest.mark.parametrize("name", REFERENCES)
def test_every_equation_is_drawn_and_nothing_overlaps(page, path, name):
    what = REFERENCES[name]()
    check_drawn(page.open(what, path), what)


@pytest.mark.parametrize("p", CORPUS, ids=str)
def test_every_program_can_be_looked_at(page, path, p):
    graph = fg.trace(p.f, *p.args)
    check_drawn(page.open(graph, path), graph)
    if "grad" not in p.lacks:
        halves = fg.halves(graph, p.diff)
        check_drawn(page.open(halves, path), halves)


@pytest.mark.parametrize("name", REFERENCES)
def test_the_pictures_of_the_docs(page, path, name):
    """They are made here: copy them from the temporary folder when the page looks different."""
    page.open(REFERENCES[name](), path)
    if name == "mlp":
        page.click("transpose/out/dot_general#0")
    picture = path.parent / f"viewing_{name}.png"
    page.driver.save_screenshot(str(picture))
    kept = DOCS / picture.name
    assert kept.stat().st_size < 200_000
    width, height = (page.js(f"return window.inner{side}") for side in ("Width", "Height"))
    assert struct.unpack(">II", kept.read_bytes()[16:24]) == (width, height)


def test_every_value_that_is_read_is_an_edge_with_type_and_bytes(page, path):
    graph = mlp_gradient()
    page.open(graph, path)
    page.element("#unfold").click()
    titles = "\n".join(page.texts("path.edge title"))
    data = json.loads(graph.to_json())
    for edge in data["edges"]:
        value = data["values"][edge["value"]]
        assert f"{value['name']}: {value['type']} · " in titles
    assert "hidden" in page.drawn()[1]
    assert any(text.startswith("f32[8,16] · 512 B") for text in page.texts("text.type"))


def test_boxes_open_and_close(page, path):
    page.open(rnn_loss(), path)
    scan = (
        "return document.querySelector(`.node[data-id='${nodes.find((n) => n.label === 'scan ×20').id}']`).ariaExpanded"
    )
    assert page.js(scan) == "true"
    assert {"cell", "tanh"} <= {label.split()[-1] for label in page.drawn()}
    before = len(page.drawn())
    page.click("scan#0")
    assert page.js(scan) == "false"
    assert len(page.drawn()) < before
    assert "tanh" not in page.drawn()
    page.click("scan#0")
    assert len(page.drawn()) == before
    page.element("#fold").click()
    assert page.js("return document.querySelectorAll('.node.open').length") == 0


def test_search_finds_opens_and_selects(page, path):
    page.open(rnn_loss(), path)
    page.element("#fold").click()
    page.press("/", "tanh")
    assert page.texts("#found") == ["1 found"]
    page.press("\ue007")
    assert page.texts("#found") == ["1 of 1"]
    assert page.having("selected") == {"cell/tanh#0"}
    assert "cell/tanh#0" in page.texts("#panel h2")
    assert page.is_in_view(".selected")


def test_a_backward_equation_lights_its_forward_one_and_its_line(page, path):
    page.open(fg.halves(fg.trace(mlp, *mlp_arguments())), path)
    page.click("transpose/out/dot_general#0")
    assert page.having("selected") == {"transpose/out/dot_general#0"}
    assert page.having("lit") == {"out/dot_general#0"}
    assert page.texts(".code.selected code") == ['guess = h @ params["out"]["w"] + params["out"]["b"]']


def mlp_arguments():
    layer = lambda n, m: {"w": array(n, m), "b": array(m)}
    return {"hidden": layer(3, 16), "out": layer(16, 2)}, array(8, 3), array(8, 2)


def test_a_residual_is_followed(page, path):
    halves = fg.halves(fg.trace(mlp, *mlp_arguments()))
    page.open(halves, path)
    shown = page.texts("#panel .link[data-value] small")
    assert sorted(shown) == sorted(r.path for r in halves.residuals)
    sizes = page.js("return [...document.querySelectorAll('#panel .link')].map((e) => values[e.dataset.value].bytes)")
    assert sizes == sorted((r.bytes for r in halves.residuals), reverse=True)
    page.js(
        "[...document.querySelectorAll('#panel .link')].find((e) => e.textContent.includes('hidden/tanh#0')).click()"
    )
    assert page.having("selected") == {"hidden/tanh#0"}
    data = graph_data(halves)
    readers = {edge["target"] for edge in data["edges"] if data["nodes"][edge["source"]].get("name") == "hidden/tanh#0"}
    names = {data["nodes"][k]["name"] for k in readers}
    assert page.having("lit") == names
    backward = [name for name in names if name.startswith("transpose")]
    assert page.js("return document.querySelectorAll('.residual.on').length") == len(backward) > 0
    assert page.is_in_view(".selected")
    assert page.is_in_view(".lit")


def test_a_line_of_source_selects_its_equations(page, path):
    graph = mlp_gradient()
    page.open(graph, path)
    page.js("[...document.querySelectorAll('.code')].find((e) => e.textContent.includes('guess = h')).click()")
    lines = {node["name"]: node["line"] for node in json.loads(graph.to_json())["nodes"] if "name" in node}
    assert page.having("selected") == {name for name, line in lines.items() if line == lines["out/add#0"]}


def test_the_keyboard_walks_the_graph(page, path):
    page.open(mlp_gradient(), path)
    page.click("hidden/add#0")
    page.press("\ue015")  # down
    assert page.having("selected") == {"hidden/tanh#0"}
    page.press("\ue013")  # up
    assert page.having("selected") == {"hidden/add#0"}
    page.press("\ue012")  # left
    assert page.having("selected") == {"hidden/broadcast_in_dim#0"}
    scale = page.js("return view.scale")
    page.press("+")
    assert page.js("return view.scale") > scale
    page.press("\ue00c")  # escape
    assert page.having("selected") == set()


def test_the_wheel_zooms_where_the_mouse_is_and_dragging_moves(page, path):
    from selenium.webdriver import ActionChains

    page.open(mlp_gradient(), path)
    canvas = page.element("#canvas")
    at = lambda: page.js(
        "const r = document.querySelector('.selected > .shape').getBoundingClientRect(); return [r.x, r.y];"
    )
    page.click("hidden/tanh#0")
    before = at()
    ActionChains(page.driver).move_to_element_with_offset(canvas, 300, 200).click_and_hold().move_by_offset(
        40, 25
    ).release().perform()
    assert at() == pytest.approx([before[0] + 40, before[1] + 25], abs=1)
    assert page.having("selected") == {"hidden/tanh#0"}
    scale = page.js("return view.scale")
    x, y = at()
    page.js(
        f"const turn = {{deltaY: -300, clientX: {x}, clientY: {y}, cancelable: true}};"
        "document.getElementById('canvas').dispatchEvent(new WheelEvent('wheel', turn));"
    )
    assert page.js("return view.scale") > scale
    assert at() == pytest.approx([before[0] + 40, before[1] + 25], abs=1)


def test_the_table_holds_the_same_and_sorts(page, path):
    graph = mlp_gradient()
    page.open(graph, path)
    page.press("t")
    names = page.texts("#table tbody tr td:first-child")
    data = json.loads(graph.to_json())
    equations = [node for node in data["nodes"] if node["kind"] == "equation"]
    assert names == [node["name"] for node in equations]
    page.element("[data-column='FLOPs']").click()
    flops = {node["name"]: node["flops"] or 0 for node in equations}
    shown = [flops[name] for name in page.texts("#table tbody tr td:first-child")]
    assert shown == sorted(flops.values(), reverse=True)
    page.press("/", "transpose out")
    assert all(name.startswith("transpose/out") for name in page.texts("#table tbody tr td:first-child"))


def test_a_node_says_in_which_kernels_it_is(page, path):
    graph = rnn_loss()
    c = fg.compiled(graph)
    page.open(graph, path, kernels=c)
    name, kernels = next(iter(c.parts.items()))
    page.press("/", name, "\ue007")
    (shown,) = [text for text in page.texts("#panel p") if text.startswith(f"{kernels[0].name}: ")]
    assert kernels[0].sort in shown


def test_colours_by_time_and_dtype(page, path):
    graph = rnn_loss()
    page.open(graph, path, times={"cell/tanh#0": 3e-6, "cell/add#0": 1e-6})
    choose = lambda name: page.js(
        f"const s = document.getElementById('measure'); s.value = '{name}'; s.dispatchEvent(new Event('change'));"
    )
    fill = lambda name: page.js(
        f"return document.querySelector(\".node[data-id='{page.id_of(name)}'] > .shape\").getAttribute('fill')"
    )
    choose("time")
    assert page.texts("#legend") == ["1 µs4 µs"]
    assert len({fill("cell/tanh#0"), fill("cell/add#0"), fill("cell/add#1")}) == 3
    assert fill("cell/add#1") == "#ffffff"
    choose("dtype")
    assert page.texts("#legend") == ["dtype of the resultfloat32"]
    assert fill("cell/tanh#0") == fill("cell/add#1") == "#56b4e9"


def test_a_notebook_draws_the_page_in_its_frame(page, path):
    path.write_text(f"<!doctype html><meta charset='utf-8'>{rnn_loss()._repr_html_()}", encoding="utf-8")
    page.driver.get(path.as_uri())
    page.driver.switch_to.frame(page.element("iframe"))
    page.click("cell/tanh#0")
    assert page.having("selected") == {"cell/tanh#0"}
    page.driver.switch_to.default_content()


def test_300_equations_are_drawn_at_once(page, path):
    graph = fg.grad(fg.trace(transformer, weights(2), array(4, 32, 64)))
    count = sum(1 for _ in fg.walk(graph))
    assert 270 < count < 350
    page.open(graph, path)
    folded = len(page.drawn())
    page.element("#unfold").click()
    assert folded < count < len(page.drawn())


def test_of_10000_equations_only_some_are_drawn(page, path):
    graph = fg.grad(fg.trace(transformer, weights(68), array(4, 32, 64)))
    assert sum(1 for _ in fg.walk(graph)) > 9500
    page.open(graph, path)
    assert len(page.drawn()) < 200
    for action in ("toggle(nodes.find((n) => n.label === 'block_3'))", "search('block_5/ tanh')", "nextMatch(1)"):
        page.js(action)
    assert page.having("selected")
    page.js("unfold(OPEN_AT_MOST); draw()")
    assert len(page.drawn()) <= 1500


def test_a_long_chain_without_scopes_is_cut_into_parts(page, path):
    def f(x):
        for k in range(5000):
            x = jnp.sin(x) if k % 3 else x * 2.0
        return x

    page.open(fg.trace(f, array(8)), path)
    assert len(page.drawn()) < 200
    page.press("/", "sin#2000", "\ue007")
    assert page.having("selected") == {"sin#2000"}
