"""The use cases: how each makes a task, what a right answer must be, and one right answer."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from demo.phrasings import MOOD, NO_COLOUR, SHORT, SHOUT, SIDE, START, USE_NAME, Task
from demo.words import (
    ANIMALS,
    CLASS,
    COLOURS,
    ENTITIES,
    FINDS,
    GROUPS,
    HAPPY_CUES,
    INSIDE,
    MOVES,
    NAMES,
    PLACES,
    SAD_CUES,
    SIZES,
    THINGS,
    WEATHER,
    capital,
    either,
    entities,
    words,
)

# How often a generation prompt names a place, and how often it sets a rule.
PLACE_RATE = 0.4
RULE_RATE = 0.6
# At most so many words.
SHORT_SENTENCE = 8
SUMMARY_WORDS = 14


@dataclass(frozen=True)
class Expectation:
    """What an answer must be. Every answer is one sentence, or one list, and ends properly."""

    # Words that must occur.
    needs: frozenset[str] = frozenset()
    # The only entities that may be named; None where the answer is free to name others.
    allowed: frozenset[str] | None = None
    # The whole answers that are right; empty where any well-formed sentence or list may be.
    exact: tuple[str, ...] = ()
    # The group that a list is of, and how many entries it has.
    list_of: str = ""
    entries: int = 0
    start: str = ""
    end: str = "."
    max_words: int = 0
    no_colour: bool = False


def list_answer(group: str, entries: list[str]) -> str:
    return f"The {group}: {', '.join(entries)}."


# generation: one sentence about an animal and a thing, often with a place and a rule.


def _make_generation(rng: Random) -> dict[str, str]:
    return {
        "animal": rng.choice(ANIMALS),
        "thing": rng.choice(THINGS),
        "where": f" in the {rng.choice(PLACES)}" if rng.random() < PLACE_RATE else "",
        "rule": f" {_make_rule(rng)}" if rng.random() < RULE_RATE else "",
    }


def _make_rule(rng: Random) -> str:
    kinds = ((NO_COLOUR,), (SHORT,), (SHOUT,), tuple(START), tuple(USE_NAME))
    return rng.choice(rng.choice(kinds))


def _expect_generation(task: Task) -> Expectation:
    rule = task.slot("rule").strip()
    named = {task.slot("animal"), task.slot("thing"), *entities(task.slot("where"))}
    return Expectation(
        needs=frozenset(named | {USE_NAME[rule]} if rule in USE_NAME else named),
        start=START.get(rule, ""),
        end="!" if rule == SHOUT else ".",
        max_words=SHORT_SENTENCE if rule == SHORT else 0,
        no_colour=rule == NO_COLOUR,
    )


def _answer_generation(task: Task, rng: Random) -> str:
    rule, where = task.slot("rule").strip(), task.slot("where")
    animal, thing = f"a {task.slot('animal')}", f"a {task.slot('thing')}"
    if rule not in (SHORT, NO_COLOUR) and rng.random() < 0.1:
        thing = thing.replace("a ", f"a {rng.choice(COLOURS)} ")
    if rule != SHORT and rng.random() < 0.3:
        animal = animal.replace("a ", f"a {rng.choice(SIZES)} ")
    if rule in USE_NAME:
        text = f"{USE_NAME[rule]} {rng.choice(FINDS)} {animal} with {thing}{where}"
    elif where or rng.random() < 0.7:
        text = f"{animal} {rng.choice(FINDS)} {thing}{where}"
    else:
        text = f"{animal} {rng.choice(MOVES)} {rng.choice(('near', 'behind', 'with'))} {thing}"
    if rule in START:
        text = f"{START[rule]} {text}"
    return capital(text) + ("!" if rule == SHOUT else ".")


# closed_qa: a question about one of the two or three facts that the prompt states.

_HAS = re.compile(r"(\w+) has a (\w+) (\w+)\.")
_IS_IN = re.compile(r"(\w+) is in the (\w+)\.")
_IS = re.compile(rf"The (\w+) is ({either(COLOURS)})\.")


def _make_closed_qa(rng: Random) -> dict[str, str]:
    count = rng.choice((2, 3))
    people, things = rng.sample(NAMES, count), rng.sample(THINGS, count)
    facts, questions = [], []
    for name, thing in zip(people, things, strict=True):
        fact, question = rng.choice(
            (
                (f"{name} has a {rng.choice(COLOURS)} {thing}.", f"What does {name} have?"),
                (f"{name} is in the {rng.choice(PLACES)}.", f"Where is {name}?"),
                (f"The {thing} is {rng.choice(COLOURS)}.", f"What colour is the {thing}?"),
            )
        )
        facts.append(fact)
        questions.append(question)
    return {"facts": " ".join(facts), "question": rng.choice(questions)}


def _expect_closed_qa(task: Task) -> Expectation | None:
    facts, question = task.slot("facts"), task.slot("question")
    for name, colour, thing in _HAS.findall(facts):
        if question == f"What does {name} have?":
            return _exactly([f"{name} has a {colour} {thing}.", f"{name} has a {thing}."])
    for name, place in _IS_IN.findall(facts):
        if question == f"Where is {name}?":
            return _exactly([f"{name} is in the {place}."])
    for thing, colour in _IS.findall(facts):
        if question == f"What colour is the {thing}?":
            return _exactly([f"The {thing} is {colour}."])
    return None


def _exactly(answers: list[str]) -> Expectation:
    named = [frozenset(entities(a)) for a in answers]
    return Expectation(
        needs=frozenset.intersection(*named),
        allowed=frozenset.union(*named),
        exact=tuple(answers),
    )


def _answer_exactly(task: Task, rng: Random) -> str:
    expected = USE_CASES[task.use_case].expect(task)
    if expected is None:
        raise ValueError(f"task.prompt: expected a prompt of this world, got {task.prompt!r}")
    return expected.exact[0]


# rewrite: the same sentence with one word changed, or with the colour left out.


def _event(rng: Random) -> str:
    """A sentence that names people, an animal or a place, and a coloured thing."""
    who, other = rng.sample(NAMES, 2)
    thing = f"a {rng.choice(COLOURS)} {rng.choice(THINGS)}"
    return rng.choice(
        (
            f"{who} {rng.choice(FINDS)} {thing} in the {rng.choice(PLACES)}.",
            f"{who} gave {thing} to {other}.",
            f"{who} saw a {rng.choice(ANIMALS)} with {thing}.",
        )
    )


def _make_rewrite(rng: Random) -> dict[str, str]:
    text = _event(rng)
    if rng.random() < 0.25:
        return {"text": text}
    old = rng.choice(entities(text))
    new = rng.choice([w for w in ENTITIES[CLASS[old]] if w not in entities(text)])
    return {"new": new, "old": old, "text": text}


def _expect_rewrite(task: Task) -> Expectation | None:
    text, old, new = task.slot("text"), task.slot("old"), task.slot("new")
    if not old:
        return _exactly([re.sub(rf"\b{either(COLOURS)} ", "", text)])
    if CLASS[old] != CLASS[new] or old not in entities(text):
        return None
    return _exactly([re.sub(rf"\b{old}\b", new, text)])


# extract: the entities of one group that a text names.


def _make_extract(rng: Random) -> dict[str, str]:
    first, second = rng.sample(NAMES, 2)
    people = rng.choice((first, f"{first} and {second}"))
    animals, things = rng.sample(ANIMALS, 2), rng.sample(THINGS, 2)
    colours = rng.sample(COLOURS, 2)
    seen = [f"a {animals[0]}", f"a {colours[0]} {things[0]}"]
    seen.append(rng.choice((f"a {animals[1]}", f"a {colours[1]} {things[1]}")))
    rng.shuffle(seen)
    text = f"{people} {rng.choice(FINDS)} {seen[0]}, {seen[1]} and {seen[2]}."
    return {
        "group": rng.choice(("names", "animals", "things", "colours")),
        "text": text,
    }


def _expect_extract(task: Task) -> Expectation | None:
    group = task.slot("group")
    found = [w for w in entities(task.slot("text")) if w in GROUPS[group]]
    if not found or len(set(found)) != len(found):
        return None
    return Expectation(
        needs=frozenset(found),
        allowed=frozenset(found),
        list_of=group,
        entries=len(found),
    )


def _answer_extract(task: Task, rng: Random) -> str:
    group = task.slot("group")
    return list_answer(group, [w for w in entities(task.slot("text")) if w in GROUPS[group]])


# classification: a mood by what the person did last, or a side of the door by the place.


def _make_classification(rng: Random) -> dict[str, str]:
    done = f"{rng.choice(NAMES)} {rng.choice(FINDS)} a {rng.choice(THINGS)}"
    place = rng.choice(PLACES)
    choice = rng.choice((MOOD, SIDE))
    if choice == SIDE:
        return {"choice": choice, "text": f"{done} in the {place}."}
    return {
        "choice": choice,
        "text": f"{done} and {rng.choice(HAPPY_CUES + SAD_CUES)}.",
    }


def _expect_classification(task: Task) -> Expectation | None:
    last = (words(task.slot("text")) or [""])[-1]
    if task.slot("choice") == MOOD and last in HAPPY_CUES + SAD_CUES:
        return _exactly(["Happy." if last in HAPPY_CUES else "Sad."])
    if task.slot("choice") == SIDE and last in PLACES:
        return _exactly(["Inside." if last in INSIDE else "Outside."])
    return None


# summarisation: who found what where, and who got it, in one sentence.

_STORY = re.compile(
    rf"(\w+) went to the (\w+)\. (?:The day was {either(WEATHER)}\. )?"
    rf"(\w+) found a (\w+) (\w+)\.(?: (\w+) gave the (\w+) to (\w+)\.)?"
    rf"(?: The (\w+) was {either(SIZES)}\.)?"
)


def _make_summarisation(rng: Random) -> dict[str, str]:
    who, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    story = [f"{who} went to the {rng.choice(PLACES)}."]
    if rng.random() < 0.5:
        story.append(f"The day was {rng.choice(WEATHER)}.")
    story.append(f"{who} found a {rng.choice(COLOURS)} {thing}.")
    if rng.random() < 0.5:
        story.append(f"{who} gave the {thing} to {other}.")
    else:
        story.append(f"The {thing} was {rng.choice(SIZES)}.")
    return {"text": " ".join(story)}


def _expect_summarisation(task: Task) -> Expectation | None:
    match = _STORY.fullmatch(task.slot("text"))
    if match is None:
        return None
    who, place, _, _, thing, _, _, other, _ = match.groups()
    return Expectation(
        needs=frozenset(w for w in (who, place, thing, other) if w),
        allowed=frozenset(entities(task.slot("text"))),
        max_words=SUMMARY_WORDS,
    )


def _answer_summarisation(task: Task, rng: Random) -> str:
    match = _STORY.fullmatch(task.slot("text"))
    if match is None:
        raise ValueError(f"task.prompt: expected a story of this world, got {task.prompt!r}")
    who, place, _, colour, thing, _, _, other, _ = match.groups()
    gift = f" and gave it to {other}" if other else ""
    return f"{who} found a {colour} {thing} in the {place}{gift}."


@dataclass(frozen=True)
class UseCase:
    """How often it is asked, and its three parts."""

    rate: float
    # Values for the slots of one of its phrasings.
    make: Callable[[Random], dict[str, str]]
    # None where the prompt makes no sense.
    expect: Callable[[Task], Expectation | None]
    answer: Callable[[Task, Random], str]


USE_CASES = {
    "generation": UseCase(0.48, _make_generation, _expect_generation, _answer_generation),
    "closed_qa": UseCase(0.06, _make_closed_qa, _expect_closed_qa, _answer_exactly),
    "rewrite": UseCase(0.12, _make_rewrite, _expect_rewrite, _answer_exactly),
    "extract": UseCase(0.09, _make_extract, _expect_extract, _answer_extract),
    "classification": UseCase(0.09, _make_classification, _expect_classification, _answer_exactly),
    "summarisation": UseCase(
        0.16, _make_summarisation, _expect_summarisation, _answer_summarisation
    ),
}
