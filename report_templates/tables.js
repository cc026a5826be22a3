"use strict";
// Sort, filter and columns of tables. The hash of the URL stores their state.
const tables = [...document.querySelectorAll("table.sortable")];
const headsOf = (table) => [...table.tHead.rows[0].cells];
const rowsOf = (body) => [...body.rows].filter((row) => !row.classList.contains("group"));
const toolsOf = (table) => table.closest(".scroll").previousElementSibling;
const controlsOf = (table, kind) => [...toolsOf(table).querySelectorAll(`[data-${kind}]`)];
const given = new WeakMap();
const count = (number) => number.toLocaleString("en");

// `#?cells.sort=3,down&cells.filter=lora`: the question mark distinguishes it from the anchor of a row.
let state = new URLSearchParams();
const wanted = (table, name) => state.get(`${table.id}.${name}`) ?? "";
function remember(name, value) {
  if (value) state.set(name, value);
  else state.delete(name);
  history.replaceState(null, "", `#?${state}`);
}

// "98.3K", "549 MB", "< 50%" and "294,912 (0.29M)" sort as numbers. Other texts sort after all numbers.
const NUMBER = /^[<>≈~]?\s*([+−-]?[\d,]*\.?\d+(?:e[+-]?\d+)?)\s*([kKMGT]?)i?B?[x%]?(\s*\(.*\))?$/;
const SIZES = { "": 1, k: 1e3, K: 1e3, M: 1e6, G: 1e9, T: 1e12 };
function number(text) {
  const [, digits, size] = NUMBER.exec(text) ?? [];
  return digits === undefined ? NaN : Number(digits.replaceAll(",", "").replace("−", "-")) * SIZES[size];
}
const { compare } = new Intl.Collator("en", { numeric: true });
function order(a, b) {
  if (Number.isNaN(a.number) || Number.isNaN(b.number)) return Number.isNaN(a.number) - Number.isNaN(b.number) || compare(a.text, b.text);
  return a.number - b.number;
}

