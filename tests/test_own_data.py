"""Files as people have them: each kind of bad file gives one line that says what to do, or a named warning, never silence."""

import json

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
from datasets import Dataset

from helpers.baselines import TfidfSvm
from helpers.errors import BookError
from helpers.lab import own_data, search
from helpers.lab.compare import METHODS
from helpers.lab.own_data import read
from helpers.tasks import Task

NOUNS = "goal market robot player bank virus team price laptop vote match trade phone coach stock worm league chip law"
LABELS = ("sport", "business", "technology")


def text(number):
    generator = np.random.default_rng(number)
    return f"the {' and the '.join(generator.choice(NOUNS.split(), 4, replace=False))} of {number}"


def rows(n=60):
    return [(text(number), LABELS[number % 3]) for number in range(n)]


def as_csv(lines, header="text,label", separator=","):
    quoted = (separator.join(f'"{cell}"' for cell in line) if isinstance(line, tuple) else line for line in lines)
    return "\n".join([header, *quoted]) + "\n"


def relabelled(label):
    return [(content, label(number, old)) for number, (content, old) in enumerate(rows())]


def as_jsonl(lines):
    return "\n".join(
        line if isinstance(line, str) else json.dumps(dict(zip(("text", "label"), line, strict=True))) for line in lines
    )


