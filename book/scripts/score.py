"""Label documents with an exported classifier: JSON lines in, JSON lines out.

    python score.py folder < documents.jsonl > labelled.jsonl

Each line in has a `text`; each line out has its `label` and the
`probabilities` of all labels, or an `error`. Where a text can have several
labels, these are its `labels`. The folder holds `model.onnx`, `tokenizer.json`
and `labels.json`. Only onnxruntime, tokenizers and numpy are needed.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


class Scorer:
    """The classifier of a folder; `score` is what to put behind a server."""

    def __init__(self, folder, threads=1):
        folder = Path(folder)
        described = json.loads(
            (folder / "labels.json").read_text(encoding="utf-8")
        )
        self.labels, self.suffix = described["labels"], described["suffix"]
        self.tokens = described["tokens"]  # of a text, without the suffix
        self.multi_label = described.get("multi_label", False)
        self.threshold = described.get("threshold", 0.5)  # of several labels
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # a control token in a document is read as text
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.enable_padding(pad_id=described["pad_id"])
        self.tokenizer.enable_truncation(described["max_length"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            folder / "model.onnx", options, providers=["CPUExecutionProvider"]
        )

    def cut(self, text):
        """The text as it was in training: its first tokens."""
        if self.tokens is None:
            return text
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        ends = [end for _, end in encoded.offsets[: self.tokens]]
        return text[: max(ends, default=0)]

    def logits(self, texts):
        """Shape (n_texts, n_labels)."""
        encoded = self.tokenizer.encode_batch(
            [self.cut(text) + self.suffix for text in texts]
        )
        batch = {
            "input_ids": np.array(
                [each.ids for each in encoded], dtype=np.int64
            ),
            "attention_mask": np.array(
                [each.attention_mask for each in encoded], dtype=np.int64
            ),
        }
        return self.session.run(["logits"], batch)[0]

    def score(self, texts, batch_size=32):
        """Probabilities, shape (n_texts, n_labels)."""
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        probabilities = np.empty(
            (len(texts), len(self.labels)), dtype=np.float32
        )
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            logits = self.logits([texts[row] for row in rows])
            if self.multi_label:
                probabilities[rows] = 1 / (1 + np.exp(-logits))
                continue
            powers = np.exp(logits - logits.max(axis=1, keepdims=True))
            probabilities[rows] = powers / powers.sum(axis=1, keepdims=True)
        return probabilities


def answer(scorer, line):
    """One line out for one line in."""
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return {"error": 'no JSON object with a "text"'}
    if not isinstance(text, str) or not text.strip():
        return {"error": "the text is empty"}
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return {"error": "the text has half a character"}
    [said] = scorer.score([text])
    named = dict(zip(scorer.labels, map(float, said), strict=True))
    probabilities = {label: round(each, 4) for label, each in named.items()}
    if scorer.multi_label:
        found = [label for label in named if named[label] >= scorer.threshold]
        return {"labels": found, "probabilities": probabilities}
    return {"label": max(named, key=named.get), "probabilities": probabilities}


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "model.onnx").exists():
        sys.exit(
            "Give the folder of an exported classifier: "
            "python score.py folder < documents.jsonl"
        )
    # whatever the system's locale is; what is no UTF-8 becomes half characters
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    sys.stdout.reconfigure(encoding="utf-8")
    scorer = Scorer(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(answer(scorer, line), ensure_ascii=False), flush=True)
