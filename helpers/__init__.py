"""Plumbing for the book *Head or Prompt?*: Task -> approach.fit -> approach.predict -> Predictions -> evaluate.

The lesson stands in the chapters, on transformers, peft, trl and scikit-learn. What is in here would only get in the way there.
"""

import importlib.metadata
import logging
import os
import sys

from helpers.errors import BookError

# One GPU, unless a launcher shares out several: over two (Kaggle has them) Trainer would split every batch, and TRL refuses that.
if "LOCAL_RANK" not in os.environ:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
# Beside the torchao that Colab brings along PEFT makes no adapters, because it is too old; nothing here needs it. And what a
# session has loaded (pandas loads pyarrow) stays as it was, though the set-up cell has put a newer one in its place.
if "COLAB_RELEASE_TAG" in os.environ:
    sys.modules.setdefault("torchao", None)
    replaced = {"accelerate", "datasets", "huggingface_hub", "peft", "pyarrow", "tokenizers", "transformers"} & sys.modules.keys()
    old = [name for name in sorted(replaced) if sys.modules[name].__version__ != importlib.metadata.version(name)]
    if old:
        again = "Choose Runtime, 'Restart session and run all': what is installed stays, so this cell then takes seconds."
        raise BookError(f"This session had loaded an older {' and '.join(old)} before its first cell. {again}")

# On CPUs with AVX512-BF16 bitsandbytes looks for a package with a faster kernel and says that it is missing, as soon as
# transformers or peft import it. So this module comes first: in the set-up cell of every chapter.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
