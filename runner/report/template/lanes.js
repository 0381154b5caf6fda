// A lane for each run: its checkpoints along the steps, and its seconds along the clock. Few shapes, however many runs.
const TITLE = { progress: "training that stands", eval: "evaluating", save: "saving", data: "waiting for data", lost: "done again",
  import: "starting Python", startup: "start-up", restore: "restoring", compile: "compiling", profile: "tracing steps", finish: "finishing", other: "not written down", down: "down" };
const BEFORE = ["import", "startup", "restore", "compile"];
const SEQUENCE = [...BEFORE, "progress", "data", "eval", "save", "lost", "other", "profile", "finish"];

// The frame that both kinds share: names, an axis, a band under the run that is picked. Gives x(value) and y(row).
function frame(section, most, named) {
  const box = section.querySelector(".lanes"), order = drawn();
  const isNarrow = box.clientWidth < 640, single = runs.length === 1;
  const step = isNarrow && !single ? 40 : 24, right = 14, high = order.length * step;
  const svg = made(null, "svg", { width: 1, height: high + 2, role: "img", "aria-label": section.querySelector("h2").textContent });
  const axis = made(null, "svg", { width: 1, height: 24, class: "axis" }); // it stays in sight where the lanes scroll
  box.replaceChildren(svg, axis);
  const width = box.clientWidth; // once its height has decided whether it scrolls
  for (const each of [svg, axis]) each.setAttribute("width", width);
  const left = isNarrow || single ? 6 : Math.min(Math.max(...order.map((index) => runs[index].name.length), 4) * 7.2 + 24, width * 0.34);
  const x = (value) => left + (value / (most || 1)) * (width - left - right);
  const y = (row) => row * step + (isNarrow && !single ? 29 : 13);
  const grid = ticks(0, most, isNarrow ? 3 : 6);
  const picked = order.indexOf(view.picked);
  if (picked >= 0 && !single) made(svg, "rect", { class: "band", x: 0, y: picked * step, width, height: step });
  made(svg, "path", { class: "grid", d: grid.map((value) => `M${Math.round(x(value))} 0V${high}`).join("") });
  for (const value of grid) {
    const last = x(value) > width - 34;
    made(axis, "text", { x: last ? width - right : x(value), y: 16, "text-anchor": last ? "end" : x(value) < 20 ? "start" : "middle" }, named(value));
  }
  if (!single) order.forEach((index, row) => {
    const room = Math.floor((isNarrow ? width : left - 14) / 7), name = runs[index].name;
    const label = made(svg, "text", { class: "name", x: isNarrow ? 2 : left - 14, y: row * step + (isNarrow ? 15 : 17), "text-anchor": isNarrow ? "start" : "end" },
      name.length > room ? `${name.slice(0, room - 1)}…` : name);
    label.addEventListener("click", () => pick(index, { scroll: true }));
  });
  return { svg, x, y, order, row: (event) => Math.floor((event.clientY - svg.getBoundingClientRect().top) / step),
    along: (event) => event.clientX - svg.getBoundingClientRect().left };
}

function drawSaves() {
  const section = document.getElementById("saves");
  section.hidden = !runs.some((run) => run.saves.length);
  if (section.hidden) return;
  const most = Math.max(...runs.map((run) => Math.max(run.step, run.steps ?? 0, ...run.saves.map((save) => save[0]))));
  const lanes = frame(section, most, (step) => number(step) + (step === 0 ? " steps" : ""));
  const shapes = { rail: "", again: "", gone: "", kept: "", best: "", halo: "", stop: "" };
  lanes.order.forEach((index, row) => {
    const run = runs[index], y = lanes.y(row);
    shapes.rail += `M${lanes.x(0)} ${y}H${lanes.x(run.step)}`;
    for (const [from, to] of again(run)) shapes.again += `M${lanes.x(from)} ${y}H${lanes.x(to)}`;
    for (const [step, , kept, , , isBest] of run.saves) {
      const x = lanes.x(step);
      if (isBest) shapes.best += `M${x} ${y - 7}l7 7-7 7-7-7Z`;
      else shapes[kept === null ? "gone" : "kept"] += disc(x, y, kept === null ? 3.2 : 5);
    }
    for (const span of interruptions(run)) shapes.stop += cross(lanes.x(span[5]), y, 4);
  });
  shapes.halo = shapes.stop;
  for (const [name, d] of Object.entries(shapes)) if (d) made(lanes.svg, "path", { class: name, d });
  listen(lanes, aboutSave);
}

const disc = (x, y, r) => `M${(x - r).toFixed(1)} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`;
const interruptions = (run) => run.spans.filter((span) => facts.interrupted.includes(span[3]) && span[4] !== null);

// Stretches of steps that were done, lost and done again.
function again(run) {
  return run.spans.filter((span) => span[6] > 0 && span[4] !== null).map((span) => [Math.max(span[5] - span[6], 0), span[5]]);
}

