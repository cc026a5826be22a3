"use strict";
// Sort, filter and download. The page is complete without this script. The hash of the URL stores the state of the tables.
const tables = [...document.querySelectorAll("table.sortable")];
const headsOf = (table) => [...table.tHead.rows[0].cells];
const rowsOf = (body) => [...body.rows].filter((row) => !row.classList.contains("group"));
const given = new Map(tables.flatMap((table) => [...table.tBodies].map((body) => [body, rowsOf(body)])));
const boxes = new Map([...document.querySelectorAll("[data-filter]")].map((box) => [box.dataset.filter, box]));

// "98.3K", "549 MB", "< 50%" and "294,912 (0.29M)" sort as numbers. Other texts sort after all numbers.
const NUMBER = /^[<>≈~]?\s*([+−-]?[\d,]*\.?\d+(?:e[+-]?\d+)?)\s*([kKMGT]?)i?B?[x%]?(\s*\(.*\))?$/;
const SIZES = { "": 1, k: 1e3, K: 1e3, M: 1e6, G: 1e9, T: 1e12 };
function number(text) {
  const [, digits, size] = NUMBER.exec(text) ?? [];
  return digits === undefined ? NaN : Number(digits.replaceAll(",", "").replace("−", "-")) * SIZES[size];
}
function order(a, b) {
  const x = number(a), y = number(b);
  if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y) || a.localeCompare(b, "en", { numeric: true });
  return x - y;
}

// Without a column, the rows get the order in which the page came.
function sort(table, column, down) {
  for (const body of table.tBodies) {
    const rows = [...given.get(body)];
    if (column !== null) rows.sort((a, b) => {
      const [x, y] = [a, b].map((row) => row.cells[column].dataset.v || null);
      // Missing values stay at the end in both orders.
      if (x === null || y === null) return (x === null) - (y === null);
      return down ? order(y, x) : order(x, y);
    });
    body.append(...rows);
  }
  headsOf(table).forEach((head, i) => {
    if (i === column) head.setAttribute("aria-sort", down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
}

// A row is shown if each word of the filter begins a word of the row or of its group's title: `lora` does not find `qlora`.
function filter(table, text) {
  const box = boxes.get(table.id);
  if (!box) return;
  if (box.value !== text) box.value = text;
  const words = text.split(/\s+/).filter(Boolean)
    .map((word) => new RegExp(`(?<![a-z0-9.])${word.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&")}`, "i"));
  let shown = 0, all = 0;
  for (const body of table.tBodies) {
    const before = shown;
    for (const row of rowsOf(body)) {
      const content = [body.dataset.group, ...[...row.cells].map((cell) => cell.textContent)].join(" ");
      row.hidden = !words.every((word) => word.test(content));
      shown += !row.hidden;
      all += 1;
    }
    body.hidden = shown === before;
  }
  const none = shown ? "" : ". No row has words that begin like this.";
  box.closest(".tools").querySelector("output").textContent = words.length ? `${shown} of ${all} rows${none}` : `${all} rows`;
}

// `#?cells.sort=3,down&cells.filter=lora`: the question mark distinguishes it from the anchor of a row.
let state = new URLSearchParams();
function remember(name, value) {
  if (value) state.set(name, value);
  else state.delete(name);
  history.replaceState(null, "", `#?${state}`);
}

function followHash() {
  if (!location.hash.startsWith("#?")) {
    const row = document.querySelector("tr:target"), table = row?.closest("table.sortable");
    if (!table) return;
    if (!row.checkVisibility()) {
      state.delete(`${table.id}.filter`);
      filter(table, "");
    }
    // The row comes into view in the table, then the table with its head in the window.
    row.scrollIntoView();
    table.closest(".scroll").scrollIntoView();
    return;
  }
  state = new URLSearchParams(location.hash.slice(2));
  for (const table of tables) {
    const [column, way] = (state.get(`${table.id}.sort`) ?? "").split(",");
    sort(table, /^\d+$/.test(column) && headsOf(table)[column] ? Number(column) : null, way === "down");
    filter(table, state.get(`${table.id}.filter`) ?? "");
  }
  const first = tables.find((table) => state.has(`${table.id}.sort`) || state.has(`${table.id}.filter`));
  first?.closest(".scroll").previousElementSibling.scrollIntoView();
}

for (const table of tables) {
  headsOf(table).forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      sort(table, i, down);
      remember(`${table.id}.sort`, `${i},${down ? "down" : "up"}`);
    });
  });
  const box = boxes.get(table.id);
  box?.addEventListener("input", () => {
    filter(table, box.value);
    remember(`${table.id}.filter`, box.value);
  });
  filter(table, "");
}
document.querySelectorAll(".tools").forEach((tools) => { tools.hidden = false; });
addEventListener("hashchange", followHash);
followHash();

function download(name, type, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// A spreadsheet would run a field that begins like a formula, and Records may come from other people.
const isNumber = (text) => text !== "" && Number.isFinite(Number(text));
const quoted = (text) => `"${(/^[=+@\t\r-]/.test(text) && !isNumber(text) ? `'${text}` : text).replaceAll('"', '""')}"`;

// A column of the page becomes one of values in its unit, then one for each further detail, e.g. the ends of an interval.
function columnsOf(table, rows) {
  return headsOf(table).flatMap((head, i) => {
    const scaled = (value) => String(Number((value * (head.dataset.scale ?? 1)).toPrecision(12)));
    const details = rows.map((row) => {
      const cell = row.cells[i], flag = cell.querySelector("[data-flag]")?.dataset.flag, value = cell.dataset.v ?? "";
      return { "": isNumber(value) ? scaled(value) : value, ...JSON.parse(cell.dataset.more ?? "{}"), ...(flag && { flag }) };
    });
    return [...new Set(details.flatMap(Object.keys))].map((name) => [
      head.textContent + (name && ` (${name})`),
      ...details.map(({ [name]: value = "" }) => (typeof value === "number" ? scaled(value) : value)),
    ]);
  });
}

for (const button of document.querySelectorAll("[data-csv]")) {
  button.addEventListener("click", () => {
    const table = document.getElementById(button.dataset.csv), rows = [...table.tBodies].flatMap(rowsOf);
    const columns = columnsOf(table, rows), groups = rows.map((row) => row.closest("tbody").dataset.group);
    if (groups.some(Boolean)) columns.unshift([table.dataset.by, ...groups]);
    const lines = [null, ...rows].flatMap((row, i) => (row?.hidden ? [] : [columns.map((column) => quoted(column[i])).join(",")]));
    download(`${table.dataset.file}.csv`, "text/csv", lines.join("\r\n"));
  });
}

const json = document.getElementById("json");
if (json) {
  json.hidden = false;
  json.addEventListener("click", () => download("report.json", "application/json", document.getElementById("data").textContent));
}
