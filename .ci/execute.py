"""Execute chapters top to bottom in place and store their outputs: python .ci/execute.py book/00_quickstart.ipynb …

On what and when goes into the notebook's metadata, and from there into the table of book/machine.md; without chapters, only that
table is written anew.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers.lab import sweeps  # noqa: E402

HEAD = "| executed on | device | threads | Python | chapters |\n|---|---|---|---|---|\n"


def machine_table() -> str:
    """A row for all chapters that were executed alike, from their metadata."""
    rows = defaultdict(list)
    for path in sorted((ROOT / "book").glob("*.ipynb")):
        made = nbformat.read(path, as_version=4).metadata.get("executed")
        if made is None:
            continue
        name = path.stem.split("_")[0] if path.stem[0].isdigit() else path.stem.replace("_", " ")
        rows[made["date"], made["device"], made["threads"], made["python"]].append(f"[{name}]({path.stem})")
    lines = [" | ".join([*map(str, how), ", ".join(chapters)]) for how, chapters in sorted(rows.items())]
    return HEAD + "".join(f"| {line} |\n" for line in lines)


def main(paths: list[str]) -> None:
    """Execute chapters and write the table anew."""
    for path in map(Path, paths):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(path.parent)}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # time stamps
        made = sweeps.provenance()
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
