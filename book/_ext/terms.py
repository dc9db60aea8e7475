"""Links the first use of each term on a page to book/glossary.md.

The pages stay free of roles that Colab and JupyterLab would show as they are,
and a term that moves takes its link along. An entry with several names has one
link. Terms may begin with a capital and end in s. Outputs of cells, code,
headings and lists of references are left alone.
"""

import functools
import re

from docutils import nodes
from sphinx import addnodes

GLOSSARY = "book/glossary"
NOT_HERE = ("references",)  # pages that only list
NOT_IN = (
    nodes.title,
    nodes.rubric,
    nodes.reference,
    nodes.literal,
    nodes.literal_block,
    nodes.doctest_block,
    nodes.math,
    nodes.raw,
    nodes.comment,
    nodes.caption,
    addnodes.pending_xref,
)


def entries(env) -> dict[str, str]:
    """Every name in the glossary, with the id of its entry."""
    found = {}
    for glossary in env.get_doctree(GLOSSARY).findall(addnodes.glossary):
        for item in glossary.findall(nodes.definition_list_item):
            terms = [each for each in item.children if each.tagname == "term"]
            for term in terms:
                found[term.astext()] = terms[0]["ids"][0]
    return found


def pattern(names: list[str]) -> re.Pattern:
    """Finds any of the names as words of their own, the longest first."""
    parts = []
    for name in sorted(names, key=len, reverse=True):
        first, rest = re.escape(name[0]), re.escape(name[1:])
        if name[0].islower():
            first = f"[{name[0]}{name[0].upper()}]"
        parts.append(rf"{first}{rest}".replace(r"\ ", r"\s+"))
    # "tries" is a verb
    return re.compile(rf"(?<![\w-])({'|'.join(parts)})(?:(?<!trie)s)?(?![\w-])")


@functools.lru_cache(maxsize=1)
def glossary(env) -> tuple[dict[str, str], re.Pattern]:
    """`entries` and their `pattern`: the same for every page of a build."""
    names = entries(env)
    return names, pattern(list(names))


def name_of(text: str, names: dict[str, str]) -> str:
    """The name in the glossary of what was found in a text."""
    text = " ".join(text.split())
    return text if text in names else text[0].lower() + text[1:]


def inside(node: nodes.Node, kinds: tuple) -> bool:
    """Whether a node is in one of these."""
    while node := node.parent:
        if isinstance(node, kinds):
            return True
    return False


def is_prose(text: nodes.Text) -> bool:
    """Whether a person wrote it as a part of the page's argument."""
    if inside(text, NOT_IN) or not inside(text, (nodes.section,)):
        return False
    node = text
    while node := node.parent:
        if "cell_output" in node.get("classes", []):
            return False
        if "references" in node.get("names", []):
            return False
    return True


def split(text: str, done: set, names: dict, finds: re.Pattern, address: str):
    """A text as nodes, its terms that are not done yet as links."""
    at = 0
    for match in finds.finditer(text):
        entry = names[name_of(match[1], names)]
        if entry in done:
            continue
        done.add(entry)
        yield nodes.Text(text[at : match.start()])
        link = nodes.reference("", "", internal=True, classes=["term"])
        link["refuri"] = f"{address}#{entry}"
        link += nodes.inline("", match[0], classes=["xref", "std", "std-term"])
        yield link
        at = match.end()
    yield nodes.Text(text[at:])


def link_terms(app, document: nodes.document, page: str) -> None:
    """Put the links into a page that is about to be written."""
    if GLOSSARY not in app.env.found_docs or app.builder.format != "html":
        return
    if page == GLOSSARY or page.endswith(NOT_HERE):
        return
    names, finds = glossary(app.env)
    address = app.builder.get_relative_uri(page, GLOSSARY)
    linked = document.findall(nodes.reference)
    done = {  # by hand, with the role
        each["refuri"].partition("#")[2]
        for each in linked
        if each.get("refuri", "").startswith(f"{address}#")
    }
    for text in list(document.findall(nodes.Text)):
        if not is_prose(text):
            continue
        new = list(split(text.astext(), done, names, finds, address))
        if len(new) > 1:
            text.parent.replace(text, [each for each in new if each.astext()])


def setup(app) -> dict:
    """Called by Sphinx."""
    app.connect("doctree-resolved", link_terms)
    return {
        "version": "1",
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
