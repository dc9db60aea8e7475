"""Writes what stands at the root of the site: index.html and llms.txt.

The first page lies in a folder. Whoever shares the site's address shares
index.html, which leads there, so it has the tags of that page. llms.txt
(llmstxt.org) lists every page for programs, and its text: a chapter's script, a
page's Markdown.
"""

from pathlib import Path

from sphinxext.opengraph import get_description

INDEX = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<title>{title}</title>
{tags}<link rel="canonical" href="{site}{page}.html" />
<meta http-equiv="refresh" content="0; url={page}.html" />
</head>
<body><p><a href="{page}.html">{title}</a></p></body>
</html>
"""


def write_index(app, page: str, _, context: dict, doctree) -> None:
    """Lead from the root to the first page, if it lies elsewhere."""
    if page != app.config.root_doc or page == "index":
        return
    text = INDEX.format(
        title=app.config.html_title,
        tags=context["metatags"],
        site=app.config.html_baseurl,
        page=page,
    )
    (Path(app.outdir) / "index.html").write_text(text, encoding="utf-8")


def pages_in_order(env) -> list[str]:
    """The root of the book, and its pages as its contents list them."""
    todo, found = [env.config.root_doc], []
    while todo:
        page = todo.pop(0)
        found.append(page)
        todo = env.toctree_includes.get(page, []) + todo
    return found


def write_list(app, exception) -> None:
    """Write llms.txt."""
    if exception or app.builder.name != "html":
        return
    env, site = app.env, app.config.html_baseurl
    lines = [f"# {app.config.html_title}", ""]
    for page in pages_in_order(env):
        title = env.titles[page].astext()
        begins = get_description(env.get_doctree(page), 200, {title})
        if page == app.config.root_doc:
            lines += [f"> {begins}", "", "## Pages", ""]
        suffix = Path(env.doc2path(page)).suffix
        source = f"{page}{'.py' if suffix == '.ipynb' else suffix}"
        line = f"- [{title}]({site}{page}.html): {begins}"
        lines.append(f"{line} [As text]({site}_sources/{source})")
    text = "\n".join([*lines, ""])
    (Path(app.outdir) / "llms.txt").write_text(text, encoding="utf-8")


def setup(app) -> dict:
    """Called by Sphinx."""
    app.connect("html-page-context", write_index, priority=900)
    app.connect("build-finished", write_list)
    return {
        "version": "1",
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
