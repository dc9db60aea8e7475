"""Print the built site as one PDF, through Chromium: python .ci/pdf.py [--site _build/html] [--out _build/head-or-prompt.pdf]

A cover, a table of contents with page numbers, the pages in the order of _toc.yml, each on a new sheet, a number on every sheet.
Links between pages stay within the PDF, and its outline has all headings. Code that the site folds away is left out.
Chromium does not say on which sheet a page begins; pypdf reads that from the PDF.
"""

import argparse
import contextlib
import functools
import http.server
import shutil
import sys
import threading
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import yaml
from playwright.sync_api import Page, sync_playwright
from pypdf import PdfReader, PdfWriter
from pypdf.generic import DictionaryObject, TextStringObject

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PATIENCE = 300_000  # milliseconds
LEFT_OUT = "Code that the site folds away is left out here, and so is what needs a browser. The site and its notebooks have both."
FOOTER = '<div style="width: 100%; text-align: center; font: 9px sans-serif"><span class="pageNumber"></span></div>'

STYLE = """
@page { size: A4; margin: 18mm 16mm 20mm; }
html, body { font-size: 12px; background: white; color: black; height: auto; overflow: visible; }
.sheet { break-before: page; }
.sheet::before { content: ""; display: block; height: 1px; }
.cover { height: 230mm; display: flex; flex-direction: column; justify-content: center; gap: 1.5rem; }
.cover h1 { font-size: 3.6rem; line-height: 1.15; margin: 0; }
.cover p { font-size: 1.4rem; margin: 0; }
.contents ol { list-style: none; padding: 0; margin: 0; }
.contents li { display: flex; gap: 0.5rem; margin: 0; font-size: 1.2rem; line-height: 1.75; }
.contents li.part { font-weight: 700; margin-top: 0.8rem; }
.contents a { color: inherit; text-decoration: none; }
.contents i { flex: 1; border-bottom: 1px dotted; margin-bottom: 0.5em; }
.sheet a { overflow-wrap: anywhere; }
.sheet pre { white-space: pre-wrap !important; overflow-wrap: anywhere; }
.sheet * { max-width: 100%; }
.sheet :is(pre, table, div) { overflow: visible !important; }
.sheet :is(img, svg, tr, table, .sd-card) { break-inside: avoid; }
.sheet :is(pre, div:not(.sd-card, .cheat-part)) { break-inside: auto !important; orphans: 3; widows: 3; }
.sheet :is(h1, h2, h3, h4, .admonition-title) { break-after: avoid; }
.sheet .output img { width: auto !important; max-width: 150mm !important; }
"""

# Makes the book of the page that is open: its style sheets, and the texts of all pages. Gives their titles.
ASSEMBLE = """async ({ parts, style, cover }) => {
    const root = location.origin, names = parts.flatMap(part => part.pages);
    const place = (name, fragment) => name.replaceAll('/', '-') + (fragment ? '--' + fragment : '');
    const make = (tag, name, ...children) => {
        const element = Object.assign(document.createElement(tag), { className: name });
        element.append(...children);
        return element;
    };
    const sheets = {};
    for (const name of names) {
        const address = `${root}/${name}.html`;
        const page = new DOMParser().parseFromString(await (await fetch(address)).text(), 'text/html');
        const text = page.querySelector('article.bd-article');
        for (const folded of text.querySelectorAll('details.hide')) {
            const cell = folded.closest('.cell');
            if (cell.matches('.tag_hide-input, .tag_claim')) folded.remove();
            else folded.replaceWith(...[...folded.childNodes].filter(each => each.tagName != 'SUMMARY'));
        }
        for (const each of text.querySelectorAll('.explorer')) each.replaceWith(make('p', '', each.textContent));
        const away = 'script, noscript, button, .headerlink, .admonition.recipe';
        text.querySelectorAll(away).forEach(each => each.remove());
        text.querySelectorAll('details').forEach(each => each.open = true);
        text.querySelectorAll('[id]').forEach(each => each.id = place(name, each.id));
        for (const each of text.querySelectorAll('[src]')) each.src = new URL(each.getAttribute('src'), address);
        for (const link of text.querySelectorAll('a[href]')) {
            const goal = new URL(link.getAttribute('href'), address);
            const target = decodeURIComponent(goal.pathname).slice(1).replace(/[.]html$/, '');
            const within = goal.origin === root && names.includes(target);
            link.href = within ? '#' + place(target, decodeURIComponent(goal.hash.slice(1))) : goal;
        }
        sheets[name] = make('section', 'sheet', ...text.childNodes);
        sheets[name].id = place(name);
    }
    const titles = Object.fromEntries(names.map(name => [name, sheets[name].querySelector('h1').textContent.trim()]));
    const list = make('ol', '');
    for (const { caption, pages } of parts) {
        if (caption) list.append(make('li', 'part', caption));
        for (const name of pages) {
            const link = make('a', '', titles[name]), number = make('span', 'number', '000');
            link.href = '#' + place(name);
            number.dataset.page = name;
            list.append(make('li', '', link, make('i', ''), number));
        }
    }
    const front = make('section', 'cover', make('h1', '', cover.title), ...cover.lines.map(line => make('p', '', line)));
    const contents = make('section', 'sheet contents', make('h1', '', 'Contents'), list);
    const book = make('main', 'bd-content', make('article', 'bd-article', front, contents, ...names.map(name => sheets[name])));
    document.head.append(make('style', '', style));
    document.body.replaceChildren(book);
    document.documentElement.dataset.theme = 'light';
    document.title = cover.title;
    await Promise.all([...document.images].map(image => image.decode()));
    return titles;
}"""
NUMBER = "numbers => document.querySelectorAll('.number').forEach(e => e.textContent = numbers[e.dataset.page])"


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves the site without a word."""

    def log_message(self, *_):
        """Say nothing."""


def parts_of(toc: dict) -> list[dict]:
    """The parts of the book with their pages, in order; the front page has no caption."""
    parts = [{"caption": part.get("caption"), "pages": [each["file"] for each in part["chapters"]]} for part in toc["parts"]]
    return [{"caption": None, "pages": [toc["root"]]}, *parts]


@contextlib.contextmanager
def served(site: Path) -> Iterator[str]:
    """The address under which the site's files are, on this machine alone."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def numbers_of(pdf: Path, names: list[str]) -> dict[str, int]:
    """On which sheet each page of the site begins, the cover being sheet 1."""
    reader = PdfReader(pdf)
    places = {name.lstrip("/"): place for name, place in reader.named_destinations.items()}
    return {name: reader.get_destination_page_number(places[name.replace("/", "-")]) + 1 for name in names}


