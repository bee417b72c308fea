"use strict";
// All text of models, data and configs goes through textContent: it is never parsed as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const MINUS = "\u2212";

function make(tag, settings = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(settings)) {
    if (name === "text") element.textContent = value;
    else if (name === "color") element.style.background = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function draw(parent, tag, settings, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(settings)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function figures(value, digits = 3) {
  if (value === undefined || value === null || !isFinite(value)) return "";
  const size = Math.abs(value);
  const text = value === 0 ? "0"
    : size >= 1e6 || size < 1e-4 ? value.toExponential(digits - 1)
    : size >= 1000 ? Math.round(value).toLocaleString("en")
    : String(Number(value.toPrecision(digits)));
  return text.replace("-", MINUS);
}

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let place = 0;
  while (value >= 1024 && place < units.length - 1) { value /= 1024; place += 1; }
  return `${figures(value)} ${units[place]}`;
}

const color = (place) => `var(--c${place % 8})`;
const armIndex = data.runs.map((_, run) => data.arms.findIndex((arm) => arm.runs.includes(run)));
let weight = 0.6;

// Curves ------------------------------------------------------------------------------------------

function smoothed(values) {  // exponential moving average with bias correction, as in Adam
  let sum = 0, total = 0;
  return values.map((value) => {
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return sum / total;
  });
}

function band(arm, metric) {  // mean and range over the runs of an arm, at each x that all of them have
  const curves = arm.runs.map((run) => data.curves[run][metric]).filter(Boolean);
  if (!curves.length) return null;
  const maps = curves.map((curve) => {
    const values = smoothed(curve.y);
    return new Map(curve.x.map((x, i) => [x, values[i]]));
  });
  const x = curves[0].x.filter((place) => maps.every((map) => map.has(place)));
  const all = x.map((place) => maps.map((map) => map.get(place)));
  return {
    x, curves,
    mean: all.map((values) => values.reduce((a, b) => a + b, 0) / values.length),
    low: all.map((values) => Math.min(...values)),
    high: all.map((values) => Math.max(...values)),
  };
}

function ticks(low, high, number) {
  const rough = (high - low) / number, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((s) => s * power).find((s) => s >= rough) || rough;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) found.push(i * step);
  return found;
}

function range(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) { if (value < low) low = value; if (value > high) high = value; }
  if (!isFinite(low)) return [0, 1];
  if (low === 0 && high === 0) return [0, 1];
  if (low === high) { const margin = Math.abs(low) * 0.1 || 1; return [low - margin, high + margin]; }
  const margin = (high - low) * 0.05;
  return [low - margin, high + margin];
}

const figureWidth = (figure) => Math.max(260, Math.round(figure.clientWidth) - 26 || 340);

function plane(figure, width, xs, ys, height, axis) {
  const left = 48, right = 10, top = 8, bottom = 32;
  const svg = draw(figure, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  const [x0, x1] = xs, [y0, y1] = ys;
  const X = (x) => left + (x - x0) / (x1 - x0) * (width - left - right);
  const Y = (y) => height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom);
  for (const y of ticks(y0, y1, 4)) {
    draw(svg, "line", { class: "axis", x1: left, x2: width - right, y1: Y(y), y2: Y(y) });
    draw(svg, "text", { x: left - 6, y: Y(y) + 4, "text-anchor": "end" }, figures(y));
  }
  for (const x of ticks(x0, x1, width > 500 ? 8 : 5)) {
    draw(svg, "text", { x: X(x), y: height - bottom + 15, "text-anchor": "middle" }, figures(x));
  }
  draw(svg, "text", { x: width - right, y: height - 3, "text-anchor": "end" }, axis);
  const toX = (place) => x0 + (place * width - left) / (width - left - right) * (x1 - x0);
  return { svg, X, Y, toX, top, bottom: height - bottom };
}

const line = (x, y, on) => x.map((place, i) => `${i ? "L" : "M"}${on.X(place).toFixed(1)} ${on.Y(y[i]).toFixed(1)}`).join("");
const area = (x, low, high, on) => line(x, high, on) + line([...x].reverse(), [...low].reverse(), on).replace("M", "L") + "Z";

