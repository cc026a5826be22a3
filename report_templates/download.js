"use strict";
// Save tables as CSV and the data as JSON, and copy a text.
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

// Each shown column becomes a column of values in its unit, then a column for each further detail, e.g. an end of an interval.
function columnsOf(table, rows) {
  return headsOf(table).flatMap((head, i) => {
    if (head.hidden) return [];
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
    const columns = columnsOf(table, rows), groups = rows.map((row) => row.closest("tbody").dataset.group ?? "");
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

for (const button of document.querySelectorAll("[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    getSelection().selectAllChildren(source); // so that the keyboard can copy it, if the browser refuses
    await navigator.clipboard?.writeText(source.textContent).then(() => { button.textContent = "Copied"; }, () => {});
  });
}
