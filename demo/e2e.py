"""E2E restaurant descriptions: which facts of its input an answer tells, leaves out or makes up."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import sacrebleu

from contracts.errors import InvalidInput
from feedback.importers.files import csv_rows
from feedback.importers.row import BadRow
from training.data import PromptRow

Measure = Callable[[Sequence[PromptRow], Sequence[str]], dict[str, float]]
Judge = Callable[[Sequence[PromptRow], Sequence[str], Sequence[bool]], list[float]]

# What an unfinished answer loses, in the judge's unit: as much as an answer that tells nothing.
CUT_OFF = 1.0

# Slots told by quoting them.
_VENUE_SLOTS = ("name", "near")
# Values of the other slots, to what of them can be told apart in a text: people write "cheap" for
# "less than £20", and "three stars" for "average".
_MEANING = {
    "eatType": {"restaurant": "restaurant", "pub": "pub", "coffee shop": "coffee shop"},
    "food": {
        food: food
        for food in ("chinese", "english", "fast food", "french", "indian", "italian", "japanese")
    },
    "priceRange": {
        "cheap": "low",
        "less than £20": "low",
        "moderate": "middle",
        "£20-25": "middle",
        "high": "high",
        "more than £30": "high",
    },
    "customer rating": {
        "low": "low",
        "1 out of 5": "low",
        "average": "middle",
        "3 out of 5": "middle",
        "high": "high",
        "5 out of 5": "high",
    },
    "area": {"riverside": "riverside", "city centre": "city centre"},
    "familyFriendly": {"yes": "yes", "no": "no"},
}
# All names and neighbours of the E2E data, so that one that was made up is seen.
_VENUES = (
    "Alimentum, All Bar One, Aromi, Avalon, Bibimbap House, Blue Spice, Browns Cambridge, "
    "Burger King, Cafe Adriatic, Cafe Brazil, Cafe Rouge, Cafe Sicilia, Clare Hall, Clowns, Cocum, "
    "Cotto, Crowne Plaza Hotel, Express by Holiday Inn, Fitzbillies, Giraffe, Green Man, "
    "Loch Fyne, Midsummer House, Rainbow Vegetarian Cafe, Raja Indian Cuisine, Ranch, Strada, "
    "Taste of Cambridge, The Bakers, The Cambridge Blue, The Cricketers, The Dumpling Tree, "
    "The Eagle, The Golden Curry, The Golden Palace, The Mill, The Olive Grove, The Phoenix, "
    "The Plough, The Portland Arms, The Punter, The Rice Boat, The Six Bells, The Sorrento, "
    "The Twenty Two, The Vaults, The Waterman, The Wrestlers, Travellers Rest Beefeater, Wildwood, "
    "Yippee Noodle Bar, Zizzi"
).split(", ")

_PRICE = r"(?:pric\w+|costs?|costing|ranges?|ranged)\b"
_RATING = (
    r"(?:rat(?:ed?|es|ings?)|review(?:s|ed)?|stars?|quality|feedback|scores?|customers?(?! pric))\b"
)
_KIDS = r"\b(?:famil(?:y|ies)|kids?|child(?:ren)?s?|all ages)\b"
_UNFIT = r"un(?:friendly|suitable|welcom\w+|fit)"
_NOT = rf"\b(?:not?|none?|cannot|\w+n't|never|without|nor|leave|{_UNFIT})\b(?! only)"
_ELSEWHERE = r"\b(?:not in|outside(?: of)?|(?:nor|sou)th of|far from)"
_JOINED = r"and\b|but\b|with\b"


def _said_of(noun: str, adjectives: str, other: str) -> str:
    """An adjective before or after the noun, which is not said of the other slot's noun."""
    gap = rf"(?:(?!{other}|{_JOINED})[\w']+[ -]+)"
    adjective = rf"\b(?:{adjectives})(?:ly)?\b"
    before = rf"{adjective}[ -]+{gap}{{0,2}}{noun}"
    return rf"{before}|{noun}:?[ -]+{gap}{{0,4}}{adjective}(?![ -]{other})"


