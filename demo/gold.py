"""The known taste: what is wrong with an answer, and how good that leaves it."""

import re

from demo.phrasings import Task
from demo.prompts import expectation, from_prompt
from demo.use_cases import Expectation
from demo.words import (
    CHATTER,
    COLOURS,
    GROUPS,
    LEXICON,
    capital,
    either,
    entities,
    is_sentence,
    sentences,
    words,
)

# The share of the score that each fault takes away. Shares multiply, so that a better answer stays
# better however much else is wrong with it.
PENALTY = {
    "empty": 1.0,
    "unknown_prompt": 1.0,
    "cut_off": 0.7,
    "unknown_word": 0.5,
    "malformed": 0.5,
    "invented": 0.5,
    "wrong": 0.5,
    "missing": 0.5,
    "start": 0.5,
    "end": 0.5,
    "too_long": 0.5,
    "colour": 0.5,
    "count": 0.5,
    "extra_sentence": 0.4,
    "repetition": 0.4,
    "chatter": 0.4,
}
_CHATTER = re.compile(either(CHATTER))


def gold_score(prompt: str, answer: str, finished: bool) -> float:
    """How good the answer is, from 0 to 1; 1 where nothing is wrong. `finished`: it was not cut
    off.
    """
    score = 1.0
    for fault in violations(prompt, answer) + ([] if finished else ["cut_off"]):
        score *= 1 - PENALTY[fault]
    return score


def violations(prompt: str, answer: str) -> list[str]:
    """The names of what is wrong with an answer, keys of PENALTY; none where it is right."""
    task = from_prompt(prompt)
    expected = expectation(task) if task else None
    if task is None or expected is None:
        return ["unknown_prompt"]
    if not answer.strip():
        return ["empty"]
    body = _without_chatter(answer.strip())
    parts = sentences(body)
    found = {
        "chatter": body != answer.strip(),
        "unknown_word": not set(words(body)) <= LEXICON,
        "repetition": len(set(parts)) < len(parts) or _repeats_entry(expected, parts[0]),
        "extra_sentence": len(set(parts)) > 1,
        "end": not body.endswith(expected.end),
        "start": bool(expected.start) and not answer.strip().startswith(expected.start + " "),
        "too_long": bool(expected.max_words) and len(words(parts[0])) > expected.max_words,
        "colour": expected.no_colour and not set(COLOURS).isdisjoint(words(body)),
        "missing": not expected.needs <= set(entities(parts[0])),
        "count": bool(expected.entries) and len(_entries(parts[0])) != expected.entries,
        **_unasked(task, expected, body),
    }
    if not found["wrong"] and not found["missing"] and not found["invented"]:
        found["malformed"] = not _well_formed(expected, parts[0])
    return [name for name, is_so in found.items() if is_so]


def _without_chatter(answer: str) -> str:
    rest = _CHATTER.sub("", answer, count=1) if _CHATTER.match(answer) else answer
    return answer if not rest.strip() or rest == answer else capital(rest.strip())


def _unasked(task: Task, expected: Expectation, body: str) -> dict[str, bool]:
    """Whether the answer names what the prompt does not hold, or holds but did not ask for."""
    if expected.allowed is None:
        return {"invented": False, "wrong": False}
    named = set(entities(body)) - expected.allowed
    held = set(entities(task.prompt))
    return {"invented": bool(named - held), "wrong": bool(named & held)}


def _well_formed(expected: Expectation, sentence: str) -> bool:
    if expected.exact:
        return sentence in expected.exact
    if expected.list_of:
        entry = either(GROUPS[expected.list_of])
        return bool(re.fullmatch(rf"The {expected.list_of}: {entry}(?:, {entry})*\.", sentence))
    return is_sentence(sentence)


def _entries(sentence: str) -> list[str]:
    """The entries of a list: what stands after its colon."""
    return entities(sentence.partition(":")[2])


def _repeats_entry(expected: Expectation, sentence: str) -> bool:
    entries = _entries(sentence) if expected.list_of else []
    return len(set(entries)) < len(entries)