function panels(place, metrics) {  // all frames first, so that the browser computes the layout once
  const frames = metrics.map(({ title, unit, metric }) => {
    const reading = make("span", { class: "reading" });
    const caption = make("figcaption", {}, make("h3", { text: title }), make("span", { text: unit }), reading);
    return { title, metric, reading, figure: make("figure", { "data-metric": metric }, caption) };
  });
  place.replaceChildren(...frames.map((frame) => frame.figure));
  const width = frames.length ? figureWidth(frames[0].figure) : 0;
  for (const frame of frames) panel(frame, width);
}

function panel({ title, metric, reading, figure }, width) {
  const arms = data.arms.map((arm, number) => ({ number, name: arm.name, ...band(arm, metric) })).filter((arm) => arm.x && arm.x.length);
  const single = arms.every((arm) => arm.curves.length === 1);
  const raw = (arm) => arm.curves.flatMap((curve) => single ? [...(curve.lo || curve.y), ...(curve.hi || curve.y)] : []);
  const xs = arms.flatMap((arm) => arm.x);
  const few = xs.length && xs.length === arms.length;
  const span = range([0, ...xs, ...data.runs.map((run) => run.last)]);  // one x axis for all panels
  const on = plane(figure, width, span, range(arms.flatMap((arm) => [...arm.low, ...arm.high, ...raw(arm)])), 190, data.axis);
  on.svg.setAttribute("aria-label", `${title}: ${arms.map((arm) => `${arm.name} ends at ${figures(arm.mean.at(-1))}`).join(", ")}`);
  for (const arm of arms) {
    const ink = color(arm.number);
    for (const curve of arm.curves) {
      if (single && curve.lo) draw(on.svg, "path", { d: area(curve.x, curve.lo, curve.hi, on), fill: ink, opacity: 0.13 });
      else if (single && weight > 0) draw(on.svg, "path", { d: line(curve.x, curve.y, on), fill: "none", stroke: ink, opacity: 0.28 });
    }
    if (arm.curves.length > 1) draw(on.svg, "path", { d: area(arm.x, arm.low, arm.high, on), fill: ink, opacity: 0.2 });
    draw(on.svg, "path", { d: line(arm.x, arm.mean, on), fill: "none", stroke: ink, "stroke-width": 1.8, "stroke-linejoin": "round" });
    if (few || arm.x.length < 12) arm.x.forEach((x, i) => draw(on.svg, "circle", { cx: on.X(x), cy: on.Y(arm.mean[i]), r: 2.6, fill: ink }));
  }
  follow(on, arms, reading);
}

function follow(on, arms, reading) {
  const showValues = (words) => reading.replaceChildren(...arms.map((arm, i) => make("span", { class: "key", title: arm.name }, make("i", { color: color(arm.number) }), words(arm, i))));
  const most = Math.max(...arms.flatMap((arm) => arm.mean.map(Math.abs)));
  const plain = (value) => figures(Math.abs(value) < 1e-5 * most ? 0 : value);  // an exponential mean never reaches 0
  const rest = () => showValues((arm) => arm.mean.length < 2 ? plain(arm.mean[0]) : `${plain(arm.mean[0])} \u2192 ${plain(arm.mean.at(-1))}`);
  const ruler = draw(on.svg, "line", { class: "axis", y1: on.top, y2: on.bottom, visibility: "hidden" });
  on.svg.addEventListener("pointermove", (event) => {
    const box = on.svg.getBoundingClientRect(), x = on.toX((event.clientX - box.left) / box.width);
    showValues((arm) => {
      const i = arm.x.reduce((best, place, j) => Math.abs(place - x) < Math.abs(arm.x[best] - x) ? j : best, 0);
      const spread = arm.curves.length > 1 ? ` (${figures(arm.low[i])} to ${figures(arm.high[i])})` : "";
      ruler.setAttribute("x1", on.X(arm.x[i])); ruler.setAttribute("x2", on.X(arm.x[i]));
      return `${figures(arm.x[i], 5)}: ${figures(arm.mean[i], 4)}${spread}`;
    });
    ruler.setAttribute("visibility", "visible");
  });
  on.svg.addEventListener("pointerleave", () => { ruler.setAttribute("visibility", "hidden"); rest(); });
  rest();
}