function aboutSave(lanes, index, x) {
  const run = runs[index];
  let words = "", least = 10;
  for (const [step, reason, kept, size, score, isBest] of run.saves) {
    if (Math.abs(lanes.x(step) - x) >= least) continue;
    least = Math.abs(lanes.x(step) - x);
    const stands = kept === null ? "deleted since" : `kept: ${facts.words[kept]}`;
    words = `step ${number(step)}${size ? `, ${bytes(size)}` : ""}\nsaved: ${facts.words[reason]}\n${isBest ? "the best; " : ""}${stands}`;
    if (score !== null) words += `\n${run.metric} ${short(score)}`;
  }
  for (const span of interruptions(run)) {
    if (Math.abs(lanes.x(span[5]) - x) >= least - 3) continue;
    least = Math.abs(lanes.x(span[5]) - x);
    words = `${facts.words[span[2]]} at step ${number(span[5])}${span[6] ? `\n${plural(span[6], "step")} done again` : ""}`;
  }
  return words;
}

function drawTime() {
  const section = document.getElementById("time");
  section.hidden = !runs.some((run) => run.spans.length);
  if (section.hidden) return;
  const most = Math.max(...runs.map((run) => run.spans.at(-1)?.[8] ?? 0));
  const unit = [[864e5, "d"], [36e5, "h"], [6e4, "min"], [1e3, "s"]].find(([size]) => most >= 2 * size) ?? [1e3, "s"];
  const lanes = frame(section, most / unit[0], (value) => `${Number(value.toFixed(2))} ${unit[1]}`);
  const shapes = Object.fromEntries([...SEQUENCE, "rest", "halo", "stop"].map((name) => [name, ""]));
  const place = (milliseconds) => lanes.x(milliseconds / unit[0]);
  lanes.order.forEach((index, row) => {
    const y = lanes.y(row);
    for (const { name, from, to } of pieces(runs[index])) {
      if (name === "down") shapes.rest += `M${place(from)} ${y}H${place(to)}`;
      else if (place(to) - place(from) > 0.05) shapes[name] += `M${place(from).toFixed(2)} ${y - 7}H${place(to).toFixed(2)}v14H${place(from).toFixed(2)}Z`;
    }
    for (const span of runs[index].spans) if (facts.interrupted.includes(span[3])) shapes.stop += cross(place(span[8]), y, 4);
  });
  shapes.halo = shapes.stop;
  for (const [name, d] of Object.entries(shapes)) {
    if (d) made(lanes.svg, "path", SEQUENCE.includes(name) ? { d, style: `fill:var(--${name})` } : { d, class: name });
  }
  listen(lanes, (_, index, x) => aboutTime(place, index, x));
  nameColours(section);
}

// What a run did when, one bucket after the other within an attempt: in the order in which they begin.
function pieces(run) {
  const found = [];
  let before = 0;
  for (const span of run.spans) {
    if (span[7] > before) found.push({ name: "down", from: before, to: span[7], span });
    let from = span[7];
    for (const name of SEQUENCE) {
      const length = span[9][facts.buckets.indexOf(name)];
      if (length) found.push({ name, from, to: (from += length), span });
    }
    before = span[8];
  }
  return found;
}

function aboutTime(place, index, x) {
  const piece = pieces(runs[index]).find(({ from, to }) => x >= place(from) && x < Math.max(place(to), place(from) + 1));
  if (!piece) return "";
  const { name, from, to, span } = piece;
  return `${TITLE[name]} ${clock(to - from)}\n` + (name === "down" ? `before attempt ${span[0]}` : `attempt ${span[0]}, ${facts.words[span[2]]}`);
}

function nameColours(section) {
  const sums = new Map();
  for (const index of view.order.filter(matches)) for (const { name, from, to } of pieces(runs[index])) sums.set(name, (sums.get(name) ?? 0) + to - from);
  const total = [...sums.values()].reduce((a, b) => a + b, 0);
  const list = section.querySelector(".legend");
  list.replaceChildren();
  for (const name of [...SEQUENCE, "down"]) {
    if (!((sums.get(name) ?? 0) >= facts.seen)) continue;
    const item = made(list, "li");
    made(item, "span", { class: `swatch ${name}` }).style.background = `var(--${name})`;
    item.append(`${TITLE[name]} ${(100 * sums.get(name) / total).toFixed(1)} %`);
  }
}

function listen(lanes, about) {
  const over = (event) => {
    const index = lanes.order[lanes.row(event)];
    const words = index === undefined ? "" : about(lanes, index, lanes.along(event));
    tell(event, words && runs.length > 1 ? `${runs[index].name}\n${words}` : words);
  };
  pointed(lanes.svg, over, () => tell(null, ""));
}
