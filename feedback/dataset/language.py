"""The language of many texts at once: py3langid's model, walked with numpy.

Its own `classify` takes a text a time, byte by byte in Python. Without a feature in a text the
label is the model's first, as there.
"""

import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

# How much of a text is looked at; and how many texts at once, which bounds the memory.
_CHARS, _AT_ONCE = 1000, 500


def languages_of(texts: Sequence[str]) -> list[str]:
    """ISO 639-1 of each text."""
    found: list[str] = []
    for start in range(0, len(texts), _AT_ONCE):
        found += _classified([_encoded(text[:_CHARS]) for text in texts[start : start + _AT_ONCE]])
    return found


@cache
def _model() -> tuple[Any, ...]:
    """Labels; log-probabilities of labels, and of features by label; the automaton's moves, the
    rows of its states, the feature that each state has found.
    """
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # a model that only builds need

    model = LanguageIdentifier.from_model_file(MODEL_FILE)
    moves, rows, output = (
        np.asarray(table, dtype=np.int64)
        for table in (model.tk_nextmove, model.tk_row, model.tk_output)
    )
    weights = np.asarray(model.nb_ptc, dtype=np.float32)
    return model.nb_classes, model.nb_pc, weights, moves, rows << 8, output


def _classified(texts: Sequence[bytes]) -> list[str]:
    """Naive Bayes over the features that an automaton finds (Lui and Baldwin 2012)."""
    labels, prior, weights, *_ = _model()
    text_of, feature, counts = _counted(texts)
    ends = np.searchsorted(text_of, np.arange(len(texts) + 1)).tolist()
    logs = np.log1p(counts.astype(np.float32))
    best = [
        int((logs[a:b] @ weights[feature[a:b]] + prior).argmax()) if b > a else 0
        for a, b in pairwise(ends)
    ]
    return [str(labels[at]) for at in best]


def _counted(texts: Sequence[bytes]) -> tuple[npt.NDArray[np.int64], ...]:
    """How often each feature is in each text: (text, feature, count), in order of both."""
    _, _, weights, moves, rows, output = _model()
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    width = int(lengths.max(initial=0))
    letters = np.frombuffer(b"".join(text.ljust(width) for text in texts), dtype=np.uint8)
    letters_NT = letters.reshape(len(texts), width)
    state = np.zeros(len(texts), dtype=np.int64)
    found_TN = np.full((width, len(texts)), -1, dtype=np.int64)
    for place in range(width):
        state = moves[rows[state] + letters_NT[:, place]]
        found_TN[place] = output[state]
    there = (found_TN >= 0) & (np.arange(width)[:, None] < lengths)
    features = len(weights)
    keys = np.broadcast_to(np.arange(len(texts)) * features, found_TN.shape)[there]
    unique, counts = np.unique(keys + found_TN[there], return_counts=True)
    return unique // features, unique % features, counts


def _encoded(text: str) -> bytes:
    """As py3langid does before it looks at the bytes."""
    text = text.lower() if text.isupper() else text
    return unicodedata.normalize("NFC", text).encode(errors="surrogatepass")