function curves() {
  at("smoothing-value").textContent = weight.toFixed(2);
  panels(at("panels"), data.panels);
  panels(at("rest"), at("more").open ? data.rest : []);
  frontier();
}

// Frontier ----------------------------------------------------------------------------------------

function frontier() {
  const both = data.curves.map((each) => each.reward && each["kl/per_response_k1"]);
  at("s-frontier").hidden = !both.some(Boolean);
  at("frontier").replaceChildren();
  if (at("s-frontier").hidden) return;
  const clouds = data.runs.map((_, run) => {
    if (!both[run]) return null;
    const { reward, "kl/per_response_k1": kl } = data.curves[run];
    const scores = new Map(smoothed(reward.y).map((value, i) => [reward.x[i], value])), nats = smoothed(kl.y);
    return kl.x.map((x, i) => ({ x: nats[i], y: scores.get(x) })).filter((point) => point.y !== undefined);
  });
  const points = clouds.flatMap((cloud) => cloud || []);
  const figure = make("figure", {});
  at("frontier").append(figure);
  const on = plane(figure, figureWidth(figure), range(points.map((p) => p.x)), range(points.map((p) => p.y)), 320, "KL to the reference, nats per response");
  on.svg.setAttribute("aria-label", "Reward over KL to the reference, one point per rollout");
  clouds.forEach((cloud, run) => (cloud || []).forEach((p, i) => draw(on.svg, "circle", {
    cx: on.X(p.x).toFixed(1), cy: on.Y(p.y).toFixed(1), r: 2.4, fill: color(armIndex[run]), opacity: (0.12 + 0.5 * i / cloud.length).toFixed(2),
  })));
  data.arms.forEach((arm, number) => {
    const sorted = arm.runs.flatMap((run) => clouds[run] || []).sort((a, b) => a.x - b.x);
    let best = -Infinity, d = "";
    for (const p of sorted) {
      if (p.y <= best) continue;
      d += d ? `H${on.X(p.x).toFixed(1)}V${on.Y(p.y).toFixed(1)}` : `M${on.X(p.x).toFixed(1)} ${on.Y(p.y).toFixed(1)}`;
      best = p.y;
    }
    if (d) draw(on.svg, "path", { d: `${d}H${on.X(sorted.at(-1).x).toFixed(1)}`, fill: "none", stroke: color(number), "stroke-width": 1.8 });
  });
}

// Tables ------------------------------------------------------------------------------------------

const row = (cells, tag = "td") => make("tr", {}, ...cells.map((cell) => cell instanceof Node ? cell : make(tag, { text: cell })));

function summary() {
  const many = data.runs.length > 1;
  at("title").textContent = data.arms.map((arm) => arm.name).join(" \u00b7 ");
  document.title = `${at("title").textContent} \u2013 lit_align`;
  at("about").textContent = `${many ? `${data.runs.length} runs` : data.runs[0].path}, lit_align ${data.version}`;
  const shown = data.panels.slice(0, 5);
  at("summary").append(row(["run", "algorithm", "seed", data.axis, ...shown.map((each) => each.title)], "th"));
  data.runs.forEach((run, number) => {
    const tenth = (values) => {  // means of the first and of the last tenth
      const n = Math.max(1, Math.floor(values.length / 10)), mean = (part) => part.reduce((a, b) => a + b, 0) / part.length;
      return values.length < 2 ? figures(values[0]) : `${figures(mean(values.slice(0, n)))} \u2192 ${figures(mean(values.slice(-n)))}`;
    };
    const key = make("span", { class: "key" }, make("i", { color: color(armIndex[number]) }), run.name);
    const cells = shown.map(({ metric }) => make("td", { class: "number", text: data.curves[number][metric] ? tenth(data.curves[number][metric].y) : "" }));
    at("summary").append(row([make("td", { class: "text" }, key), run.algorithm, run.seed, make("td", { class: "number", text: figures(Number(run.last), 6) }), ...cells]));
  });
  const seeds = data.arms.some((arm) => arm.runs.length > 1);
  at("reading").textContent = `The table shows the means of the first and of the last tenth of each run. ${seeds ? "Runs that differ only in the seed are one line, their mean, with a band, their range." : "Faint lines are logged values without smoothing. A shade is the range of the values that a point replaces."}`;
  data.notes.forEach((note) => at("notes").append(make("p", { text: note })));
}