@pytest.fixture
def write(tmp_path):
    def written(content, name="documents.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return written


GOOD = as_csv(rows())

# what is wrong: (content, file name, what the one line says)
REFUSED = {
    "no rows": ("text,label\n", "documents.csv", "has no rows"),
    "nothing at all": ("", "documents.csv", "has no rows"),
    "another ending": (GOOD, "documents.xlsx", "only .csv, .tsv, .jsonl, .ndjson, .parquet can be read"),
    "no header": (GOOD.partition("\n")[2], "documents.csv", "There is no column 'text'"),
    "a column that is spelled otherwise": (GOOD.replace("text,", "Text,", 1), "documents.csv", "Did you mean 'Text'"),
    "semicolons, and a column missing": (as_csv(rows(), "text;topic", ";"), "documents.csv", "no column 'label'.* text, topic"),
    "a column twice": (as_csv([(*row, "x") for row in rows()], "text,label,label"), "documents.csv", "'label' is named twice"),
    "a line with too many fields": (as_csv([*rows(), "a,b,c"]), "documents.csv", "line 62: 3 fields between ',' .* has 2"),
    "a comma at the end of every row": (
        as_csv([f'"{content}",{label},' for content, label in rows()]),
        "documents.csv",
        "line 2: 3 fields between ',' .* has 2",
    ),
    "a comma in every text, without quotes": (
        as_csv([f"{content}, and more,{label}" for content, label in rows()]),
        "documents.csv",
        "line 2: 3 fields between ',' .* has 2",
    ),
    "a line with too few fields": (as_csv([*rows(), "alone"]), "documents.csv", "line 62: 1 fields between ','"),
    "a quote that is never closed": (
        as_csv([*rows(), '"open,sport']),
        "documents.csv",
        "the row that begins in line 62 is not readable as CSV",
    ),
    "binary junk": (bytes(range(256)) * 20, "documents.csv", "is no text in any encoding .* --encoding"),
    "zero bytes": (GOOD + "\0\0", "documents.csv", "is no text in any encoding"),
    "one label": (as_csv(relabelled(lambda *_: "x")), "documents.csv", "needs two labels or more, .* only 'x'"),
    "a label for each document": (as_csv(relabelled(lambda n, _: f"x{n}")), "documents.csv", "60 documents have 60 labels"),
    "measurements as labels": (as_csv(relabelled(lambda n, _: f"{n % 7}.5")), "documents.csv", "are measurements"),
    "numbers as texts": (as_csv([(str(n), one) for n, (_, one) in enumerate(rows())]), "documents.csv", "holds numbers .0., no"),
    "no text in any row": (as_csv([(" ", one) for _, one in rows()]), "documents.csv", "no row has both a text and a label"),
    "no label in any row": (as_csv(relabelled(lambda *_: "")), "documents.csv", "no row has both a text and a label"),
    "only texts with two labels": (
        as_csv([("the same", "sport"), ("the same", "business"), ("The same", "business"), ("the same ", "sport")]),
        "documents.csv",
        "needs two labels or more, .* none",
    ),
    "a line that is no JSON": (as_jsonl([*rows(), "{'text': 1}"]), "documents.jsonl", "line 61 is no JSON"),
    "one JSON array": (json.dumps([{"text": "a"}], indent=1), "documents.jsonl", "line 1 is no JSON .* one object a line"),
    "a JSON line that is a list": (as_jsonl(['["a"]']), "documents.jsonl", "line 1 is no JSON object"),
    "JSON objects as labels": (as_jsonl(relabelled(lambda *_: {"a": 1})), "documents.jsonl", "line 1: 'label' holds .* no name"),
    "JSON lists as texts": (as_jsonl([(["a", "b"], "sport")]), "documents.jsonl", "line 1: 'text' holds .* no text"),
    "lists and names as labels": (
        as_jsonl([("a b", ["sport"]), ("c d", "sport")]),
        "documents.jsonl",
        "line 2: 'label' holds 's",
    ),
    "lists as text, and names": (
        as_csv([("a b", "['sport', 'business']"), ("c d", "sport")]),
        "documents.csv",
        "line 3: 'label' holds 'sport', while other rows have lists",
    ),
    "an object as text": (as_csv([("a b", "{'sport': 1}")]), "documents.csv", "line 2: 'label' holds .* lists of names"),
    "a number of too many digits for Python": (as_jsonl([*rows(), "1" * 5000]), "documents.jsonl", "line 61 is no JSON"),
    "objects in objects without end": (as_jsonl([*rows(), '{"a":' * 10**5]), "documents.jsonl", "line 61 is no JSON"),
    "Parquet that is none": (GOOD, "documents.parquet", "cannot be read as Parquet"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case, write):
    content, name, said = REFUSED[case]
    path = write(content, name)
    with pytest.raises(BookError, match=said) as caught:
        read(path, "text", "label")
    assert "\n" not in str(caught.value) and str(path.parent) not in str(caught.value) and len(str(caught.value)) < 250
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())


def test_no_file_and_no_file_but_a_folder(write, tmp_path):
    write(GOOD, "others.csv")
    with pytest.raises(BookError, match="There is no file .*documents.csv. There is others.csv."):
        read(tmp_path / "documents.csv", "text", "label")
    with pytest.raises(BookError, match="There is no file .*. There is others.csv."):
        read(tmp_path, "text", "label")
    with pytest.raises(BookError, match="'text' is named twice"):
        read(tmp_path / "others.csv", "text", "text")


# what is odd: (content, file name, what the warning says, documents left)
WARNED = {
    "rows without text": (as_csv([*rows(), ("", "sport"), (" \t", "sport")]), "2 rows without text left out, first line 62", 60),
    "rows without label": (
        as_csv([*rows(), (text(70), ""), (text(71), "NaN")]),
        "2 rows without label left out, first line 62",
        60,
    ),
    "labels that differ in case": (as_csv([*rows(), (text(70), "Sport")]), "1 label .* 'sport' and 'Sport': taken as one", 61),
    "labels that differ in spaces": (as_csv([*rows(), (text(70), " sport ")] + rows(0)), None, 61),
    "numbers as labels": (as_csv(relabelled(lambda n, _: n % 3)), "Labels are numbers, such as '0'", 60),
    "copies": (as_csv([*rows(), *rows(5)]), "5 of 65 documents are copies", 60),
    "copies in other case": (as_csv([*rows(), (text(0).upper(), "sport")]), "1 of 61 documents are copies", 60),
    "near copies": (as_csv([*rows(), (text(0) + "!", "sport")]), "1 document nearly the same as another one", 60),
    "near copies with another label": (as_csv([*rows(), (text(0) + "!", "business")]), None, 61),
    "texts that one letter tells apart": (
        as_csv([(f"a long notice on the delivery of a class {each} item", each) for each in "AB"] + rows()),
        None,
        62,
    ),
    "texts that one digit tells apart, with one label": (as_csv([(f"ward {n}", "sport") for n in range(9)] + rows()), None, 69),
    "half a character": (
        as_jsonl([*rows(), (text(70) + " \ud83d", "sport")]),
        "1 row with half a character, replaced by \ufffd, first line 61",
        61,
    ),
    "a label that is composed and decomposed": (
        as_csv(relabelled(lambda n, old: ("Caf\u00e9", "Cafe\u0301", "Hafen")[n % 3])),
        None,
        60,
    ),
    "a text that is composed and decomposed": (
        as_csv([*rows(), ("der Caf\u00e9", "sport"), ("der Cafe\u0301", "sport")]),
        "1 of 62 documents are copies",
        61,
    ),
    "names that pandas takes for missing values": (
        as_csv(relabelled(lambda n, old: ("EU", "NULL", "N/A")[n % 3])),
        "'NULL' is taken for a label",
        60,
    ),
    "whole numbers that a missing one made 1.0": (
        as_csv(relabelled(lambda n, old: f"{n % 3}.0")),
        "Labels are numbers, such as '0'",
        60,
    ),
    "numbers with leading zeros": (as_csv(relabelled(lambda n, old: f"00{n % 3}")), "Labels are numbers, such as '000'", 60),
    "labels in brackets": (as_csv(relabelled(lambda n, old: f"[{old}]")), None, 60),
    "the same text with two labels": (as_csv([*rows(), (text(0), "business")]), "1 text with different labels: left out", 59),
    "labels out of balance": (as_csv([(text(n), "sport" if n % 30 else "business") for n in range(90)]), None, 90),
    "a label called none": (as_csv(relabelled(lambda n, old: old if n % 3 else "none")), "'none' is taken for a label", 60),
    "ten megabytes in one cell": (as_csv([*rows(), ("word " * 2_000_000, "sport")]), None, 61),
}


@pytest.mark.parametrize("case", WARNED)
def test_done_and_named(case, write):
    content, said, n = WARNED[case]
    data = read(write(content, f"documents.{'jsonl' if content.startswith('{') else 'csv'}"), "text", "label")
    assert len(data.documents) == n and not data.multi_label
    assert all("\n" not in line and len(line) < 200 for line in data.warnings)
    assert len(data.warnings) == (said is not None)
    if said:
        assert pd.Series(data.warnings).str.contains(said).all(), data.warnings


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (GOOD, "documents.csv"),
        (GOOD.replace("\n", "\r\n"), "documents.csv"),
        ("\ufeff" + GOOD, "documents.CSV"),
        (GOOD.encode("utf-16"), "documents.csv"),
        (GOOD.replace("\n", "\r"), "documents.csv"),
        (as_csv([(str(n), *row) for n, row in enumerate(rows())], '"ticket\n(auto)",text,label'), "documents.csv"),
        ("\n\n" + GOOD, "documents [2024].csv"),
        (as_csv(rows(), "text;label", ";"), "documents.csv"),
        (as_csv(rows(), "text\tlabel", "\t"), "documents.tsv"),
        (as_csv([(*row, "x") for row in rows()], "text,label,more"), "documents.csv"),
        (as_jsonl(rows()) + "\n\n", "documents.jsonl"),
    ],
    ids=[
        *("utf-8", "windows lines", "byte order mark", "utf-16", "mac lines", "header breaks", "brackets in its name"),
        *("semicolons", "tabs", "another column", "json lines"),
    ],
)
def test_the_same_documents_in_every_form(content, name, write):
    write("text,label\nanother,file\n", "documents 2.csv")  # which a pattern would find
    data = read(write(content, name), "text", "label")
    assert [(each.text, each.label) for each in data.documents] == rows() and data.warnings == ()
    assert data.in_words == "Each document has one label: 'label' has 3 of them." and not data.multi_label
    assert data.labels == dict.fromkeys(LABELS, 20)


