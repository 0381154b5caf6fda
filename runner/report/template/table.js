// The table of runs: sorted by a click on a head, and what is left of it by words. Curves and lanes follow.
const rows = [...document.querySelectorAll("#table tbody tr")];

function setUpTable() {
  document.querySelectorAll("#table thead th").forEach((head, column) => {
    const isNumber = rows.some((row) => row.cells[column].classList.contains("number"));
    if (isNumber) head.classList.add("number");
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      document.querySelectorAll("#table thead th").forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      sort(column, down ? -1 : 1);
    });
  });
  for (const row of rows) {
    row.addEventListener("click", (event) => event.target.closest("a") || pick(Number(row.dataset.run)));
  }
  const filter = document.getElementById("filter");
  filter?.addEventListener("input", () => {
    view.words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    count();
    draw();
  });
  count();
}

// Numbers as numbers, words as words, what is missing at the end: whichever way.
function sort(column, sign) {
  const ranked = rows.map((row, place) => ({ row, place, rank: row.cells[column].dataset.rank }));
  const numbers = ranked.every(({ rank }) => rank === undefined || (rank !== "" && !isNaN(rank)));
  ranked.sort((a, b) => {
    if (a.rank === undefined || b.rank === undefined) return (a.rank === undefined) - (b.rank === undefined) || a.place - b.place;
    const order = numbers ? a.rank - b.rank : a.rank.localeCompare(b.rank, "en", { numeric: true });
    return sign * order || a.place - b.place;
  });
  rows[0].parentElement.append(...ranked.map(({ row }) => row));
  view.order = ranked.map(({ row }) => Number(row.dataset.run));
  draw();
}

function count() {
  const left = runs.filter((_, index) => matches(index)).length;
  const place = document.getElementById("count");
  if (place) place.textContent = left < runs.length ? `${number(left)} of ${number(runs.length)}` : "";
}

function markRows() {
  for (const row of rows) {
    const index = Number(row.dataset.run);
    row.hidden = !matches(index);
    row.classList.toggle("picked", index === view.picked && runs.length > 1);
  }
}
