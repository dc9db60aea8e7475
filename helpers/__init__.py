"""Plumbing for the book *Head or Prompt?*: one data path for every approach.

Task -> approach.fit -> approach.predict -> Predictions -> evaluate

The lesson itself stands in the chapters, written directly on transformers, peft, trl and
scikit-learn. What is in here is what would only get in the way there: fetching, checking,
timing, tables and figures. Each module says which chapter explains it.
"""

import logging

# On CPUs with AVX512-BF16 bitsandbytes looks for a package with a faster kernel and says that it is missing, as soon as
# transformers or peft import it. So this module comes first: in the set-up cell of every chapter.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
