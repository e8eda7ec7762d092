// Draws the data of a graph (schema: docs/viewing.md) as boxes that open and close. dagre lays out each box on its own.
"use strict";

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);

const OPEN_AT_FIRST = [160, 60, 20]; // limits of visible nodes when the page opens: the first whose layout is legible counts
const OPEN_AT_MOST = 1500; // the limit at any time, to keep the page fast
const MOST_LEAVES = 10; // arguments or outputs beside each other; more go into boxes of their names
const WIDEST_BOX = 100; // children of a box; more are split into parts
const MOST_ROWS = 1000; // rows of the table
const LEGIBLE = 0.85; // scale
const HEADER = 24; // height of a box's title
const PAD = 14;
const GAP = 34; // between ranks: room for the type of a value

// ------------------------------------------------------------------------------------------------ the tree of boxes

const nodes = data.nodes;
const values = data.values;
const root = { id: -1, parent: null, kind: "root", label: data.name, children: [], open: true };
const up = (node) => (node.parent === null ? root : nodes[node.parent]);
const PILLS = new Set(["argument", "constant", "input", "output"]); // kinds of nodes that are not operations
const isBox = (node) => node.children.length > 0;
const isHalved = (box) => box.children.length === 2 && box.children.every((node) => node.kind === "half");

const edges = data.edges.map((edge) => ({
  source: nodes[edge.source],
  target: nodes[edge.target],
  value: values[edge.value],
}));
// from, to: edges that leave the node, and that enter it
const emptyNode = () => ({ children: [], made: [], from: [], to: [], open: false });

for (const node of nodes) Object.assign(node, emptyNode());
for (const node of nodes) up(node).children.push(node);
for (const value of values) {
  value.edges = [];
  nodes[value.node].made.push(value);
}
for (const edge of edges) {
  edge.value.edges.push(edge);
  edge.source.from.push(edge);
  edge.target.to.push(edge);
}
const equations = nodes.filter((node) => node.kind === "equation");
equations.forEach((node, k) => (node.number = k + 1));
tidy(root);
sum(root);

/** Boxes that are not in the data and make large graphs legible: halves, parts, and arguments near their users. */
function tidy(box) {
  halve(box);
  settle(box);
  while (box.children.length > WIDEST_BOX) {
    const children = [...box.children];
    for (let k = 0; k < children.length; k += WIDEST_BOX) {
      const part = children.slice(k, k + WIDEST_BOX);
      const found = part.flatMap(numbers);
      wrap(box, part, "part", found.length ? `${found[0]} – ${found.at(-1)}` : `${part.length} arrays`);
    }
  }
  box.children.forEach(tidy);
}

function numbers(node) {
  return node.number ? [node.number] : node.children.flatMap(numbers);
}

/** Split a box that contains a backward pass into a forward and a backward half. */
function halve(box) {
  const isBackward = (node) => node.kind === "scope" && node.label === "transpose";
  const after = new Set(box.children.filter(isBackward));
  if (!after.size || box.kind === "half") return;
  const isAfter = (node) =>
    after.has(node) || node.children.some(isAfter) || node.to.some((edge) => after.has(within(box, edge.source)));
  for (let count = 0; count !== after.size;) {
    count = after.size;
    for (const child of box.children) if (isAfter(child)) after.add(child);
  }
  const isReadAfter = (node) => node.from.length > 0 && node.from.every((edge) => after.has(within(box, edge.target)));
  for (const child of box.children) if (PILLS.has(child.kind) && isReadAfter(child)) after.add(child);
  const before = box.children.filter((node) => !after.has(node));
  if (before.every((node) => PILLS.has(node.kind))) return;
  wrap(box, before, "half", "forward");
  const isAll = [...after].every((node) => isBackward(node) || PILLS.has(node.kind));
  const half = wrap(box, [...after], "half", isAll ? "backward" : "backward, and what follows");
  for (const scope of half.children.filter(isBackward)) unwrap(scope);
}

