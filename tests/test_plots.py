import base64
import io
import re

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
from IPython.display import Markdown
from matplotlib.colors import same_color
from PIL import Image

from helpers.plots import PALETTE, dot_plot, glue, set_style, with_alt_text

RESULTS = pd.DataFrame(
    {
        "accuracy": [20.0, 80.0, 90.0],
        "accuracy_low": [15.0, 75.0, 86.0],
        "accuracy_high": [26.0, 84.0, 93.0],
        "macro_f1": [6.0, 79.0, 91.0],
        "macro_f1_low": [5.0, 74.0, 85.0],
        "macro_f1_high": [7.0, 85.0, 94.0],
    },
    index=pd.Index(["majority", "probe", "head"], name="approach"),
)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def markers(figure):
    return [container.lines[0] for container in figure.axes[0].containers]


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_one_dot_with_its_interval_for_each_approach(metric):
    figure = dot_plot(RESULTS, metric)
    axes = figure.axes[0]
    dots = markers(figure)
    assert [(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots] == list(zip(RESULTS[metric], range(3), strict=True))
    for container, (_, row) in zip(axes.containers, RESULTS.iterrows(), strict=True):
        (segment,) = container.lines[2][0].get_segments()
        assert np.allclose(segment[:, 0], [row[f"{metric}_low"], row[f"{metric}_high"]])
    assert [text.get_text() for text in axes.texts] == [f"{value:.1f}" for value in RESULTS[metric]]


def test_labels_are_on_the_y_axis_in_the_order_of_the_table():
    axes = dot_plot(RESULTS).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(RESULTS.index)
    bottom, top = axes.get_ylim()
    assert bottom > 2 and top < 0  # first row on top
    assert axes.get_xlabel() == "accuracy on the test set, % (95 % interval)"


def test_highlight_differs_by_colour_and_by_shape():
    plain, _, chosen = markers(dot_plot(RESULTS, highlight=("head",)))
    assert same_color(chosen.get_color(), sns.color_palette("colorblind")[0])
    assert same_color(chosen.get_markerfacecolor(), chosen.get_color())
    assert same_color(plain.get_color(), "0.35") and same_color(plain.get_markerfacecolor(), "white")
    assert chosen.get_marker() != plain.get_marker()


def test_default_colours_are_the_colourblind_palette():
    dot_plot(RESULTS)
    assert sns.color_palette() == sns.color_palette("colorblind")


def test_alt_text_is_escaped_and_in_the_image():
    figure = dot_plot(RESULTS)
    html = with_alt_text(figure, 'Dots: "head" leads & <b> 90 %').data
    assert 'alt="Dots: &quot;head&quot; leads &amp; &lt;b&gt; 90 %"' in html
    data = re.search(r'src="data:image/png;base64,([^"]+)"', html).group(1)
    assert base64.b64decode(data).startswith(b"\x89PNG")
    assert not plt.fignum_exists(figure.number)


def test_a_colour_that_is_rare_is_kept():
    set_style()
    colors = sns.color_palette(PALETTE)[:8]
    figure, axes = plt.subplots(figsize=(7, 4))
    for place, color in enumerate(colors):
        axes.plot(place, place, "s", color=color, markerfacecolor="white", markeredgewidth=2)
        axes.annotate("many shades of grey", (place, place))
    data = re.search(r"base64,([^\"]+)", with_alt_text(figure, "Eight squares.").data).group(1)
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).reshape(-1, 3).astype(int)
    for color in colors:
        assert np.abs(pixels - np.round(255 * np.array(color))).sum(axis=1).min() <= 6


def test_keep_shows_the_value_under_its_name(monkeypatch):
    shown = []
    monkeypatch.setattr("helpers.plots.display", lambda data, raw, metadata: shown.append((data, raw, metadata)))
    glue("answer", 42)
    ((data, raw, metadata),) = shown
    assert data["text/plain"] == "42" and raw
    assert metadata["scrapbook"] == {"name": "answer", "mime_prefix": ""}


def test_kept_markdown_can_be_pasted_as_html(monkeypatch):
    shown = []
    monkeypatch.setattr("helpers.plots.display", lambda data, raw, metadata: shown.append(data))
    glue("answer", Markdown("**42** documents"))
    assert shown[0]["text/html"].strip() == "<p><strong>42</strong> documents</p>"
