// Tables of pandas, styled or not, are sorted by the column whose head is clicked; again, the other way round.
for (const table of document.querySelectorAll("table.dataframe, .output_html table")) {
  const body = table.tBodies[0], head = table.tHead && table.tHead.rows[0];
  if (!head || !body || table.tHead.rows.length > 1 || body.querySelector("[rowspan]")) continue;
  const key = (row, i) => {
    const text = row.cells[i].dataset.value ?? row.cells[i].textContent.trim();
    const number = parseFloat(text.replace(/^[<>]\s/, "").replaceAll(",", "").replace("−", "-"));
    return Number.isNaN(number) ? text : number;
  };
  const order = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : typeof a === typeof b ? a.localeCompare(b, undefined, { numeric: true })
    : typeof a === "number" ? -1 : 1;
  [...head.cells].forEach((cell, i) => {
    const sort = () => {
      const sign = cell.ariaSort === "ascending" ? -1 : 1;
      for (const other of head.cells) other.ariaSort = "none";
      cell.ariaSort = sign > 0 ? "ascending" : "descending";
      body.append(...[...body.rows].sort((a, b) => sign * order(key(a, i), key(b, i))));
    };
    cell.ariaSort = "none";
    cell.tabIndex = 0;
    cell.title = "sort by this column";
    cell.addEventListener("click", sort);
    cell.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });
}