/** Move arguments into the only scope that reads them, outputs into the only scope that makes them; box many others by name. */
function settle(box) {
  for (const [kind, ends] of [
    ["argument", (node) => node.from.map((edge) => edge.target)],
    ["output", (node) => node.to.map((edge) => edge.source)],
  ]) {
    if (box.kind === "tree") continue;
    const isOwn = (node) => node.kind === kind && !("result" in node); // of the graph, not of a sub-graph
    for (const leaf of box.children.filter(isOwn)) {
      const near = ends(leaf).filter((node) => within(box, node));
      let place = box;
      for (;;) {
        const around = new Set(near.map((node) => within(place, node)));
        const [next] = around;
        if (around.size !== 1 || next.kind !== "scope") break;
        place = next;
      }
      if (place !== box) move(leaf, place);
    }
    const left = box.children.filter(isOwn);
    if (left.length <= MOST_LEAVES) continue;
    for (const [label, members] of Map.groupBy(left, (node) => node.label.split(/[[.]/)[0]))
      if (members.length > 1) wrap(box, members, "tree", label);
  }
}

/** The child of a box that is or contains a node; undefined if the node is outside of the box. */
function within(box, node) {
  for (let child = node; child !== root; child = up(child)) if (up(child) === box) return child;
}

function wrap(box, members, kind, label) {
  const node = { id: nodes.length, parent: box.id < 0 ? null : box.id, kind, label };
  nodes.push(Object.assign(node, emptyNode()));
  box.children.splice(box.children.indexOf(members[0]), 0, node);
  for (const member of members) move(member, node);
  return node;
}

function move(node, box) {
  const siblings = up(node).children;
  siblings.splice(siblings.indexOf(node), 1);
  node.parent = box.id;
  if (node.kind === "argument") box.children.unshift(node);
  else box.children.push(node);
}

function unwrap(box) {
  for (const child of [...box.children]) move(child, up(box));
  up(box).children.splice(up(box).children.indexOf(box), 1);
}

/** The total costs of the equations in a node. */
function sum(node) {
  node.children.forEach(sum);
  const add = (own, key) => node.children.reduce((total, child) => total + child[key], own ?? 0);
  node.FLOPs = add(node.flops, "FLOPs");
  node.bytes = add((node.bytes_read ?? 0) + (node.bytes_written ?? 0), "bytes");
  node.time = add(node.time_s, "time");
  node.count = add(node.kind === "equation" ? 1 : 0, "count");
  node.dtype = node.made?.[0]?.dtype ?? null;
}

/** The node, or the outermost closed box around it. */
function shown(node) {
  let found = node;
  for (let box = up(node); box !== root; box = up(box)) if (!box.open) found = box;
  return found;
}

function ancestors(node) {
  const found = [];
  for (let box = node; box !== root; box = up(box)) found.push(box);
  return [...found, root];
}

// ------------------------------------------------------------------------------------------------ edges, level by level

// Borders of boxes cut edges into segments. A segment joins two children of a box, or a child and the border (null), and
// bundles all edges with the same ends. An edge from one half of a gradient to the other is a residual.
const residuals = [];
for (const node of [root, ...nodes]) node.segments = new Map();
for (const edge of edges) cut(edge);
for (const node of nodes) if (node.kind === "output" && "result" in node) leave(node);

function cut(edge) {
  const over = new Set(ancestors(edge.source));
  const meeting = ancestors(edge.target).find((box) => over.has(box));
  if (isHalved(meeting)) {
    residuals.push(edge);
    return;
  }
  const from = climb(edge.source, meeting, (box, child) => segment(box, child, null, [edge]));
  const to = climb(edge.target, meeting, (box, child) => segment(box, null, child, [edge]));
  segment(meeting, from, to, [edge]);
}

/** Call `visit` for the boxes around a node up to `meeting`; returns the child of `meeting` that contains it. */
function climb(node, meeting, visit) {
  let child = node;
  for (let box = up(node); box !== meeting; box = up(box)) {
    visit(box, child);
    child = box;
  }
  return child;
}

/** Draw the result of a sub-graph from its output to the equation that returns it. */
function leave(node) {
  const value = values[node.result];
  const owner = value ? nodes[value.node] : up(node);
  for (let child = node; child !== owner; child = up(child)) segment(up(child), child, null, value?.edges ?? []);
}

function segment(box, from, to, bundle) {
  const key = `${from?.id}>${to?.id}`;
  if (!box.segments.has(key)) box.segments.set(key, { from, to, bundle: new Set() });
  for (const edge of bundle) box.segments.get(key).bundle.add(edge);
}

// ------------------------------------------------------------------------------------------------ layout

const pen = document.createElement("canvas").getContext("2d");
pen.font = "600 12px system-ui, sans-serif";
const TYPE_SCALE = 0.78; // font size of the types of values, relative to the captions
const FAR = 1e9;

function caption(node) {
  const short = node.label.length > 30 ? `…${node.label.slice(-29)}` : node.label;
  const literals = (node.literals ?? []).map((x) => (x.length > 9 ? `${x.slice(0, 8)}…` : x));
  if (PILLS.has(node.kind)) return node.kind === "output" && literals.length ? `${short} = ${literals[0]}` : short;
  return [isBox(node) && !node.open ? "▸" : "", short, ...literals].join(" ").trim();
}

/** Compute the size of a node, and for an open box the positions of its children and the paths of its segments. */
function layOut(node, upward) {
  if (node.laid) return;
  node.laid = true;
  const text = pen.measureText(caption(node)).width;
  if (!node.open) {
    node.width = Math.max(PILLS.has(node.kind) ? 44 : 64, Math.ceil(text) + (PILLS.has(node.kind) ? 20 : 18));
    node.height = isBox(node) ? 38 : PILLS.has(node.kind) ? 22 : 26;
    return;
  }
  if (isHalved(node)) return sideBySide(node);
  for (const child of node.children) layOut(child, upward);

  const graph = new dagre.graphlib.Graph();
  graph.setGraph({ ranksep: GAP, nodesep: 22, edgesep: 12, ranker: "network-simplex" });
  const summaries = labels(node);
  const lean = leanings(node);
  const byLeaning = (a, b) => (lean.get(b) ?? FAR) - (lean.get(a) ?? FAR);
  for (const child of node.children.toSorted(byLeaning)) {
    const label = child.open ? 0 : pen.measureText(summaries.get(child) ?? "").width * TYPE_SCALE;
    graph.setNode(child.id, { width: Math.max(child.width, label), height: child.height });
  }
  const borders = { width: 1, height: 1 };
  const segments = [...node.segments.values()].sort((a, b) => byLeaning(a.from ?? a.to, b.from ?? b.to));
  for (const { from, to, bundle } of segments) {
    const ends = [from?.id ?? "in", to?.id ?? "out"];
    ends.forEach((end) => graph.hasNode(end) || graph.setNode(end, { ...borders }));
    const isPort = (!from && to.kind === "input") || (!to && from.kind === "output");
    graph.setEdge(...ends, { weight: isPort ? 8 : from && to ? 2 + Math.min(bundle.size, 4) : 1 });
  }
  dagre.layout(graph);

  const { width, height } = graph.graph();
  node.width = Math.max((Number.isFinite(width) ? width : 0) + 2 * PAD, text + 2 * PAD);
  node.height = (Number.isFinite(height) ? height : 0) + HEADER + PAD;
  const flip = (y) => (upward ? node.height - PAD - y : HEADER + y);
  for (const child of node.children) {
    const place = graph.node(child.id);
    child.x = place.x - child.width / 2 + PAD;
    child.y = flip(place.y) - child.height / 2;
  }
  const ranks = new Map();
  for (const id of graph.nodes()) {
    const { y, height } = graph.node(id);
    ranks.set(Math.round(y), Math.max(ranks.get(Math.round(y)) ?? 0, height / 2));
  }
  const half = (y) => ranks.get(Math.round(y)) ?? 0;
  node.paths = [];
  for (const part of node.segments.values()) {
    const bends = graph
      .edge(part.from?.id ?? "in", part.to?.id ?? "out")
      .points.slice(1, -1)
      .map(({ x, y }) => ({ x: x + PAD, y, half: half(y) }));
    if (!part.from && part.to.kind === "input") bends.length = 0;
    node.paths.push({ ...part, ...route(node, part, bends, graph, half, flip, upward) });
  }
}

/** The x at which a child's values enter open siblings. dagre does not see inside these; it puts the first nodes rightmost. */
function leanings(box) {
  const lean = new Map();
  for (const { from, to, bundle } of box.segments.values()) {
    if (!from || !to?.open) continue;
    const entries = to.paths.filter((path) => !path.from && !path.bundle.isDisjointFrom(bundle));
    if (entries.length) lean.set(from, entries.reduce((sum, path) => sum + path.points[0][0], 0) / entries.length);
  }
  return lean;
}

/** The trunk of a bundle as a path between ranks, and legs to the points where its edges cross the border of an open box. */
function route(node, { from, to, bundle }, bends, graph, half, flip, upward) {
  const place = ({ id, width, height }) => ({ x: graph.node(id).x + PAD, y: graph.node(id).y, width, height });
  const near = (x, { x: middle, width }, margin) =>
    Math.min(Math.max(x, middle - width / 2 + margin), middle + width / 2 - margin);
  const start = from && place(from);
  const stop = to && place(to);
  const aim = bends.at(0)?.x ?? stop?.x ?? start.x;
  const origin = bends.at(-1)?.x ?? start?.x ?? stop.x;
  const begin = start && (from.open ? near(aim, start, 10) : start.x);
  const end = stop && near(origin, stop, 9);
  const out = from?.open ? ports(from, "out", bundle, start) : [];
  const into = to?.open ? ports(to, "in", bundle, stop) : [];
  const xs = { begin: out.length === 1 ? out[0].x : begin, end: into.length === 1 ? into[0].x : end };
  const points = [];
  const margin = upward ? PAD : HEADER; // between the border where data enters and the first rank
  const lead = 11; // distance from the border at which a bundle splits into legs
  if (start) {
    const bottom = start.y + start.height / 2;
    if (out.length > 1) points.push([xs.begin, bottom + lead]);
    else points.push([xs.begin, bottom], [xs.begin, start.y + half(start.y)]);
  } else {
    points.push([bends.at(0)?.x ?? xs.end, -margin]);
  }
  for (const { x, y, half } of bends) points.push([x, y - half], [x, y + half]);
  if (stop) {
    const top = stop.y - stop.height / 2;
    if (into.length > 1) points.push([xs.end, top - lead]);
    else points.push([xs.end, stop.y - half(stop.y)], [xs.end, top]);
  } else {
    points.push([bends.at(-1)?.x ?? xs.begin, node.height - margin]);
  }
  const turned = (list) => list.map(([x, y]) => [x, flip(y)]);
  const legs = [];
  if (out.length > 1)
    for (const port of out)
      legs.push({ bundle: port.bundle, points: turned([[port.x, start.y + start.height / 2], points[0]]) });
  if (into.length > 1)
    for (const port of into)
      legs.push({
        bundle: port.bundle,
        points: turned([points.at(-1), [port.x, stop.y - stop.height / 2]]),
        tip: true,
      });
  return { points: turned(points), legs, tip: Boolean(stop) && into.length <= 1, upward };
}

/** The points where a bundle crosses the border of an open box. */
function ports(box, way, bundle, place) {
  const found = new Map();
  for (const path of box.paths) {
    if ((way === "in" ? path.from : path.to) !== null) continue;
    const crossing = [...path.bundle].filter((edge) => bundle.has(edge));
    if (!crossing.length) continue;
    const x = place.x - place.width / 2 + (way === "in" ? path.points[0] : path.points.at(-1))[0];
    found.set(Math.round(x), { x, bundle: new Set([...(found.get(Math.round(x))?.bundle ?? []), ...crossing]) });
  }
  return [...found.values()];
}

/** The halves of a gradient: data runs down in the forward half and up in the backward half. */
function sideBySide(box) {
  const [forward, backward] = box.children;
  const [left, top] = box === root ? [0, 0] : [PAD, HEADER];
  layOut(forward, false);
  layOut(backward, true);
  const height = Math.max(forward.height, backward.height);
  Object.assign(forward, { x: left, y: top + height - forward.height });
  Object.assign(backward, { x: left + forward.width + 110, y: top + height - backward.height });
  box.width = backward.x + backward.width + left;
  box.height = top + height + (top && PAD);
  box.paths = [];
}

/** The upper left corner of a visible node in the coordinates of the root. */
function corner(node) {
  let [x, y] = [0, 0];
  for (let box = node; box !== root; box = up(box)) [x, y] = [x + box.x, y + box.y];
  return [x, y];
}

// ------------------------------------------------------------------------------------------------ colours

// Viridis, darker for larger amounts, and the palette of Okabe and Ito; both are safe for colour-blind readers.
const RAMP = ["#fde725", "#addc30", "#5ec962", "#28ae80", "#21918c", "#2c728e", "#3b528b", "#472d7b", "#440154"];
const KINDS = ["#56b4e9", "#e69f00", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2", "#999999"];
const dtypes = [...new Set(equations.map((node) => node.made[0]?.dtype).filter(Boolean))];
const MEASURES = ["FLOPs", "bytes", "time", "dtype"];
let measure = equations.some((node) => node.flops) ? "FLOPs" : "bytes";
let range = [1, 1];

function setMeasure(name) {
  measure = name;
  const amounts = equations.map((node) => node[name]).filter((x) => x > 0);
  range = [amounts.reduce((a, b) => Math.min(a, b), Infinity), Math.max(root[name], 0)];
}

function colour(node) {
  if (measure === "dtype") {
    if (!node.dtype || (isBox(node) && node.kind !== "equation")) return "#ffffff";
    return KINDS[Math.min(Math.max(dtypes.indexOf(node.dtype), 0), KINDS.length - 1)];
  }
  const amount = node[measure];
  if (!(amount > 0) || PILLS.has(node.kind)) return "#ffffff";
  const [least, most] = range;
  const part = most > least ? Math.log(amount / least) / Math.log(most / least) : 1;
  return mixed(RAMP, Math.min(Math.max(part, 0), 1) * (RAMP.length - 1));
}

function mixed(ramp, at) {
  const k = Math.min(Math.floor(at), ramp.length - 2);
  const [a, b] = [ramp[k], ramp[k + 1]].map(channels);
  return `rgb(${a.map((x, i) => Math.round(x + (b[i] - x) * (at - k))).join(" ")})`;
}

const channels = (hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16));

function isDark(fill) {
  const [r, g, b] = fill.startsWith("#") ? channels(fill) : fill.match(/\d+/g).map(Number);
  return 0.299 * r + 0.587 * g + 0.114 * b < 135;
}

// ------------------------------------------------------------------------------------------------ words

function scaled(n, base, units) {
  let k = 0;
  while (n >= base && k < units.length - 1) [n, k] = [n / base, k + 1];
  return `${Number.isInteger(n) ? n : n.toFixed(n < 10 ? 1 : 0)} ${units[k]}`.trim();
}

const inBytes = (n) => scaled(n, 1024, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]);
const inCounts = (n, unit = "") =>
  scaled(
    n,
    1000,
    ["", "k", "M", "G", "T", "P"].map((prefix) => prefix + unit),
  );
