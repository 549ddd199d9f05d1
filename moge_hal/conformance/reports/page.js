// The table of all cases: filter, sort, more. Cells of the other tables and links set its filter.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const rows = data.rows.map(([b, id, outcome, error, limit, seconds, reason, level, command]) => ({
  backend: data.backends[b],
  id: data.ids[id],
  outcome: data.words[outcome],
  mark: data.marks[outcome],
  error, limit, seconds,
  margin: error !== null && limit ? error / limit : null,
  reason: data.reasons[reason],
  level: data.levels[level],
  command: data.commands[command].replace("{id}", data.ids[id]),
}));
const $ = (id) => document.getElementById(id);
const query = $("query"), backend = $("backend"), outcome = $("outcome");
const body = $("all").tBodies[0];
const STEP = 100;
let order = null, falling = false, shown = STEP;

const count = (n) => n.toLocaleString("en");
function number(x) {
  if (x === null) return "";
  if (x === 0 || (x >= 0.01 && x < 10000)) return String(Number(x.toPrecision(x < 100 ? 2 : 3)));
  return x.toExponential(1).replace("e+", "e");
}

// Words that must all be in the id or the reason; one with a * is a glob on the whole id.
function matcher(text) {
  const tests = text.trim().split(/\s+/).filter(Boolean).map((word) => {
    if (!word.includes("*")) return (row) => row.id.includes(word) || row.reason.includes(word);
    const glob = word.split("*").map((part) => part.replace(/[.+?^${}()|[\]\\]/g, "\\$&"));
    const whole = new RegExp(`^${glob.join(".*")}$`);
    return (row) => whole.test(row.id);
  });
  return (row) => tests.every((test) => test(row));
}

function cell(tr, text, kind) {
  const td = tr.insertCell();
  if (kind) td.className = kind;
  td.textContent = text;
  return td;
}

function copier(text) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "copy command";
  button.title = text;
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "copied";
    } catch {
      prompt("The command that runs this case alone", text);
    }
  };
  return button;
}

function show() {
  const matches = matcher(query.value);
  const found = rows.filter((row) =>
    (!backend.value || row.backend === backend.value) &&
    (!outcome.value || row.outcome === outcome.value) && matches(row));
  if (order) {
    const sign = falling ? -1 : 1;
    found.sort((a, b) => {
      const x = a[order], y = b[order];
      if (x === null || y === null) return (x === null) - (y === null);
      return sign * (x < y ? -1 : x > y ? 1 : 0);
    });
  }
  body.replaceChildren();
  for (const row of found.slice(0, shown)) {
    const tr = body.insertRow();
    const id = cell(tr, row.id, "id");
    if (row.reason) {
      const why = document.createElement("small");
      why.textContent = row.reason;
      id.append(why);
    }
    cell(tr, row.backend);
    const mark = document.createElement("span");
    mark.className = `mark ${row.outcome}`;
    mark.textContent = `${row.mark} ${row.outcome}`;
    const td = cell(tr, "");
    td.append(mark);
    if (row.level !== "real" && row.outcome !== "skipped") td.append(` ${row.level}`);
    const percent = row.margin === null ? null : 100 * row.margin;
    const numbers = { error: row.error, limit: row.limit, "% of limit": percent, ms: 1000 * row.seconds };
    for (const [name, x] of Object.entries(numbers)) {
      cell(tr, number(x), x === null ? "number empty" : "number").dataset.name = name;
    }
    cell(tr, "").append(copier(row.command));
  }
  $("found").textContent = `${count(found.length)} of ${count(rows.length)} outcomes` +
    (found.length > shown ? `, the first ${shown} are shown` : "");
  $("more").hidden = found.length <= shown;
}

function reset() { shown = STEP; show(); }
for (const control of [query, backend, outcome]) control.addEventListener("input", reset);
$("more").onclick = () => { shown += 10 * STEP; show(); };
$("clear").onclick = () => { query.value = backend.value = outcome.value = ""; reset(); };
for (const th of $("all").tHead.rows[0].cells) {
  const button = th.querySelector("button");
  if (!button) continue;
  button.onclick = () => {
    falling = order === th.dataset.key ? !falling : th.classList.contains("number");
    order = th.dataset.key;
    for (const other of $("all").tHead.rows[0].cells) other.removeAttribute("aria-sort");
    th.setAttribute("aria-sort", falling ? "descending" : "ascending");
    reset();
  };
}
document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href='#cases']");
  if (!link) return;
  query.value = link.dataset.q ?? "";
  outcome.value = link.dataset.o ?? "";
  backend.value = link.closest("section")?.dataset.b ?? "";
  reset();
});
for (const pre of document.querySelectorAll(".fault pre")) pre.after(copier(pre.textContent));
show();
