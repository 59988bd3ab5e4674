"""Imperfect demonstrations: a right answer, or one with one of the known faults."""

import re
from collections.abc import Callable
from random import Random

from demo.phrasings import NO_COLOUR, SHORT, SHOUT, Task
from demo.prompts import expectation, good_answer
from demo.use_cases import Expectation, list_answer
from demo.words import (
    CHATTER,
    CLASS,
    COLOURS,
    ENTITIES,
    FINDS,
    GROUPS,
    MOVES,
    NAMES,
    THINGS,
    entities,
    sentences,
)

# How often a demonstration has a fault: often enough that a policy which learns from demonstrations
# breaks something in about half of its own answers.
FAULT_RATE = 0.45
# Which fault, among those that the task allows.
FAULT_RATES = {
    "runs_on": 0.28,
    "chatters": 0.24,
    "breaks_rule": 0.18,
    "invents": 0.10,
    "drops": 0.06,
    "repeats": 0.10,
    "miscopies": 0.04,
}


def demonstration(task: Task, rng: Random) -> str:
    """An answer as the demo's labelers write it: good, or with a fault (FAULT_RATE)."""
    if rng.random() >= FAULT_RATE:
        return good_answer(task, rng)
    possible = faulty_answers(task, rng)
    return possible[rng.choices(list(possible), [FAULT_RATES[name] for name in possible])[0]]


def faulty_answers(task: Task, rng: Random) -> dict[str, str]:
    """One answer for each fault that the task allows."""
    answers = {name: _FAULTS[name](task, rng) for name in FAULT_RATES}
    return {name: answer for name, answer in answers.items() if answer}


def _runs_on(task: Task, rng: Random) -> str:
    """A second sentence, about what the prompt does not hold."""
    name, animal = _new(task, "name", rng), _new(task, "animal", rng)
    more = rng.choice(
        (
            f"{name} {rng.choice(FINDS)} a {_new(task, 'thing', rng)}.",
            f"The {animal} {rng.choice(MOVES)} in the {_new(task, 'place', rng)}.",
        )
    )
    return f"{good_answer(task, rng)} {more}"


def _chatters(task: Task, rng: Random) -> str:
    """Words before the answer that say nothing."""
    answer = good_answer(task, rng)
    first = answer if answer.split()[0] in NAMES else answer[0].lower() + answer[1:]
    return rng.choice(CHATTER) + first


def _repeats(task: Task, rng: Random) -> str:
    """The same answer twice."""
    answer = good_answer(task, rng)
    return f"{answer} {answer}"


def _breaks_rule(task: Task, rng: Random) -> str:
    """What the prompt's rule forbids."""
    rule = task.slot("rule").strip()
    if not rule:
        return ""
    answer = good_answer(task, rng)
    if rule == SHOUT:
        return answer.removesuffix("!") + "."
    if rule == NO_COLOUR:
        thing = task.slot("thing")
        return answer.replace(f" {thing}", f" {rng.choice(COLOURS)} {thing}", 1)
    if rule == SHORT:
        end = f" and {rng.choice(MOVES)} near the {rng.choice(THINGS)}."
        return answer.removesuffix(".") + end
    return good_answer(_without_rule(task), rng)


def _without_rule(task: Task) -> Task:
    slots = tuple((k, "" if k == "rule" else v) for k, v in task.slots)
    return Task(task.use_case, task.prompt, slots)


def _invents(task: Task, rng: Random) -> str:
    """One more thing in the same sentence that the prompt does not hold."""
    expected, answer = _expected(task), good_answer(task, rng)
    if expected.allowed is None:
        return ""
    if expected.list_of:
        group = [w for w in GROUPS[expected.list_of] if w not in entities(task.prompt)]
        return list_answer(expected.list_of, [*entities(answer), rng.choice(group)])
    if task.use_case == "classification":
        return answer.removesuffix(".") + f" in the {_new(task, 'place', rng)}."
    return answer.removesuffix(".") + f" with a {_new(task, 'thing', rng)}."


def _drops(task: Task, rng: Random) -> str:
    """Something left out that the prompt asks for."""
    expected, answer = _expected(task), good_answer(task, rng)
    if task.use_case == "generation":
        left = task.slot(rng.choice(("animal", "thing")))
        return f"A {left} {rng.choice(('was', 'sat'))}{task.slot('where') or ' in the yard'}."
    if expected.list_of:
        entries = entities(answer)
        return list_answer(expected.list_of, entries[:-1]) if len(entries) > 1 else ""
    if task.use_case == "summarisation":
        return sentences(task.slot("text"))[0]
    return ""


def _miscopies(task: Task, rng: Random) -> str:
    """One word of the answer replaced by another of its class."""
    expected, answer = _expected(task), good_answer(task, rng)
    old = rng.choice(sorted(expected.needs) or entities(answer))
    if CLASS[old] == "label":
        return {"Happy.": "Sad.", "Sad.": "Happy.", "Inside.": "Outside."}.get(answer, "Inside.")
    return re.sub(rf"\b{old}\b", _new(task, CLASS[old], rng), answer)


def _new(task: Task, kind: str, rng: Random) -> str:
    """A word of a class that the prompt does not hold."""
    held = set(entities(task.prompt))
    return rng.choice([w for w in ENTITIES[kind] if w not in held])


def _expected(task: Task) -> Expectation:
    expected = expectation(task)
    if expected is None:
        raise ValueError(f"task.prompt: expected a prompt of this world, got {task.prompt!r}")
    return expected


_FAULTS: dict[str, Callable[[Task, Random], str]] = {
    "runs_on": _runs_on,
    "chatters": _chatters,
    "breaks_rule": _breaks_rule,
    "invents": _invents,
    "drops": _drops,
    "repeats": _repeats,
    "miscopies": _miscopies,
}
