// The script of the page (report.html). Sections: choices, runs, table, charts, curves, experts, settings and samples,
// files, refresh. A row is a run, or the runs of one setting when seeds are grouped.
"use strict";
const get = id => document.getElementById(id);
const make = (parent, tag, text = "") => {
  const node = document.createElement(tag);
  node.textContent = text;
  parent.append(node);
  return node;
};
const range = n => [...Array(n).keys()], sum = values => values.reduce((a, b) => a + b, 0);
const mean = values => sum(values) / values.length;
const deviation = values => Math.sqrt(sum(values.map(x => (x - mean(values)) ** 2)) / Math.max(1, values.length - 1));

// ---- choices of the reader, which outlive a refresh
let numbers, runs;
const hidden = new Set();  // names of the runs that are not ticked
let sorted = { column: null, descending: false };  // column: an index, -1 for the name, null for the order of the log
const filter = get("filter"), grouped = get("grouped");
const axis = get("axis"), smoothing = get("smoothing"), logarithmic = get("logarithmic");

// ---- runs: a row of the table and a curve for each, or for each group of seeds
function matches(run) {
  return filter.value.toLowerCase().split(/\s+/).every(word => run.text.includes(word));
}

function listRows() {  // of the runs that the filter passes
  const groups = new Map();
  for (const run of runs.filter(matches)) {
    const key = grouped.checked ? run.group : run.index;
    groups.set(key, [...(groups.get(key) ?? []), run]);
  }
  const rows = [...groups.values()].map(makeRow);
  if (sorted.column === null) return rows;
  const value = row => sorted.column < 0 ? row.name : row.values[sorted.column];
  const compare = (a, b) => typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
  const missing = row => value(row) === null;
  return rows.sort((a, b) => missing(a) - missing(b) ||
                             (missing(a) ? 0 : compare(value(a), value(b)) * (sorted.descending ? -1 : 1)));
}

function makeRow(members) {
  const [first] = members, ticked = members.filter(run => !hidden.has(run.name));
  const counted = ticked.length ? ticked : members;  // in the cells
  const columns = first.values.map((_, i) => counted.map(run => run.values[i]).filter(value => value !== null));
  const format = (values, i) => {
    if (!values.length) return "-";
    const [middle, around] = [mean(values), deviation(values)].map(value => formatted(numbers.columns[i][1], value));
    return deviation(values) ? `${middle} ± ${around}` : middle;
  };
  return { index: first.index, colour: first.colour, dash: first.dash, members, ticked,
           name: members.length > 1 ? `${first.name} (${counted.length} seeds)` : first.name,
           values: columns.map(values => values.length ? mean(values) : null),
           deviations: columns.map(values => values.length ? deviation(values) : null),
           cells: members.length > 1 ? columns.map(format) : first.cells };
}

function formatted(template, value) {  // template: {:,.2f} or {:.2%}
  const [, comma, digits, kind] = template.match(/^\{:(,?)\.(\d)([f%])\}$/);
  const how = { minimumFractionDigits: digits, maximumFractionDigits: digits, useGrouping: comma === "," };
  return (kind === "%" ? 100 * value : value).toLocaleString("en", how) + (kind === "%" ? "%" : "");
}

const shownRows = () => listRows().filter(row => row.ticked.length);
const shownRuns = () => runs.filter(run => matches(run) && !hidden.has(run.name));

// ---- table of runs
function drawTable() {
  const table = get("runs"), head = table.tHead;
  head.replaceChildren();
  const titles = ["run", ...numbers.columns.map(([title]) => title)], tr = make(head, "tr");
  for (const [i, title] of titles.entries()) {
    const th = make(tr, "th"), column = i - 1;
    if (sorted.column === column) th.setAttribute("aria-sort", sorted.descending ? "descending" : "ascending");
    make(th, "button", title).onclick = () => {
      sorted = { column, descending: sorted.column === column && !sorted.descending };
      drawTable();
    };
  }
  make(tr, "th", "files");
  table.tBodies[0].replaceChildren(...listRows().map(tableRow));
}

function tableRow(row) {
  const tr = document.createElement("tr"), box = document.createElement("input");
  const label = make(make(tr, "td"), "label");
  const dashes = row.dash === "solid" ? "" : `stroke-dasharray="${row.dash.replaceAll("px", "")}"`;
  label.innerHTML = `<svg class="swatch" viewBox="0 0 34 8"><path d="M0 4h34" stroke="${row.colour}" stroke-width="3"
                     ${dashes}/></svg>`;
  label.prepend(box);
  label.append(row.name);
  label.title = row.members.map(run => run.name).join(", ");
  Object.assign(box, { type: "checkbox", checked: row.ticked.length > 0 });
  box.oninput = () => {
    for (const run of row.members) hidden[box.checked ? "delete" : "add"](run.name);
    tr.classList.toggle("off", !box.checked);
    drawRest();
  };
  for (const cell of row.cells) make(tr, "td", cell);
  const files = make(tr, "td");
  for (const [name, path] of row.members.length > 1 ? [] : row.members[0].files)
    Object.assign(make(files, "a", name), { href: path }).insertAdjacentText("afterend", " ");
  tr.classList.toggle("off", !row.ticked.length);
  tr.dataset.index = row.index;
  tr.onmouseenter = () => highlight(row.index);
  tr.onmouseleave = () => highlight(null);
  return tr;
}