def bookmarks(above: DictionaryObject) -> Iterator[DictionaryObject]:
    """The entries of a PDF's outline below this one."""
    entry = above.get("/First")
    while entry is not None:
        entry = entry.get_object()
        yield entry
        yield from bookmarks(entry)
        entry = entry.get("/Next")


def finish(pdf: Path, cover: dict) -> None:
    """Title and author; and a heading on top of a sheet, which Chromium writes twice into the outline, once."""
    writer = PdfWriter(PdfReader(pdf), incremental=True)
    writer.add_metadata({"/Title": cover["title"], "/Author": cover["author"]})
    for entry in bookmarks(writer.get_outline_root()):
        title = str(entry["/Title"])
        half = title[: len(title) // 2]
        if half * 2 == title:
            entry[next(key for key in entry if key == "/Title")] = TextStringObject(half)
    writer.write(pdf)


def print_book(page: Page, out: Path, parts: list[dict], cover: dict) -> dict[str, int]:
    """Print the book of the page that is open; gives the sheet on which each page of the site begins."""
    names = [name for part in parts for name in part["pages"]]
    page.evaluate(ASSEMBLE, {"parts": parts, "style": STYLE, "cover": cover})
    options = {"path": out, "prefer_css_page_size": True, "display_header_footer": True, "print_background": True}
    options |= {"header_template": "<span></span>", "footer_template": FOOTER}
    page.pdf(**options)  # to see where the pages begin
    numbers = numbers_of(out, names)
    page.evaluate(NUMBER, numbers)
    page.pdf(**options, outline=True, tagged=True)
    finish(out, cover)
    if numbers_of(out, names) != numbers:
        sys.exit("The numbers in the table of contents moved what they count. Give them more room in STYLE.")
    return numbers


def main(arguments: list[str] | None = None) -> None:
    """Print the book."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--site", type=Path, default=ROOT / "_build" / "html", help="what jupyter-book built (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "_build" / "head-or-prompt.pdf", help="the PDF (%(default)s)")
    given = parser.parse_args(arguments)
    config, toc = (yaml.safe_load((ROOT / name).read_text(encoding="utf-8")) for name in ("_config.yml", "_toc.yml"))
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        sys.exit("No Chromium to print with; on Debian: apt-get install chromium")
    if not (given.site / f"{toc['root']}.html").exists():
        sys.exit(f"There is no site in {given.site}. Build it first: jupyter-book build .")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"Printed on {date.today().isoformat()}", LEFT_OUT, f"© {config['copyright']}"]
    cover = {"title": config["title"], "author": config["author"], "lines": [config["author"], *lines]}
    with served(given.site) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=OPTIONS)
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(f"{address}/{toc['root']}.html")
        numbers = print_book(page, given.out, parts_of(toc), cover)
        browser.close()
    sheets = len(PdfReader(given.out).pages)
    print(f"{given.out}: {len(numbers)} pages of the site on {sheets} sheets, {given.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
