"""Draw the picture that a link to the book shows, and the icon of its pages: python .ci/link_picture.py"""

import sys
from pathlib import Path

import seaborn as sns
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from helpers.plots import PALETTE  # noqa: E402

STATIC = ROOT / "book" / "_static"
BLUE, ORANGE = sns.color_palette(PALETTE)[:2]
INK = "#1f2933"


def main() -> None:
    """Draw and store: 1200 × 630 pixels, as the sites that show links want it."""
    figure = plt.figure(figsize=(12, 6.3), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 1200), ylim=(0, 630))
    axes.axis("off")
    axes.text(70, 500, "Head or Prompt?", fontsize=66, weight="bold", color=INK, va="center")
    axes.text(72, 408, "Text classification with causal LLMs", fontsize=32, color=INK, va="center")
    for height, marker, color, text in (
        (262, "o", BLUE, "put a classification head on the model"),
        (172, "D", ORANGE, "or tune it to say the label?"),
    ):
        axes.plot(98, height, marker, color=color, markersize=26)
        axes.text(150, height, text, fontsize=34, color=INK, va="center")
    axes.text(72, 66, "A book of notebooks that run: a laptop is enough", fontsize=24, color="#52606d", va="center")
    figure.savefig(STATIC / "link.png", dpi=100)

    icon = plt.figure(figsize=(0.64, 0.64))
    axes = icon.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 64), ylim=(0, 64))
    axes.axis("off")
    axes.plot(20, 43, "o", color=BLUE, markersize=26)
    axes.plot(43, 21, "D", color=ORANGE, markersize=20)
    icon.savefig(STATIC / "favicon.png", dpi=100, transparent=True)


if __name__ == "__main__":
    main()
