// Sort a table by the column whose header is pressed; show the rows of one score and ratio at a time.
"use strict";
document.querySelectorAll("table.sortable").forEach((table) => {
  const headers = [...table.tHead.rows[0].cells];
  const value = (row, column) => {
    const cell = row.cells[column];
    const number = cell.dataset.value;
    return number === undefined ? cell.textContent.trim() : number === "" ? NaN : Number(number);
  };
  const compare = (a, b) => {
    if (typeof a === "string") return a.localeCompare(b, undefined, { numeric: true });
    return a - b;
  };
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const descending = header.getAttribute("aria-sort") === "ascending";
      headers.forEach((other) => other.setAttribute("aria-sort", "none"));
      header.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      const undefinedLast = (row) => Number.isNaN(value(row, column));
      rows.sort((a, b) => {
        if (undefinedLast(a) || undefinedLast(b)) return undefinedLast(a) - undefinedLast(b);
        const order = compare(value(a, column), value(b, column));
        return descending ? -order : order;
      });
      table.tBodies[0].append(...rows);
    });
  });
});
document.querySelectorAll(".filter").forEach((filter) => {
  const select = filter.querySelector("select");
  const table = document.getElementById(select.dataset.table);
  const show = () => {
    for (const row of table.tBodies[0].rows) row.hidden = select.value !== "" && row.dataset.stack !== select.value;
    table.classList.toggle("one-stack", select.value !== "");
  };
  filter.hidden = false;
  select.addEventListener("change", show);
  show();
});
