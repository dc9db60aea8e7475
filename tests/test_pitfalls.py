"""The page about pitfalls: every trap is whole, and what it links to is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = "../"
PAGE = (ROOT / "book" / "pitfalls.md").read_text(encoding="utf-8")
CONTENTS, *SECTIONS = re.split(r"^## ", PAGE, flags=re.M)
TRAPS = {  # anchor: (title, text)
    found[1]: (found[2], found[3])
    for section in SECTIONS
    for found in re.finditer(r"^\(([\w-]+)\)=\n### ([^\n]+)\n(.*?)(?=^\([\w-]+\)=\n|\Z)", section, re.M | re.S)
}
PARTS = ("Symptom", "Cause", "Cure", "Issue", "Chapter", "Test")
THREAD = re.compile(r"https://github\.com/[\w.-]+/[\w.-]+/(?:issues|pull)/(\d+)")

every_trap = pytest.mark.parametrize("anchor", TRAPS)


def parts_of(anchor):
    """The parts of a trap in their order, by name."""
    names = re.split(r"^\*\*(\w+)\.\*\* ", TRAPS[anchor][1], flags=re.M)
    assert not names[0].strip()
    return dict(zip(names[1::2], names[2::2], strict=True))


def links(text):
    return re.findall(r"\[([^]]+)\]\(([^)\s]+)\)", text)


def defined_in(path):
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


def test_there_are_traps_and_no_heading_is_overlooked():
    assert len(TRAPS) >= 12
    assert len(TRAPS) == len(re.findall(r"^### ", PAGE, re.M)) == len(re.findall(r"^\([\w-]+\)=$", PAGE, re.M))
    assert len({title for title, _ in TRAPS.values()}) == len(TRAPS)


def test_the_contents_lead_from_a_symptom_to_every_trap():
    lines = re.findall(r"^- (.+) → \[([^]]+)\]\(#([\w-]+)\)$", CONTENTS, re.M)
    assert [(title, anchor) for _, title, anchor in lines] == [(title, anchor) for anchor, (title, _) in TRAPS.items()]
    assert len({symptom for symptom, _, _ in lines}) == len(lines) == len(re.findall(r"^- ", CONTENTS, re.M))
    sections = [section.split("\n")[0] for section in SECTIONS]
    assert re.findall(r"^\*\*(.+)\*\*$", CONTENTS, re.M) == sections


@every_trap
def test_a_trap_has_all_parts_in_order(anchor):
    parts = parts_of(anchor)
    assert tuple(parts) == PARTS
    assert all(len(text.strip()) > 10 for text in parts.values())


@every_trap
def test_snippets_are_python(anchor):
    snippets = re.findall(r"^```python\n(.*?)^```$", parts_of(anchor)["Cure"], re.M | re.S)
    assert snippets and TRAPS[anchor][1].count("```") == 2 * len(snippets)
    for snippet in snippets:
        assert ast.parse(snippet).body
        assert max(map(len, snippet.splitlines())) <= 88  # wider ones scroll on the site


@every_trap
def test_issues_are_threads_on_github(anchor):
    found = links(parts_of(anchor)["Issue"])
    assert found
    for text, address in found:
        thread = THREAD.fullmatch(address)
        assert thread, address
        repository = address.split("/")[4]
        assert text == f"{repository} #{thread[1]}"


@every_trap
def test_chapters_are_there(anchor):
    found = links(parts_of(anchor)["Chapter"])
    assert found
    for text, chapter in found:
        assert (ROOT / "book" / f"{chapter}.ipynb").exists(), chapter
        assert chapter.startswith(f"{text}_")


@every_trap
def test_tests_are_there(anchor):
    found = links(parts_of(anchor)["Test"])
    assert found
    for text, address in found:
        assert address.startswith(f"{FILES}tests/"), address
        assert text.strip("`") in defined_in(ROOT / address.removeprefix(FILES)), text
    assert len(set(found)) == len(found)


def test_no_other_links():
    elsewhere = [link for link in links(PAGE) if not link[1].startswith(("#", FILES)) and not THREAD.fullmatch(link[1])]
    assert {chapter for _, chapter in elsewhere} <= {path.stem for path in (ROOT / "book").glob("*.ipynb")}


def test_every_test_of_a_trap_is_on_the_page():
    """`test_traps.py` holds nothing that the page does not speak of, but for what chapters 04 and 05 add to it."""
    spoken_of = {text.strip("`") for text, address in links(PAGE) if address.endswith("/test_traps.py")}
    others = {name for name in defined_in(ROOT / "tests" / "test_traps.py") if name.startswith("test_")} - spoken_of
    assert others <= {
        "test_a_checkpoint_quantized_as_a_language_model_keeps_its_new_head_whole",
        "test_the_start_of_a_head_is_not_random",
    }
