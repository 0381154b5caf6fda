// By what runs are coloured, and the legend that switches them off and on.
const RUN = "run", STATE = "state", CATEGORIES = 8, CHIPS = 24;
const ALERT = { finished: "var(--c2)", running: "var(--c0)", preempted: "var(--c5)", failed: "var(--c1)", diverged: "var(--c3)", killed: "var(--c6)" };
const colourings = new Map();

function colourValue(index) {
  if (view.colour === RUN) return runs[index].name;
  if (view.colour === STATE) return runs[index].state;
  return textAt(facts.keys.find((each) => each.key === view.colour), index);
}

// value → colour: numbers and what is too many for names go along a ramp, the rest has colours that are told apart
function colouring() {
  if (colourings.has(view.colour)) return colourings.get(view.colour);
  const values = [...new Set(runs.map((_, index) => colourValue(index)))];
  const numbers = values.every((value) => value !== "null" && value.trim() !== "" && isFinite(value));
  if (numbers) values.sort((a, b) => a - b);
  const colours = new Map(values.map((value, place) => {
    if (view.colour === STATE) return [value, ALERT[value] ?? "var(--c7)"];
    if (values.length <= CATEGORIES && !(numbers && values.length > 2)) return [value, `var(--c${place})`];
    return [value, ramp(place / Math.max(values.length - 1, 1))];
  }));
  colourings.set(view.colour, colours);
  return colours;
}

function ramp(part) {
  const [from, to, share] = part < 0.5 ? ["low", "middle", part * 2] : ["middle", "high", part * 2 - 1];
  return `color-mix(in oklab, var(--${from}), var(--${to}) ${(share * 100).toFixed(1)}%)`;
}

const colourOf = (index) => colouring().get(colourValue(index));

function setUpColours() {
  const select = document.querySelector("#colour select");
  const keys = [...facts.keys.map((each) => each.key), STATE];
  if (runs.length <= CHIPS) keys.unshift(RUN);
  for (const key of keys) made(select, "option", { value: key }, key);
  view.colour = select.value = runs.length <= CATEGORIES ? RUN : keys.find((key) => key !== RUN);
  document.getElementById("colour").hidden = runs.length < 2;
  select.addEventListener("change", () => {
    view.colour = select.value;
    view.off.clear();
    drawLegend();
    draw();
  });
  drawLegend();
}

function drawLegend() {
  const legend = document.getElementById("legend");
  legend.replaceChildren();
  if (runs.length < 2) return;
  const colours = [...colouring()];
  if (colours.length > CHIPS) {
    made(legend, "span", {}, colours[0][0]);
    made(legend, "span", { class: "ramp" });
    made(legend, "span", {}, colours.at(-1)[0]);
    return;
  }
  for (const [value, colour] of colours) {
    const chip = made(legend, "button", { type: "button", class: "chip", "aria-pressed": "true", title: value });
    made(chip, "i").style.background = colour;
    chip.append(value === "null" ? "–" : value);
    chip.addEventListener("click", () => {
      if (!view.off.delete(value)) view.off.add(value);
      chip.setAttribute("aria-pressed", String(!view.off.has(value)));
      draw();
    });
  }
}
