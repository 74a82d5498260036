"""ROUGE-L (Lin, 2004) by the rouge-score package: its tokenization, no stemming, F-measure."""

from collections.abc import Sequence


def rouge_l(completions: Sequence[str], references: Sequence[str]) -> list[float]:
    """F-measure of the longest common subsequence of words, one number in [0, 1] a pair."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return [
        scorer.score(reference, completion)["rougeL"].fmeasure
        for completion, reference in zip(completions, references, strict=True)
    ]