function highlight(index) {  // a row and its curves, or none
  const own = ["run", "low", "high"].map(part => `.trace${part}${index}`);
  get("highlight").textContent = index === null ? "" :
    `.scatterlayer .trace:not(${own.join(", ")}, [class*=level]) { opacity: 0.15 !important }
     .scatterlayer ${own[0]} .js-line { stroke-width: 3.5px !important }`;
  for (const tr of get("runs").tBodies[0].rows) tr.classList.toggle("lit", tr.dataset.index === String(index));
}

for (const [id, change] of [["all", "delete"], ["none", "add"]])
  get(id).onclick = () => { for (const run of runs.filter(matches)) hidden[change](run.name); draw(); };
for (const control of [filter, grouped]) control.addEventListener("input", draw);

// ---- charts
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function layout(title, more = {}) {
  const line = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"),
                 automargin: true };
  return { title: { text: title, font: { size: 14 }, x: 0.02, xanchor: "left", y: 0.96 },
           font: { color: colour("--text"), size: 11 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
           margin: { l: 50, r: 14, t: 36, b: 40 }, showlegend: false,
           modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--faint"), activecolor: colour("--text") },
           ...more, xaxis: { ...line, ...more.xaxis }, yaxis: { ...line, ...more.yaxis } };
}
const plot = (div, traces, how) =>
  Plotly.react(div, traces, how, { responsive: true, displaylogo: false, displayModeBar: "hover",
                                   modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]] });

// ---- curves
function smoothed(values, share) {  // exponential moving average, bias-corrected
  let total = 0, weight = 0;
  return values.map(value => {
    total = share * total + (1 - share) * value;
    weight = share * weight + (1 - share);
    return total / weight;
  });
}

function resampled(xs, ys, at) {  // linear between the points; xs and at ascend
  let i = 0;
  return at.map(x => {
    while (i < xs.length - 1 && xs[i] < x) i++;
    const share = i && xs[i] > x ? (xs[i] - x) / (xs[i] - xs[i - 1]) : 0;
    return share ? ys[i] + share * (ys[i - 1] - ys[i]) : ys[i];
  });
}

function curve(row, key) {  // of one run, or the mean of seeds at equal steps, to the end of the shortest; or null
  const share = key.startsWith("val/") ? 0 : +smoothing.value;  // an evaluation is an average already
  const seeds = row.ticked.map(run => run.parts.find(part => key in part.y)).filter(part => part?.x[axis.value])
    .map(part => ({ step: part.x.step, x: part.x[axis.value], y: smoothed(part.y[key], share) }));
  if (seeds.length < 2) return seeds.length ? { ...seeds[0], deviation: null } : null;
  const end = Math.min(...seeds.map(seed => seed.step.at(-1)));
  const longest = seeds.reduce((a, b) => b.step.length > a.step.length ? b : a);
  const step = longest.step.filter(step => step <= end);
  const [x, y] = ["x", "y"].map(name => seeds.map(seed => resampled(seed.step, seed[name], step)));
  const over = (columns, statistic) => range(step.length).map(i => statistic(columns.map(values => values[i])));
  return { step, x: over(x, mean), y: over(y, mean), deviation: over(y, deviation) };
}

function traces(row, key) {
  const line = curve(row, key);
  if (!line) return [];
  const few = line.y.length <= 30, style = { color: row.colour, dash: row.dash, width: 1.7 };
  const edge = (name, sign) => ({ x: line.x, y: line.y.map((y, i) => y + sign * line.deviation[i]),
                                  uid: name + row.index, name: `${row.name}, ${name}`, mode: "lines",
                                  line: { width: 0 }, hoverinfo: "skip" });
  const fill = { fill: "tonexty", fillcolor: row.colour + "2e" };
  const band = line.deviation ? [edge("low", -1), { ...edge("high", 1), ...fill }] : [];
  return [...band, { x: line.x, y: line.y, uid: `run${row.index}`, name: row.name, meta: row.index, line: style,
                     mode: few ? "lines+markers" : "lines", marker: { size: 5 }, customdata: line.deviation,
                     hovertemplate: "%{y:.5g}" + (line.deviation ? " ± %{customdata:.2g}" : "") +
                                    "<extra>%{fullData.name}</extra>" }];
}

