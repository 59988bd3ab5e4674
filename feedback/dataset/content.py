"""Rules of what a text is: its length, its language, its use case, what in it is masked."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from feedback.dataset.row import Given, Kept, Row
from feedback.pii import mask

# The classes of InstructGPT, table 1; a label may name others.
USE_CASES = (
    "generation", "open_qa", "brainstorming", "chat", "rewrite", "summarisation", "classification",
    "other", "closed_qa", "extract",
)  # fmt: skip
# The first that matches a prompt's last 2,000 characters, so that the request counts more than the
# text that it is about.
_HINTS = {
    use_case: re.compile(pattern, re.IGNORECASE | re.VERBOSE)
    for use_case, pattern in {
        "summarisation": r"""\b(?: summar\w+ | tl;?dr | key\ points |
            in\ (?:one|a\ few)\ sentences? )\b""",
        "extract": r"""\b(?: extract\b |
            (?:list|find|pull\ out)\ (?:all|every|the)\ .{1,40}\b(?:from|in)\ (?:the|this)\b )""",
        "classification": r"""\b(?: classif\w+ |
            (?:positive|negative)\ or\ (?:positive|negative)\b |
            (?:sentiment|label|categor\w+)\ (?:of|for|the|this)\b )""",
        "rewrite": r"""\b(?: rewrite | rephrase | paraphrase | translate | proofread |
            (?:correct|fix)\ the | make\ (?:this|it)\ (?:more|less|shorter|longer) )\b""",
        "brainstorming": r"""\b(?: brainstorm | ideas?\ for | suggest |
            give\ me\ (?:\d+|some|a\ few|a\ list) | list\ (?:\d+|some|a\ few|five|ten) )\b""",
        "closed_qa": r"""\bcontext: | \b(?:according\ to|based\ on|given)\ (?:the|this)\ (?:
            text | passage | above | following | context | article )\b""",
        "generation": r"\b(?: write | compose | draft | generate | create | tell\ me\ a )\b",
        "chat": r"\b(?:human|ai|assistant|user):\  | ^(?:hi|hello|hey)\b",
        "open_qa": r"""\?\s*$ |
            ^(?: what|who|when|where|why|how|which|is|are|can|does|do|explain )\b""",
    }.items()
}


def short_enough(rows: Sequence[Row], given: Given) -> Kept:
    """Prompt and answers are short enough; a ranking with one answer too long goes as a whole."""
    settings = given.settings
    prompt_fits = [row for row in rows if len(row.words) <= settings.max_prompt_chars]
    kept = [
        row
        for row in prompt_fits
        if all(len(text) <= settings.max_response_chars for text in row.responses)
    ]
    return kept, {
        "prompt_too_long": len(rows) - len(prompt_fits),
        "response_too_long": len(prompt_fits) - len(kept),
    }


def language_recorded(rows: Sequence[Row], _given: Given) -> Kept:
    """Every row stays, with the language of its prompt (ISO 639-1)."""
    of = {words: _language(words) for words in {row.words for row in rows}}
    kept = [replace(row, language=of[row.words]) for row in rows]
    return kept, dict(sorted(Counter(row.language for row in kept).items()))


def use_case_known(rows: Sequence[Row], given: Given) -> Kept:
    """Every row stays; one without a label gets the class that its words hint at."""
    kept = [
        replace(row, use_case=classify(row.words), use_case_by="classifier")
        if not row.use_case and given.settings.classify_use_case
        else row
        for row in rows
    ]
    counts = Counter(f"{row.use_case or 'unlabelled'}_by_{row.use_case_by}" for row in kept)
    return kept, dict(sorted(counts.items()))


def classify(words: str) -> str:
    """The use case that a prompt's words hint at; "other" where none does."""
    asked = words[-2000:]
    return next((name for name, hint in _HINTS.items() if hint.search(asked)), "other")


def masked(rows: Sequence[Row], given: Given) -> Kept:
    """Every row stays; personal data and secrets in it become their kinds."""
    if not given.settings.mask_pii:
        return list(rows), {}
    kinds = Counter[str]()
    kept = []
    for row in rows:
        pairs = (*row.messages, *row.annotations)
        found = Counter[str]()
        for text in (row.text, *(value for _, value in pairs), *row.responses):
            found += mask(text).kinds
        kinds += found
        kept.append(_masked_row(row, tuple(sorted(found))) if found else row)
    return kept, dict(sorted(kinds.items()))


def _masked_row(row: Row, kinds: tuple[str, ...]) -> Row:
    messages = tuple((role, mask(content).text) for role, content in row.messages)
    text = mask(row.text).text
    return replace(
        row,
        text=text,
        messages=messages,
        words=text or "\n".join(content for _, content in messages),
        responses=tuple(mask(response).text for response in row.responses),
        annotations=tuple((name, mask(value).text) for name, value in row.annotations),
        masked=kinds,
    )


def _language(words: str) -> str:
    import py3langid  # loads a model that only a build needs

    return str(py3langid.classify(words[:1000])[0])
