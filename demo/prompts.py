"""Tasks: prompts with explicit constraints, what a right answer must hold, and one right answer."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

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
    OPENERS,
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

# How often each use case is asked.
USE_CASE_RATES = {
    "generation": 0.30,
    "closed_qa": 0.15,
    "rewrite": 0.15,
    "extract": 0.12,
    "classification": 0.10,
    "summarisation": 0.10,
    "brainstorming": 0.08,
}
# How often a generation prompt names a place, and how often it sets a rule.
PLACE_RATE = 0.4
RULE_RATE = 0.6
SHORT_SENTENCE = 8
SUMMARY_WORDS = 14
NUMBERS = {"two": 2, "three": 3, "four": 4}

NO_COLOUR, SHORT, SHOUT = "Name no colour.", "Use at most eight words.", "End with !"
_START = {f"Start with the word {capital(o)}.": capital(o) for o in OPENERS}
_USE_NAME = {f"Use the name {n}.": n for n in NAMES}
RULES = (NO_COLOUR, SHORT, SHOUT, *_START, *_USE_NAME)

PHRASINGS: dict[str, tuple[str, ...]] = {
    "generation": tuple(
        f"{lead} a sentence about a {{animal}} and a {{thing}}{{where}}.{{rule}}"
        for lead in ("Write", "Tell me", "Make up")
    ),
    "closed_qa": (
        "{facts} {question}",
        "Text: {facts} {question}",
        "Read this: {facts} {question}",
    ),
    "rewrite": (
        "Put {new} in place of {old}: {text}",
        "Say {new} and not {old}: {text}",
        "Leave out the colour: {text}",
        "Write this with no colour: {text}",
    ),
    "extract": (
        "List the {group}: {text}",
        "Which {group} are in this text: {text}",
        "Find all the {group}: {text}",
    ),
    "classification": (
        "Is this {choice}: {text}",
        "Say if this is {choice}: {text}",
        "{text} Is this {choice}?",
    ),
    "summarisation": (
        "Sum up in one sentence: {text}",
        "Say this in one short sentence: {text}",
        "{text} Sum this up in one sentence.",
    ),
    "brainstorming": (
        "Name {number} {group} but no {first} and no {second}.",
        "Think of {number} {group} but no {first} and no {second}.",
    ),
}
_MOOD, _SIDE = "happy or sad", "inside or outside"
_ENTITY = either(CLASS)
_TEXT = r"[A-Z][A-Za-z, ]*\.(?: [A-Z][A-Za-z, ]*\.)*"
_SLOTS = {
    "animal": either(ANIMALS),
    "thing": either(THINGS),
    "where": rf"(?: in the {either(PLACES)})?",
    "rule": rf"(?: {either(RULES)})?",
    "facts": rf"(?:{either(NAMES)} (?:has a {_ENTITY} {_ENTITY}|is in the {_ENTITY})\. ?)+(?<! )",
    "question": r"(?:What|Who|Where) [a-zA-Z ]+\?",
    "new": _ENTITY,
    "old": _ENTITY,
    "text": _TEXT,
    "group": either(GROUPS),
    "choice": either((_MOOD, _SIDE)),
    "number": either(NUMBERS),
    "first": _ENTITY,
    "second": _ENTITY,
}


@dataclass(frozen=True)
class Task:
    """A prompt, one line of plain text, and the values that fill its phrasing."""

    use_case: str
    prompt: str
    slots: tuple[tuple[str, str], ...]

    def slot(self, name: str) -> str:
        """The value of a slot; empty where the phrasing has no such slot."""
        return dict(self.slots).get(name, "")


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


def make_task(rng: Random) -> Task:
    """A random task, in one of the phrasings of its use case."""
    use_case = rng.choices(list(USE_CASE_RATES), list(USE_CASE_RATES.values()))[0]
    slots = _MAKE[use_case](rng)
    fitting = [p for p in PHRASINGS[use_case] if set(_slot_names(p)) == set(slots)]
    prompt = rng.choice(fitting).format_map(slots)
    return Task(use_case, prompt, tuple(sorted(slots.items())))


def from_prompt(prompt: str) -> Task | None:
    """The task whose prompt this is; None where it is none of this world's."""
    for use_case, pattern in _PATTERNS:
        if match := pattern.fullmatch(prompt):
            task = Task(use_case, prompt, tuple(sorted(match.groupdict().items())))
            if expectation(task) is not None:
                return task
    return None


def expectation(task: Task) -> Expectation | None:
    """What a right answer must be; None where the prompt makes no sense."""
    return _EXPECT[task.use_case](task)


