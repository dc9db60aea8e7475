"""The built site in a real browser, Chromium driven by Playwright, without a network."""

import functools
import http.server
import os
import re
import shutil
import threading
from collections import namedtuple
from urllib.parse import quote, unquote, urljoin, urlsplit

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from test_book import CONFIG, ROOT, URL, build

PAGES = re.findall(r"(?:root|file): (\S+)", (ROOT / "_toc.yml").read_text())
NOTEBOOKS = [name for name in PAGES if (ROOT / f"{name}.ipynb").exists()]
HOSTS = {
    "arxiv.org",
    "attack.mitre.org",
    "colab.research.google.com",
    "creativecommons.org",
    "github.com",
    "huggingface.co",
    "onnxruntime.ai",
    "thinkingmachines.ai",
    "unicode.org",
    "www.apache.org",
    "www.wipo.int",
}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NO_CHROMIUM = "no Chromium for the tests of the site; on Debian: apt-get install chromium"
OPTIONS = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update disable-sync"
WIDE, PHONE = {"width": 1300, "height": 900}, {"width": 390, "height": 844}
HEAVY = 2_000_000  # bytes
SMALL = 14  # pixels
CONTRAST = 4.5  # WCAG 2, AA

Visit = namedtuple("Visit", "name page status errors outside")

every_page = pytest.mark.parametrize("name", PAGES)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The site's folder, built once from the stored outputs, and what the command gave."""
    out = tmp_path_factory.mktemp("site")
    execute = CONFIG["execute"] | {"execute_notebooks": "off"}
    (out / "_config.yml").write_text(yaml.safe_dump(CONFIG | {"execute": execute}))
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
    assert 'alt="Dot plot' in index and "labelled documents, TF-IDF" in index  # pasted from the quickstart


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
    branch = CONFIG["repository"]["branch"]
    repository = URL.removeprefix("https://github.com/")
    expected = f"https://colab.research.google.com/github/{repository}/blob/{branch}/{name}.ipynb"
    assert set(colab) == ({expected} if name in NOTEBOOKS else set())


@every_page
def test_images_have_alt_text_and_the_page_is_no_more_than_2_mb(site, name):
    page = parsed(site, f"{name}.html")
    assert [str(image)[:80] for image in page.find_all("img") if not (image.get("alt") or "").strip()] == []
    figures = page.find("article").find_all("img")
    assert all(len(image["alt"]) > 30 for image in figures)
    files = {(site / name).parent / image["src"] for image in page.find_all("img") if not image["src"].startswith("data:")}
    assert sum(path.stat().st_size for path in {site / f"{name}.html", *files}) <= HEAVY


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
    return [cell.source for cell in cells if cell.cell_type == "code" and not hidden & set(cell.metadata.get("tags", []))]


def test_copy_buttons_copy_the_code_of_their_cell(visit):
    page = visit.page
    page.set_viewport_size(WIDE)
    copied = page.evaluate(
        """async () => {
            const texts = [];
            for (const button of document.querySelectorAll('.cell_input .copybtn')) {
                button.click();
                texts.push(await navigator.clipboard.readText());
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
    assert [text for text, size in sizes if size < SMALL] == []
    widths = page.eval_on_selector_all("article .output img", "images => images.map(i => i.clientWidth)")
    assert all(width >= 500 for width in widths)  # narrower, and the labels of the figures cannot be read


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
