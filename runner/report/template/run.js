// One run in full: where it lives, its attempts and its checkpoints.
const ROWS = 60;

function showRun(index) {
  const section = document.getElementById("run"), run = runs[index];
  section.hidden = false;
  section.replaceChildren();
  made(section, "h2", {}, run.name);
  if (run.command) made(made(section, "p", { class: "typed" }), "code", {}, run.command);
  const links = made(section, "ul", { class: "links" });
  for (const [name, file] of [["directory", ""], ["README.md", "README.md"], ["config.yaml", "config.yaml"], ["metrics.jsonl", "logs/metrics.jsonl"], ["run.log", "logs/run.log"]]) {
    made(made(links, "li"), "a", { href: `${run.href}/${file}` }, name);
  }
  if (run.why) made(section, "p", { class: "why" }, `${run.state}: ${run.why}`);
  attempts(section, run);
  checkpoints(section, run);
  profiles(section, run);
}

// What the steps did that were traced: a bar of the shares, and the operations that took most.
function profiles(section, run) {
  for (const [folder, words, operations] of run.profiles) {
    made(section, "h3", {}, "Trace of some steps");
    const line = made(section, "p", { class: "traced" }, `${words} `);
    made(line, "a", { href: `${run.href}/profile/${encodeURIComponent(folder)}/` }, "the trace, for XProf or Perfetto");
    tabled(section, ["operation", "kind", "share", "time", "times"],
      operations.map(([name, kind, share, seconds, times]) => [name, kind, `${(100 * share).toFixed(1)} %`, seconds < 1 ? `${Number((1000 * seconds).toPrecision(3))} ms` : clock(1000 * seconds), number(times)]), [2, 3, 4]);
  }
}

function attempts(section, run) {
  if (!run.spans.length) return;
  made(section, "h3", {}, plural(run.spans.length, "attempt"));
  const lines = run.spans.map((span, place) => [
    String(span[0]), new Date(span[1] * 1000).toISOString().slice(0, 19).replace("T", " "), facts.words[span[2]],
    span[4] === null ? "" : `${number(span[4])} → ${number(span[5])}`, span[6] ? number(span[6]) : "",
    span[7] > (run.spans[place - 1]?.[8] ?? 0) ? clock(span[7] - (run.spans[place - 1]?.[8] ?? 0)) : "", clock(span[8] - span[7]),
  ]);
  tabled(section, ["#", "started (UTC)", "ended", "steps", "done again", "down before", "took"], lines, [3, 4, 5, 6]);
}

function checkpoints(section, run) {
  if (!run.saves.length) return;
  const kept = run.saves.filter((save) => save[2] !== null).length;
  const all = run.saves.length + run.undrawn;
  made(section, "h3", {}, `${plural(all, "checkpoint")}, ${number(kept)} kept`);
  const lines = run.saves.slice(-ROWS).reverse().map(([step, reason, why, size, score, isBest]) => [
    number(step), facts.words[reason], why === null ? "deleted" : facts.words[why] + (isBest ? " (the best)" : ""), score === null ? "" : short(score), size ? bytes(size) : "",
  ]);
  tabled(section, ["step", "saved because", "kept because", run.metric, "size"], lines, [0, 3, 4], [1, 2]);
  if (all > lines.length) made(section, "p", { class: "note" }, `${number(all - lines.length)} more are not listed; python -m runner ls lists those that are kept`);
}

function tabled(section, head, lines, right, words = []) {
  const told = head.map((_, column) => column).filter((column) => lines.some((line) => line[column] !== ""));
  const kind = (column) => (right.includes(column) ? "number" : words.includes(column) ? "words" : "");
  const table = made(made(section, "div", { class: "scrolls" }), "table");
  const top = made(made(table, "thead"), "tr");
  for (const column of told) made(top, "th", { class: kind(column), scope: "col" }, head[column]);
  const body = made(table, "tbody");
  for (const line of lines) {
    const row = made(body, "tr");
    for (const column of told) made(row, "td", { class: kind(column) }, line[column]);
  }
}
