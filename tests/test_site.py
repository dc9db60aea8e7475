"""The built site in a real browser, Chromium driven by Playwright, without a network."""

import ast
import functools
import gzip
import http.server
import importlib.util
import io
import json
import os
import re
import shutil
import threading
from collections import namedtuple
from urllib.parse import quote, unquote, urljoin, urlsplit
from xml.etree import ElementTree

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from PIL import Image
from pypdf import PdfReader
from test_book import CONFIG, ROOT, URL, build

PAGES = re.findall(r"(?:root|file): (\S+)", (ROOT / "_toc.yml").read_text())
NOTEBOOKS = [name for name in PAGES if (ROOT / f"{name}.ipynb").exists()]
FORK = "https://github.com/Somebody/a-fork"  # the site is built as a fork that has changed the one line
SITE = "https://somebody.github.io/a-fork/"
BRANCH = CONFIG["repository"]["branch"]
HOSTS = {
    "arxiv.org",
    "attack.mitre.org",
    "colab.research.google.com",
    "creativecommons.org",
    "docs.cleanlab.ai",
    "docs.vllm.ai",
    "github.com",
    "huggingface.co",
    "onnxruntime.ai",
    "somebody.github.io",
    "thinkingmachines.ai",
    "unicode.org",
    "www.apache.org",
    "www.kaggle.com",
    "www.wipo.int",
}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NO_CHROMIUM = "no Chromium for the tests of the site; on Debian: apt-get install chromium"
OPTIONS = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"
WIDE, PHONE = {"width": 1300, "height": 900}, {"width": 390, "height": 844}
HEAVY = 1_000_000  # bytes of a page with all that it loads, compressed as GitHub Pages does
SMALL = 14  # pixels
PATIENCE = 1000  # milliseconds until the first picture
CONTRAST = 4.5  # WCAG 2, AA

Visit = namedtuple("Visit", "name page status errors outside")

