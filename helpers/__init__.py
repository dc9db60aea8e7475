"""Plumbing for the book *Head or Prompt?*: one data path for every approach.

Task -> approach.fit -> approach.predict -> Predictions -> evaluate

The lesson itself stands in the chapters, written directly on transformers, peft, trl and
scikit-learn. What is in here is what would only get in the way there: fetching, checking,
timing, tables and figures. Each module says which chapter explains it.
"""

import logging

# On CPUs with AVX512-BF16 bitsandbytes asks for a faster kernel from the hub, in the first cell that imports it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
