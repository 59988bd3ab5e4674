"""MinHash sketches of many texts at once, and which of them are nearly the same as an earlier one.

A sketch is a byte for each permutation (b-bit minwise hashing, Li and König 2010).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

PERMUTATIONS = 128
_SHINGLE = 5
# Odd, so that powers of it mix all bits of a 64-bit product.
_BASE = np.uint64(0x9E3779B97F4A7C15)
# Sketches are sorted this many times, each time by other permutations, and compared with so many
# that stand before them.
_ORDERS, _BEFORE = 16, 2
_KEY_NIBBLES = 16
_AT_ONCE = 1 << 16

Sketches = npt.NDArray[np.uint8]


def sketches(texts: Sequence[str]) -> list[bytes]:
    """Of each text's shingles of five characters, whatever its spaces and its case."""
    from rensa import RMinHash

    if not texts:
        return []
    hashes, ends = _shingles([" ".join(text.split()).lower() for text in texts])
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, ends, PERMUTATIONS, 1)
    low = np.array(matrix.to_rows(), dtype=np.uint32).astype(np.uint8)
    return [row.tobytes() for row in low]


def repeats(found: Sketches, least: float) -> npt.NDArray[np.bool_]:
    """Whether an earlier sketch is at least as similar as `least`; shape (N,) for (N, 128).

    Nearly equal sketches stand side by side in some order of them, as in an LSH forest (Bawa and
    others, 2005): the time is linear but for the sorting, however alike the texts are. Two
    different hashes share a byte once in 256, which counts as no similarity.
    """
    out = np.zeros(len(found), dtype=np.bool_)
    matches = PERMUTATIONS * (least + (1 - least) / 256)
    for number in range(_ORDERS):
        order = np.argsort(_keys(found, number), kind="stable")
        for before in range(1, _BEFORE + 1):
            _compare(found, order[:-before], order[before:], matches, out)
    return out


def _shingles(texts: Sequence[str]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """64-bit hashes of every text's shingles, one text after the other, and where each begins and
    the last ends; a text that is shorter than a shingle is one.
    """
    padded = [text.ljust(_SHINGLE, "\0") for text in texts]
    lengths = np.array([len(text) for text in padded], dtype=np.int64)
    data = "".join(padded).encode("utf-32-le", errors="surrogatepass")
    letters = np.frombuffer(data, dtype="<u4").astype(np.uint64)
    count = len(letters) - _SHINGLE + 1
    hashes = np.zeros(count, dtype=np.uint64)
    for place in range(_SHINGLE):
        hashes = (hashes + letters[place : place + count] + np.uint64(1)) * _BASE
        hashes ^= hashes >> np.uint64(29)
    ends = np.cumsum(lengths)
    whole = np.ones(len(letters), dtype=np.bool_)
    for back in range(1, _SHINGLE):
        whole[ends - back] = False
    offsets = np.concatenate(([0], np.cumsum(lengths - _SHINGLE + 1)))
    return hashes[whole[:count]], offsets.astype(np.uint64)


def _keys(found: Sketches, number: int) -> npt.NDArray[np.uint64]:
    """Sixteen permutations' lower four bits each, other permutations for another `number`."""
    keys = np.zeros(len(found), dtype=np.uint64)
    for place in range(_KEY_NIBBLES):
        column = (number * 37 + place * (2 * number + 1)) % PERMUTATIONS
        keys = (keys << np.uint64(4)) | (found[:, column] & np.uint8(15))
    return keys


def _compare(
    found: Sketches,
    left: npt.NDArray[np.int64],
    right: npt.NDArray[np.int64],
    matches: float,
    out: npt.NDArray[np.bool_],
) -> None:
    """Mark the later of each pair that matches in at least so many bytes."""
    later = np.maximum(left, right)
    open_pairs = np.flatnonzero(~out[later])
    for start in range(0, len(open_pairs), _AT_ONCE):
        some = open_pairs[start : start + _AT_ONCE]
        same = np.count_nonzero(found[left[some]] == found[right[some]], axis=1)
        out[later[some[same >= matches]]] = True