const PARTS = ["parameters", "optimizer_state", "gradients", "other"];

function bars(title, unit, rows, show, ink) {  // rows: [name, [[part, size], ...]]; ink: first color
  const figure = make("figure", {}, make("figcaption", {}, make("h3", { text: title }), make("span", { text: unit })));
  at("phases").append(figure);
  const names = [...new Set(rows.flatMap(([, parts]) => parts.map(([name]) => name)))];
  if (names.length > 1) figure.append(make("p", { class: "keys" }, ...names.map((name, i) => make("span", { class: "key" }, make("i", { color: color(ink + i) }), name.replace("_", " ")))));
  const width = figureWidth(figure), left = 74, right = 82;
  const most = Math.max(...rows.map(([, parts]) => parts.reduce((sum, [, size]) => sum + size, 0))) || 1;
  const svg = draw(figure, "svg", { viewBox: `0 0 ${width} ${rows.length * 26}`, role: "img", "aria-label": `${title}: ${rows.map(([name, parts]) => `${name} ${show(parts.reduce((sum, [, size]) => sum + size, 0))}`).join(", ")}` });
  rows.forEach(([name, parts], i) => {
    let x = left;
    draw(svg, "text", { x: left - 8, y: i * 26 + 17, "text-anchor": "end" }, name);
    for (const [part, size] of parts) {
      const wide = size / most * (width - left - right);
      draw(svg, "rect", { x, y: i * 26 + 4, width: Math.max(0, wide), height: 18, fill: color(ink + names.indexOf(part)) });
      x += wide;
    }
    draw(svg, "text", { x: x + 6, y: i * 26 + 17 }, show(parts.reduce((sum, [, size]) => sum + size, 0)));
  });
}

function phases() {
  at("phases").replaceChildren();
  at("phases").className = "grid";
  data.runs.forEach((run, number) => {
    const suffix = data.runs.length > 1 ? `, ${run.name}` : "";
    const memory = Object.entries(run.memory).map(([phase, sizes]) => [phase, PARTS.map((part) => [part, sizes[part] || 0])]);
    const seconds = Object.entries(run.seconds).map(([phase, value]) => [phase, [["seconds", value]]]);
    if (memory.length) bars(`Memory${suffix}`, "largest peak of a phase", memory, bytes, 2);
    if (seconds.length) bars(`Time${suffix}`, "mean seconds per rollout", seconds, (value) => `${figures(value)} s`, armIndex[number]);
  });
  at("s-phases").hidden = !at("phases").children.length;
}

function settings() {
  const all = at("all-settings").checked, many = data.runs.length > 1;
  const rows = data.config.filter((each) => all || !many || each.differs);
  at("config").replaceChildren(row(["setting", ...data.runs.map((run) => run.name)], "th"));
  rows.forEach(({ name, values, differs }) => {
    const found = row([name, ...values.map((value) => make("td", { class: "text", text: value }))]);
    if (differs && all && many) found.className = "differs";
    at("config").append(found);
  });
  if (!rows.length) at("config").append(row(["All settings are equal."]));
  at("s-config").hidden = !data.config.length;
}

// Completions -------------------------------------------------------------------------------------

const ORDERS = { "worst first": (a, b) => a.low - b.low, "best first": (a, b) => b.high - a.high,
  "largest gain first": (a, b) => b.gain - a.gain, "as logged": (a, b) => a.place - b.place };
const PAGE = 12;  // prompts that one click on "Show more" adds
const MARKS = { truncated: "cut off", stored: "offline response" };
const moments = new Map();  // stages (rollout, validation, predictions) by run and prompt
for (const { r, p, t } of data.answers) moments.set(`${r} ${p}`, (moments.get(`${r} ${p}`) || new Set()).add(t));
const repeatedPrompts = new Set([...moments].filter(([, when]) => when.size > 1).map(([key]) => Number(key.split(" ")[1])));
let limit = PAGE;