const inSeconds = (t) => scaled(t * 1e9, 1000, ["ns", "µs", "ms", "s"]);
const inWords = { FLOPs: (n) => inCounts(n, "FLOP"), bytes: inBytes, time: inSeconds };
const escaped = (text) => String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
const typed = (value) => `${value.type} · ${inBytes(value.bytes)}`;
const where = (node) => (node.file ? `${node.file}:${node.line} (${node.function})` : "");

const valuesOf = (bundle) => [...new Set([...bundle].map((edge) => edge.value))];
const bytesOf = (list) => list.reduce((total, value) => total + value.bytes, 0);
const summary = (list) => (list.length === 1 ? typed(list[0]) : `${list.length} values · ${inBytes(bytesOf(list))}`);

// ------------------------------------------------------------------------------------------------ drawing

let drawn = new Map(); // node id -> <g>
let lines = []; // [element, bundle]

function draw() {
  layOut(root, false);
  const parts = [];
  const bundles = [];
  drawBox(root, parts, bundles);
  drawResiduals(parts, bundles);
  $("canvas").innerHTML = `<g id="world">${parts.join("")}</g>`;
  drawn = new Map([...$("canvas").querySelectorAll(".node")].map((g) => [Number(g.dataset.id), g]));
  lines = [...$("canvas").querySelectorAll(".edge")].map((path, k) => [path, bundles[k]]);
  place();
  mark();
}

