"""Rules of what a text is: its length, its language, its use case, what in it is masked."""

import re
from collections import Counter
from collections.abc import Sequence

from msgspec.structs import replace

from feedback.dataset.row import Given, Kept, Row

# The classes of InstructGPT, table 1; a label may name others.
USE_CASES = (
    "generation", "open_qa", "brainstorming", "chat", "rewrite", "summarisation", "classification",
    "other", "closed_qa", "extract",
)  # fmt: skip
# The first that matches a prompt's last 2,000 characters, so that the request counts more than the
# text that it is about. Each pattern comes with what a text must hold for it to match at all.
_HINTS = {
    use_case: (holds, re.compile(pattern, re.VERBOSE))
    for use_case, holds, pattern in (
        ("summarisation", ("summar", "tl", "key points", "sentence"), r"""\b(?: summar\w+ |
            tl;?dr | key\ points | in\ (?:one|a\ few)\ sentences? )\b"""),
        ("extract", ("extract", "list", "find", "pull out"), r"""\b(?: extract\b |
            (?:list|find|pull\ out)\ (?:all|every|the)\ .{1,40}\b(?:from|in)\ (?:the|this)\b )"""),
        ("classification", ("classif", "tive or ", "sentiment", "label", "categor"), r"""\b(?:
            classif\w+ | (?:positive|negative)\ or\ (?:positive|negative)\b |
            (?:sentiment|label|categor\w+)\ (?:of|for|the|this)\b )"""),
        ("rewrite", ("re", "para", "trans", "fix the", "make "), r"""\b(?: rewrite | rephrase |
            paraphrase | translate | proofread | (?:correct|fix)\ the |
            make\ (?:this|it)\ (?:more|less|shorter|longer) )\b"""),
        ("brainstorming", ("brainstorm", "idea", "suggest", "give me", "list "), r"""\b(?:
            brainstorm | ideas?\ for | suggest | give\ me\ (?:\d+|some|a\ few|a\ list) |
            list\ (?:\d+|some|a\ few|five|ten) )\b"""),
        ("closed_qa", ("context:", "according", "based", "given"), r"""\bcontext: |
            \b(?:according\ to|based\ on|given)\ (?:the|this)\ (?:
            text | passage | above | following | context | article )\b"""),
        ("generation", ("write", "compose", "draft", "generate", "create", "tell me"), r"""\b(?:
            write | compose | draft | generate | create | tell\ me\ a )\b"""),
        ("chat", (": ", "h"), r"""\b(?:human|ai|assistant|user):\  | ^(?:hi|hello|hey)\b"""),
        ("open_qa", ("",), r"""\?\s*$ |
            ^(?: what|who|when|where|why|how|which|is|are|can|does|do|explain )\b"""),
    )
}  # fmt: skip


def short_enough(rows: Sequence[Row], given: Given) -> Kept:
    """Prompt and answers are short enough; a ranking with one answer too long goes as a whole."""
    settings = given.settings
    prompt_fits = [row for row in rows if row.prompt.chars <= settings.max_prompt_chars]
    kept = [
        row
        for row in prompt_fits
        if all(words.chars <= settings.max_response_chars for words in row.responses)
    ]
    return kept, {
        "prompt_too_long": len(rows) - len(prompt_fits),
        "response_too_long": len(prompt_fits) - len(kept),
    }


def language_recorded(rows: Sequence[Row], _given: Given) -> Kept:
    """Every row stays, with the language of its prompt (ISO 639-1)."""
    return list(rows), dict(sorted(Counter(row.prompt.language for row in rows).items()))


def use_case_known(rows: Sequence[Row], given: Given) -> Kept:
    """Every row stays; one without a label gets the class that its words hint at."""
    kept = [
        replace(row, use_case=row.prompt.hint, use_case_by="classifier")
        if not row.use_case and given.settings.classify_use_case
        else row
        for row in rows
    ]
    counts = Counter((row.use_case or "unlabelled", row.use_case_by) for row in kept)
    return kept, {f"{use_case}_by_{by}": n for (use_case, by), n in sorted(counts.items())}


def classify(words: str) -> str:
    """The use case that a prompt's words hint at; "other" where none does."""
    asked = words[-2000:].lower()
    hints = (
        name
        for name, (holds, pattern) in _HINTS.items()
        if any(part in asked for part in holds) and pattern.search(asked)
    )
    return next(hints, "other")


def masked(rows: Sequence[Row], given: Given) -> Kept:
    """Every row stays; personal data and secrets in it become their kinds, which it names."""
    if not given.settings.mask_pii:
        return list(rows), {}
    kinds = Counter[str]()
    kept = []
    for row in rows:
        found = [*row.prompt.found, *(row.annotated or ())]
        for words in row.responses:
            found += words.found
        kinds.update(found)
        kept.append(replace(row, masked=tuple(sorted(set(found)))) if found else row)
    return kept, dict(sorted(kinds.items()))
