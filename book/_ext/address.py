"""Feeds all that needs the book's address from one line of _config.yml.

The line is `repository: url`. Links to files of the repository are written as
relative paths, which GitHub and JupyterLab follow; here they become addresses.
The address of the site is that of GitHub Pages unless `html: baseurl` says
another. The notebooks' first cell, which runs where there is no _config.yml, is
shown and offered with the address too; in the files `.ci/address.py` writes it.
"""

import re
from pathlib import Path

from docutils import nodes
from sphinx import addnodes

CLONE = re.compile(r"(?<=git clone -q --depth 1 )https://\S+")


def pages_address(repository: str) -> str:
    """Where GitHub Pages puts the site of a repository."""
    owner, name = repository.strip("/").split("/")[-2:]
    host = f"{owner.lower()}.github.io"
    return f"https://{host}/" + ("" if name.lower() == host else f"{name}/")


def settle(_, config) -> None:
    """Give the address to those who ask Sphinx for it."""
    theme = config.html_theme_options
    repository = theme["repository_url"].strip("/")
    config.repository = repository
    config.repository_files = f"{repository}/blob/{theme['repository_branch']}"
    config.html_baseurl = config.html_baseurl or pages_address(repository)
    config.ogp_site_url = config.html_baseurl


def with_address(notebook: str, config) -> str:
    """The text of a notebook whose first cell fetches this book."""
    return CLONE.sub(config.repository, notebook)


def write_into_cell(app, _, source: list[str]) -> None:
    """Show the set-up cell of a page with the address."""
    source[0] = with_address(source[0], app.config)


def link_to_repository(app, document: nodes.document) -> None:
    """Turn links to files into addresses, in place of copies to download."""
    for link in list(document.findall(addnodes.download_reference)):
        if link.get("reftype") != "myst":
            continue
        _, path = app.env.relfn2path(link["reftarget"], app.env.docname)
        inside = Path(path).resolve().relative_to(Path(app.srcdir).resolve())
        address = f"{app.config.repository_files}/{inside.as_posix()}"
        [text] = link.children
        reference = nodes.reference("", "", *text.children, refuri=address)
        link.replace_self(reference)


def setup(app) -> dict:
    """Called by Sphinx."""
    app.add_config_value("repository", "", "env")
    app.add_config_value("repository_files", "", "env")
    app.connect("config-inited", settle, priority=900)
    app.connect("source-read", write_into_cell)
    # before Sphinx collects what is to be downloaded
    app.connect("doctree-read", link_to_repository, priority=100)
    return {
        "version": "1",
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