FOREIGN = {
    "German, Windows": ("cp1252", "cp1252", "Grüße aus Zürich – „heute“"),
    "French, Unix": ("latin-1", "cp1252", "un été à la crêperie"),
    "bytes that Windows has not": ("latin-1", "latin-1", "caf\xe9 \x81 \x8d"),
    "Russian": ("cp1251", "cp1251", "мы видели большой корабль в порту"),
    "Chinese": ("gb18030", "gb18030", "我们在港口看到了一艘大船"),
    "Japanese": ("shift_jis", "shift_jis", "私たちは港で大きな船を見ました"),
}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_old_encodings_are_found_and_named(case, end, write):
    encoding, found, words = FOREIGN[case]
    lines = [(f"{content} {words}", label) for content, label in rows()]
    path = write(as_csv(lines).replace("\n", end).encode(encoding))
    data = read(path, "text", "label")
    assert [each.text for each in data.documents] == [" ".join(content.split()) for content, _ in lines]
    (warning,) = data.warnings
    assert warning.startswith(f"Read as {found}, for it is no UTF-8: ") and "--encoding" in warning
    assert words.split()[0] in warning or case == "French, Unix"
    named = read(path, "text", "label", encoding=encoding)
    assert named.documents == data.documents and named.warnings == ()
    with pytest.raises(BookError, match="documents.csv cannot be read as ascii .* --encoding"):
        read(path, "text", "label", encoding="ascii")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "utf-8-sig"])
