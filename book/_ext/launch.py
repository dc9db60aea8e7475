"""Adds to a chapter's buttons: open it on Kaggle, download it as a script.

Kaggle's image is made from Colab's and sets the same variable, so the set-up
cell works there as well. A script is the notebook in the percent format, which
editors open as cells; its lines with ! and % are written out, so run it with
IPython.
"""

from pathlib import Path

import nbformat
from address import with_address
from IPython.core.inputtransformer2 import TransformerManager

KAGGLE = "https://www.kaggle.com/kernels/welcome?src="


def group(context: dict, label: str) -> list[dict]:
    """The buttons of a group in the header of a page, to be added to."""
    found = [b for b in context["header_buttons"] if b.get("label") == label]
    return found[0]["buttons"] if found else []


def add_buttons(app, page: str, _, context: dict, doctree) -> None:
    """Put both on the page of a notebook."""
    if doctree is None or context.get("page_source_suffix") != ".ipynb":
        return
    address = f"{app.config.repository_files}/{page}.ipynb"
    kaggle = {
        "type": "link",
        "text": "Kaggle",
        "tooltip": "Launch on Kaggle",
        "icon": "fab fa-kaggle",
        "url": KAGGLE + address,
    }
    script = {
        "type": "link",
        "text": ".py",
        "tooltip": "Download as a script, for IPython",
        "icon": "fas fa-file-code",
        "label": "download-script-button",
        "url": f"{context['pathto']('_sources', 1)}/{page}.py",
    }
    group(context, "launch-buttons").append(kaggle)
    group(context, "download-buttons").insert(1, script)


def script_of(notebook: nbformat.NotebookNode) -> str:
    """All cells as Python, Markdown as comments."""
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            code = TransformerManager().transform_cell(cell.source)
            parts.append(f"# %%\n{code.strip()}\n")
        else:
            lines = [f"# {each}".rstrip() for each in cell.source.splitlines()]
            parts.append("\n".join(["# %% [markdown]", *lines, ""]))
    return "\n".join(parts)


def write_downloads(app, exception) -> None:
    """Write the scripts, and the notebooks with the book's address."""
    if exception or app.builder.name != "html":
        return
    for page in app.env.found_docs:
        path = Path(app.env.doc2path(page))
        if path.suffix != ".ipynb":
            continue
        text = with_address(path.read_text(encoding="utf-8"), app.config)
        script = script_of(nbformat.reads(text, as_version=4))
        goal = Path(app.outdir) / "_sources" / f"{page}.ipynb"
        goal.parent.mkdir(parents=True, exist_ok=True)
        goal.write_text(text, encoding="utf-8")
        goal.with_suffix(".py").write_text(script, encoding="utf-8")


def setup(app) -> dict:
    """Called by Sphinx."""
    app.connect("html-page-context", add_buttons, priority=900)
    app.connect("build-finished", write_downloads)
    return {
        "version": "1",
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
