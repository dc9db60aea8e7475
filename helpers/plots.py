"""Figures in one style: a colour-blind palette, sizes to be read on a phone, never colour alone; chapters write the alt text."""

import base64
import io
from html import escape

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from IPython.core.formatters import format_display_data
from IPython.display import HTML, display
from markdown_it import MarkdownIt
from PIL import Image

PALETTE = "colorblind"
_LOOKS = {"fmt": "o", "color": "C0"}, {"fmt": "D", "color": "C1"}  # approach 1 and approach 2


def set_style() -> None:
    """seaborn's white grid with the colour-blind palette; called by the figures below."""
    sns.set_theme(style="whitegrid", palette=PALETTE, context="notebook", rc={"figure.dpi": 100})


def dot_plot(results: pd.DataFrame, metric: str = "accuracy", highlight: tuple[str, ...] = ()) -> plt.Figure:
    """A dot with its 95 % interval for each row of `evaluation.table`, in its order, in percent.

    `metric` has `_low` and `_high` beside it. `highlight`: a head and an instruction, in their colours; the others are hollow.
    """
    set_style()
    figure, axes = plt.subplots(figsize=(7, 0.55 * len(results) + 1.2), layout="constrained")
    for position, (name, row) in enumerate(results.iterrows()):
        value, below, above = row[metric], row[metric] - row[f"{metric}_low"], row[f"{metric}_high"] - row[metric]
        look = _LOOKS[highlight.index(name)] if name in highlight else {"fmt": "s", "color": "0.35", "markerfacecolor": "white"}
        axes.errorbar(value, position, xerr=[[below], [above]], markersize=9, capsize=4, linewidth=2, **look)
        axes.annotate(f"{value:.1f}", (value, position), xytext=(0, 9), textcoords="offset points", ha="center")
    axes.set(yticks=range(len(results)), yticklabels=results.index, ylim=(len(results) - 0.4, -0.7))
    axes.set_xlabel(f"{metric.replace('_', ' ').replace('f1', 'F1')} on the test set, % (95 % interval)")
    axes.grid(axis="y", visible=False)
    sns.despine(figure, left=True)
    return figure


def with_alt_text(figure: plt.Figure, alt_text: str) -> HTML:
    """The figure as an image that carries its own alt text, for Jupyter, Colab and the site alike."""
    figure.savefig(drawn := io.BytesIO(), format="png", dpi=110)
    plt.close(figure)
    few = Image.open(drawn).convert("RGB").quantize(method=Image.Quantize.FASTOCTREE)  # a quarter of the bytes, rare colours kept
    few.save(small := io.BytesIO(), format="png", optimize=True)
    data = base64.b64encode(small.getvalue()).decode()
    return HTML(f'<img src="data:image/png;base64,{data}" alt="{escape(alt_text)}" style="max-width:100%">')


def glue(name: str, value: object) -> None:
    """Show `value` and keep it under `name` for other pages, as `myst_nb.glue` does, which a reader need not install."""
    data, metadata = format_display_data(value)
    if "text/markdown" in data:  # another page can paste HTML, but not Markdown
        data["text/html"] = MarkdownIt().render(data["text/markdown"])
    display(data, raw=True, metadata=metadata | {"scrapbook": {"name": name, "mime_prefix": ""}})