function drawBox(box, parts, bundles) {
  for (const path of box.paths) {
    drawEdge(curve(path.points), path.bundle, "", parts, bundles);
    if (path.tip) drawTip(path.points.at(-1), path.upward, parts);
    for (const leg of path.legs) {
      drawEdge(curve(leg.points), leg.bundle, "", parts, bundles);
      if (leg.tip) drawTip(leg.points.at(-1), path.upward, parts);
    }
  }
  for (const child of box.children) drawNode(child, parts, bundles);
  const summaries = labels(box);
  for (const path of box.paths) {
    const child = path.from;
    if (!summaries.has(child)) continue;
    const x = child.open ? path.points[0][0] : child.x + child.width / 2;
    const y = path.upward ? child.y - 5 : child.y + child.height + 11;
    parts.push(`<text class="type" text-anchor="middle" x="${x}" y="${y}">${escaped(summaries.get(child))}</text>`);
    summaries.delete(child);
  }
}

/** A summary of the values that leave each child of a box. */
function labels(box) {
  const bundles = new Map();
  for (const { from, bundle } of box.segments.values())
    if (from && bundle.size) bundles.set(from, [...(bundles.get(from) ?? []), ...bundle]);
  return new Map([...bundles].map(([child, bundle]) => [child, summary(valuesOf(bundle))]));
}

function drawEdge(path, bundle, kind, parts, bundles) {
  if (!bundle.size) return;
  const list = valuesOf(bundle);
  const width = Math.min(1 + Math.log2(1 + bytesOf(list) / 1024) / 6, 4).toFixed(1);
  const lines = list.slice(0, 12).map((value) => `${value.name}: ${typed(value)}`);
  if (list.length > 12) lines.push(`… ${list.length - 12} more`);
  const title = `<title>${escaped(lines.join("\n"))}</title>`;
  parts.push(`<path class="edge ${kind}" d="${path}" stroke-width="${width}">${title}</path>`);
  bundles.push(bundle);
}

function drawTip([x, y], upward, parts) {
  parts.push(`<path class="tip" d="M${x} ${y}l-3.2 ${upward ? 6 : -6}h6.4z"/>`);
}