def good_answer(task: Task, rng: Random) -> str:
    """An answer that meets every constraint."""
    return _ANSWER[task.use_case](task, rng)


def list_answer(group: str, entries: list[str]) -> str:
    return f"The {group}: {', '.join(entries)}."


def _slot_names(phrasing: str) -> list[str]:
    return re.findall(r"{(\w+)}", phrasing)


def _pattern(phrasing: str) -> re.Pattern[str]:
    parts = re.split(r"{(\w+)}", phrasing)
    return re.compile(
        "".join(
            f"(?P<{part}>{_SLOTS[part]})" if i % 2 else re.escape(part)
            for i, part in enumerate(parts)
        )
    )


_PATTERNS = [(use_case, _pattern(p)) for use_case, ps in PHRASINGS.items() for p in ps]


# generation: one sentence about an animal and a thing, often with a place and a rule.


def _make_generation(rng: Random) -> dict[str, str]:
    return {
        "animal": rng.choice(ANIMALS),
        "thing": rng.choice(THINGS),
        "where": f" in the {rng.choice(PLACES)}" if rng.random() < PLACE_RATE else "",
        "rule": f" {_make_rule(rng)}" if rng.random() < RULE_RATE else "",
    }


def _make_rule(rng: Random) -> str:
    kinds = ((NO_COLOUR,), (SHORT,), (SHOUT,), tuple(_START), tuple(_USE_NAME))
    return rng.choice(rng.choice(kinds))


def _expect_generation(task: Task) -> Expectation:
    rule = task.slot("rule").strip()
    named = {task.slot("animal"), task.slot("thing"), *entities(task.slot("where"))}
    return Expectation(
        needs=frozenset(named | {_USE_NAME[rule]} if rule in _USE_NAME else named),
        start=_START.get(rule, ""),
        end="!" if rule == SHOUT else ".",
        max_words=SHORT_SENTENCE if rule == SHORT else 0,
        no_colour=rule == NO_COLOUR,
    )


def _answer_generation(task: Task, rng: Random) -> str:
    rule, where = task.slot("rule").strip(), task.slot("where")
    animal, thing = f"a {task.slot('animal')}", f"a {task.slot('thing')}"
    if rule not in (SHORT, NO_COLOUR) and rng.random() < 0.3:
        thing = thing.replace("a ", f"a {rng.choice(COLOURS)} ")
    if rule != SHORT and rng.random() < 0.3:
        animal = animal.replace("a ", f"a {rng.choice(SIZES)} ")
    if rule in _USE_NAME:
        text = f"{_USE_NAME[rule]} {rng.choice(FINDS)} {animal} with {thing}{where}"
    elif where or rng.random() < 0.7:
        text = f"{animal} {rng.choice(FINDS)} {thing}{where}"
    else:
        text = f"{animal} {rng.choice(MOVES)} {rng.choice(('near', 'behind', 'with'))} {thing}"
    if rule in _START:
        text = f"{_START[rule]} {text}"
    return capital(text) + ("!" if rule == SHOUT else ".")


# closed_qa: a question about two or three facts that the prompt states.

_HAS = re.compile(r"(\w+) has a (\w+) (\w+)\.")
_IS_IN = re.compile(r"(\w+) is in the (\w+)\.")


def _make_closed_qa(rng: Random) -> dict[str, str]:
    first, second = rng.sample(NAMES, 2)
    things, colours = rng.sample(THINGS, 2), rng.sample(COLOURS, 2)
    facts = [
        f"{n} has a {c} {t}."
        for n, c, t in zip((first, second), colours, things, strict=True)
    ]
    asked = rng.randrange(2)
    questions = [
        f"What does {(first, second)[asked]} have?",
        f"Who has the {things[asked]}?",
        f"What colour is the {things[asked]}?",
    ]
    if rng.random() < 0.4:
        someone = rng.choice((first, second))
        facts.append(f"{someone} is in the {rng.choice(PLACES)}.")
        questions.append(f"Where is {someone}?")
    rng.shuffle(facts)
    return {"facts": " ".join(facts), "question": rng.choice(questions)}


def _expect_closed_qa(task: Task) -> Expectation | None:
    facts, question = task.slot("facts"), task.slot("question")
    asked = entities(question)
    if len(asked) != 1:
        return None
    return _exactly(_replies(facts, question, asked[0]))


