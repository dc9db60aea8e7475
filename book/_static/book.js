// Folds a table that is longer than a screen behind a button. Without this script, and on paper, it is whole.
const MOST = 16, SHOWN = 8;

document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll(".bd-content article table")) {
    const rows = [...(table.tBodies[0]?.rows ?? [])];
    if (rows.length <= MOST) continue;
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
