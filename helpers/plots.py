"""Figures in one style: a colour-blind palette, sizes that can be read on a phone, never colour alone.

Alt text belongs to the cell that shows the figure (`alt_text`), because only the chapter knows what it should say.
"""

import base64
import html as markup
import io
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from IPython.core.formatters import format_display_data
from IPython.display import HTML, display
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from PIL import Image

PALETTE = "colorblind"


def set_style() -> None:
    """seaborn's white grid with the colour-blind palette; called by the figures below."""
    sns.set_theme(style="whitegrid", palette=PALETTE, context="notebook", rc={"figure.dpi": 100})


def dot_plot(results: pd.DataFrame, metric: str = "accuracy", highlight: tuple[str, ...] = ()) -> Figure:
    """One dot with its 95 % interval for each approach, in the order of the table.

    Args:
        results: `evaluation.table`, in percent.
        metric: a column that has `_low` and `_high` beside it.
        highlight: approaches drawn filled and in the accent colour; the others are hollow.
    """
    set_style()
    accent, plain = sns.color_palette(PALETTE)[0], "0.35"
    figure, axes = plt.subplots(figsize=(7, 0.55 * len(results) + 1.2), layout="constrained")
    for position, (name, row) in enumerate(results.iterrows()):
        chosen = name in highlight
        axes.errorbar(
            row[metric],
            position,
            xerr=[[row[metric] - row[f"{metric}_low"]], [row[f"{metric}_high"] - row[metric]]],
            fmt="o" if chosen else "s",
            color=accent if chosen else plain,
            markerfacecolor=accent if chosen else "white",
            markersize=9,
            capsize=4,
            linewidth=2,
        )
        axes.annotate(f"{row[metric]:.1f}", (row[metric], position), xytext=(0, 9), textcoords="offset points", ha="center")
    axes.set_yticks(range(len(results)), results.index)
    axes.set_ylim(len(results) - 0.4, -0.7)
    axes.set_xlabel(f"{metric.replace('_', ' ').replace('f1', 'F1')} on the test set, % (95 % interval)")
    axes.grid(axis="y", visible=False)
    sns.despine(figure, left=True)
    return figure


def with_alt_text(figure: Figure, alt_text: str) -> HTML:
    """The figure as an image that carries its own alt text, for Jupyter, Colab and the site alike."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    plt.close(figure)
    few = Image.open(drawn).convert("RGB").quantize(method=Image.Quantize.FASTOCTREE)  # a quarter of the bytes, rare colours kept
    few.save(small, format="png", optimize=True)
    data = base64.b64encode(small.getvalue()).decode()
    return HTML(f'<img src="data:image/png;base64,{data}" alt="{markup.escape(alt_text)}" style="max-width:100%">')


def glue(name: str, value: Any) -> None:
    """Show `value` and keep it under `name`, so that other pages can paste it: `{glue} name` with `:doc:`.

    What `myst_nb.glue` does, without asking a reader of one chapter to install what builds the site.
    """
    data, metadata = format_display_data(value)
    if "text/markdown" in data:  # another page can paste HTML, but not Markdown
        data["text/html"] = MarkdownIt().render(data["text/markdown"])
    display(data, raw=True, metadata={**metadata, "scrapbook": {"name": name, "mime_prefix": ""}})
