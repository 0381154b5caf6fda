// One figure a metric: a curve for each run, with a cross where it was interrupted.
const figures = [];
const LEFT = 50, RIGHT = 10, TOP = 8, BOTTOM = 24;

function setUpCurves() {
  const losses = facts.metrics.filter((name) => name.endsWith("/loss"));
  const scores = facts.metrics.filter((name) => runs.some((run) => run.metric === name));
  const first = [...new Set([...losses, ...scores])].slice(0, 4);
  const shown = first.length ? first : facts.metrics.slice(0, 2);
  document.getElementById("curves").hidden = shown.length === 0;
  for (const name of shown) {
    const box = made(document.getElementById("figures"), "figure");
    const head = made(box, "figcaption");
    const select = made(head, "select", { "aria-label": "which curve" });
    facts.metrics.forEach((each, place) => made(select, "option", { value: place }, each));
    select.value = facts.metrics.indexOf(name);
    const button = made(head, "button", { type: "button", class: "chip" });
    const figure = { box, select, button, log: null };
    button.addEventListener("click", () => {
      figure.log = !figure.isLog;
      drawCurves(figure);
    });
    select.addEventListener("change", () => {
      figure.log = null;
      drawCurves(figure);
    });
    pointed(box, (event) => over(figure, event), () => away(figure));
    box.addEventListener("click", (event) => figure.near >= 0 && event.target.closest("svg") && pick(figure.near));
    figures.push(figure);
  }
}

function read(figure) {
  const metric = figure.select.value;
  const lines = [];
  for (const index of drawn()) {
    const curve = runs[index].curves[metric];
    if (curve && isShown(index)) lines.push({ index, steps: facts.grids[curve[0]], values: curve[1] });
  }
  return lines;
}

function drawCurves(figure) {
  const lines = read(figure);
  const width = figure.box.clientWidth, height = width < 460 ? 230 : 290;
  figure.svg?.remove();
  figure.near = -1;
  figure.svg = made(null, "svg", { width, height, role: "img", "aria-label": facts.metrics[figure.select.value] });
  figure.box.append(figure.svg);
  figure.lines = lines;
  if (!lines.length) return void made(figure.svg, "text", { x: LEFT, y: 40 }, "no run to show");
  scale(figure, lines, width, height);
  axes(figure, width, height);
  const group = made(figure.svg, "g", { class: lines.length > MANY ? "many" : "" });
  figure.group = group;
  for (const line of lines) {
    // A curve of one point is a dot; as a style, for an attribute loses against the style sheet.
    const dot = line.values.length > 1 ? "" : ";stroke-linecap:round;stroke-width:6";
    made(group, "path", { class: "curve", style: `stroke:${colourOf(line.index)}${dot}`, d: `${path(figure, line)}${dot && "h.01"}` });
  }
  const crosses = lines.flatMap((line) => stops(line).map((step) => cross(figure.x(step), figure.y(at(line, step)), 4))).join("");
  made(group, "path", { class: "halo", d: crosses });
  made(group, "path", { class: "stop", d: crosses });
  const apart = new Set(lines.map(({ steps, values }) => `${values}|${steps}`)).size;
  if (apart < lines.length) { // one would look for those that are hidden
    const words = `${number(lines.length)} runs on ${plural(apart, "curve")}: equal in five digits`;
    made(figure.svg, "text", { class: "same", x: width - RIGHT, y: TOP + 10, "text-anchor": "end" }, words);
  }
  figure.above = made(figure.svg, "g");
  const picked = lines.find((line) => line.index === view.picked);
  if (picked && runs.length > 1) raise(figure, picked);
}

function scale(figure, lines, width, height) {
  let [low, least, high, end, start] = [Infinity, Infinity, -Infinity, 0, Infinity]; // least: above zero
  const firsts = [];
  for (const { steps, values } of lines) {
    for (const value of values) {
      if (value < low) low = value;
      if (value > 0 && value < least) least = value;
      if (value > high) high = value;
    }
    start = Math.min(start, steps[0]);
    end = Math.max(end, steps.at(-1));
    firsts.push(values.at(-1));
  }
  const typical = firsts.sort((a, b) => a - b)[firsts.length >> 1];
  figure.isLog = low >= 0 && high > 0 && (figure.log ?? high > 20 * typical);
  figure.button.hidden = low < 0 || high <= 0;
  figure.button.textContent = figure.isLog ? "logarithmic" : "linear";
  if (figure.isLog) [low, high] = [Math.log10(least), Math.log10(high)]; // what is zero lies on the floor
  const gap = (high - low) * 0.04 || Math.abs(high) * 0.1 || 1;
  [figure.low, figure.high, figure.start, figure.end] = [low - gap, high + gap, start < 0.3 * end ? 0 : start, end];
  const down = (height - TOP - BOTTOM) / (figure.high - figure.low), along = (width - LEFT - RIGHT) / (end - figure.start || 1);
  figure.x = (step) => LEFT + (step - figure.start) * along;
  figure.y = (value) => TOP + (figure.high - (figure.isLog ? Math.max(Math.log10(value), figure.low) : value)) * down;
}