def _replies(facts: str, question: str, asked: str) -> list[str]:
    """The right answers to a question, the usual one first; none where the facts do not say."""
    for name, colour, thing in _HAS.findall(facts):
        if question == f"What does {name} have?":
            return [f"{name} has a {colour} {thing}.", f"{name} has a {thing}."]
        if question == f"Who has the {thing}?":
            return [f"{name} has the {thing}.", f"{name} has a {colour} {thing}."]
        if question == f"What colour is the {thing}?":
            return [f"The {thing} is {colour}."]
    for name, place in _IS_IN.findall(facts):
        if question == f"Where is {asked}?" and name == asked:
            return [f"{name} is in the {place}."]
    return []


def _exactly(answers: list[str]) -> Expectation | None:
    if not answers:
        return None
    named = [frozenset(entities(a)) for a in answers]
    return Expectation(
        needs=frozenset.intersection(*named),
        allowed=frozenset.union(*named),
        exact=tuple(answers),
    )


def _answer_exactly(task: Task, rng: Random) -> str:
    expected = expectation(task)
    if expected is None:
        raise ValueError(
            f"task.prompt: expected a prompt of this world, got {task.prompt!r}"
        )
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
    return list_answer(
        group, [w for w in entities(task.slot("text")) if w in GROUPS[group]]
    )


# classification: a mood by what the person did last, or a side of the door by the place.


def _make_classification(rng: Random) -> dict[str, str]:
    done = f"{rng.choice(NAMES)} {rng.choice(FINDS)} a {rng.choice(THINGS)}"
    place = rng.choice(PLACES)
    choice = rng.choice((_MOOD, _SIDE))
    if choice == _SIDE:
        return {"choice": choice, "text": f"{done} in the {place}."}
    return {
        "choice": choice,
        "text": f"{done} and {rng.choice(HAPPY_CUES + SAD_CUES)}.",
    }


def _expect_classification(task: Task) -> Expectation | None:
    last = (words(task.slot("text")) or [""])[-1]
    if task.slot("choice") == _MOOD and last in HAPPY_CUES + SAD_CUES:
        return _exactly(["Happy." if last in HAPPY_CUES else "Sad."])
    if task.slot("choice") == _SIDE and last in PLACES:
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
        raise ValueError(
            f"task.prompt: expected a story of this world, got {task.prompt!r}"
        )
    who, place, _, _, thing, _, _, other, _ = match.groups()
    gift = f" and gave it to {other}" if other else ""
    return f"{who} found a {thing} in the {place}{gift}."


# brainstorming: a number of entities of a group, some left out.


def _make_brainstorming(rng: Random) -> dict[str, str]:
    group = rng.choice(list(GROUPS))
    first, second = rng.sample(GROUPS[group], 2)
    return {
        "number": rng.choice(list(NUMBERS)),
        "group": group,
        "first": first,
        "second": second,
    }


def _expect_brainstorming(task: Task) -> Expectation | None:
    group, entries = task.slot("group"), NUMBERS[task.slot("number")]
    excluded = {task.slot("first"), task.slot("second")}
    if not excluded <= set(GROUPS[group]):
        return None
    return Expectation(
        allowed=frozenset(GROUPS[group]) - excluded, list_of=group, entries=entries
    )


def _answer_brainstorming(task: Task, rng: Random) -> str:
    group, entries = task.slot("group"), NUMBERS[task.slot("number")]
    excluded = {task.slot("first"), task.slot("second")}
    return list_answer(
        group, rng.sample([w for w in GROUPS[group] if w not in excluded], entries)
    )


_MAKE: dict[str, Callable[[Random], dict[str, str]]] = {
    "generation": _make_generation,
    "closed_qa": _make_closed_qa,
    "rewrite": _make_rewrite,
    "extract": _make_extract,
    "classification": _make_classification,
    "summarisation": _make_summarisation,
    "brainstorming": _make_brainstorming,
}
_EXPECT: dict[str, Callable[[Task], Expectation | None]] = {
    "generation": _expect_generation,
    "closed_qa": _expect_closed_qa,
    "rewrite": _expect_rewrite,
    "extract": _expect_extract,
    "classification": _expect_classification,
    "summarisation": _expect_summarisation,
    "brainstorming": _expect_brainstorming,
}
_ANSWER: dict[str, Callable[[Task, Random], str]] = {
    "generation": _answer_generation,
    "closed_qa": _answer_exactly,
    "rewrite": _answer_exactly,
    "extract": _answer_extract,
    "classification": _answer_exactly,
    "summarisation": _answer_summarisation,
    "brainstorming": _answer_brainstorming,
}
