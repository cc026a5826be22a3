"use strict";
// Sort, filter and download. The page is complete without this script. The hash of the URL stores the state of the tables.
const numeric = (text) => text !== "" && Number.isFinite(Number(text));
const order = (a, b) => (numeric(a) && numeric(b) ? Number(a) - Number(b) : a.localeCompare(b));
const key = (row, column) => row.cells[column].dataset.v ?? null;
const rowsOf = (body) => [...body.rows].filter((row) => !row.classList.contains("group"));

function sort(table, column, down) {
  for (const body of table.tBodies) {
    const rows = rowsOf(body);
    rows.sort((a, b) => {
      const x = key(a, column), y = key(b, column);
      // Missing values stay at the end in both orders.
      if (x === null || y === null) return (x === null) - (y === null);
      return down ? order(y, x) : order(x, y);
    });
    body.append(...rows);
  }
  [...table.tHead.rows[0].cells].forEach((head, i) => {
    if (i === column) head.setAttribute("aria-sort", down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
}

function filter(table, text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  for (const body of table.tBodies) {
    let shown = 0;
    for (const row of rowsOf(body)) {
      const content = `${row.textContent} ${body.rows[0].textContent}`.toLowerCase();
      row.hidden = !words.every((word) => content.includes(word));
      shown += !row.hidden;
    }
    body.hidden = shown === 0;
  }
}

// `#?cells.sort=3,down&cells.filter=lora`: the question mark distinguishes it from the anchor of a row.
const state = new URLSearchParams(location.hash.startsWith("#?") ? location.hash.slice(2) : "");
function remember(name, value) {
  if (value) state.set(name, value);
  else state.delete(name);
  history.replaceState(null, "", `#?${state}`);
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      sort(table, i, down);
      remember(`${table.id}.sort`, `${i},${down ? "down" : "up"}`);
    });
  });
  const [column, way] = (state.get(`${table.id}.sort`) ?? "").split(",");
  if (numeric(column) && table.tHead.rows[0].cells[Number(column)]) sort(table, Number(column), way === "down");
}

for (const box of document.querySelectorAll("[data-filter]")) {
  const table = document.getElementById(box.dataset.filter);
  box.closest(".tools").hidden = false;
  box.value = state.get(`${table.id}.filter`) ?? "";
  filter(table, box.value);
  box.addEventListener("input", () => {
    filter(table, box.value);
    remember(`${table.id}.filter`, box.value);
  });
}

function download(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// A spreadsheet would run a field that begins like a formula, and Records may come from other people.
const field = (text) => `"${(/^[=+@\t\r-]/.test(text) && !numeric(text) ? `'${text}` : text).replaceAll('"', '""')}"`;

for (const button of document.querySelectorAll("[data-csv]")) {
  button.addEventListener("click", () => {
    const table = document.getElementById(button.dataset.csv);
    const heads = ["Group", ...[...table.tHead.rows[0].cells].map((cell) => cell.textContent)];
    const lines = [...table.tBodies].flatMap((body) =>
      rowsOf(body).filter((row) => !row.hidden && !body.hidden)
        .map((row) => [body.rows[0].textContent.trim(), ...[...row.cells].map((cell) => cell.dataset.v ?? "")]));
    download("cells.csv", "text/csv", [heads, ...lines].map((line) => line.map(field).join(",")).join("\r\n"));
  });
}

const json = document.getElementById("json");
if (json) {
  json.hidden = false;
  json.addEventListener("click", () => download("report.json", "application/json", document.getElementById("data").textContent));
}