/** A curve that is vertical at each point. */
function curve(points) {
  const [[x, y], ...rest] = points;
  let [px, py] = [x, y];
  let path = `M${x.toFixed(1)} ${y.toFixed(1)}`;
  for (const [x, y] of rest) {
    const middle = ((py + y) / 2).toFixed(1);
    path +=
      x === px
        ? `V${y.toFixed(1)}`
        : `C${px.toFixed(1)} ${middle} ${x.toFixed(1)} ${middle} ${x.toFixed(1)} ${y.toFixed(1)}`;
    [px, py] = [x, y];
  }
  return path;
}

function drawNode(node, parts, bundles) {
  const isOpen = isBox(node) && node.open;
  const fill = isOpen ? "" : colour(node);
  const ink = fill && isDark(fill) ? ' style="fill:#ffffff"' : "";
  const radius = PILLS.has(node.kind) ? node.height / 2 : isBox(node) ? 7 : 4;
  const dead = node.kind === "equation" && !isBox(node) && node.times === null ? "dead" : "";
  const role = isBox(node) ? ` aria-expanded="${node.open}"` : "";
  parts.push(
    `<g class="node ${node.kind} ${isOpen ? "open" : ""} ${dead}" data-id="${node.id}" role="button"${role}`,
    ` aria-label="${escaped(caption(node))}" transform="translate(${node.x.toFixed(1)} ${node.y.toFixed(1)})">`,
    `<rect class="shape" width="${node.width}" height="${node.height}" rx="${radius}"${fill ? ` fill="${fill}"` : ""}/>`,
  );
  if (isOpen) {
    drawBox(node, parts, bundles);
    parts.push(`<text class="title" x="9" y="16">▾ ${escaped(node.label)}</text>`);
  } else {
    const [x, y] = [node.width / 2, isBox(node) ? 16 : node.height / 2 + 4];
    parts.push(
      `<text class="${isBox(node) ? "title" : ""}" x="${x}" y="${y}" text-anchor="middle"${ink}>${escaped(caption(node))}</text>`,
    );
    if (isBox(node)) parts.push(`<text x="${x}" y="31" text-anchor="middle"${ink}>${escaped(contents(node))}</text>`);
  }
  parts.push("</g>");
}

function contents(node) {
  if (node.count > (node.kind === "equation" ? 1 : 0)) return `${node.count - (node.kind === "equation" ? 1 : 0)} eqns`;
  return `${node.children.length} arrays`;
}

function drawResiduals(parts, bundles) {
  const seen = new Map();
  for (const edge of residuals) {
    const [from, to] = [shown(edge.source), shown(edge.target)];
    const key = `${from.id}>${to.id}`;
    if (from === to) continue;
    if (!seen.has(key)) seen.set(key, { from, to, bundle: new Set() });
    seen.get(key).bundle.add(edge);
  }
  for (const { from, to, bundle } of seen.values()) {
    const [[x1, y1], [x2, y2]] = [corner(from), corner(to)];
    const [start, a, b] = [x1 + from.width, y1 + from.height / 2, y2 + to.height / 2];
    const bend = Math.max((x2 - start) * 0.45, 60);
    drawEdge(`M${start} ${a}C${start + bend} ${a} ${x2 - bend} ${b} ${x2} ${b}`, bundle, "residual", parts, bundles);
  }
}

function drawLegend() {
  if (measure === "dtype") {
    const swatch = (dtype, k) =>
      `<span class="swatch" style="background:${KINDS[Math.min(k, KINDS.length - 1)]}"></span>${escaped(dtype)}`;
    $("legend").innerHTML = `dtype of the result${dtypes.map(swatch).join("")}`;
    return;
  }
  const [least, most] = range.map((n) => (Number.isFinite(n) ? inWords[measure](n) : "0"));
  $("legend").innerHTML =
    `${least}<span class="ramp" style="background:linear-gradient(90deg, ${RAMP.join(",")})"></span>${most}`;
}

// ------------------------------------------------------------------------------------------------ opening and closing

/** Open or close a visible box; its corner keeps its position on the screen. */
function toggle(box) {
  if (!isBox(box)) return;
  const before = corner(box);
  box.open = !box.open;
  forget(box);
  layOut(root, false);
  const after = corner(box);
  view.x += (before[0] - after[0]) * view.scale;
  view.y += (before[1] - after[1]) * view.scale;
  draw();
}

/** Discard the layout of a box and of all boxes around it. */
function forget(node) {
  for (const box of ancestors(node)) box.laid = false;
}

function visible() {
  let count = 0;
  const visit = (box) => box.children.forEach((child) => (count++, child.open && visit(child)));
  visit(root);
  return count;
}

/** Open boxes from the outside in, one level at a time, up to a number of visible nodes. */
function unfold(most) {
  const isWanted = (box) => isBox(box) && (box.kind !== "tree" || most === OPEN_AT_MOST);
  for (let level = [root]; level.length;) {
    level = level.flatMap((box) => box.children).filter(isWanted);
    const more = level.filter((box) => !box.open).reduce((sum, box) => sum + box.children.length, 0);
    if (visible() + more > most && !level.some((box) => box.kind === "half")) break;
    for (const box of level) box.open = true;
  }
  for (const node of [root, ...nodes]) node.laid = false;
}

function foldAll() {
  for (const node of nodes) node.open &&= node.kind === "half";
  for (const node of [root, ...nodes]) node.laid = false;
}

/** Open all boxes around a node. */
function reveal(node) {
  for (const box of ancestors(node).slice(1, -1)) box.open = true;
  forget(node);
  draw();
}

// ------------------------------------------------------------------------------------------------ zoom

const view = { x: 0, y: 0, scale: 1 };

