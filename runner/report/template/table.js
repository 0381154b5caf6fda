// The table of runs: sorted by a click on a head, and what is left of it by words. Curves and lanes follow.
const body = document.querySelector("#table tbody");
const rows = new Map([...body.rows].map((row) => [Number(row.dataset.run), row])); // index → row; of many runs some

function setUpTable() {
  document.querySelectorAll("#table thead th").forEach((head, column) => {
    if (column && kindOf(column, 0).includes("number") || runs.some((_, index) => column && kindOf(column, index).includes("number"))) head.classList.add("number");
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      document.querySelectorAll("#table thead th").forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      sort(column, down ? -1 : 1);
    });
  });
  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (row && !event.target.closest("a")) pick(Number(row.dataset.run));
  });
  const filter = document.getElementById("filter");
  filter?.addEventListener("input", () => {
    view.words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    count();
    draw();
  });
  document.querySelector("#left button").addEventListener("click", () => {
    view.room += facts.drawn;
    draw();
  });
  count();
}

// Column 0 is the name; the others are in the facts where there are more rows than the page has.
const kindOf = (column, index) => (facts.table ? textAt(facts.table[column - 1].kind, index) : rows.get(index).cells[column].className);
function rankOf(column, index) {
  if (!column) return runs[index].name;
  if (!facts.table) return rows.get(index).cells[column].dataset.rank;
  const cells = facts.table[column - 1], text = textAt(cells, index);
  if (cells.ranks) return cells.ranks[index] ?? undefined;
  return text === "" || text === "–" ? undefined : text;
}

function rowOf(index) {
  if (rows.has(index)) return rows.get(index);
  const row = made(null, "tr", { "data-run": index });
  made(made(row, "th", { scope: "row" }), "a", { href: `${runs[index].href}/`, title: "open its directory" }, runs[index].name);
  facts.table.forEach((cells, place) => {
    const kind = kindOf(place + 1, index), text = textAt(cells, index);
    const cell = made(row, "td", { class: kind }, kind === "why" ? null : text);
    if (kind === "why") made(cell, "span", { title: text }, text);
  });
  rows.set(index, row);
  return row;
}

// Numbers as numbers, words as words, what is missing at the end: whichever way.
function sort(column, sign) {
  const ranked = view.order.map((_, index) => ({ index, rank: rankOf(column, index) }));
  const numbers = ranked.every(({ rank }) => rank === undefined || (rank !== "" && !isNaN(rank)));
  const words = new Intl.Collator("en", { numeric: true });
  ranked.sort((a, b) => {
    if (a.rank === undefined || b.rank === undefined) return (a.rank === undefined) - (b.rank === undefined) || a.index - b.index;
    return sign * (numbers ? a.rank - b.rank : words.compare(a.rank, b.rank)) || a.index - b.index;
  });
  view.order = ranked.map(({ index }) => index);
  draw();
}

function count() {
  const left = view.words.length ? runs.filter((_, index) => matches(index)).length : runs.length;
  const place = document.getElementById("count");
  if (place) place.textContent = left < runs.length ? `${number(left)} of ${number(runs.length)}` : "";
}

function drawTable() {
  const shown = drawn(), matching = view.words.length ? runs.filter((_, index) => matches(index)).length : runs.length;
  body.replaceChildren(...shown.map(rowOf));
  shown.forEach((index) => rowOf(index).classList.toggle("picked", index === view.picked && runs.length > 1));
  const left = document.getElementById("left"), isPart = shown.length < matching;
  const words = `the first ${number(shown.length)} of ${number(matching)} runs`;
  left.hidden = !isPart;
  left.firstElementChild.textContent = `${words} are listed and drawn; sort or filter to see others, or`;
  document.querySelector("#curves .part").textContent = isPart ? ` · ${words}, in the order of the table below` : "";
}
