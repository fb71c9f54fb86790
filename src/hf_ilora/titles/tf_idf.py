"""Encodes titles without a language model: TF-IDF of words and pairs of words."""

import importlib.util
from collections.abc import Sequence

import torch

MAX_SIZE = 384


def encode_with_tf_idf(titles: Sequence[str]) -> torch.Tensor:
    """Singular vectors of the TF-IDF of words and pairs of words, with logarithmic term frequencies.

    Words of one letter, and words that occur in one title only, are ignored unless there are no others. The vectors
    depend on all titles, so vectors from different calls cannot be compared.

    Args:
        titles: (titles,) strings.

    Returns:
        (titles, size) float32, with at most 384 numbers per title; zero for titles whose words are all ignored.

    Raises:
        ValueError: no title has a word, or scikit-learn is not installed.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise ValueError('TF-IDF needs scikit-learn: pip install "hf_ilora[titles]"')
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.utils.extmath import randomized_svd

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    try:
        matrix = vectorizer.fit_transform(titles)  # (titles, words)
    except ValueError:  # no word of two letters is in two titles
        try:
            matrix = vectorizer.set_params(min_df=1, token_pattern=r"\w+").fit_transform(titles)
        except ValueError as error:
            raise ValueError(
                f"none of the {len(titles)} titles has a word (the first is {titles[0]!r}): choose another encoder"
            ) from error
    left, values, _ = randomized_svd(matrix, min(MAX_SIZE, *matrix.shape), random_state=0)
    return torch.from_numpy(left * values).float()


__all__ = ["encode_with_tf_idf"]