every_page = pytest.mark.parametrize("name", PAGES)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The site's folder, built once from the stored outputs with a fork's address, and what the command gave."""
    out = tmp_path_factory.mktemp("site")
    config = (ROOT / "_config.yml").read_text().replace(f"url: {URL}\n", f"url: {FORK}\n")
    assert config.count(FORK) == 1
    (out / "_config.yml").write_text(config.replace("execute_notebooks: force", "execute_notebooks: 'off'"))
    result = build(ROOT, out, "--config", str(out / "_config.yml"), "-W", "-n", "--keep-going")
    return out / "_build" / "html", result


@pytest.fixture(scope="module")
def site(built):
    folder, result = built
    assert (folder / "index.html").exists(), result.stderr[-2000:]
    return folder


def test_site_builds_from_stored_outputs_without_a_warning(built):
    folder, result = built
    assert result.returncode == 0, result.stderr[-2000:]
    for path in (ROOT / "book").glob("*.ipynb"):
        assert f"blob/main/book/{path.name}" in (folder / "book" / f"{path.stem}.html").read_text()  # the Colab button
    index = (folder / "book" / "index.html").read_text()
    assert 'alt="Instruction tuning minus head' in index and "closest to the paper +" in index  # pasted from chapter 06


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_site_has_one_block_to_copy_for_each_recipe(site, name):
    cells = [cell for cell in nbformat.read(ROOT / f"{name}.ipynb", 4).cells if "recipe" in cell.metadata.get("tags", [])]
    blocks = BeautifulSoup((site / f"{name}.html").read_text(), "html.parser").select("div.admonition.recipe")
    if not cells:
        assert blocks == []
        return
    [block] = blocks
    assert "dropdown" in block["class"]
    assert block.select_one(".admonition-title").get_text() == "Copy this recipe"
    [code] = block.select("div.highlight pre")
    assert code.get_text() == "\n\n\n".join(cell.source for cell in cells) + "\n"
    assert block.find_next("div", class_="cell").find("pre").get_text().strip() == cells[0].source.strip()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        (pytest.fail if os.environ.get("BOOK_BROWSER_REQUIRED") else pytest.skip)(NO_CHROMIUM)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{option}" for option in OPTIONS.split()])
        yield chromium
        chromium.close()


def open_page(browser, address, path, **options):
    """A page in a context of its own, with what went wrong while it loaded and what it asked of other hosts."""
    context = browser.new_context(**{"viewport": WIDE} | options)
    context.set_default_timeout(30_000)
    page, errors, outside = context.new_page(), [], []

    def route(request):
        if request.request.url.startswith((address, "data:")):
            request.continue_()
        else:
            outside.append(request.request.url)
            request.abort()

    def from_here(message):
        return message.location.get("url", "").startswith(address) or "net::ERR_FAILED" not in message.text

    context.route("**/*", route)
    page.on("console", lambda message: message.type == "error" and from_here(message) and errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    status = page.goto(f"{address}/{path}").status
    return Visit(path, page, status, errors, outside)


@pytest.fixture(scope="module", params=PAGES)
def visit(request, browser, address):
    """Every page, loaded once for all the tests that only look at it."""
    visit = open_page(browser, address, f"{request.param}.html", permissions=["clipboard-read", "clipboard-write"])
    yield visit._replace(name=request.param)
    visit.page.context.close()


@functools.cache
def parsed(site, path):
    return BeautifulSoup((site / path).read_text(), "html.parser")


@functools.cache
def anchors(site, path):
    """What a link may have behind its `#`; nothing is fine."""
    return {"", *(tag["id"] for tag in parsed(site, path).find_all(id=True))} if path.endswith(".html") else {""}


def html_files(site):
    return sorted(str(path.relative_to(site)) for path in site.rglob("*.html") if "_static" not in path.parts)


def links(site, path):
    """(tag, address) of everything that a page links to or loads, but not what it has in itself."""
    for tag in parsed(site, path).find_all(["a", "link", "img", "script", "iframe", "source"]):
        link = tag.get("href") or tag.get("src")
        if link and not link.startswith("data:"):
            yield tag.name, link


def external(site, path):
    return [(tag, link) for tag, link in links(site, path) if urlsplit(link).scheme or urlsplit(link).netloc]


def assert_loads(visit):
    assert visit.status == 200
    visit.page.wait_for_load_state("networkidle")
    assert visit.errors == []
    assert visit.outside == []
    broken = visit.page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src.slice(0, 80))")
    assert broken == []


def test_page_loads_without_an_error_and_without_another_host(visit):
    assert_loads(visit)


@pytest.mark.parametrize("name", ["search", "genindex"])
def test_page_that_sphinx_adds_loads_too(browser, address, name):
    visit = open_page(browser, address, f"{name}.html")
    assert_loads(visit)
    visit.page.context.close()


def test_every_page_of_the_contents_is_built_and_the_front_page_leads_to_it(site, browser, address):
    assert {f"{name}.html" for name in PAGES} <= set(html_files(site))
    front = open_page(browser, address, "index.html")
    front.page.wait_for_url(f"{address}/{PAGES[0]}.html")
    front.page.context.close()


def test_no_internal_link_is_dead(site):
    dead = []
    for path in html_files(site):
        for _, link in set(links(site, path)) - set(external(site, path)):
            goal = urlsplit(urljoin(f"http://site/{path}", link))
            target = unquote(goal.path).lstrip("/") or "index.html"
            if not (site / target).is_file() or unquote(goal.fragment) not in anchors(site, target):
                dead.append((path, link))
    assert dead == []


def test_external_links_are_well_formed_and_lead_to_known_hosts(site):
    found = {link for path in html_files(site) for tag, link in external(site, path)}
    assert len(found) > 50
    wrong = [link for link in found if not re.fullmatch(r"https://[\w-]+(\.[\w-]+)+(/[^\s<>\"]*)?", link)]
    assert wrong == []
    assert {urlsplit(link).netloc for link in found} - HOSTS == set(), "not in the list of hosts in this file"
    loaded = [(path, link) for path in html_files(site) for tag, link in external(site, path) if tag not in ("a", "link")]
    assert loaded == []


@every_page
def test_colab_links_open_this_chapter(site, name):
    colab = [link for tag, link in links(site, f"{name}.html") if tag == "a" and "colab.research" in link]
    expected = f"https://colab.research.google.com/github/Somebody/a-fork/blob/{BRANCH}/{name}.ipynb"
    assert set(colab) == ({expected} if name in NOTEBOOKS else set())


@every_page
def test_buttons_open_kaggle_edit_the_page_and_download_it(site, name):
    suffix = ".ipynb" if name in NOTEBOOKS else ".md"
    to = {link for tag, link in links(site, f"{name}.html") if tag == "a"}
    assert f"{FORK}/edit/{BRANCH}/{name}{suffix}" in to
    assert (f"https://www.kaggle.com/kernels/welcome?src={FORK}/blob/{BRANCH}/{name}.ipynb" in to) == (name in NOTEBOOKS)
    downloads = {each["href"] for each in parsed(site, f"{name}.html").select(".dropdown-download-buttons a")}
    assert downloads == {f"../_sources/{name}{each}" for each in ([".ipynb", ".py"] if name in NOTEBOOKS else [".md"])}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_downloads_have_every_cell_and_the_address(site, name):
    cells = nbformat.read(ROOT / f"{name}.ipynb", 4).cells
    downloaded = nbformat.read(site / "_sources" / f"{name}.ipynb", 4).cells
    assert [cell.source for cell in downloaded] == [cell.source.replace(URL, FORK) for cell in cells]
    script = (site / "_sources" / f"{name}.py").read_text()
    ast.parse(script)  # lines with ! and % are written out
    assert f"git clone -q --depth 1 {FORK} book-repo" in script
    parts = re.split(r"^# %%(?: \[markdown\])?\n", script, flags=re.M)[1:]
    assert len(parts) == len(cells)
    for part, cell in zip(parts, cells, strict=True):
        if cell.cell_type == "markdown":
            text = [line.removeprefix("#").removeprefix(" ") for line in part.strip().splitlines()]
            assert [line.rstrip() for line in cell.source.splitlines()] == text
        elif not re.search(r"^\s*[!%]", cell.source, re.M):
            assert cell.source.strip() in part


def test_one_line_of_the_configuration_gives_the_address_everywhere(site):
    """Also to links into the repository: no page, script, notebook or list has the address that the line had before."""
    files = [path for path in site.rglob("*") if path.suffix in (".html", ".py", ".ipynb", ".txt", ".xml", ".js")]
    assert [path.name for path in files if URL in path.read_text(encoding="utf-8")] == []
    owner, name = URL.split("/")[-2:]
    assert [path.name for path in files if f"{owner.lower()}.github.io/{name}" in path.read_text(encoding="utf-8")] == []
    to_files = {link for name in PAGES for _, link in links(site, f"{name}.html") if link.startswith(f"{FORK}/blob/")}
    paths = {link.removeprefix(f"{FORK}/blob/{BRANCH}/") for link in to_files}
    assert {"tests/test_traps.py", "helpers/lab/memory.py", "book/scripts/train.py"} <= paths
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def tags_of(page):
    """The properties of a page for those who show links to it."""
    return {tag.get("property") or tag.get("name"): tag["content"] for tag in page.find_all("meta", content=True)}


@pytest.mark.parametrize("name", ["index", *PAGES])
def test_links_to_a_page_are_shown_with_title_words_and_picture(site, name):
    page = parsed(site, f"{name}.html")
    tags = tags_of(page)
    target = PAGES[0] if name == "index" else name  # the root of the site leads to the first page
    assert tags["og:url"] == f"{SITE}{target}.html" == page.find("link", rel="canonical")["href"]
    assert tags["og:title"] == parsed(site, f"{target}.html").find("h1").find(string=True)
    assert len(tags["og:description"]) > 50 and tags["description"] == tags["og:description"]
    assert tags["twitter:card"] == "summary_large_image" and len(tags["og:image:alt"]) > 30
    picture = Image.open(site / tags["og:image"].removeprefix(SITE))
    assert picture.size == (1200, 630)


def test_the_sitemap_and_llms_txt_list_every_page(site):
    listed = [element.text for element in ElementTree.parse(site / "sitemap.xml").iter() if element.tag.endswith("}loc")]
    assert sorted(listed) == sorted(f"{SITE}{name}.html" for name in PAGES)
    text = (site / "llms.txt").read_text()
    lines = re.findall(r"^- \[(.+)\]\((\S+)\): (.{40,}) \[As text\]\((\S+)\)$", text, re.M)
    assert [address for _, address, _, _ in lines] == [f"{SITE}{name}.html" for name in PAGES]
    assert all((site / source.removeprefix(SITE)).is_file() for *_, source in lines)
    assert text.startswith(f"# {CONFIG['title']}\n\n> ") and text.count("\n- ") == len(PAGES)


def test_every_entry_of_the_glossary_is_linked_from_where_it_is_used_first(site):
    entries = {dt["id"] for dt in parsed(site, "book/glossary.html").select("dl.glossary dt")}
    linked = set()
    for name in PAGES:
        article = parsed(site, f"{name}.html").find("article")
        here = [link["href"].partition("#")[2] for link in article.select("a.term")]
        assert len(here) == len(set(here)), name
        assert not article.select(":is(h1, h2, h3, pre, .cell_output) a.term"), name
        linked |= set(here)
    headings = {
        dt["id"] for dl in parsed(site, "book/glossary.html").select("dl.glossary") for dt in dl.select("dd + dt, dt:first-child")
    }
    assert headings - linked == set() and linked <= entries


def test_every_paper_is_in_the_bibliography_and_cited_from_a_page(site):
    page = parsed(site, "book/references.html")
    papers = {each["id"] for each in page.select("div.citation")}
    assert len(papers) == len(re.findall(r"^@", (ROOT / "book" / "references.bib").read_text(), re.M))  # none that nobody cites
    known = set(re.findall(r"arXiv:(\d+\.\d+)", page.get_text()))
    for name in PAGES:
        spoken_of = {link.split("/abs/")[1] for _, link in links(site, f"{name}.html") if "arxiv.org/abs/" in link}
        assert {re.sub(r"v\d$", "", number) for number in spoken_of} <= known, name
    versions = set(re.findall(r"arXiv:2512\.12677(v\d)", page.get_text()))
    assert versions == {"v1", "v2", "v3"}


@every_page
def test_images_have_alt_text(site, name):
    page = parsed(site, f"{name}.html")
    assert [str(image)[:80] for image in page.find_all("img") if not (image.get("alt") or "").strip()] == []
    figures = page.find("article").find_all("img")
    assert all(len(image["alt"]) > 30 for image in figures)


def test_page_with_all_it_loads_is_no_more_than_1_mb(visit, site):
    loaded = visit.page.evaluate("[location.href, ...performance.getEntriesByType('resource').map(entry => entry.name)]")
    files = {site / urlsplit(each).path.lstrip("/") for each in loaded if each.startswith("http://127")}
    assert len(files) > 5
    packed = {".html", ".css", ".js", ".svg", ".json", ".txt"}
    sizes = [len(gzip.compress(each.read_bytes(), 6)) if each.suffix in packed else each.stat().st_size for each in files]
    assert sum(sizes) <= HEAVY


@every_page
def test_search_for_a_title_finds_the_page_first(site, searching, address, name):
    title = parsed(site, f"{name}.html").find("h1").find(string=True)
    searching.goto(f"{address}/search.html?q={quote(title)}")
    searching.wait_for_function("document.querySelector('.search-summary')?.textContent.match(/found|did not match/)")
    found = searching.eval_on_selector_all("#search-results li a", "links => links.map(a => new URL(a.href).pathname)")
    assert found[:1] == [f"/{name}.html"], (title, found)


@pytest.fixture(scope="module")
def searching(browser, address):
    visit = open_page(browser, address, "search.html")
    yield visit.page
    visit.page.context.close()


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_search_button_of_a_page_leads_to_the_results(browser, address, size):
    page = open_page(browser, address, f"{PAGES[0]}.html", viewport=size).page
    buttons = page.locator("button[aria-label=Search]:visible")
    assert buttons.count() == 1
    buttons.click()
    page.locator("#pst-search-dialog input[type=search]").fill("quantization")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=quantization")
    page.locator("#search-results a[href*='02_quantization.html']").first.wait_for()
    page.context.close()


def shown_cells(name):
    """The sources of the cells that the page of a notebook shows, and in the same order."""
    cells = nbformat.read(ROOT / f"{name}.ipynb", 4).cells
    hidden = {"remove-input", "remove-cell"}
    shown = [cell for cell in cells if cell.cell_type == "code" and not hidden & set(cell.metadata.get("tags", []))]
    return [cell.source.replace(URL, FORK) for cell in shown]


def test_copy_buttons_copy_the_code_of_their_cell(visit):
    page = visit.page
    page.set_viewport_size(WIDE)
    copied = page.evaluate(
        """async () => {
            const texts = [], wait = () => new Promise(done => setTimeout(done, 25));
            for (const button of document.querySelectorAll('.cell_input .copybtn')) {
                button.click();
                let text = await navigator.clipboard.readText();
                for (let i = 0; i < 40 && text == texts.at(-1); i++) { // no two cells are equal
                    await wait();
                    text = await navigator.clipboard.readText();
                }
                texts.push(text);
            }
            return texts;
        }"""
    )
    expected = shown_cells(visit.name) if visit.name in NOTEBOOKS else []
    assert [text.rstrip("\n") for text in copied] == [source.rstrip("\n") for source in expected]


def test_a_click_with_the_mouse_copies_too(browser, address):
    visit = open_page(browser, address, f"{NOTEBOOKS[0]}.html", permissions=["clipboard-read", "clipboard-write"])
    cell = visit.page.locator(".cell_input:visible").first
    cell.hover()
    cell.locator(".copybtn").click()
    code = visit.page.evaluate("navigator.clipboard.readText()")
    assert code.strip() in [source.strip() for source in shown_cells(NOTEBOOKS[0])]
    visit.page.context.close()


# Opens what is folded, stops what moves, and gives every piece of text with its element.
PREPARE = """() => {
    document.head.insertAdjacentHTML('beforeend', '<style>* { transition: none !important }</style>');
    document.querySelectorAll('article details').forEach(e => e.open = true);
    document.querySelectorAll('article .toggle-hidden').forEach(e => e.classList.remove('toggle-hidden'));
    const seen = { opacityProperty: true, visibilityProperty: true };
    window.texts = selector => {
        const walker = document.createTreeWalker(document.querySelector(selector), NodeFilter.SHOW_TEXT), found = [];
        while (walker.nextNode()) {
            const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
            if (text && !element.closest('script, style, noscript') && element.checkVisibility(seen))
                found.push([text.slice(0, 40), element]);
        }
        return found;
    };
}"""

# What is wider than the window, but for what scrolls in a box of its own.
STICKS_OUT = """() => [...document.querySelectorAll('article *')].filter(e => {
    if (e.getBoundingClientRect().right <= innerWidth + 1 || !e.checkVisibility()) return false;
    for (let p = e.parentElement; p && p.tagName != 'ARTICLE'; p = p.parentElement)
        if (['auto', 'scroll'].includes(getComputedStyle(p).overflowX)) return false;
    return true;
}).map(e => e.tagName + ' ' + e.textContent.slice(0, 60))"""

# Text whose colour is too near to that of its ground, with the ratio of WCAG 2.
PALE = """least => {
    const numbers = css => {
        const [r, g, b, alpha = 1] = css.match(/[\\d.]+/g).map(Number);
        return css.startsWith('color(') ? [255 * r, 255 * g, 255 * b, alpha] : [r, g, b, alpha];
    };
    const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
    const ground = e => {
        const layers = [];
        for (; e; e = e.parentElement) layers.push(numbers(getComputedStyle(e).backgroundColor));
        return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
    };
    const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = c => 0.2126 * linear(c[0] / 255) + 0.7152 * linear(c[1] / 255) + 0.0722 * linear(c[2] / 255);
    const found = new Set();
    for (const [text, element] of texts('.bd-main')) {
        const below = ground(element), colour = over(numbers(getComputedStyle(element).color), below);
        const [dark, bright] = [light(below), light(colour)].sort((a, b) => a - b);
        const ratio = (bright + 0.05) / (dark + 0.05);
        if (ratio < least) found.add(ratio.toFixed(1) + ' ' + element.tagName + ' ' + element.className + ': ' + text);
    }
    return [...found];
}"""

# Lightness (0 to 1) of the corner of every figure, as it lies on the ground that the style gives it.
CORNERS = """() => [...document.querySelectorAll('article img')].map(image => {
    const canvas = Object.assign(document.createElement('canvas'), { width: 1, height: 1 }), paper = canvas.getContext('2d');
    paper.fillStyle = getComputedStyle(image).backgroundColor;
    paper.fillRect(0, 0, 1, 1);
    paper.drawImage(image, 0, 0);
    const [r, g, b, alpha] = paper.getImageData(0, 0, 1, 1).data;
    return (r + g + b) / 765 * (alpha / 255);
})"""


def test_page_can_be_read_on_a_phone(visit):
    page = visit.page
    page.set_viewport_size(PHONE)
    page.evaluate(PREPARE)
    assert page.evaluate(STICKS_OUT) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    sizes = page.evaluate("texts('article').map(([text, e]) => [text, parseFloat(getComputedStyle(e).fontSize)])")
    assert sizes
    assert [text for text, size in sizes if 0 < size < SMALL] == []  # a card's link has its name for screen readers only
    shown = "images => images.map(i => i.getBoundingClientRect().width / i.naturalWidth)"
    scales = page.eval_on_selector_all("article .output img", shown)
    assert all(scale >= 0.59 for scale in scales)  # 66 pixels an inch; with fewer the labels of the figures cannot be read


def test_on_a_phone_what_is_wider_fades_until_it_is_scrolled_and_printed_columns_stay(browser, address):
    page = open_page(browser, address, "book/index.html", viewport=PHONE).page
    box = page.locator("article .output.text_html:has(> img)").nth(1)
    page.wait_for_function("box => box.matches('.goes-on')", arg=box.element_handle())
    inside = box.evaluate("box => box.clientWidth / box.firstElementChild.getBoundingClientRect().width")
    assert inside > 0.75  # of the figure with the book's answer
    box.evaluate("box => box.scrollTo(box.scrollWidth, 0)")
    page.wait_for_function("box => !box.matches('.goes-on')", arg=box.element_handle())
    page.goto(f"{address}/book/04_embedding_head.html")
    report = page.locator("pre", has_text="macro avg").last
    line = float(report.evaluate("e => parseFloat(getComputedStyle(e).lineHeight)"))
    n_lines = len(report.text_content().rstrip("\n").split("\n"))
    assert report.bounding_box()["height"] < (n_lines + 2.5) * line  # no line of it breaks
    page.context.close()


# When the largest picture of the first screen was painted, in milliseconds after the address was asked for.
PAINTED = """() => new Promise(found => {
    new PerformanceObserver(list => list.getEntries().forEach(each => {
        if (each.element?.tagName == 'IMG') found(each.renderTime || each.loadTime);
    })).observe({ type: 'largest-contentful-paint', buffered: true });
    setTimeout(() => found(null), 10000);
})"""


def test_the_first_picture_of_the_front_page_is_there_within_a_second(browser, address):
    """From this machine, which may have other work: the best of up to ten visits, each with nothing kept from the one before."""
    times = []
    while len(times) < 10 and min(times, default=PATIENCE) >= PATIENCE:
        context = browser.new_context(viewport=WIDE)  # without the eyes of open_page on every request, which take time
        page = context.new_page()
        page.goto(f"{address}/{PAGES[0]}.html")
        times.append(page.evaluate(PAINTED))
        context.close()
        assert times[-1] is not None, "no picture on the first screen"
    assert min(times) < PATIENCE, times


# What scrolls sideways in a box of its own.
SCROLLS = """() => [...document.querySelectorAll('article *')].filter(e => e.scrollWidth > e.clientWidth + 1
    && ['auto', 'scroll'].includes(getComputedStyle(e).overflowX) && e.checkVisibility())
    .map(e => e.tagName + ' ' + e.scrollWidth + ' > ' + e.clientWidth + ' ' + e.textContent.trim().slice(0, 60))"""


def test_nothing_scrolls_sideways_on_a_laptop(visit):
    page = visit.page
    page.set_viewport_size(WIDE)
    page.evaluate(PREPARE)
    assert page.evaluate(STICKS_OUT) == []
    assert page.evaluate(SCROLLS) == []


def test_a_long_table_is_folded_and_opens(browser, address):
    page = open_page(browser, address, "book/09_one_gpu_8b.html").page
    button = page.locator("button.unfold")
    assert button.text_content() == "Show all 17 rows" and button.get_attribute("aria-expanded") == "false"
    rows = button.locator("xpath=preceding::table[1]/tbody/tr")
    assert rows.locator("visible=true").count() == 8
    button.focus()
    page.keyboard.press("Enter")
    assert rows.locator("visible=true").count() == rows.count() == 17
    page.get_by_role("button", name="Show the first 8 rows").click()
    page.emulate_media(media="print")
    assert rows.locator("visible=true").count() == 17
    page.context.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_page_can_be_read_in_light_and_dark(visit, theme):
    page = visit.page
    page.set_viewport_size(WIDE)
    page.evaluate("theme => document.documentElement.dataset.theme = theme", theme)
    page.evaluate(PREPARE)
    assert page.evaluate("texts('.bd-main').length") > 10
    assert page.evaluate(PALE, CONTRAST) == []
    assert all(lightness > 0.6 for lightness in page.evaluate(CORNERS))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_first_visit_follows_the_system_and_a_choice_is_kept(browser, address, theme):
    page = open_page(browser, address, f"{PAGES[0]}.html", color_scheme=theme).page
    shown = "document.documentElement.dataset.theme"
    assert page.evaluate(shown) == theme
    other = {"light": "dark", "dark": "light"}[theme]
    for _ in range(3):  # light, dark, as the system
        if page.evaluate(shown) != other:
            page.locator(".theme-switch-button:visible").first.click()
    page.reload()
    assert page.evaluate(shown) == other
    page.context.close()


def test_page_has_no_serious_finding_of_axe(visit):
    """The last of the tests that share a page: code becomes plain text here, which is faster; its colours stand above."""
    from axe_playwright_python.sync_playwright import Axe

    page = visit.page
    page.set_viewport_size(WIDE)
    page.evaluate("document.documentElement.dataset.theme = 'light'")
    page.evaluate(PREPARE)
    page.evaluate("document.querySelectorAll('article pre').forEach(e => e.textContent = e.textContent)")
    # The side bars are the same everywhere, and the articles' colours were looked at above.
    contrast = {"enabled": visit.name == PAGES[0]}
    found = Axe().run(page, options={"resultTypes": ["violations"], "rules": {"color-contrast": contrast}}).response
    assert found["testEngine"]["name"] == "axe-core" and len(found["passes"]) > 20
    serious = [each for each in found["violations"] if each["impact"] in ("serious", "critical")]
    assert [(each["id"], each["nodes"][0]["html"][:200]) for each in serious] == []


# ---- every recorded run (the page's JSON itself: test_explorer)


@pytest.fixture
def explorer(browser, address):
    visit = open_page(browser, address, "book/explorer.html")
    yield visit.page
    assert visit.errors == [] and visit.outside == []
    visit.page.context.close()


@pytest.fixture(scope="module")
def recorded(site):
    """What the page holds: the runs as dictionaries, and the settings."""
    text = parsed(site, "book/explorer.html").find("script", id="records").string
    assert len(text.encode()) <= 500_000
    data = json.loads(text)
    runs, texts = data["runs"], set(data["runs"]["texts"])
    cells = [zip(runs["columns"], row, strict=True) for row in runs["rows"]]
    rows = [{n: runs["strings"][v] if n in texts and v is not None else v for n, v in row} for row in cells]
    return rows, data["settings"]


def scores_shown(page):
    return [float(text.split()[0]) for text in page.locator(".runs tbody tr td:nth-child(9)").all_inner_texts()]


def test_runs_are_filtered_and_sorted_with_the_keyboard_alone(explorer, recorded):
    rows, _ = recorded
    status = explorer.locator("[data-part=runs] [role=status]")
    assert status.inner_text().startswith(f"{len(rows)} of {len(rows)} runs")
    for control in explorer.locator(".explorer :is(input, select)").all():
        assert explorer.locator(f"label[for='{control.get_attribute('id')}']").inner_text().strip()
    explorer.locator("#runs-q").focus()
    explorer.keyboard.type("headlines instruction")
    wanted = [r for r in rows if all(word in " ".join(map(str, r.values())).lower() for word in ("headlines", "instruction"))]
    assert status.inner_text().startswith(f"{len(wanted)} of {len(rows)} runs") and 0 < len(wanted) < len(rows)
    explorer.locator("#runs-how").select_option("chosen")
    chosen = [row for row in wanted if row["how"] == "validation"]
    assert status.inner_text().startswith(f"{len(chosen)} of")
    head = explorer.locator(".runs th", has_text="Macro-F1")
    for _ in range(40):  # with the tabulator from the filters to the heading
        if explorer.evaluate("document.activeElement.textContent.startsWith('Macro-F1')"):
            break
        explorer.keyboard.press("Tab")
    explorer.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    best = sorted((row["macro_f1"] for row in chosen), reverse=True)
    assert scores_shown(explorer) == pytest.approx(best[:25], abs=0.06)
    explorer.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert explorer.locator(".runs th[aria-sort=none]").count() == 8
    assert scores_shown(explorer) == pytest.approx(best[::-1][:25], abs=0.06)
    explorer.reload()  # the address remembers the filters
    assert status.inner_text().startswith(f"{len(chosen)} of")


def test_a_row_says_at_which_rate_it_ran_and_who_chose_it(explorer, recorded):
    rows, _ = recorded
    explorer.locator("#runs-how").select_option("fixed")
    explorer.locator("#runs-file").select_option("learning_rate")
    first = explorer.locator(".runs tbody tr").first
    of_file = [row for row in rows if row["file"] == "learning_rate"]
    rate = float(first.locator("td").nth(6).inner_text())
    assert rate in {row["rate"] for row in of_file} and first.locator("td").nth(7).inner_text() == "fixed"
    button = first.locator("button")
    button.focus()
    explorer.keyboard.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"
    details = explorer.locator(".runs tr.details").inner_text()
    assert "book/results/learning_rate.jsonl" in details and "Base model" in details
    explorer.keyboard.press("Enter")
    assert explorer.locator(".runs tr.details").count() == 0
    explorer.get_by_role("button", name="Show all runs").click()
    assert explorer.locator("[data-part=runs] [role=status]").inner_text().startswith(f"{len(rows)} of")
    explorer.locator("#runs-q").fill("no run has these words")
    assert explorer.locator("[data-part=runs] [role=status]").inner_text().startswith("None of")
    with pytest.raises(Exception, match="Timeout"):
        explorer.get_by_role("button", name="Next rows").click(timeout=500)  # there are none


def full_name(method):
    return method["method"] + (f" ({method['variant']})" if method["variant"] else "")


def give(page, labels, per_class, words):
    for name, value in (("labels", labels), ("per_class", per_class), ("words", words)):
        page.locator(f"#my-{name}").fill(str(value))


def test_my_setting_shows_what_is_recorded_nearest_and_how_far_it_is(explorer, recorded):
    _, settings = recorded
    says, place = explorer.locator(".says"), explorer.locator("[data-part=setting]")
    families = [{method["family"] for method in setting["methods"]} for setting in settings]
    both = [setting for setting, each in zip(settings, families, strict=True) if {"head", "instruction tuning"} <= each]
    assert both
    for setting in both:
        give(explorer, setting["labels"], setting["per_class"], setting["words"])
        assert says.get_attribute("data-far") == "near"
        drawn = place.locator("svg").first.locator("g text").all_text_contents()
        shown = dict(zip(drawn[::2], map(float, drawn[1::2]), strict=True))
        same = [each for each in both if all(each[n] == setting[n] for n in ("labels", "per_class", "words"))]
        assert shown in [
            {
                m["method"] + (f" ({m['variant']})" if m["variant"] else ""): pytest.approx(m["mean"], abs=0.051)
                for m in each["methods"]
            }
            for each in same
        ]
    others = [each for each in settings if each not in both]
    for setting in others[:1]:  # it comes below, and says what is missing
        give(explorer, setting["labels"], setting["per_class"], setting["words"])
        assert "recorded in this setting" not in place.locator(":scope > div > div").first.inner_text()
        place.locator("details.other summary").first.click()
        place.locator("details.other").first.get_by_text("recorded in this setting").first.wait_for()  # filled once it is open
    give(explorer, 2000, 3, 9000)
    assert says.get_attribute("data-far") == "very far" and "measure on your own" in says.inner_text()
    apart = place.locator("table.distance").first.locator("tbody tr td:last-child").all_inner_texts()
    assert all(text.endswith("times") for text in apart) and float(apart[0].split()[0]) > 20
    give(explorer, 1, 32, 5)
    assert "at least two labels" in says.inner_text() and place.locator("svg").count() == 0


def test_my_setting_fits_on_a_phone_and_has_its_numbers_as_a_table(browser, address, recorded):
    _, settings = recorded
    page = open_page(browser, address, "book/explorer.html", viewport=PHONE).page
    fullest = max(settings, key=lambda each: len(each["methods"]))
    give(page, fullest["labels"], fullest["per_class"], fullest["words"])
    page.locator("[data-part=setting] summary").first.click()
    rows = page.locator("[data-part=setting] details table tbody tr").all_inner_texts()
    assert len(rows) == len(fullest["methods"])
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    box = page.locator("[data-part=setting] svg").first.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]
    page.context.close()


# ---- on paper


def test_the_cheat_sheet_prints_on_one_sheet_of_a4(browser, address):
    page = open_page(browser, address, "book/cheat_sheet.html").page
    margins = dict.fromkeys(("top", "bottom", "left", "right"), "10mm")
    printed = PdfReader(io.BytesIO(page.pdf(format="A4", margin=margins)))
    assert len(printed.pages) == 1
    text = printed.pages[0].extract_text()
    assert all(part in text for part in ("Head or prompt?", "AutoModelForSequenceClassification", "SFTTrainer", "Memory"))
    page.context.close()


def test_the_book_is_printed_with_cover_contents_chapters_and_numbers(browser, address, tmp_path):
    """The short pages stand for all: the whole book takes minutes and is printed by the workflow."""
    spec = importlib.util.spec_from_file_location("pdf", ROOT / ".ci" / "pdf.py")
    pdf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pdf)
    parts = pdf.parts_of(yaml.safe_load((ROOT / "_toc.yml").read_text()))
    assert [name for part in parts for name in part["pages"]] == PAGES
    short = [name for name in PAGES if (ROOT / f"{name}.md").exists() and (ROOT / f"{name}.md").stat().st_size < 10_000]
    parts = [part | {"pages": [name for name in part["pages"] if name in short]} for part in parts]
    page = open_page(browser, address, f"{PAGES[0]}.html").page
    cover = {"title": CONFIG["title"], "author": CONFIG["author"], "lines": ["one line"]}
    numbers = pdf.print_book(page, tmp_path / "book.pdf", parts, cover)
    printed = PdfReader(tmp_path / "book.pdf")
    titles = [
        page.evaluate("id => document.getElementById(id).querySelector('h1').textContent", n.replace("/", "-")) for n in numbers
    ]
    sheets = [sheet.extract_text() for sheet in printed.pages]
    assert short == list(numbers) == sorted(numbers, key=numbers.get) and len(short) >= 4
    assert "one line" in sheets[0] and sheets[1].split()[0] == "Contents"
    contents = re.sub(r"\s+", "", sheets[1])
    for title, number in zip(titles, numbers.values(), strict=True):
        flat = re.sub(r"\s+", "", title)
        assert f"{flat}{number}" in contents
        assert re.sub(r"\s+", "", sheets[number - 1]).startswith(flat)
        assert sheets[number - 1].split()[-1] == str(number)  # at its foot
    chapters = [entry.title for entry in printed.outline if not isinstance(entry, list)]
    assert [re.sub(r"\s+", "", each) for each in chapters[2:]] == [re.sub(r"\s+", "", title) for title in titles]
    assert printed.metadata.title == CONFIG["title"]
    page.context.close()
