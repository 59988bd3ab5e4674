"""How a task is put in words: a prompt and the values that fill its phrasing, there and back."""

import re
from dataclasses import dataclass

from demo.words import ANIMALS, CLASS, GROUPS, NAMES, OPENERS, PLACES, THINGS, capital, either

NO_COLOUR, SHORT, SHOUT = "Name no colour.", "Use at most eight words.", "End with !"
START = {f"Start with the word {capital(o)}.": capital(o) for o in OPENERS}
USE_NAME = {f"Use the name {n}.": n for n in NAMES}
RULES = (NO_COLOUR, SHORT, SHOUT, *START, *USE_NAME)

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
}
MOOD, SIDE = "happy or sad", "inside or outside"
_ENTITY = either(CLASS)
_TEXT = r"[A-Z][A-Za-z, ]*\.(?: [A-Z][A-Za-z, ]*\.)*"
_SLOTS = {
    "animal": either(ANIMALS),
    "thing": either(THINGS),
    "where": rf"(?: in the {either(PLACES)})?",
    "rule": rf"(?: {either(RULES)})?",
    "facts": rf"(?:(?:{_ENTITY} has a {_ENTITY} {_ENTITY}|{_ENTITY} is in the {_ENTITY}|"
    rf"The {_ENTITY} is {_ENTITY})\. ?)+(?<! )",
    "question": r"(?:What|Where) [a-zA-Z ]+\?",
    "new": _ENTITY,
    "old": _ENTITY,
    "text": _TEXT,
    "group": either(GROUPS),
    "choice": either((MOOD, SIDE)),
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


def slot_names(phrasing: str) -> list[str]:
    return re.findall(r"{(\w+)}", phrasing)


def _pattern(phrasing: str) -> re.Pattern[str]:
    parts = re.split(r"{(\w+)}", phrasing)
    return re.compile(
        "".join(
            f"(?P<{part}>{_SLOTS[part]})" if i % 2 else re.escape(part)
            for i, part in enumerate(parts)
        )
    )


PATTERNS = [(use_case, _pattern(p)) for use_case, ps in PHRASINGS.items() for p in ps]