function place() {
  $("world")?.setAttribute("transform", `translate(${view.x} ${view.y}) scale(${view.scale})`);
}

function zoom(factor, x = $("canvas").clientWidth / 2, y = $("canvas").clientHeight / 2) {
  const scale = Math.min(Math.max(view.scale * factor, 0.02), 4);
  view.x = x - ((x - view.x) * scale) / view.scale;
  view.y = y - ((y - view.y) * scale) / view.scale;
  view.scale = scale;
  place();
}

/** Show the whole graph; if that would be illegible, its upper part in full width. */
function fit(legible = 0) {
  const { clientWidth, clientHeight } = $("canvas");
  const wide = clientWidth / (root.width + 40);
  const whole = Math.min(wide, clientHeight / (root.height + 40), 1.25);
  view.scale = Math.max(whole, Math.min(wide, legible));
  view.x = (clientWidth - root.width * view.scale) / 2;
  view.y = Math.max((clientHeight - root.height * view.scale) / 2, 16);
  place();
}

/** Centre the view on all of these nodes. */
function centre(members) {
  const { clientWidth, clientHeight } = $("canvas");
  const ends = members
    .map(shown)
    .flatMap((node) => [corner(node), [node.width, node.height].map((n, k) => n + corner(node)[k])]);
  const [left, top] = [0, 1].map((k) => Math.min(...ends.map((end) => end[k])));
  const [right, bottom] = [0, 1].map((k) => Math.max(...ends.map((end) => end[k])));
  const whole = Math.min(clientWidth / (right - left + 60), clientHeight / (bottom - top + 60));
  view.scale = Math.min(whole, Math.max(view.scale, LEGIBLE));
  view.x = (clientWidth - (left + right) * view.scale) / 2;
  view.y = (clientHeight - (top + bottom) * view.scale) / 2;
  place();
}

// ------------------------------------------------------------------------------------------------ selection

let selected = []; // nodes
let followed = null; // a value

/** The forward equations of the selection, or the users of the followed value. */
function lit() {
  if (followed) return followed.edges.map((edge) => edge.target);
  return selected.flatMap((node) => node.forward ?? []).map((id) => nodes[id]);
}

function select(chosen, value = null) {
  [selected, followed] = [chosen, value];
  mark();
  describe();
}

function mark() {
  const touched = new Set(followed ? followed.edges : selected.flatMap(crossing));
  const sets = { selected, lit: lit(), found: matches };
  for (const [name, members] of Object.entries(sets)) {
    for (const g of $("canvas").querySelectorAll(`.${name}`)) g.classList.remove(name);
    for (const node of members) drawn.get(shown(node).id)?.classList.add(name);
    const chosen = new Set(members);
    for (const row of $("table").querySelectorAll("tr[data-id]"))
      row.classList.toggle(name, chosen.has(nodes[row.dataset.id]));
  }
  $("canvas").classList.toggle("selecting", selected.length > 0);
  for (const [path, bundle] of lines) path.classList.toggle("on", !touched.isDisjointFrom(bundle));
  drawCode();
}

/** The edges that start or end at a node, or cross its border. */
function crossing(node) {
  const inner = [...node.segments.values()].filter((part) => !part.from || !part.to);
  return [...node.from, ...node.to, ...inner.flatMap((part) => [...part.bundle])];
}

function describe() {
  const panel = $("panel");
  if (!selected.length) {
    panel.innerHTML = residuals.length ? residualList() : "";
    panel.innerHTML += overview();
  } else if (selected.length > 1) {
    panel.innerHTML = `<h2>${selected.length} equations</h2>${selected.slice(0, 40).map(link).join("")}`;
  } else {
    panel.innerHTML = details(selected[0]);
  }
  panel.innerHTML += '<h3>Source</h3><div id="code"></div>';
  drawCode();
}

function details(node) {
  const rows = [];
  const tell = (term, text) => text && rows.push(`<dt>${term}</dt><dd>${escaped(text)}</dd>`);
  tell("scope", node.scope);
  tell("equations", isBox(node) && node.count ? String(node.count) : "");
  tell("FLOPs", node.FLOPs ? inCounts(node.FLOPs, "FLOP") : "");
  tell("transcendentals", node.transcendentals ? inCounts(node.transcendentals) : "");
  tell("bytes", node.bytes ? `${inBytes(node.bytes)} moved` : "");
  tell("runs", node.times > 1 ? `${inCounts(node.times)} times` : "");
  tell("time", node.time ? inSeconds(node.time) : "");
  tell("line", where(node));
  const heading = node.name ?? `${node.kind === "equation" ? "" : `${node.kind} `}${node.label}`;
  const unused = node.times === null && node.text && !isBox(node) && node.flops === null;
  const parts = [`<h2>${escaped(heading)}</h2>`];
  if (node.text) parts.push(`<code>${escaped(node.text)}</code>`);
  parts.push(`<dl>${rows.join("")}</dl>`);
  if (unused) parts.push("<p>Costs nothing: a view, or nothing that any output needs.</p>");
  const forward = (node.forward ?? []).map((id) => nodes[id]);
  if (node.kernels?.length) parts.push(`<h3>Kernels</h3>${node.kernels.map((k) => `<p>${escaped(k)}</p>`).join("")}`);
  if (forward.length) parts.push(`<h3>Derivative of</h3>${forward.slice(0, 12).map(link).join("")}`);
  if (node.made.length) parts.push(`<h3>Makes</h3>${node.made.map(valueLink).join("")}`);
  if (node.to.length) parts.push(`<h3>Reads</h3>${valuesOf(node.to).map(valueLink).join("")}`);
  return parts.join("");
}

