"""Puts "Copy this recipe" above the first cell tagged `recipe` of a page.

The block is folded and has the code of all cells with the tag, to be copied at
once.
"""

from docutils import nodes

TAG = "recipe"
TITLE = "Copy this recipe"


def cells_of(document: nodes.document) -> list[nodes.container]:
    """The cells with the tag, in order; MyST-NB makes a class of each tag."""
    found = document.findall(nodes.container)
    return [each for each in found if f"tag_{TAG}" in each["classes"]]


def code_of(cells: list[nodes.container]) -> str:
    """The code of the cells, two empty lines between them, no outputs."""
    blocks = [
        block.astext().strip("\n")
        for cell in cells
        for each in cell.findall(nodes.container)
        if "cell_input" in each["classes"]
        for block in each.findall(nodes.literal_block)
    ]
    return "\n\n\n".join(blocks) + "\n"


def add_recipe(_, document: nodes.document) -> None:
    """Insert the block into a page that was read, if there are such cells."""
    cells = cells_of(document)
    if not cells:
        return
    code = code_of(cells)
    classes = ["tip", "dropdown", TAG]
    block = nodes.admonition("", nodes.title("", TITLE), classes=classes)
    block += nodes.literal_block(code, code, language="python")
    first = cells[0]
    first.parent.insert(first.parent.index(first), block)


def setup(app) -> dict:
    """Called by Sphinx."""
    app.connect("doctree-read", add_recipe)
    return {
        "version": "1",
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
