// Folds a table that is longer than a screen behind a button. Without this script, and on paper, it is whole.
const MOST = 16, SHOWN = 8;

document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll(".bd-content article table")) {
    const rows = [...(table.tBodies[0]?.rows ?? [])];
    if (rows.length <= MOST || table.closest(".explorer")) continue; // the explorer has pages of its own
    const rest = rows.slice(SHOWN);
    const button = document.createElement("button");
    button.className = "unfold";
    button.type = "button";
    const fold = (folded) => {
      rest.forEach((row) => row.classList.toggle("folded", folded));
      button.textContent = folded ? `Show all ${rows.length} rows` : `Show the first ${SHOWN} rows`;
      button.setAttribute("aria-expanded", String(!folded));
    };
    button.addEventListener("click", () => fold(button.getAttribute("aria-expanded") === "true"));
    fold(true);
    const box = table.closest(".pst-scrollable-table-container") ?? table;
    box.after(button);
  }
});

// An entry of the bibliography has a role that is no longer allowed in the list around it (DPUB-ARIA 1.1): it is a list's item.
document.addEventListener("DOMContentLoaded", () => {
  for (const entry of document.querySelectorAll("[role=doc-biblioentry]")) entry.setAttribute("role", "listitem");
});

// What a cell prints in columns keeps them on a phone, where other lines break (book.css).
document.addEventListener("DOMContentLoaded", () => {
  for (const printed of document.querySelectorAll(".bd-content .cell_output pre")) {
    const lines = printed.textContent.split("\n").filter((line) => line.trim());
    const columns = lines.filter((line) => /\S {2,}\S/.test(line));
    printed.classList.toggle("columns", lines.length > 1 && columns.length > lines.length / 2);
  }
});

// A figure, table or code that is wider than its box fades at the right edge until it is scrolled to its end.
document.addEventListener("DOMContentLoaded", () => {
  const boxes = ".output.text_html, .pst-scrollable-table-container, .highlight pre";
  const look = (box) => box.classList.toggle("goes-on", box.scrollLeft + box.clientWidth < box.scrollWidth - 1);
  const changed = new ResizeObserver((entries) => entries.forEach(({ target }) => look(target)));
  for (const box of document.querySelectorAll(`.bd-content article :is(${boxes})`)) {
    box.addEventListener("scroll", () => look(box), { passive: true });
    changed.observe(box);
  }
});