function overview() {
  return `<h3>How to read it</h3>
    <p>Boxes are scopes (solid) and sub-graphs (dashed); nodes are equations, coloured by ${measure}; edges are values.
    A dashed node costs nothing.${residuals.length ? " Orange edges are residuals: kept for the backward pass." : ""}</p>
    <h3>Keys</h3><dl>
    <dt><kbd>click</kbd></dt><dd>select; on a box's title: open or close</dd>
    <dt><kbd>↑</kbd> <kbd>↓</kbd></dt><dd>to what it reads, to what reads it</dd>
    <dt><kbd>←</kbd> <kbd>→</kbd></dt><dd>to its neighbours</dd>
    <dt><kbd>Enter</kbd></dt><dd>open or close a box</dd>
    <dt><kbd>/</kbd></dt><dd>search; <kbd>Enter</kbd> next</dd>
    <dt><kbd>+</kbd> <kbd>−</kbd> <kbd>f</kbd></dt><dd>zoom, fit</dd>
    <dt><kbd>t</kbd></dt><dd>table</dd>
    <dt><kbd>Esc</kbd></dt><dd>select nothing</dd></dl>`;
}

function residualList() {
  const kept = valuesOf(residuals).sort((a, b) => b.bytes - a.bytes);
  return `<h2>${kept.length} residuals · ${inBytes(bytesOf(kept))}</h2>${kept.slice(0, 200).map(valueLink).join("")}`;
}

const link = (node) => `<button class="link" data-node="${node.id}">${escaped(node.name ?? node.label)}</button>`;
const valueLink = (value) => {
  const maker = nodes[value.node];
  const text = `<b>${escaped(value.name)}</b> ${escaped(typed(value))}`;
  return `<button class="link" data-value="${value.id}">${text} <small>${escaped(maker.name ?? maker.label)}</small></button>`;
};

/** The source lines of the graph; those of selected and lit equations are marked. */
function drawCode() {
  if (!$("code")) return;
  const near = (members) => new Set(members.map((node) => `${node.file}:${node.line}`));
  const [own, other] = [near(selected), near(followed ? [] : lit())];
  const parts = [];
  for (const [file, code] of Object.entries(data.source ?? {})) {
    parts.push(`<p><small>${escaped(file)}</small></p>`);
    for (const [line, text] of Object.entries(code)) {
      const key = `${file}:${line}`;
      const mark = own.has(key) ? "selected" : other.has(key) ? "lit" : "";
      const words = `<span>${line}</span><code>${escaped(text.trim())}</code>`;
      parts.push(`<button class="code ${mark}" data-file="${escaped(file)}" data-line="${line}">${words}</button>`);
    }
  }
  $("code").innerHTML = parts.join("") || "<p>unknown</p>";
}

$("panel").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const { node, value, file, line } = button.dataset;
  if (node) go(nodes[node]);
  if (value) follow(values[value]);
  if (file) select(equations.filter((node) => node.file === file && String(node.line) === line));
});

/** Select a node where it stands. */
function go(node) {
  reveal(node);
  select([node]);
  centre([node]);
}

/** Select what made a value, and light what reads it. */
function follow(value) {
  reveal(nodes[value.node]);
  select([nodes[value.node]], value);
  centre([nodes[value.node], ...lit()]);
}

// ------------------------------------------------------------------------------------------------ search

let matches = [];
let at = -1;

function search(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  matches = words.length ? nodes.filter((node) => words.every((word) => wording(node).includes(word))) : [];
  at = -1;
  tellFound();
  mark();
  if (!$("table").hidden) drawTable();
}

/** What a node is found by. */
function wording(node) {
  const parts = [node.name ?? node.label, node.kind, node.text, where(node), ...node.made.map((value) => value.type)];
  return (node.wording ??= parts.join(" ").toLowerCase());
}

function tellFound() {
  const total = matches.length;
  $("found").textContent = $("search").value ? (at >= 0 ? `${at + 1} of ${total}` : `${total} found`) : "";
}

function nextMatch(step) {
  if (!matches.length) return;
  at = (at + step + matches.length) % matches.length;
  tellFound();
  go(matches[at]);
}

// ------------------------------------------------------------------------------------------------ table

const COLUMNS = {
  name: (node) => node.name,
  type: (node) => node.made.map((value) => value.type).join(" "),
  FLOPs: (node) => node.FLOPs,
  transcendentals: (node) => node.transcendentals ?? 0,
  read: (node) => node.bytes_read ?? 0,
  written: (node) => node.bytes_written ?? 0,
  runs: (node) => node.times ?? 0,
  time: (node) => node.time,
  line: (node) => where(node),
};
const SHOWN_AS = {
  FLOPs: inCounts,
  transcendentals: inCounts,
  read: inBytes,
  written: inBytes,
  runs: inCounts,
  time: inSeconds,
};
const order = { column: null, sign: 1 };

function drawTable() {
  const columns = Object.keys(COLUMNS).filter((name) => name !== "time" || root.time);
  const chosen = $("search").value ? matches.filter((node) => node.kind === "equation") : [...equations];
  if (order.column) {
    const key = COLUMNS[order.column];
    chosen.sort((a, b) => order.sign * (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0));
  }
  const kind = (name) => (SHOWN_AS[name] ? ' class="number"' : "");
  const arrow = (name) => (name === order.column ? (order.sign > 0 ? " ▴" : " ▾") : "");
  const cell = (node, name) =>
    `<td${kind(name)}>${escaped(SHOWN_AS[name]?.(COLUMNS[name](node)) ?? COLUMNS[name](node))}</td>`;
  const row = (node) => `<tr data-id="${node.id}">${columns.map((name) => cell(node, name)).join("")}</tr>`;
  const more = chosen.length - MOST_ROWS;
  $("table").innerHTML =
    `<table><thead><tr>${columns.map((name) => `<th${kind(name)}><button data-column="${name}">${name}${arrow(name)}</button></th>`).join("")}</tr></thead>` +
    `<tbody>${chosen.slice(0, MOST_ROWS).map(row).join("")}</tbody></table>` +
    (more > 0 ? `<p>… ${more} more: search narrows the table</p>` : "");
  mark();
}

