"""Plumbing for the book *Head or Prompt?*: Task -> approach.fit -> approach.predict -> Predictions -> evaluate.

The lesson stands in the chapters, on transformers, peft, trl and scikit-learn. What is in here would only get in the way there.
"""

import logging

# On CPUs with AVX512-BF16 bitsandbytes looks for a package with a faster kernel and says that it is missing, as soon as
# transformers or peft import it. So this module comes first: in the set-up cell of every chapter.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