def test_unicode_needs_no_word(encoding, write):
    path = write(as_csv([(f"{content} für", label) for content, label in rows()]).encode(encoding))
    data = read(path, "text", "label")
    assert data.documents[0].text == f"{text(0)} für" and data.warnings == ()


@pytest.mark.parametrize("quote", ["", '"'])
def test_a_carriage_return_in_a_cell_ends_no_row(quote, write):
    """As pandas writes it, which does not read it again."""
    lines = [
        f"{quote}{content}\r and more{quote},{label}" if n == 3 else f"{content},{label}"
        for n, (content, label) in enumerate(rows())
    ]
    data = read(write(as_csv(lines)), "text", "label")
    assert [each.text for each in data.documents][2:4] == [text(2), f"{text(3)} and more"] and len(data.documents) == 60
    assert data.warnings == ("1 row with a carriage return, read as a space, first line 5.",)
    assert not quote or read(write(as_csv(lines).replace("\n", "\r\n")), "text", "label").documents == data.documents


def test_parquet_and_text_over_several_lines(tmp_path, write):
    frame = pd.DataFrame(rows(), columns=["text", "label"])
    frame.to_parquet(tmp_path / "documents.parquet")
    assert read(tmp_path / "documents.parquet", "text", "label").documents == read(write(GOOD), "text", "label").documents
    several = read(write(GOOD.replace(" and ", "\nand ")), "text", "label")
    assert several.documents == read(write(GOOD), "text", "label").documents
    frame.astype("category").to_parquet(tmp_path / "category.parquet")
    view = pyarrow.table({name: pyarrow.array(frame[name]).cast(pyarrow.string_view()) for name in frame})
    pyarrow.parquet.write_table(view, tmp_path / "view.parquet")
    for name in ("category", "view"):
        assert read(tmp_path / f"{name}.parquet", "text", "label").documents == several.documents
    frame.assign(label=[1.0, np.nan, 2.0] * 20).to_parquet(tmp_path / "numbers.parquet")
    numbers = read(tmp_path / "numbers.parquet", "text", "label")
    assert numbers.labels == {"1": 20, "2": 20} and numbers.warnings[0] == "20 rows without label left out, first row 1."


SEVERAL = [("sport",), ("business", "sport"), ("technology",), ("business", "technology"), ("business",)]


def test_several_text_columns_are_joined_in_the_order_asked_for(write):
    lines = [(content, f"title {number}", "", one) for number, (content, one) in enumerate(rows())]
    path = write(as_csv(lines, "abstract,title,claim,label"))
    read_as = read(path, ["title", "claim", "abstract"], "label").documents
    assert [each.text for each in read_as] == [f"title {number} {content}" for number, (content, _) in enumerate(rows())]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_quotes_hold_separators_quotes_and_line_breaks(write, mark, end):
    path = write(mark + as_csv(['"one, ""two""\n\n three\u2028four",sport', "", *rows(30)]).replace("\n", end))
    assert read(path, "text", "label").documents[0].text == 'one, "two" three four'