function axes(figure, width, height) {
  const lines = [];
  for (const [value, isNamed] of heights(figure)) {
    const y = Math.round(figure.y(value));
    lines.push(`M${LEFT} ${y}H${width - RIGHT}`);
    if (isNamed) made(figure.svg, "text", { x: LEFT - 8, y: y + 4, "text-anchor": "end" }, short(value));
  }
  for (const step of ticks(figure.start, figure.end, width < 460 ? 3 : 5)) {
    if (step % 1) continue;
    const last = figure.x(step) > width - 40;
    made(figure.svg, "text", { x: last ? width - RIGHT : figure.x(step), y: height - 6, "text-anchor": last ? "end" : "middle" },
      number(step) + (step === 0 ? " steps" : ""));
  }
  figure.svg.prepend(made(figure.svg, "path", { class: "grid", d: lines.join("") }));
}

function heights(figure) {
  if (!figure.isLog) return ticks(figure.low, figure.high, 5).map((value) => [value, true]);
  const decades = figure.high - figure.low, found = [];
  const every = Math.max(Math.ceil(decades / 8), 1);
  for (let power = Math.floor(figure.low); power <= figure.high; power++) {
    for (const part of decades > 3 ? [1] : decades > 1.2 ? [1, 2, 5] : [1, 2, 3, 4, 5, 6, 7, 8, 9]) {
      const place = power + Math.log10(part);
      if (place >= figure.low && place <= figure.high) found.push([part * 10 ** power, decades > 3 ? power % every === 0 : decades > 0.5 ? part < 6 : true]);
    }
  }
  return found.length > 1 ? found : ticks(10 ** figure.low, 10 ** figure.high, 5).filter((value) => value > 0).map((value) => [value, true]);
}

function path(figure, { steps, values }) {
  let drawn = "";
  for (let place = 0; place < values.length; place++) {
    drawn += `${place ? "L" : "M"}${figure.x(steps[place]).toFixed(1)} ${figure.y(values[place]).toFixed(1)}`;
  }
  return drawn;
}

const cross = (x, y, size) => `M${(x - size).toFixed(1)} ${(y - size).toFixed(1)}l${2 * size} ${2 * size}m0 ${-2 * size}l${-2 * size} ${2 * size}`;

// Where a run was interrupted in training, within its curve.
function stops({ index, steps }) {
  const found = runs[index].spans.filter((span) => facts.interrupted.includes(span[3]) && span[4] !== null).map((span) => span[5]);
  return found.filter((step) => step >= steps[0] && step <= steps.at(-1));
}

// The height of a curve at a step: on the line between the points beside it.
function at({ steps, values }, step) {
  let after = steps.findIndex((each) => each >= step);
  if (after <= 0) return values[after === 0 ? 0 : values.length - 1];
  const part = (step - steps[after - 1]) / (steps[after] - steps[after - 1]);
  return values[after - 1] + part * (values[after] - values[after - 1]);
}

function raise(figure, line) {
  figure.group.classList.add("dim");
  made(figure.above, "path", { class: "curve top", style: `stroke:${colourOf(line.index)}`, d: path(figure, line) });
}

function over(figure, event) {
  const box = figure.svg.getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  let nearest = null, least = 40 ** 2;
  for (const line of figure.lines ?? []) {
    for (let place = 0; place < line.values.length; place++) {
      const across = figure.x(line.steps[place]) - x;
      if (across * across >= least) continue;
      const away = across * across + (figure.y(line.values[place]) - y) ** 2;
      if (away < least) [nearest, least] = [{ line, place }, away];
    }
  }
  if (!nearest) return away(figure);
  const { line, place } = nearest;
  figure.near = line.index;
  figure.above.replaceChildren();
  if (figure.lines.length > 1) raise(figure, line);
  made(figure.above, "circle", { class: "dot", r: 5, cx: figure.x(line.steps[place]), cy: figure.y(line.values[place]), style: `fill:${colourOf(line.index)}` });
  const same = figure.lines.filter((each) => each !== line && each.values[place] === line.values[place]).length;
  const name = runs.length > 1 ? `${runs[line.index].name}${same ? ` (and ${plural(same, "run")} just there)` : ""}\n` : "";
  tell(event, `${name}${facts.metrics[figure.select.value]} ${short(line.values[place])} at step ${number(line.steps[place])}`);
}

function away(figure) {
  figure.near = -1;
  if (figure.above) {
    figure.above.replaceChildren();
    figure.group.classList.remove("dim");
    const picked = figure.lines.find((line) => line.index === view.picked);
    if (picked && runs.length > 1) raise(figure, picked);
  }
  tell(null, "");
}
