"""Execute chapters top to bottom in place and store their outputs: python .ci/execute.py book/00_quickstart.ipynb …

On what and when goes into the notebook's metadata, and from there into the table of book/machine.md; without chapters, only that
table is written anew.
"""

import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers import runs  # noqa: E402

HEAD = "| chapter | executed on | device | threads | Python |\n|---|---|---|---|---|\n"


def machine_table() -> str:
    """A row for each chapter, from its metadata."""
    rows = []
    for path in sorted((ROOT / "book").glob("*.ipynb")):
        made = nbformat.read(path, as_version=4).metadata.get("executed")
        if made is None:
            continue
        shown = [made["date"], made["device"], made["threads"], made["python"]]
        rows.append(" | ".join(["", f"[{path.stem}]({path.stem})", *map(str, shown), ""]).strip())
    return HEAD + "".join(f"{row}\n" for row in rows)


def main(paths: list[str]) -> None:
    """Execute chapters and write the table anew."""
    for path in map(Path, paths):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(path.parent)}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # time stamps
        made = runs.provenance()
        made.pop("commit")  # the one before the outputs
        notebook.metadata["executed"] = made
        nbformat.write(notebook, path)
        print(f"{path}: executed, {path.stat().st_size / 1000:.0f} kB")
    page = ROOT / "book" / "machine.md"
    before, _, after = page.read_text(encoding="utf-8").partition(HEAD)
    rest = re.sub(r"\A(\|.*\n)*", "", after)
    page.write_text(before + machine_table() + rest, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
