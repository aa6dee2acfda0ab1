// ---- the table of cases sorts
const byId = (id) => document.getElementById(id);

function sortBy(header, column) {
  const body = byId("rows"), rising = header.getAttribute("aria-sort") === "descending";
  for (const other of header.parentNode.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", rising ? "ascending" : "descending");
  const value = (row) => row.children[column].dataset.value ?? row.children[column].textContent;
  const rows = [...body.children].sort((a, b) => {
    const [u, v] = [value(a), value(b)];
    if (u === "" || v === "") return (u === "") - (v === "");  // what has no value comes last either way
    const order = isNaN(u) || isNaN(v) ? u.localeCompare(v, undefined, { numeric: true }) : u - v;
    return rising ? order : -order;
  });
  body.append(...rows);
}

document.querySelectorAll("#table thead th").forEach((header, column) =>
  header.querySelector("button").addEventListener("click", () => sortBy(header, column)));