function cards() {
  const words = at("find").value.trim().toLowerCase(), run = at("which-run").value, moment = at("which-moment").value;
  const groups = new Map();
  for (const response of data.answers) {
    if (at("again").checked && !repeatedPrompts.has(response.p)) continue;
    if (run !== "" && response.r !== Number(run)) continue;
    if (moment !== "" && response.t !== moment) continue;
    if (words && !data.prompts[response.p].toLowerCase().includes(words) && !response.c.toLowerCase().includes(words)) continue;
    if (groups.has(response.p)) groups.get(response.p).push(response); else groups.set(response.p, [response]);
  }
  const found = [...groups.entries()].map(([prompt, responses]) => {
    const ordered = responses.sort((a, b) => a.r - b.r || a.o - b.o), scores = ordered.filter((a) => a.s !== undefined).map((a) => a.s);
    const several = scores.length > 1;
    return { prompt, responses: ordered, place: prompt, low: Math.min(...scores), high: Math.max(...scores), gain: several ? scores.at(-1) - scores[0] : -1e9 };
  }).sort(ORDERS[at("order").value]);
  at("counted").textContent = `${found.length.toLocaleString("en")} prompts, ${found.reduce((sum, each) => sum + each.responses.length, 0).toLocaleString("en")} responses`;
  at("cards").replaceChildren(...found.slice(0, limit).map(card));
  at("more-cards").hidden = found.length <= limit;
}

function ends(responses) {  // the first two and the last two responses of each run to one prompt
  return data.runs.flatMap((_, run) => {
    const mine = responses.filter((response) => response.r === run);
    return mine.length <= 4 ? mine : [...mine.slice(0, 2), ...mine.slice(-2)];
  });
}

function card({ prompt, responses }) {
  const kept = ends(responses);
  const sides = kept.map((response) => {
    const about = make("div", { class: "about" });
    if (response.s !== undefined) about.append("reward ", make("b", { text: figures(response.s) }), " \u00b7 ");
    const facts = [response.t, data.runs.length > 1 ? data.runs[response.r].name : "", response.n === undefined ? "" : `${response.n} tokens`,
      response.k === undefined ? "" : `KL ${figures(response.k)} nats`, ...response.m.map((mark) => MARKS[mark] || mark)];
    about.append(facts.filter(Boolean).join(" \u00b7 "));
    const side = make("div", { class: "side" }, about, make("p", { text: response.c || "(empty)" }));
    side.style.borderColor = color(armIndex[response.r]);
    return side;
  });
  const lines = data.runs.map((_, run) => make("div", { class: "sides" }, ...sides.filter((_, i) => kept[i].r === run))).filter((line) => line.children.length);
  const found = make("article", { class: "card" }, make("p", { class: "prompt", text: data.prompts[prompt] }), ...lines);
  if (kept.length < responses.length) found.append(make("p", { class: "note", text: `${responses.length - kept.length} responses in between are not shown` }));
  return found;
}

function choices(id, pairs) {
  at(id).append(...pairs.map(([value, text]) => make("option", { value, text })));
}

function start() {
  summary();
  choices("which-run", [["", "all"], ...data.runs.map((run, i) => [String(i), run.name])]);
  const times = [...new Set([...data.answers].sort((a, b) => a.o - b.o).map((response) => response.t))];
  choices("which-moment", [["", "all"], ...times.map((time) => [time, time])]);
  at("again").checked = repeatedPrompts.size > 0;
  at("again-label").hidden = !repeatedPrompts.size;
  choices("order", Object.keys(ORDERS).map((name) => [name, name]));
  at("s-answers").hidden = !data.answers.length;
  at("more").hidden = !data.rest.length;
  const redraw = () => { curves(); phases(); };
  redraw(); settings(); cards();
  at("smoothing").addEventListener("input", (event) => { weight = Number(event.target.value); curves(); });
  at("more").addEventListener("toggle", () => { if (at("more").open) curves(); });
  at("all-settings").addEventListener("change", settings);
  for (const id of ["find", "which-run", "which-moment", "order", "again"]) at(id).addEventListener("input", () => { limit = PAGE; cards(); });
  at("more-cards").addEventListener("click", () => { limit += PAGE; cards(); });
  let width = window.innerWidth;
  window.addEventListener("resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; redraw(); } });
}

start();
