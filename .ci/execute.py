"""Execute chapters top to bottom in place and store their outputs: python .ci/execute.py book/00_quickstart.ipynb …"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

for path in map(Path, sys.argv[1:]):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # time stamps
    nbformat.write(notebook, path)
    print(f"{path}: executed, {path.stat().st_size / 1000:.0f} kB")
