"""What chapters 06 to 08 and 10 compute from predictions, beyond `helpers.evaluation`: families of tests, power, calibration."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import binom
from statsmodels.stats.multitest import multipletests

from helpers import bootstrap
from helpers.errors import BookError
from helpers.evaluation import Predictions, compare

_ALIKE = ("base_model", "n_layers", "rank", "batch_size", "precision")  # what both approaches of a comparison must share


def of_settings(made: Iterable[dict]) -> dict[tuple[str, str], list[dict]]:
    """Records by `(setting, name)`, one for each seed in their order; a setting is a task with its amount of labelled text.

    BookError: records that do not belong together: of one name, but with other settings (a prompt, a start, a grid), or two of
    one seed; of one setting, but with another base model, other adapters, or other test documents for the same seed.
    """
    found, before = defaultdict(dict), {}
    for record in made:
        key, settings, name, seed = record["key"], record["key"]["settings"], record["name"], record["key"]["seed"]
        setting = f"{key['task']}, {key['options'].get('per_class', key['options'].get('n_train'))}"
        same = {(setting, name): {**settings, "seed": None, "options": key["options"], "profile": key["profile"]}}
        same |= {(setting, seed): {"test_set": record["test_set"]}}
        if "rank" in settings:
            same |= {(setting, "adapters"): {each: settings.get(each) for each in _ALIKE}}
        for part, now in same.items():
            first = before.setdefault(part, now)
            for wrong in (each for each in now if first.get(each) != now[each]):
                raise BookError(f"{setting}, {name}, seed {seed}: {wrong} is {now[wrong]!r}, elsewhere {first.get(wrong)!r}.")
        if seed in found[setting, name]:
            raise BookError(f"{setting}, {name}: two records of seed {seed}. Give one.")
        found[setting, name][seed] = record
    return {key: [by_seed[seed] for seed in sorted(by_seed)] for key, by_seed in found.items()}


METRICS = ("accuracy", "macro_f1", "micro_f1")  # as `bootstrap.scores` orders them; multi-label accuracy is exact match


def over_seeds(
    a: Sequence[Predictions], b: Sequence[Predictions], metric: str = "macro_f1", n_resamples: int = 4000, seed: int = 0
) -> dict[str, float]:
    """`metric` of `a` minus that of `b`, in -1..1, the mean over seeds; each has an entry for every seed.

    A bootstrap draws seeds and then, within each, groups of documents: what another training and other documents would change.
    With three seeds its interval can be much too narrow: look at each seed, or at a t-interval over seeds, as well.

    Returns `difference` with its 95 % interval `low`, `high`, and `p_value`: twice the share of resamples beyond zero.
    """
    drawn, differences, number = [], [], METRICS.index(metric)
    for one, other in zip(a, b, strict=True):
        bootstrap.check_pair(one, other)
        weights = bootstrap.resamples(one, n_resamples, seed)
        drawn.append(bootstrap.scores(one, weights)[number] - bootstrap.scores(other, weights)[number])
        differences.append(bootstrap.scores(one)[number] - bootstrap.scores(other)[number])
    generator = np.random.default_rng(seed)
    seeds, columns = (generator.integers(0, n, (n_resamples, len(drawn))) for n in (len(drawn), n_resamples))
    means = np.array(drawn)[seeds, columns].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    p_value = 2 * (1 + min((means <= 0).sum(), (means >= 0).sum())) / (1 + n_resamples)
    found = {"difference": np.mean(differences), "low": low, "high": high, "p_value": min(1.0, p_value)}
    return {name: float(value) for name, value in found.items()}


def decide(test: Predictions, validation: Predictions, metric: str) -> Predictions:
    """Multi-label `test` with the decisions that are best for `metric` on `validation`."""
    return decided(test, **best_decision(validation, metric))


def best_decision(validation: Predictions, metric: str) -> dict:
    """A `threshold` for all labels, and whether the likeliest is predicted where none reaches it (`at_least_one`)."""
    cuts = np.unique(np.quantile(validation.probabilities, np.linspace(0.5, 1, 101)))
    rules = [(float(cut), at_least_one) for cut in (cuts[:-1] + cuts[1:]) / 2 for at_least_one in (False, True)]
    score = [bootstrap.scores(decided(validation, *rule))[METRICS.index(metric)] for rule in rules]
    return dict(zip(("threshold", "at_least_one"), rules[int(np.argmax(score))], strict=True))


def decided(of: Predictions, threshold: float, at_least_one: bool) -> Predictions:
    """Multi-label predictions with another decision (`best_decision`)."""
    likeliest = of.probabilities.max(axis=1, keepdims=True)
    return replace(of, thresholds=np.minimum(threshold, likeliest) if at_least_one else threshold)


def comparisons(pairs: dict[str, tuple[Predictions, Predictions]], **options) -> pd.DataFrame:
    """`compare`, with its `options`, for every pair: a row each, with the p-values of the whole family after Holm as `p_holm`.

    The chance of one false "better" anywhere in it is at most 5 % at `p_holm` < 0.05.
    """
    rows = pd.DataFrame({name: compare(a, b, **options) for name, (a, b) in pairs.items()}).T
    return rows.assign(p_holm=multipletests(rows["p_value"], method="holm")[1])


def power(difference: float, n_documents: int, disagree: float, alpha: float = 0.05) -> float:
    """Chance that the exact McNemar test finds a true `difference` (0..disagree) in accuracy between two classifiers.

    `disagree` is the share of the documents on which just one of the two is right.
    """
    k = np.arange(n_documents + 1)  # documents on which they disagree
    cut = binom.ppf(alpha / 2, k, 0.5) - 1  # so few on one side: significant
    share = (disagree + difference) / (2 * disagree)
    significant = binom.cdf(cut, k, share) + binom.sf(k - cut - 1, k, share)
    return float(binom.pmf(k, n_documents, disagree) @ significant)


def minimum_detectable_effect(n_documents: int, disagree: float, wanted_power: float = 0.8, alpha: float = 0.05) -> float:
    """The smallest true difference in accuracy that `n_documents` show with `wanted_power` (chapter 01 derives it).

    NaN where even winning every disagreement would not be enough; BookError: `disagree` is no share of the documents.
    """
    if not 0 < disagree <= 1:
        raise BookError(f"disagree is {disagree}, but it is a share of the documents: more than 0, at most 1.")
    if power(disagree, n_documents, disagree, alpha) < wanted_power:
        return float("nan")
    return brentq(lambda difference: power(difference, n_documents, disagree, alpha) - wanted_power, 1e-9, disagree)


def expected_calibration_error(predictions: Predictions, n_bins: int = 10) -> float:
    """Mean distance between confidence and accuracy in bins of equal width, weighted by documents, in 0..1.

    Confidence is the probability of a document's most probable label (Guo et al. 2017, arXiv 1706.04599). For single labels.
    """
    confidence = predictions.probabilities.max(axis=1)
    bins = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    too_sure = np.bincount(bins, weights=confidence - predictions.correct)  # the sum over a bin's documents
    return float(np.abs(too_sure).sum() / len(confidence))