$("table").addEventListener("click", (event) => {
  const column = event.target.closest("[data-column]")?.dataset.column;
  const row = event.target.closest("[data-id]");
  if (column) {
    order.sign = order.column === column ? -order.sign : SHOWN_AS[column] ? -1 : 1;
    order.column = column;
    drawTable();
  }
  if (row) select([nodes[row.dataset.id]]);
});

$("table").addEventListener("dblclick", (event) => {
  const row = event.target.closest("[data-id]");
  if (!row) return;
  showTable(false);
  go(nodes[row.dataset.id]);
});

function showTable(isShown) {
  $("table").hidden = !isShown;
  $("legend").hidden = isShown;
  $("as-table").setAttribute("aria-pressed", String(isShown));
  if (isShown) drawTable();
}

// ------------------------------------------------------------------------------------------------ mouse and keys

const canvas = $("canvas");
let drag = null;

canvas.addEventListener("pointerdown", (event) => {
  drag = { x: event.clientX, y: event.clientY, moved: false };
});
canvas.addEventListener("pointermove", (event) => {
  if (!drag || !event.buttons) return;
  const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
  if (!drag.moved && Math.hypot(dx, dy) < 4) return;
  view.x += dx;
  view.y += dy;
  drag = { x: event.clientX, y: event.clientY, moved: true };
  place();
});
canvas.addEventListener("click", (event) => {
  if (drag?.moved) return;
  const g = event.target.closest(".node");
  if (!g) return select([]);
  const node = nodes[g.dataset.id];
  const isTitle = event.target.getBoundingClientRect().top + HEADER * view.scale > event.clientY;
  select([node]);
  if (isBox(node) && (!node.open || isTitle)) toggle(node);
});
canvas.addEventListener(
  "wheel",
  (event) => {
    event.preventDefault();
    const { left, top } = canvas.getBoundingClientRect();
    zoom(Math.exp(-event.deltaY * 0.0015), event.clientX - left, event.clientY - top);
  },
  { passive: false },
);

/** Select the first input (up) or user (down) of the selected node, or its neighbour in the same box (left, right). */
function step(key) {
  const node = selected[0];
  if (!node) return go(shown(root.children[0]));
  let next;
  if (key === "ArrowUp") next = node.to[0]?.source;
  if (key === "ArrowDown") next = node.from[0]?.target;
  if (isBox(node) && node.kind !== "equation") {
    const parts = [...up(node).segments.values()];
    if (key === "ArrowUp") next = parts.find((part) => part.to === node && part.from)?.from;
    if (key === "ArrowDown") next = parts.find((part) => part.from === node && part.to)?.to;
  }
  if (key === "ArrowLeft" || key === "ArrowRight") {
    const row = up(node).children;
    next = row[row.indexOf(node) + (key === "ArrowLeft" ? -1 : 1)];
  }
  if (!next) return;
  select([shown(next)]);
  centre([next]);
}

const KEYS = {
  "/": () => $("search").focus(),
  "+": () => zoom(1.25),
  "=": () => zoom(1.25),
  "-": () => zoom(0.8),
  f: () => fit(),
  0: () => fit(),
  t: () => showTable($("table").hidden),
  Escape: () => select([]),
  Enter: () => selected[0] && toggle(selected[0]),
  " ": () => selected[0] && toggle(selected[0]),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const isTyping = /^(INPUT|SELECT)$/.test(event.target.tagName);
  if (event.target.id === "search") {
    if (event.key === "Enter") nextMatch(event.shiftKey ? -1 : 1);
    if (event.key === "Escape") canvas.focus();
  }
  if (isTyping || (event.target.tagName === "BUTTON" && /^(Enter| )$/.test(event.key))) return;
  const isArrow = event.key.startsWith("Arrow") && $("table").hidden;
  if (isArrow) step(event.key);
  else KEYS[event.key]?.();
  if (isArrow || event.key in KEYS) event.preventDefault();
});

$("search").addEventListener("input", (event) => search(event.target.value));
$("fold").addEventListener("click", () => {
  foldAll();
  draw();
  fit(LEGIBLE);
});
$("unfold").addEventListener("click", () => {
  unfold(OPEN_AT_MOST);
  draw();
  fit(LEGIBLE);
  const closed = [...drawn.keys()].some((id) => isBox(nodes[id]) && !nodes[id].open);
  if (closed) $("found").textContent = "too many to open all";
});
$("fit").addEventListener("click", () => fit());
$("as-table").addEventListener("click", () => showTable($("table").hidden));
$("measure").addEventListener("change", (event) => {
  setMeasure(event.target.value);
  drawLegend();
  draw();
});

// ------------------------------------------------------------------------------------------------ start

$("name").textContent = data.name;
$("totals").textContent =
  `${inCounts(equations.length)} equations · ${inCounts(root.FLOPs, "FLOP")} · ${inBytes(root.bytes)} moved`;
for (const name of MEASURES) {
  const option = new Option(
    name === "time" && !root.time ? "time (not measured)" : name,
    name,
    false,
    name === measure,
  );
  option.disabled = name === "time" && !root.time;
  $("measure").add(option);
}
setMeasure(measure);
for (const most of OPEN_AT_FIRST) {
  foldAll();
  unfold(most);
  layOut(root, false);
  if ($("canvas").clientWidth > (root.width * LEGIBLE) / 2) break;
}
draw();
fit(LEGIBLE);
drawLegend();
describe();
document.body.dataset.ready = Math.round(performance.now()); // milliseconds since the start of navigation