def _price(adjectives: str) -> str:
    return _said_of(_PRICE, adjectives, _RATING)


def _rating(adjectives: str) -> str:
    return _said_of(_RATING, adjectives, _PRICE)


def _stars(number: str) -> str:
    """A grade of five; "an average rating of" before it tells no grade of its own."""
    mean = r"(?:\baverage (?:\w+ ){0,5}?)?"
    of_five = r"[ -]*(?:(?:out|our) )?(?:of|/|out)[ -]*(?:5|five)\b"
    return rf"{mean}\b(?:{number})(?:{of_five}|[ -]+star(?:s|red)?\b)"


_LOW, _HIGH = r"low(?:er|est)?|poor|bad", r"high(?:er|est)?"
_MIDDLE = r"moderate|average|mid(?:dle)?|medium|ok(?:ay)?|decent"

# Slot -> patterns in their order, and what each may mean, separated by "|". What a pattern has
# matched, the next ones do not see; "" tells nothing.
_PATTERNS: dict[str, tuple[tuple[str, str], ...]] = {
    "eatType": (
        (r"\bcoffee|\bcafe", "coffee shop"),
        (r"\bpubs?\b", "pub"),
        (r"\brestaurants?\b", "restaurant"),
    ),
    "food": (
        (r"\bchinese\b", "chinese"),
        (r"\b(?:english|british)\b", "english"),
        (r"\bfast[ -]?foods?\b", "fast food"),
        (r"\bfrench\b(?! fries)", "french"),
        (r"\bindian\b", "indian"),
        (r"\bitalian\b", "italian"),
        (r"\bjapanese\b", "japanese"),
    ),
    "priceRange": (
        (r"£? ?(?:20|twenty) ?(?:-|\u2013|to|and) ?£? ?(?:25|twenty[ -]five)\b", "middle"),
        (r"\b(?:(?:less|lower|cheaper) than|under|below) ?£? ?(?:20|twenty)\b", "low"),
        (r"£20 or less\b", "low"),
        (r"\b(?:(?:more|higher|greater) than|over|above) ?£? ?(?:30|thirty)\b|£30\b", "high"),
        (rf"{_NOT} (?:\w+ )?expensive\b", "low|middle"),
        (rf"{_NOT} (?:\w+ )?cheap(?:est)?\b", "middle|high"),
        (_price(r"(?:less|lower)[ -]than[ -]average|below[ -]average"), "low"),
        (_price(r"(?:more|higher)[ -]than[ -]average|above[ -]average"), "high"),
        (r"\b(?:cheap\w*|inexpensive(?:ly)?|budget|low[ -]cost)\b", "low"),
        (r"\b(?:affordabl[ey]|reasonabl[ey]|fair(?:ly)?[ -]pric\w+)\b", "low|middle"),
        (r"\bmoderately expensive\b", "middle"),
        (r"\b(?:expensive|pricey|pricier|costly|high[ -]end|upscale)\b", "high"),
        (_price(_LOW), "low"),
        (_price(_MIDDLE), "middle"),
        (_price(_HIGH), "high"),
    ),
    "customer rating": (
        (_stars("1|one"), "low"),
        (_stars("3|three"), "middle"),
        (_stars("5|five"), "high"),
        (_stars("[024]|two|four"), "another"),
        (_rating(rf"{_NOT} (?:\w+ ){{0,2}}(?:good|great|best|well|highly)"), "low|middle"),
        (_rating(rf"{_LOW}|terrible|negative"), "low"),
        (_rating(rf"mid[ -]range|{_MIDDLE}|normal|reasonable|satisfactory"), "middle"),
        (_rating("good|well"), "middle|high"),
        (_rating(rf"{_HIGH}|excellent|great|best|top|superb|outstanding|perfect|positive"), "high"),
        (r"\bhighly recommended\b", "high"),
    ),
    "area": (
        (rf"{_ELSEWHERE} (?:the )?(?:city|town)[ -]cent\w+", ""),
        (r"\briver\w*|\bwaterfront\b", "riverside"),
        (r"\b(?:cit(?:y|ies)|cent(?:er|re|ral|rally)|town|downtown)\b", "city centre"),
    ),
    "familyFriendly": (
        (rf"{_NOT}[ -]+(?:(?!{_JOINED})[\w']+[ -]+){{0,4}}{_KIDS}(?: with {_KIDS})?", "no"),
        (rf"{_KIDS}[ -](?:(?!{_JOINED})[\w']+[ -]+){{0,3}}{_NOT}|{_KIDS}[^.,]{{0,20}}: no\b", "no"),
        (r"(?<!and )\badults?\b(?! as well)|\bgrown[ -]?ups?\b|\bchildless\b", "no"),
        (_KIDS, "yes"),
    ),
}
_COMPILED = {
    slot: [(re.compile(pattern), frozenset(said.split("|"))) for pattern, said in patterns]
    for slot, patterns in _PATTERNS.items()
}
_ANY_VENUE = re.compile(rf"\b(?:{'|'.join(_VENUES)})\b")
_MR = re.compile(r"\s*[^][,]+\[[^][]+\](?:\s*,\s*[^][,]+\[[^][]+\])*\s*")
_SLOT = re.compile(r"([^][,]+)\[([^][]+)\]")
_QUOTES = re.compile(r"(?<!\w)'|'(?!\w)|[\"\u201c\u201d\u2018]")