def test_several_labels_are_found_out_in_every_form(write):
    wanted = [SEVERAL[number % 5] for number in range(60)]
    texts = [text(number) for number in range(60)]
    joined = [
        write(as_csv([(a, sign.join(b)) for a, b in zip(texts, wanted, strict=True)]), f"{n}.csv") for n, sign in enumerate(";|,")
    ]
    lists = write(as_jsonl([(a, list(b)) for a, b in zip(texts, wanted, strict=True)]), "lists.jsonl")
    texts_of_lists = [
        write(pd.DataFrame({"text": texts, "label": [as_written(each) for each in wanted]}).to_csv(), f"written{n}.csv")
        for n, as_written in enumerate((list, np.array, tuple, set, json.dumps, lambda names: f"[{', '.join(names)}]"))
    ]
    ones = [(a, *(str(int(label in b)) for label in LABELS)) for a, b in zip(texts, wanted, strict=True)]
    columns = write(as_csv(ones, ",".join(("text", *LABELS))), "columns.csv")
    for path, label in [*((path, "label") for path in (*joined, *texts_of_lists)), (lists, "label"), (columns, list(LABELS))]:
        data = read(path, "text", label)
        assert data.multi_label and data.in_words.startswith("A document can have several labels")
        assert [each.label for each in data.documents] == wanted
    single = read(joined[0], "text", "label", multi_label=False)
    assert not single.multi_label and len(single.labels) == 5
    wrong = write(as_csv([*ones, (text(60), "0", "x", "1")], ",".join(("text", *LABELS))), "wrong.csv")
    with pytest.raises(BookError, match="wrong.csv, line 62: 'business' holds 'x', not 0 or 1. Write 1 where"):
        read(wrong, "text", list(LABELS))


def test_lists_of_one_label_can_be_single_labels(write):
    path = write(as_jsonl(relabelled(lambda n, old: [old])), "documents.jsonl")
    assert read(path, "text", "label").multi_label
    assert read(path, "text", "label", multi_label=False).documents == read(write(GOOD), "text", "label").documents
    path = write(as_jsonl(relabelled(lambda n, old: [old, "new"] if n else [old])), "documents.jsonl")
    with pytest.raises(BookError, match="line 2: 'label' holds .* its documents can have several labels"):
        read(path, "text", "label", multi_label=False)


def test_columns_of_ones_that_a_missing_cell_made_floats(write):
    lines = [(content, f"{n % 2}.0", "True" if n % 3 else "") for n, (content, _) in enumerate(rows())]
    data = read(write(as_csv(lines, "text,sport,business")), "text", ["sport", "business"])
    assert data.documents[1].label == ("business", "sport") and data.documents[0].label == ()


SENTENCES = {
    "Hindi": "\u0930\u093e\u092e {} \u0915\u0940 \u0915\u093f\u0924\u093e\u092c \u092a\u0922\u093c\u0924\u093e \u0939\u0948",
    "Chinese": "\u6211\u4eec\u5728{}\u770b\u5230\u4e86\u4e00\u8258\u8239",
    "emoji": "\U0001f600 {} \U0001f680",
}
THINGS = {
    "Hindi": ["रा", "री", "रु", "रू", "रे", "रै", "रो", "रौ"],
    "Chinese": ["港口", "厨房", "花园", "市场", "学校", "医院", "银行", "车站"],
    "emoji": ["🍎", "🍏", "🍐", "🍑", "🍒", "🍓", "🍇", "🍈"],
}


@pytest.mark.parametrize("script", SENTENCES)
def test_no_script_makes_different_texts_near_copies(script, write):
    texts = [SENTENCES[script].format(f"{a} {b}") for a in THINGS[script] for b in THINGS[script] if a < b]
    data = read(write(as_csv([(each, "ab"[n % 2]) for n, each in enumerate(texts)])), "text", "label")
    assert len(data.documents) == len(texts) and data.warnings == ()