function compressors(xs) {  // a level line for each value of gzip and xz
  const values = new Map();
  for (const [name, value] of shownRuns().flatMap(run => Object.entries(run.compressors)))
    if (value) values.set(`${name} ${value.toFixed(4)}`, value);
  const ends = xs.length ? [xs.reduce((a, b) => Math.min(a, b)), xs.reduce((a, b) => Math.max(a, b))] : [];
  return [...values].map(([name, value], i) => ({
    x: ends, y: ends.map(() => value), name, uid: `level${i}`, mode: "lines+text", text: ["", name],
    textposition: "top left", textfont: { color: colour("--faint") }, hoverinfo: "skip",
    line: { color: colour("--faint"), dash: "4px,3px", width: 1 } }));
}

function drawCurve(div) {
  const { key, title } = div.dataset, rows = shownRows(), lines = rows.flatMap(row => traces(row, key));
  if (key === "val/bpb") lines.push(...compressors(lines.flatMap(line => line.x)));
  const steep = /loss|bpb|^norm\//.test(key);
  plot(div, lines, layout(title, {
    hovermode: rows.length <= 8 ? "x unified" : "closest", xaxis: { title: { text: axis.selectedOptions[0].text } },
    yaxis: { type: logarithmic.checked && steep ? "log" : "linear" },
    uirevision: axis.value + logarithmic.checked }));  // while these stay, the zoom stays
  if (div.dataset.listens) return;
  div.dataset.listens = true;
  div.on("plotly_unhover", () => highlight(null));
  div.on("plotly_hover", ({ points, event }) => {  // of all runs at this x: the nearest to the pointer
    const y = event.clientY - div.getBoundingClientRect().top;
    const distance = point => Math.abs(point.yaxis.d2p(point.y) + point.yaxis._offset - y);
    const curves = points.filter(point => point.data.meta !== undefined);
    if (curves.length) highlight(curves.reduce((a, b) => distance(b) < distance(a) ? b : a).data.meta);
  });
}

function placeCharts(parent, list) {
  for (const [i, [key, title]] of list.entries()) {
    let div = [...parent.children].find(div => div.dataset.key === key);
    if (!div) {
      div = make(parent, "div");
      div.className = "chart";
      Object.assign(div.dataset, { key, title });
    }
    if (parent.children[i] !== div) parent.insertBefore(div, parent.children[i]);
  }
}

const openCharts = () => document.querySelectorAll("#curves .chart, details[open] .chart");
function drawCurves() {
  smoothing.parentNode.querySelector("output").textContent = smoothing.value;
  openCharts().forEach(drawCurve);
}
for (const control of [axis, smoothing, logarithmic]) control.addEventListener("input", drawCurves);
for (const id of ["norms", "others"]) get(id).addEventListener("toggle", drawCurves);

// ---- experts: load over time, coactivation
const which = get("which"), time = get("time"), layer = get("layer");
const chosenRun = () => runs.find(run => run.name === which.value);

function options(select, names) {  // keeps the chosen one
  const before = select.value;
  select.replaceChildren();
  for (const name of names) make(select, "option", name);
  if (names.map(String).includes(before)) select.value = before;
}

function drawExperts() {
  const routed = shownRuns().filter(run => run.load || run.coactivation);
  get("experts").hidden = !routed.length;
  options(which, routed.map(run => run.name));
  if (routed.length) chooseRun();
}

function chooseRun(event) {
  const run = chosenRun(), atEnd = event || +time.value >= +time.max;
  options(layer, range((run.load ? run.load.share[0] : run.coactivation).length));
  time.max = run.load ? run.load.step.length - 1 : 0;
  if (atEnd) time.value = time.max;
  drawMaps();
}

