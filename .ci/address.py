"""Write the book's address into what cannot read _config.yml: python .ci/address.py

The first cell of every notebook fetches the book on Colab and Kaggle, and CITATION.cff names the repository. Everything else
takes the address from `repository: url` in _config.yml when the site is built (`book/_ext/address.py`).
"""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
PLACES = r'(?<=git clone -q --depth 1 )https://[^\s"]+(?= book-repo)|(?<=^repository-code: ")[^"]+'


def main(root: Path = ROOT) -> None:
    """Change what differs, and say which files did."""
    address = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["repository"]["url"]
    for path in [root / "CITATION.cff", *sorted((root / "book").glob("*.ipynb"))]:
        text = path.read_text(encoding="utf-8")
        if (new := re.sub(PLACES, address, text, flags=re.M)) != text:
            path.write_text(new, encoding="utf-8")
            print(f"{path.relative_to(root)}: {address}")


if __name__ == "__main__":
    main()
