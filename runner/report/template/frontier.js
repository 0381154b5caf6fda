// What recomputation buys: a figure for runs that can be compared, memory across, what it costs upwards. Low and left is good.
const COST = {
  pace: { head: "time against memory", at: (point) => point.seconds?.[1] * 1000, words: (value) => `${short(Number(value.toPrecision(3)))} ms / step` },
  extra: { head: "FLOPs against memory", at: (point) => (point.extra === null ? undefined : point.extra * 100), words: (value) => `${short(Number(value.toPrecision(3)))} % recomputed` },
};
const plots = [];

function setUpFrontiers() {
  for (const box of document.querySelectorAll("#remat figure")) {
    const { compiled, points, best } = facts.frontiers[box.dataset.place];
    const head = made(box, "figcaption");
    const title = made(head, "b");
    const button = made(head, "button", { type: "button", class: "chip" });
    const named = points.map(([policy, of, memory, seconds, extra]) => ({ policy, of, memory, seconds, extra }));
    const plot = { box, title, button, compiled, points: named, best, cost: best.pace ? "pace" : "extra" };
    button.hidden = Object.keys(best).length < 2;
    button.addEventListener("click", () => {
      plot.cost = plot.cost === "pace" ? "extra" : "pace";
      drawFrontier(plot);
    });
    plots.push(plot);
  }
}

function drawFrontier(plot) {
  const cost = COST[plot.cost], width = plot.box.clientWidth, height = width < 460 ? 260 : 290;
  plot.title.textContent = cost.head;
  plot.button.textContent = plot.cost === "pace" ? "FLOPs instead" : "time instead";
  plot.svg?.remove();
  plot.svg = made(plot.box, "svg", { width, height, role: "img", "aria-label": cost.head });
  const points = plot.points.map((point, place) => ({ ...point, value: cost.at(point), best: plot.best[plot.cost].indexOf(place) }))
    .filter((point) => point.memory !== null && point.value !== undefined);
  const { x, y } = spread(plot, points, width, height);
  for (const point of points) [point.x, point.y] = [x(point.memory), y(point.value)];
  const best = points.filter((point) => point.best >= 0).sort((a, b) => a.best - b.best);
  made(plot.svg, "path", { class: "stairs", d: best.map((point, place) => (place ? `H${point.x}V${point.y}` : `M${point.x} ${TOP}V${point.y}`)).join("") + `H${width - RIGHT}` });
  if (plot.cost === "pace") {
    for (const point of points) [point.low, , point.high] = point.seconds.map((each) => y(each * 1000));
    made(plot.svg, "path", { class: "reach", d: points.filter((point) => point.of.length > 1).map(({ x, low, high }) => `M${x} ${low}V${high}`).join("") });
  }
  for (const point of points) {
    const dot = made(plot.svg, "circle", { class: point.best >= 0 ? "kept" : "gone", r: point.best >= 0 ? 5.5 : 4.5, cx: point.x, cy: point.y });
    const reach = made(plot.svg, "circle", { class: "touch", r: 14, cx: point.x, cy: point.y });
    pointed(reach, (event) => tell(event, aboutPoint(plot, point)), () => tell(null, ""));
    reach.addEventListener("click", () => pick(point.of[0]));
    dot.setAttribute("data-policy", point.policy);
  }
  nameThem(plot.svg, [...best, ...points.filter((point) => point.best < 0)], points, width, height);
}

// The scales: never closer than differences that mean something, with room for names.
function spread(plot, points, width, height) {
  const range = (values, least, pad) => {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const gap = Math.max((high - low) * pad, (high * least - (high - low)) / 2, high * 0.01);
    return [Math.max(low - gap, plot.cost === "extra" && values.includes(0) ? -gap : 0), high + gap || 1];
  };
  const heights = points.flatMap((point) => (plot.cost === "pace" ? [point.value, ...point.seconds.map((each) => each * 1000)] : [point.value]));
  const [left, right] = range(points.map((point) => point.memory), 0.1, 0.1);
  const [low, high] = range(heights, plot.cost === "pace" ? 0.2 : 0.1, 0.12);
  const x = (value) => LEFT + (value - left) / (right - left) * (width - LEFT - RIGHT);
  const y = (value) => TOP + (high - value) / (high - low) * (height - TOP - BOTTOM - 18);
  const lines = [];
  for (const value of ticks(low, high, 5)) {
    if (value < 0) continue;
    lines.push(`M${LEFT} ${Math.round(y(value))}H${width - RIGHT}`);
    made(plot.svg, "text", { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, plot.cost === "pace" ? short(value) : `${short(value)} %`);
  }
  for (const value of ticks(left, right, width < 460 ? 4 : 5)) {
    const last = x(value) > width - 46;
    lines.push(`M${Math.round(x(value))} ${TOP}V${height - BOTTOM - 18}`);
    made(plot.svg, "text", { x: last ? width - RIGHT : x(value), y: height - 24, "text-anchor": last ? "end" : "middle" }, bytes(value));
  }
  made(plot.svg, "text", { x: width - RIGHT, y: height - 5, "text-anchor": "end" }, `${plot.compiled ? "memory of a step" : "memory of a step, counted"}, on one device`);
  made(plot.svg, "text", { x: 2, y: height - 5 }, plot.cost === "pace" ? "↑ ms / step" : "↑ recomputed");
  plot.svg.prepend(made(plot.svg, "path", { class: "grid", d: lines.join("") }));
  return { x, y };
}

function aboutPoint(plot, { policy, of, memory, seconds, extra }) {
  const words = [of.length > 1 ? `${policy}, ${plural(of.length, "run")}` : policy, `${bytes(memory)} on one device, ${plot.compiled ? "says the compiler" : "counted"}`];
  if (seconds) words.push(COST.pace.words(seconds[1] * 1000) + (of.length > 1 ? ` (${seconds.map((each) => short(Number((each * 1000).toPrecision(3)))).filter((_, place) => place !== 1).join(" – ")})` : ""));
  if (extra !== null) words.push(COST.extra.words(extra * 100));
  return words.join("\n");
}

// A name beside its point, where none lies already; what finds no room is told when one points at it.
function nameThem(svg, ordered, points, width, height) {
  const taken = points.map(({ x, y, low = y, high = y }) => ({ left: x - 7, right: x + 7, top: Math.min(high, y - 7), low: Math.max(low, y + 7) }));
  for (const point of ordered) {
    const text = made(svg, "text", { class: "name" }, point.policy);
    const long = text.getComputedTextLength();
    const places = [[point.x + 10, point.y - 6], [point.x - 10 - long, point.y + 14], [point.x + 10, point.y + 14], [point.x - 10 - long, point.y - 6], [point.x - long / 2, point.y - 12], [point.x - long / 2, point.y + 20]];
    const box = ([left, low]) => ({ left: left - 2, right: left + long + 2, top: low - 12, low: low + 3 });
    const fits = places.find((place) => {
      const mine = box(place);
      return mine.left >= LEFT && mine.right <= width && mine.top >= 0 && mine.low <= height - BOTTOM - 16
        && taken.every((other) => mine.right < other.left || other.right < mine.left || mine.low < other.top || other.low < mine.top);
    });
    if (!fits) {
      text.remove();
      continue;
    }
    text.setAttribute("x", fits[0]);
    text.setAttribute("y", fits[1]);
    taken.push(box(fits));
  }
}