function drawMaps() {
  const run = chosenRun(), l = layer.selectedIndex;
  const axes = { xaxis: { title: { text: "expert" } }, yaxis: { title: { text: "MoE layer" } } };
  const map = { type: "heatmap", xgap: 1, ygap: 1 };
  const load = { ...map, colorscale: "RdBu", zmid: 1, zmin: 0, zmax: 2,
                 colorbar: { thickness: 10, tickformat: ".1f" } };
  time.parentNode.querySelector("output").textContent = run.load ? run.load.step[+time.value] : "";
  for (const id of ["load", "history"]) get(id).hidden = !run.load;
  get("coactivation").hidden = !run.coactivation;
  get("no_routes").textContent =
    run.coactivation ? "" : `No routes of this run are saved: ${run.how_to_get_routes}`;
  if (run.load) {
    const even = run.load.share[0][0].length;
    const share = run.load.share.map(layers => layers.map(experts => experts.map(x => x * even)));
    plot(get("load"), [{ ...load, z: share[+time.value],
                         hovertemplate: "layer %{y}, expert %{x}: %{z:.2f}<extra></extra>" }],
         layout("load over even load, at this step",
                { ...axes, yaxis: { ...axes.yaxis, tickvals: range(share[0].length) } }));
    const of_layer = range(even).map(e => share.map(layers => layers[l][e]));
    plot(get("history"), [{ ...load, xgap: 0, x: run.load.step, z: of_layer,
                            hovertemplate: "step %{x}, expert %{y}: %{z:.2f}<extra></extra>" }],
         layout(`the same over the steps, layer ${l}`,
                { xaxis: { title: { text: "steps" } }, yaxis: { title: { text: "expert" } } }));
  }
  if (run.coactivation)
    plot(get("coactivation"), [{ ...map, colorscale: "Viridis", z: run.coactivation[l],
                                 colorbar: { thickness: 10, tickformat: ".0%" },
                                 hovertemplate: "experts %{x} and %{y}: %{z:.1%}<extra></extra>" }],
         layout(`tokens routed to both, layer ${l}`,
                { ...axes, yaxis: { title: { text: "expert" }, scaleanchor: "x" } }));
}
which.addEventListener("input", chooseRun);
for (const control of [time, layer]) control.addEventListener("input", drawMaps);

// ---- settings and samples
function drawDifferences() {
  const shown = shownRuns(), section = get("differences"), table = section.querySelector("table");
  const rows = numbers.differences.map(([name, ...values]) => [name, ...shown.map(run => values[run.index])])
    .filter(([, ...values]) => new Set(values).size > 1);
  section.hidden = !rows.length;
  const fill = (part, tag, rows) => part.replaceChildren(...rows.map(cells => {
    const tr = document.createElement("tr");
    for (const cell of cells) make(tr, tag, cell);
    return tr;
  }));
  fill(table.tHead, "th", [["", ...shown.map(run => run.name)]]);
  fill(table.tBodies[0], "td", rows);
}

function drawSamples() {
  const written = shownRuns().filter(run => run.sample), section = get("samples"), texts = section.querySelector("div");
  section.hidden = !written.length;
  texts.replaceChildren();
  for (const run of written) {
    make(texts, "p", run.name);
    make(texts, "pre", run.sample);
  }
}

// ---- files of what is shown
function download(name, rows) {
  const quoted = cell => /[",\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell;
  const text = rows.map(cells => cells.map(cell => quoted(String(cell ?? ""))).join(",") + "\n").join("");
  const link = document.createElement("a");
  Object.assign(link, { download: name, href: URL.createObjectURL(new Blob([text], { type: "text/csv" })) });
  link.click();
}

get("table_csv").onclick = () => {
  const titles = numbers.columns.flatMap(([title]) => [title, `${title}, standard deviation`]);
  download("runs.csv", [["run", "seeds", ...titles], ...shownRows().map(row =>
    [row.name, row.ticked.length, ...row.values.flatMap((value, i) => [value, row.deviations[i]])])]);
};
get("curves_csv").onclick = () => {
  const rows = [...openCharts()].flatMap(({ dataset: { key } }) => shownRows().flatMap(row => {
    const line = curve(row, key);
    return line ? line.x.map((x, i) => [row.name, key, x, line.y[i], line.deviation?.[i]]) : [];
  }));
  download("curves.csv", [["run", "metric", axis.value, "value", "standard deviation"], ...rows]);
};

// ---- refresh: at the start, when light turns to dark, and while runs go on
function drawRest() { drawCurves(); drawExperts(); drawDifferences(); drawSamples(); }
function draw() { drawTable(); drawRest(); }

function refresh(data) {
  if (data.written === numbers?.written) return;
  numbers = data;
  runs = data.runs;
  for (const [index, run] of runs.entries()) {
    const settings = data.differences.map(([name, ...values]) => `${name}=${values[index]}`);
    Object.assign(run, { index, text: [run.name, ...settings].join("\n").toLowerCase() });
  }
  get("about").textContent = data.about;
  get("live").hidden = !data.live;
  placeCharts(get("curves"), data.curves);
  for (const id of ["norms", "others"]) {
    placeCharts(get(id).querySelector(".grid"), data[id]);
    get(id).hidden = !data[id].length;
  }
  draw();
}

let dragging = false;  // a refresh would end it
addEventListener("pointerdown", () => { dragging = true; }, true);
for (const name of ["pointerup", "pointercancel"]) addEventListener(name, () => { dragging = false; }, true);

function poll() {  // a script, because a page opened from a disk may read no other file
  const script = document.createElement("script"), { file, seconds } = numbers.live;
  const done = () => { script.remove(); if (numbers.live) setTimeout(poll, 1000 * seconds); };
  script.src = `${file}?${Date.now()}`;
  script.onload = script.onerror = done;
  if (dragging) done();
  else document.head.append(script);
}

refresh(JSON.parse(get("numbers").textContent));
if (numbers.live) poll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