@dataclass(frozen=True)
class SlotErrors:
    """The slots that an answer leaves out, tells otherwise or makes up, of `slots` to be told."""

    missing: tuple[str, ...]
    wrong: tuple[str, ...]
    added: tuple[str, ...]
    slots: int

    @property
    def count(self) -> int:
        return len(self.missing) + len(self.wrong) + len(self.added)

    @property
    def rate(self) -> float:
        return self.count / self.slots


def parse(mr: str) -> dict[str, str]:
    """The slots of a meaning representation such as "name[Blue Spice], area[riverside]"."""
    if not _MR.fullmatch(mr):
        raise InvalidInput("mr", "slot[value], slot[value], ...", "something else")
    slots = {slot.strip(): value.strip() for slot, value in _SLOT.findall(mr)}
    for slot, value in slots.items():
        if slot not in _VENUE_SLOTS and slot not in _MEANING:
            raise InvalidInput("mr", "slots of " + ", ".join((*_VENUE_SLOTS, *_MEANING)), "another")
        if slot in _MEANING and value.casefold() not in _MEANING[slot]:
            raise InvalidInput(f"mr: {slot}", "one of " + ", ".join(_MEANING[slot]), "another")
    return slots


def slot_errors(mr: str, text: str) -> SlotErrors:
    """Compare what the text tells with what its meaning representation says; a slot errs once.

    The patterns were written on the human references of the E2E development set.
    """
    slots, rest = parse(mr), _plain(text)
    missing, wrong, added = [], [], []
    for slot in _VENUE_SLOTS:
        if slot in slots:
            rest, found = _venue(slots[slot]).subn("|", rest)
            missing += [] if found else [slot]
    rest, found = _ANY_VENUE.subn("|", rest)
    if found and missing:
        wrong.append(missing.pop())
    elif found:
        added.append("near")
    for slot, meanings in _MEANING.items():
        meant = meanings[slots[slot].casefold()] if slot in slots else ""
        agree = [meant in told for told in _told(slot, rest.casefold(), meant)]
        if meant and not agree:
            missing.append(slot)
        elif meant and not any(agree):
            wrong.append(slot)
        elif not all(agree):
            added.append(slot)
    return SlotErrors(tuple(missing), tuple(wrong), tuple(added), len(slots))


