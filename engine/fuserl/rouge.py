"""ROUGE-L (Lin, 2004) by the rouge-score package: words of any script, no stemming, F-measure."""

import re
from collections.abc import Sequence


class Words:
    """Lower-cased runs of letters and digits: on ASCII rouge-score's own tokens, which are blind
    to every other script."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def rouge_l(completions: Sequence[str], references: Sequence[str]) -> list[float]:
    """F-measure of the longest common subsequence of words, one number in [0, 1] a pair."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=Words())
    return [
        float(scorer.score(reference, completion)["rougeL"].fmeasure)
        for completion, reference in zip(completions, references, strict=True)
    ]
