"""Train a classification head on a causal LLM, on one process or on many.

    accelerate launch --num_processes 2 train.py documents.csv \\
        --base Qwen/Qwen3-0.6B --out classifier

The CSV, in UTF-8, has the columns `text` and `label`; every cell is read as
it stands. Only transformers, peft, datasets and torch are needed.
"""

import argparse
import csv
import io
import json
import logging
import unicodedata

# A notice about an optional package, when the imports below bring it in on
# some CPUs.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument(
    "documents", help="a CSV file with the columns text and label"
)
parser.add_argument(
    "--base", required=True, help="a base model: a hub id or a folder"
)
parser.add_argument(
    "--out",
    required=True,
    help="the folder for adapter, head, tokenizer and losses",
)
parser.add_argument(
    "--suffix",
    default="\n\nThis article is about",
    help="what is put behind every text",
)
parser.add_argument(
    "--batch-size",
    type=int,
    default=8,
    help="documents a step, of all processes together",
)
parser.add_argument("--epochs", type=float, default=3)
parser.add_argument("--learning-rate", type=float, default=5e-4)
parser.add_argument("--rank", type=int, default=16)
parser.add_argument(
    "--nf4", action="store_true", help="the base model in 4 bits"
)
given = parser.parse_args()

state = PartialState(
    cpu=not torch.cuda.is_available()
)  # which process this is, and of how many
gpu = torch.cuda.is_available()
if given.batch_size % state.num_processes:
    parser.error(
        f"--batch-size {given.batch_size} cannot be shared by "
        f"{state.num_processes} processes: take a multiple of them."
    )

set_seed(0)
try:
    with open(given.documents, encoding="utf-8-sig", newline="") as file:
        content = unicodedata.normalize("NFC", file.read())  # é has two forms
except (OSError, UnicodeDecodeError) as error:
    parser.error(f"{given.documents} cannot be read as UTF-8 ({error}).")
reader = csv.DictReader(io.StringIO(content, newline=""))
if missing := {"text", "label"} - set(reader.fieldnames or []):
    parser.error(
        f"{given.documents} has no column {sorted(missing)[0]!r}, only "
        f"{', '.join(reader.fieldnames or [])}."
    )
rows = [(reader.line_num, row) for row in reader]
for line, row in rows:
    if None in row or None in row.values():
        parser.error(
            f"{given.documents}, line {line}: more or fewer fields than the "
            "header has. Quote texts that hold a comma."
        )
    if not row["text"].strip() or not row["label"].strip():
        parser.error(f"{given.documents}, line {line}: text or label is empty.")
documents = Dataset.from_list(
    [{name: row[name] for name in ("text", "label")} for _, row in rows]
)
labels = sorted(set(documents["label"]))

tokenizer = AutoTokenizer.from_pretrained(given.base)
if tokenizer.pad_token in (None, tokenizer.eos_token):
    # another token than the end of sequence, which nothing else uses
    spare = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]")
    spare += ("<|endoftext|>", "<unk>")
    spare = [token for token in spare if token in tokenizer.get_vocab()]
    spare = [token for token in spare if token != tokenizer.eos_token]
    if not spare:
        parser.error(
            f"The tokenizer of {given.base} has no token to pad with but its "
            "end of sequence. Give a copy of the base whose tokenizer has one."
        )
    tokenizer.pad_token = spare[0]
quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
    bnb_4bit_quant_storage=torch.bfloat16,  # so that FSDP can cut them up
)
model = AutoModelForSequenceClassification.from_pretrained(
    given.base,
    num_labels=len(labels),
    id2label=dict(enumerate(labels)),
    label2id={label: number for number, label in enumerate(labels)},
    dtype=torch.bfloat16 if gpu else torch.float32,
    quantization_config=quantization if given.nf4 else None,
    pad_token_id=tokenizer.pad_token_id,
)
model = get_peft_model(
    model,
    LoraConfig(
        task_type="SEQ_CLS",
        r=given.rank,
        lora_alpha=2 * given.rank,
        target_modules="all-linear",
    ),
)


def encode(row):
    """Token ids and label number of a document."""
    return tokenizer(row["text"] + given.suffix) | {
        "labels": labels.index(row["label"])
    }


trainer = Trainer(
    model,
    TrainingArguments(
        given.out,
        per_device_train_batch_size=given.batch_size // state.num_processes,
        num_train_epochs=given.epochs,
        learning_rate=given.learning_rate,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=gpu,
        use_cpu=not gpu,
        ddp_find_unused_parameters=False,
        # True, the default, multiplies a classifier's loss by the processes
        average_tokens_across_devices=False,
    ),
    train_dataset=documents.map(encode, remove_columns=documents.column_names),
    data_collator=DataCollatorWithPadding(tokenizer),
)
trainer.train()
trainer.save_model(given.out)
if state.is_main_process:
    tokenizer.save_pretrained(given.out)
    losses = [
        entry["loss"] for entry in trainer.state.log_history if "loss" in entry
    ]
    with open(f"{given.out}/losses.json", "w", encoding="utf-8") as file:
        json.dump({"processes": state.num_processes, "losses": losses}, file)