def _told(slot: str, text: str, meant: str) -> list[frozenset[str]]:
    """What each kind of mention of the slot may mean."""
    mentions = []
    for pattern, told in _COMPILED[slot]:
        text, count = pattern.subn("|", text)
        # "Restaurant" also stands for a place of any kind, and so contradicts nothing.
        if count and any(told) and (meant in told or told != {"restaurant"}):
            mentions.append(told)
    return mentions


def _plain(text: str) -> str:
    """Without accents, quotation marks and doubled spaces."""
    letters = unicodedata.normalize("NFKD", text.replace("\u2019", "'"))
    bare = "".join(c for c in letters if not unicodedata.combining(c))
    return " ".join(_QUOTES.sub(" ", bare).split())


def _venue(name: str) -> re.Pattern[str]:
    """Its name; people leave out a leading "The"."""
    name = re.sub("^The ", "", _plain(name))
    return re.compile(rf"\b(?:the )?{re.escape(name)}\b", re.IGNORECASE)


def slot_error_rate() -> Measure:
    """The slot error rate of all answers: missing, wrong and added slots for each slot to be told.

    Wen et al. 2015 (EMNLP) count missing and redundant slots; a wrong value is one
    error, as in Dusek, Howcroft and Rieser 2019 (INLG, "Semantic Noise Matters").
    """

    def measure(rows: Sequence[PromptRow], texts: Sequence[str]) -> dict[str, float]:
        errors = [slot_errors(_mr(row), text) for row, text in zip(rows, texts, strict=True)]
        slots = sum(e.slots for e in errors)
        return {
            "slot_error_rate": sum(e.count for e in errors) / slots,
            "missing": sum(len(e.missing) for e in errors) / slots,
            "wrong": sum(len(e.wrong) for e in errors) / slots,
            "added": sum(len(e.added) for e in errors) / slots,
            "perfect_share": sum(e.count == 0 for e in errors) / len(errors),
        }

    return measure


def slots() -> Judge:
    """Higher is better: 0 where every slot is told, and nothing else."""

    def judge(
        rows: Sequence[PromptRow], texts: Sequence[str], finished: Sequence[bool]
    ) -> list[float]:
        return [
            -slot_errors(_mr(row), text).rate - (0.0 if done else CUT_OFF)
            for row, text, done in zip(rows, texts, finished, strict=True)
        ]

    return judge


def bleu(references: str) -> Measure:
    """Corpus BLEU (sacrebleu) of all answers, against a CSV file of mr and ref, gzipped or not.

    Every answer is a hypothesis; those to prompts that the file does not know are left out.
    """
    known = _references(Path(references))

    def measure(rows: Sequence[PromptRow], texts: Sequence[str]) -> dict[str, float]:
        of_row = [known.get(_key(_mr(row)), []) for row in rows]
        scored = [(text, refs) for text, refs in zip(texts, of_row, strict=True) if refs]
        if not scored:
            raise InvalidInput("references", "references of the prompts", f"none in {references}")
        hypotheses, groups = zip(*scored, strict=True)
        # One stream for each place in the longest group; sacrebleu passes over empty references.
        streams = list(zip_longest(*groups, fillvalue=""))
        score = sacrebleu.corpus_bleu(hypotheses, streams)
        return {
            "bleu": score.score,
            "hypotheses": len(hypotheses),
            "left_out": len(texts) - len(hypotheses),
        }

    return measure


def _references(path: Path) -> dict[frozenset[tuple[str, str]], list[str]]:
    """The references of each meaning representation."""
    known = defaultdict(list)
    for row in csv_rows(path, ("mr", "ref")):
        if isinstance(row, BadRow):
            raise InvalidInput(f"{path}:{row.row}", "a row of the table", row.reason)
        if ref := row.value["ref"].strip():
            known[_key(row.value["mr"])].append(ref)
    return dict(known)


def _key(mr: str) -> frozenset[tuple[str, str]]:
    """The same for the same slots in any order."""
    return frozenset(parse(mr).items())


def _mr(row: PromptRow) -> str:
    return row.text or row.messages[-1]["content"]