// Without a column, the rows get the order in which the page came.
function sort(table) {
  const [index, way] = wanted(table, "sort").split(","), heads = headsOf(table);
  const column = /^\d+$/.test(index) && heads[index] ? Number(index) : null, down = way === "down";
  const together = wanted(table, "together");
  for (const box of controlsOf(table, "together")) box.checked = Boolean(together);
  for (const body of table.tBodies) {
    if (!given.has(body)) given.set(body, rowsOf(body));
    const rows = given.get(body).map((row) => {
      const text = column === null ? "" : row.cells[column].dataset.v ?? "";
      return { row, text, number: number(text) };
    });
    rows.sort((a, b) => {
      const apart = together ? compare(a.row.dataset.method, b.row.dataset.method) : 0;
      // Missing values stay at the end in both orders.
      return apart || (a.text === "") - (b.text === "") || (down ? order(b, a) : order(a, b));
    });
    body.append(...rows.map(({ row }) => row));
  }
  heads.forEach((head, i) => {
    if (i === column) head.setAttribute("aria-sort", down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
}

// A row is shown if each word of the filter begins a word that the row or its group's title shows: `lora` does not find `qlora`.
const textOf = (cell) => (cell.hidden ? "" : [...cell.childNodes].map((part) => (part.className === "sr" ? "" : part.textContent)).join(""));
function filter(table) {
  const [box] = controlsOf(table, "filter"), text = wanted(table, "filter");
  if (!box) return;
  if (box.value !== text) box.value = text;
  const words = text.split(/\s+/).filter(Boolean)
    .map((word) => new RegExp(`(?<![a-z0-9.])${word.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&")}`, "i"));
  const chosen = controlsOf(table, "facet").map((select) => {
    select.value = wanted(table, select.dataset.facet);
    return [select.dataset.facet, select.value];
  }).filter(([, value]) => value);
  let shown = 0, all = 0;
  for (const body of table.tBodies) {
    const before = shown;
    for (const row of rowsOf(body)) {
      const content = words.length && [body.dataset.group, ...[...row.cells].map(textOf)].join(" ");
      row.hidden = !words.every((word) => word.test(content)) || chosen.some(([name, value]) => row.dataset[name] !== value);
      shown += !row.hidden;
      all += 1;
    }
    body.hidden = shown === before;
  }
  const none = shown ? "" : words.length ? ". No row has words that begin like this." : ". No row has all these properties.";
  toolsOf(table).querySelector("output").textContent = words.length || chosen.length ? `${count(shown)} of ${count(all)} rows${none}` : `${count(all)} ${all === 1 ? "row" : "rows"}`;
}

function showColumns(table) {
  const chosen = wanted(table, "columns"), keys = chosen.split(",");
  controlsOf(table, "column").forEach((box, i) => {
    box.checked = chosen ? keys.includes(box.dataset.column) : box.defaultChecked;
    for (const row of [table.tHead.rows[0], ...[...table.tBodies].flatMap(rowsOf)]) row.cells[i + 1].hidden = !box.checked;
  });
}

function show(table) {
  sort(table);
  showColumns(table);
  filter(table);
}

// The rows of a large table are data, until a reader opens the table. parts.html.j2 has the same rows as HTML.
const stored = JSON.parse(document.getElementById("stored")?.textContent ?? '{"tables": {}}');
function element(tag, text, attributes, data = {}) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...text);
  for (const [name, value] of Object.entries(data)) if (value !== null && value !== "") made.dataset[name] = value;
  return made;
}
function fieldOf([value, ...parts], head) {
  const more = parts.length > 5 ? JSON.stringify(parts.pop()) : "";
  const [text, small, why, tone, flag] = [0, 1, 2, 3, 4].map((i) => stored.texts[parts[i] ?? 0]);
  const content = [text];
  if (flag) content.unshift(element("span", ["!", element("span", [` ${flag}`])], { className: "badge open" }, { flag }), " ");
  if (small) content.push(" ", element("small", [small]));
  if (value === null && why) content.push(element("span", [` ${why}`], { className: "sr" }));
  const className = (head.classList.contains("number") ? "number " : "") + tone;
  return element("td", content, { className, ...(why && { title: why }) }, { v: value, more });
}
function open(table) {
  const groups = stored.tables[table.id], heads = headsOf(table).slice(1);
  if (!groups) return;
  delete stored.tables[table.id];
  for (const [group, rows] of groups) {
    const title = element("th", [element("span", [group])], { colSpan: heads.length + 1, scope: "rowgroup" });
    const made = rows.map(([index, anchor, ...fields]) => {
      const [name, title, record, href, facets] = stored.rows[index];
      const head = element("th", [anchor ? name : element("a", [name], { href })], { scope: "row", title }, { v: name });
      const cells = fields.map((field, i) => fieldOf(field, heads[i]));
      return element("tr", [head, ...cells], anchor && { id: anchor }, { record, ...(anchor && facets) });
    });
    table.append(element("tbody", [element("tr", [title], { className: "group" }), ...made], {}, { group }));
  }
  table.closest("details").open = true;
  show(table);
}
// A link to a row that is still data opens the table of the row.
function openFor(id) {
  const found = id && Object.entries(stored.tables).find(([, groups]) => groups.some(([, rows]) => rows.some((row) => row[1] === id)));
  if (!found) return;
  open(document.getElementById(found[0]));
  location.replace(`#${id}`); // now the row exists, and is the target
}

function anchor() {
  try {
    return decodeURIComponent(location.hash.slice(1));
  } catch {
    return ""; // no valid text, so no id of this page
  }
}

function followHash() {
  if (!location.hash.startsWith("#?")) {
    openFor(anchor());
    const row = document.querySelector("tr:target"), table = row?.closest("table.sortable");
    if (!table) return;
    table.closest("details.stored")?.setAttribute("open", "");
    if (row.hidden) {
      for (const name of ["filter", ...controlsOf(table, "facet").map((select) => select.dataset.facet)]) state.delete(`${table.id}.${name}`);
      filter(table);
    }
    // The row comes into view in the table, then the table with its head in the window.
    row.scrollIntoView();
    table.closest(".scroll").scrollIntoView();
    return;
  }
  state = new URLSearchParams(location.hash.slice(2));
  const named = tables.filter((table) => [...state.keys()].some((key) => key.startsWith(`${table.id}.`)));
  named.forEach(open);
  tables.forEach(show);
  if (named.length) toolsOf(named[0]).scrollIntoView();
}

for (const table of tables) {
  headsOf(table).forEach((head, i) => {
    const button = element("button", [head.textContent], { type: "button" });
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      remember(`${table.id}.sort`, `${i},${head.getAttribute("aria-sort") === "ascending" ? "down" : "up"}`);
      sort(table);
    });
  });
  toolsOf(table)?.addEventListener("input", ({ target }) => {
    const { filter: words, facet, column, together } = target.dataset;
    if (words || facet) remember(`${table.id}.${facet ?? "filter"}`, target.value);
    if (together) remember(`${table.id}.together`, target.checked ? "yes" : "");
    if (column) {
      const boxes = controlsOf(table, "column"), usual = boxes.every((box) => box.checked === box.defaultChecked);
      remember(`${table.id}.columns`, usual ? "" : boxes.filter((box) => box.checked).map((box) => box.dataset.column).join() || "none");
    }
    if (together) sort(table);
    if (column) showColumns(table);
    filter(table);
  });
  table.closest("details.stored")?.addEventListener("toggle", () => open(table));
  filter(table);
}
document.querySelectorAll(".tools").forEach((tools) => { tools.hidden = false; });
addEventListener("hashchange", followHash);
addEventListener("load", followHash); // after the browser's own scroll to an anchor
followHash();