def test_a_comma_in_a_name_is_no_list(write):
    data = read(write(as_csv(relabelled(lambda n, old: f"news, {old}" if n % 2 else f"{old} and more"))), "text", "label")
    assert not data.multi_label


def test_united_where_there_can_be_several_labels(write):
    data = read(write(as_csv([*rows(), (text(0), "business")])), "text", "label", multi_label=True)
    assert data.documents[0].label == ("business", "sport") and data.warnings[0].startswith("1 text with different labels: their")


def test_groups_are_kept_and_rows_without_one_left_out(write):
    lines = [(*row, "" if number == 3 else f"g{number % 4}") for number, row in enumerate(rows())]
    data = read(write(as_csv(lines, "text,label,who")), "text", "label", group="who")
    assert {each.group for each in data.documents} == {"g0", "g1", "g2", "g3"}
    assert data.warnings == ("1 row without 'who' left out, first line 5.",)


def test_rare_labels_are_left_out(write):
    lines = [(text(n), "sport" if n % 4 else "business") for n in range(40)] + [(text(300), "rare")]
    data = own_data.cut(read(write(as_csv(lines)), "text", "label"))
    assert data.labels == {"sport": 30, "business": 10}
    assert data.warnings == ("1 label with fewer than 5 documents left out: 'rare' (1). Nobody can test them.",)
    with pytest.raises(BookError, match="fewer than two labels have 5 documents among 31"):
        own_data.cut(read(write(as_csv([line for line in lines if line[1] != "business"])), "text", "label"))


def test_a_thousand_labels(write):
    lines = [(f"{text(n)} about {n % 1000}", f"label {n % 1000}") for n in range(3000)]
    data = read(write(as_csv(lines)), "text", "label")
    assert len(data.labels) == 1000 and data.warnings == ()
    with pytest.raises(BookError, match="fewer than two labels have 5 documents"):
        own_data.cut(data)


def test_near_copies_are_not_looked_for_among_too_many(write, monkeypatch):
    path = write(as_csv([*rows(), (text(0) + "!", "sport")]))
    monkeypatch.setattr(own_data, "NEAR_MOST", 60)
    data = read(path, "text", "label")
    assert len(data.documents) == 61 and data.warnings == (
        "61 documents are too many to look for near copies: none was left out.",
    )


def test_report_counts(write, tiny_model):
    from helpers import base_models

    data = read(write(GOOD), "text", "label")
    values = own_data.report(data, base_models.load_tokenizer(tiny_model), 8)["value"]
    assert values["documents"] == "60" and values["labels"] == "3" and values["rarest label"].endswith(": 20")
    assert values["longer than the 8 tokens that are read"] == "100% of the documents"
    assert values["with the name of their label in them"] == "0% of the documents"
    told = read(write(as_csv([(f"{content} {label.upper()}", label) for content, label in rows()])), "text", "label")
    told = own_data.report(told, base_models.load_tokenizer(tiny_model), 8)["value"]
    assert told["with the name of their label in them"] == "100% of the documents"


@pytest.mark.parametrize("script", SENTENCES)
def test_the_word_counts_that_are_compared_tell_labels_apart_in_every_script(script, tmp_path):
    """Words alone would not: Chinese has no spaces, and the usual pattern takes Hindi's vowel signs and emoji for punctuation."""
    halves = {"first": THINGS[script][:4], "second": THINGS[script][4:]}
    rows = [(SENTENCES[script].format(f"{a} {b}"), label) for label, of in halves.items() for a in of for b in of if a != b]
    parts = {"train": rows[0::2], "validation": rows[1::4], "test": rows[3::4]}
    splits = {
        name: Dataset.from_dict({"text": [text for text, _ in part], "label": [int(label == "second") for _, label in part]})
        for name, part in parts.items()
    }
    task = Task(script, ("first", "second"), **splits)
    found, _ = search.search(TfidfSvm, METHODS["TfidfSvm"][1], task, tmp_path)
    said = found.predict(task.test)
    assert (said.predicted == said.gold).all()
