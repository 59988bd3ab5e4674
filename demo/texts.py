"""Plain text of the little language, for the base model and for the pretraining mix of PPO-ptx."""

from collections.abc import Callable, Iterator
from random import Random

from demo.words import (
    ANIMALS,
    COLOURS,
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
)

# How many documents are primers: a small model learns to copy from what can be copied.
PRIMER_RATE = 0.6


def base_text(rng: Random, documents: int) -> Iterator[str]:
    """Documents of about fifty words. What one names comes back in it, so that copying pays."""
    for _ in range(documents):
        yield (_primer if rng.random() < PRIMER_RATE else rng.choice(_KINDS))(rng)


def _join(lines: list[str], rng: Random) -> str:
    """One paragraph, or a line for each sentence."""
    return rng.choice((" ", "\n")).join(lines)


def _story(rng: Random) -> str:
    who, other = rng.sample(NAMES, 2)
    animal, thing, place = rng.choice(ANIMALS), rng.choice(THINGS), rng.choice(PLACES)
    colour = rng.choice(COLOURS)
    opener = capital(rng.choice(OPENERS))
    lines = [
        f"{opener} {who} went to the {place}.",
        f"{who} {rng.choice(FINDS)} a {colour} {thing} in the {place}.",
        f"The day was {rng.choice(WEATHER)}.",
        f"A {rng.choice(SIZES)} {animal} {rng.choice(MOVES)} near the {thing}.",
        f"{who} gave the {colour} {thing} to {other}.",
        f"{other} {rng.choice(HAPPY_CUES)} and was happy.",
        f"The {animal} was in the {place} with {who}.",
    ]
    kept = sorted(rng.sample(range(1, len(lines)), 4))
    return _join([lines[0], *(lines[i] for i in kept)], rng)


def _belongings(rng: Random) -> str:
    """Who has what and where everyone is, said and then said again in another order."""
    people, things = rng.sample(NAMES, 3), rng.sample(THINGS, 3)
    colours, places = rng.sample(COLOURS, 3), rng.sample(PLACES, 3)
    rows = list(zip(people, colours, things, places, strict=True))[: rng.choice((2, 3))]
    first = [f"{n} has a {c} {t}." for n, c, t, _ in rows] + [
        f"{n} is in the {p}." for n, _, _, p in rows if rng.random() < 0.5
    ]
    again = [rng.choice((f"The {t} is {c}.", f"{n} has the {t}.")) for n, c, t, _ in rows]
    again += rng.sample(first, 2)
    rng.shuffle(first)
    rng.shuffle(again)
    return _join(first + again, rng)


def _primer(rng: Random) -> str:
    """A few facts, then all that follows from them, in any order: most of it can be copied."""
    count = rng.choice((1, 2, 2, 3))
    people, things = rng.sample(NAMES, 2 * count), rng.sample(THINGS, count)
    colours, places = rng.sample(COLOURS, count), rng.sample(PLACES, count)
    animals = rng.sample(ANIMALS, count)
    facts, derived = [], []
    for i in range(count):
        n, m, t, c, p, a = people[i], people[-1 - i], things[i], colours[i], places[i], animals[i]
        did = rng.choice(FINDS)
        facts.append(
            rng.choice(
                (
                    f"{n} has a {c} {t} in the {p}.",
                    f"{n} went to the {p}. {n} {did} a {c} {t}.",
                    f"{n} and {m} {did} a {a}, a {c} {t} in the {p}.",
                )
            )
        )
        derived += [
            f"Who has the {t}? {n} has the {t}.",
            f"What does {n} have? {n} has a {c} {t}.",
            f"What colour is the {t}? The {t} is {c}.",
            f"Where is {n}? {n} is in the {p}.",
            f"{n} is {'inside' if p in INSIDE else 'outside'}.",
            f"{n} {did} a {t} in the {p}.",
            f"{n} {did} a {c} {t} in the {p}.",
            f"{n} has the {t}.",
            f"The things: {', '.join(things)}.",
            f"The colours: {', '.join(colours)}.",
            f"The names: {', '.join(people[:count])}.",
        ]
    rng.shuffle(derived)
    return _join(facts + derived[:8], rng)


def _sighting(rng: Random) -> str:
    """Somebody saw many things; then each list of them."""
    who, colours = rng.choice(NAMES), rng.sample(COLOURS, 2)
    animals, things = rng.sample(ANIMALS, 2), rng.sample(THINGS, 2)
    seen = [f"a {a}" for a in animals] + [
        f"a {c} {t}" for c, t in zip(colours, things, strict=True)
    ]
    order = rng.sample(range(4), 4)
    animals = [animals[i] for i in order if i < 2]
    late = [i - 2 for i in order if i >= 2]
    listed = [
        f"The animals: {', '.join(animals)}.",
        f"The things: {', '.join(things[i] for i in late)}.",
        f"The colours: {', '.join(colours[i] for i in late)}.",
    ]
    rng.shuffle(listed)
    a, b, c, d = (seen[i] for i in order)
    return _join([f"{who} {rng.choice(FINDS)} {a}, {b}, {c} and {d}.", *listed], rng)


def _retelling(rng: Random) -> str:
    """Lines that differ in one word each."""
    names, place = rng.sample(NAMES, 3), rng.choice(PLACES)
    verb, colour, thing = rng.choice(FINDS), rng.choice(COLOURS), rng.choice(THINGS)
    lines = [f"{n} {verb} a {colour} {thing} in the {place}." for n in names]
    lines.append(f"{names[0]} {verb} a {thing} in the {place}.")
    return _join(lines, rng)


def _groups(rng: Random) -> str:
    group = rng.choice(list(GROUPS))
    lists = [rng.sample(GROUPS[group], rng.choice((2, 3, 4))) for _ in range(3)]
    return _join([f"The {group}: {', '.join(entries)}." for entries in lists], rng)


def _moods(rng: Random) -> str:
    lines = []
    for name in rng.sample(NAMES, 3):
        happy = rng.random() < 0.5
        cue, mood = (
            rng.choice(HAPPY_CUES if happy else SAD_CUES),
            "happy" if happy else "sad",
        )
        place = rng.choice(PLACES)
        side = "inside" if place in INSIDE else "outside"
        lines += rng.choice(
            (
                [f"{name} {cue}.", f"{name} was {mood}."],
                [f"{name} was in the {place}.", f"{name} was {side}."],
            )
        )
    return _join(lines, rng)


def _dialogue(rng: Random) -> str:
    """Two people ask and say in prose."""
    who, other = rng.sample(NAMES, 2)
    thing, colour, place = rng.choice(THINGS), rng.choice(COLOURS), rng.choice(PLACES)
    animal = rng.choice(ANIMALS)
    return _join(
        [
            f"Who has the {thing}? {other} has the {thing}.",
            f"Where is {other}? {other} is in the {place} with a {animal}.",
            f"What colour is the {thing}? The {thing} is {colour}.",
            f"{who} {rng.choice(FINDS)} the {animal} and the {colour} {thing} in the {place}!",
        ],
        rng,
    )


_KINDS: tuple[Callable[[Random], str], ...] = (
    _story,
    _story,
    _belongings,
    _belongings,
    _sighting,
    _retelling,
    _groups,
    _moods,
    _dialogue,
)
