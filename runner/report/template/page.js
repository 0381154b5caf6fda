"use strict";
// What all parts of the page share: the facts, what is looked at, and how an element is made.
const facts = JSON.parse(document.getElementById("facts").textContent);
const EMPTY = { curves: [], spans: [], saves: [], profiles: [], undrawn: 0, command: [], steps: null };
const runs = facts.runs.map((values) => {
  const run = { ...EMPTY };
  values.forEach((value, place) => (run[facts.fields[place]] = value));
  for (const name of ["state", "why", "metric"]) run[name] = facts.words[run[name]];
  run.command = run.command.length ? `python run.py ${run.command.map((word) => facts.words[word]).join(" ")}` : "";
  run.href ??= `${facts.base}/${encodeURIComponent(run.path)}`;
  return run;
});
// Texts that many runs have alike are written once.
const textAt = (column, index) => (column.of ? column.of[column.at[index]] : column.texts[index]);
const MANY = 30; // more curves than this are drawn thin
const view = { order: runs.map((_, index) => index), colour: "", off: new Set(), words: [], picked: -1, room: facts.drawn ?? Infinity };
const tip = document.getElementById("tip");

// Text is only ever set as text: a name from a disk is no markup.
function made(parent, name, attributes = {}, words = null) {
  const inside = name === "svg" || parent?.namespaceURI === "http://www.w3.org/2000/svg";
  const element = inside ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (words !== null) element.textContent = words;
  parent?.append(element);
  return element;
}

const matches = (index) => view.words.every((word) => haystack(index).includes(word));
// Of many runs the first ones are drawn, in the order of the table: no eye can tell ten thousand apart.
const drawn = () => (view.order.length > view.room || view.words.length ? view.order.filter(matches).slice(0, view.room) : view.order);
const isShown = (index) => matches(index) && !view.off.has(colourValue(index));
const haystacks = [];
function haystack(index) {
  const run = runs[index];
  return (haystacks[index] ??= [run.name, run.path, run.state, run.why, ...facts.keys.map((each) => `${each.key}=${textAt(each, index)}`)]
    .join(" ").toLowerCase());
}

function tell(event, words) {
  tip.hidden = !words;
  if (!words) return;
  tip.textContent = words;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, innerWidth - width - 8);
  const top = event.clientY + 18 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 18;
  tip.style.transform = `translate(${Math.max(left, 8)}px, ${Math.max(top, 4)}px)`;
}

// A mouse points and goes; a finger taps, and what it asked for stays until it taps elsewhere or scrolls.
function pointed(element, over, away) {
  element.addEventListener("pointermove", over);
  element.addEventListener("pointerdown", over);
  element.addEventListener("pointerleave", (event) => event.pointerType === "touch" || away());
}
addEventListener("pointerdown", () => tell(null, ""), { capture: true });
addEventListener("scroll", () => tell(null, ""), { capture: true, passive: true });

function pick(index, { scroll = false } = {}) {
  view.picked = index;
  draw();
  showRun(index);
  if (scroll) document.getElementById("run").scrollIntoView({ behavior: "smooth", block: "start" });
}

function draw() {
  for (const figure of figures) drawCurves(figure);
  for (const plot of plots) drawFrontier(plot);
  drawSaves();
  drawTime();
  drawTable();
}

const number = (value) => value.toLocaleString("en-US");
function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? Number(value.toPrecision(3)).toExponential().replace("e+", "e") : String(Number(value.toPrecision(4)));
}
function clock(milliseconds) {
  const seconds = milliseconds / 1000;
  if (seconds < 59.95) return `${Number(seconds.toFixed(seconds < 10 ? 1 : 0))} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${Math.floor(Math.round(seconds) / 60)}m${String(Math.round(seconds) % 60).padStart(2, "0")}s`;
  return `${Math.floor(minutes / 60)}h${String(minutes % 60).padStart(2, "0")}m`;
}
function bytes(size) {
  for (const unit of ["bytes", "kB", "MB", "GB"]) {
    if (size < 999.5) return `${Number(size.toPrecision(3))} ${unit}`;
    size /= 1000;
  }
  return `${Number(size.toPrecision(3))} TB`;
}
const plural = (count, noun) => `${number(count)} ${noun}${count === 1 ? "" : "s"}`;

// Round numbers between two others, about `count` of them.
function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= raw * 0.999);
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) found.push(index * step || 0); // never −0
  return found;
}
