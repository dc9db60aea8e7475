"""One vector a text from a frozen model, and a probe on such vectors (chapters 01 and 04)."""

from collections.abc import Iterator

import numpy as np
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers import prompts
from helpers.errors import check_name

C = 0.1  # of the probes


@torch.inference_mode()
def hidden_states(
    texts: list[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Final-layer hidden states, batch by batch: `(rows, hidden, mask)`.

    Indices into `texts`, states of shape (len(rows), n_tokens, hidden_size), and their attention mask, padding on the right.
    """
    for rows, batch in prompts.batches(texts, tokenizer, batch_size):
        batch = batch.to(model.device)
        yield rows, model.base_model(**batch, use_cache=False).last_hidden_state, batch.attention_mask


def embed(
    texts: list[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pooling: str = "last", batch_size: int = 32
) -> np.ndarray:
    """Final-layer hidden states pooled to one vector a text, shape (n_texts, hidden_size), float32.

    Args:
        model: any model with a `base_model`; nothing in it is changed.
        pooling: `last`, the last token that is not padding; `mean` or `max`, over all tokens that are not padding.
    """
    check_name("pooling", pooling, ("last", "mean", "max"))
    vectors = np.empty((len(texts), model.config.get_text_config().hidden_size), dtype=np.float32)
    for rows, hidden, mask in hidden_states(texts, model, tokenizer, batch_size):
        if pooling == "last":
            pooled = hidden[torch.arange(len(rows)), mask.sum(1) - 1]
        elif pooling == "mean":
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        else:
            pooled = hidden.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)
        vectors[rows] = pooled.float().cpu().numpy()
    return vectors


def fit_probe(embeddings: np.ndarray, gold: np.ndarray, C: float = C) -> LogisticRegression:
    """Logistic regression without an intercept, so that its coefficients fit the stock head, which has none.

    Args:
        embeddings: shape (n_documents, hidden_size), from `embed`.
        gold: shape (n_documents,); multi-label (n_documents, n_labels), zeros and ones: one regression a label.
        C: inverse strength of the penalty, as scikit-learn has it.

    `coef_` of what comes back has the shape (n_labels, hidden_size), one row a label, also for two labels.
    """
    probe = LogisticRegression(C=C, fit_intercept=False, max_iter=5000)
    if gold.ndim == 1:
        weights = probe.fit(embeddings, gold).coef_
        # scikit-learn keeps one row for two labels: w for the second, 0 for the first
        probe.coef_ = np.concatenate([-weights / 2, weights / 2]) if len(weights) == 1 else weights
    else:  # a label that all documents have, or none, starts at zero
        rows = [clone(probe).fit(embeddings, column).coef_[0] if np.ptp(column) else 0 * embeddings[0] for column in gold.T]
        probe.coef_ = np.array(rows)
    probe.intercept_ = np.zeros(len(probe.coef_))
    return probe
