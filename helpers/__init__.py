"""Plumbing for the book *Head or Prompt?*: Task -> approach.fit -> approach.predict -> Predictions -> evaluate.

The lesson stands in the chapters, on transformers, peft, trl and scikit-learn. What is in here would only get in the way there.
"""

import logging
import os
import sys

# One GPU, unless a launcher shares out several: over two (Kaggle has them) Trainer would split every batch, and TRL refuses that.
if "LOCAL_RANK" not in os.environ:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
# Beside the torchao that Colab brings along PEFT makes no adapters, because it is too old; nothing here needs it.
if "COLAB_RELEASE_TAG" in os.environ:
    sys.modules.setdefault("torchao", None)

# On CPUs with AVX512-BF16 bitsandbytes looks for a package with a faster kernel and says that it is missing, as soon as
# transformers or peft import it. So this module comes first: in the set-up cell of every chapter.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
