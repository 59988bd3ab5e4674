"""The demo's little language: a closed lexicon, word classes and the shape of a sentence."""

import re
from collections.abc import Iterable


def _split(line: str) -> tuple[str, ...]:
    return tuple(line.split())


# Every word that may follow "a" starts with a consonant, so that the language needs no "an".
NAMES = _split("Anna Ben Tom Lucy Max Sara Jack Emma Leo Nina Sam Rosa")
ANIMALS = _split("fox dog cat bear bird frog horse duck goat lion")
THINGS = _split("ball kite book hat cup lamp box drum coat bell cake boat")
COLOURS = _split("red blue green white black brown pink gold")
INSIDE = _split("kitchen school house shop castle")
OUTSIDE = _split("forest garden park field meadow")
PLACES = INSIDE + OUTSIDE
SIZES = _split("big small young quiet new lost")
WEATHER = _split("warm cold long dark")
LABELS = _split("happy sad inside outside")
FINDS = _split("saw found took bought wanted liked kept hid")
MOVES = _split("ran slept sat played jumped waited rested")
HAPPY_CUES = _split("smiled laughed danced sang")
SAD_CUES = _split("cried wept sighed fell")
BE = _split("is was were has had gave went")
PREPOSITIONS = _split("in near under behind with to")
OPENERS = _split("once today then soon")

# What a text can be about. A word of these classes that the prompt does not hold is an invention.
ENTITIES = {
    "name": NAMES,
    "animal": ANIMALS,
    "thing": THINGS,
    "colour": COLOURS,
    "place": PLACES,
    "label": LABELS,
}
# How a list calls them.
GROUPS = {
    "names": NAMES,
    "animals": ANIMALS,
    "things": THINGS,
    "colours": COLOURS,
    "places": PLACES,
}
# Ways to start that say nothing; the known taste is against them.
CHATTER = ("Well, ", "I think ", "Sure, ")

# One letter for each class, so that a regular expression over letters is the grammar of a sentence.
_LETTERS = {
    "D": ("a", "the"),
    "J": SIZES + WEATHER + COLOURS + LABELS,
    "N": ANIMALS + THINGS + PLACES + ("day",),
    "P": (*NAMES, "it"),
    "V": FINDS + MOVES + HAPPY_CUES + SAD_CUES + BE,
    "R": PREPOSITIONS,
    "O": OPENERS,
    "C": ("and",),
}
LETTER = {word: letter for letter, words in _LETTERS.items() for word in words}
CLASS = {word: name for name, words in ENTITIES.items() for word in words}
LEXICON = frozenset(LETTER) | frozenset(GROUPS)

_NOUN_PHRASE = r"(?:DJ{0,2}N|P)"
_VERB_PHRASE = rf"V(?:{_NOUN_PHRASE}(?:C{_NOUN_PHRASE})?|J)?(?:R{_NOUN_PHRASE}){{0,2}}"
_SENTENCE = re.compile(
    rf"O?{_NOUN_PHRASE}(?:C{_NOUN_PHRASE})?{_VERB_PHRASE}(?:C{_NOUN_PHRASE}?{_VERB_PHRASE})?"
)
_WORD = re.compile(r"[A-Za-z]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with its end mark."""
    return [s for s in _SENTENCE_END.split(text.strip()) if s]


def words(text: str) -> list[str]:
    """The words of a text as the lexicon spells them: a capital only where the word is a name."""
    return [w if w in NAMES else w[0].lower() + w[1:] for w in _WORD.findall(text)]


def entities(text: str) -> list[str]:
    """The words of a text that say what it is about (classes of ENTITIES), in order."""
    return [w for w in words(text) if w in CLASS]


def is_sentence(text: str) -> bool:
    """Whether `text` is one well-formed sentence: grammar, a capital at its start, one end mark."""
    if not re.fullmatch(r"[A-Z][A-Za-z ]*[.!]", text) or "  " in text:
        return False
    if any(w[0].isupper() and w not in NAMES for w in _WORD.findall(text)[1:]):
        return False
    return bool(_SENTENCE.fullmatch("".join(LETTER.get(w, "?") for w in words(text))))


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def either(options: Iterable[str]) -> str:
    """A regular expression that matches exactly one of `options`."""
    return "(?:" + "|".join(re.escape(o) for o in options) + ")"
