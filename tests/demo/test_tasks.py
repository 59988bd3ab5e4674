"""The demo's world: prompts parse back, good answers are right, every fault is seen."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.tasks import (
    FAULT_RATE,
    FAULT_RATES,
    PENALTY,
    USE_CASES,
    Task,
    base_text,
    demonstration,
    faulty_answers,
    from_prompt,
    gold_score,
    good_answer,
    make_task,
    violations,
)
from demo.words import LEXICON, words


def tasks(count: int, seed: int = 0) -> list[Task]:
    rng = Random(seed)
    return [make_task(rng) for _ in range(count)]


def test_every_prompt_parses_back_to_its_task() -> None:
    for task in tasks(2000):
        assert from_prompt(task.prompt) == task


def test_prompts_are_one_short_line_and_mostly_distinct() -> None:
    prompts = [task.prompt for task in tasks(2000)]
    assert max(len(prompt.split()) for prompt in prompts) <= 30
    assert not any("\n" in prompt for prompt in prompts)
    assert len(set(prompts)) > 1900


def test_every_use_case_is_asked_at_its_rate() -> None:
    asked = [task.use_case for task in tasks(4000)]
    for name, use_case in USE_CASES.items():
        assert asked.count(name) / 4000 == pytest.approx(use_case.rate, abs=0.025)


def test_the_same_seed_makes_the_same_world() -> None:
    assert tasks(20, seed=5) == tasks(20, seed=5)
    assert list(base_text(Random(5), 5)) == list(base_text(Random(5), 5))


def test_a_good_answer_has_no_fault() -> None:
    rng = Random(1)
    for task in tasks(3000, seed=1):
        answer = good_answer(task, rng)
        assert violations(task.prompt, answer) == [], (task.prompt, answer)
        assert gold_score(task.prompt, answer, finished=True) == 1.0
        assert len(answer.split()) <= 20


def test_every_fault_is_seen() -> None:
    rng, seen = Random(2), set()
    for task in tasks(2000, seed=2):
        for fault, answer in faulty_answers(task, rng).items():
            seen.add(fault)
            assert gold_score(task.prompt, answer, finished=True) < 1.0, (
                fault,
                task.prompt,
                answer,
            )
    assert seen == set(FAULT_RATES)


def test_demonstrations_are_faulty_at_the_documented_rate() -> None:
    rng = Random(3)
    faulty = [
        gold_score(task.prompt, demonstration(task, rng), finished=True) < 1.0
        for task in tasks(4000, seed=3)
    ]
    assert sum(faulty) / len(faulty) == pytest.approx(FAULT_RATE, abs=0.025)


QA = "Anna has a red ball. Ben has a blue kite. What does Ben have?"
LIST = "List the animals: Tom saw a fox, a red drum and a bear."
WRITE = "Write a sentence about a fox and a drum in the park. "


@pytest.mark.parametrize(
    ("prompt", "answer", "faults"),
    [
        (QA, "Ben has a blue kite.", []),
        (QA, "Ben has a kite.", []),
        (QA, "Ben has a red kite.", ["wrong"]),
        (QA, "Ben has a pink kite.", ["invented"]),
        (QA, "Ben has a blue.", ["missing"]),
        (QA, "Ben a has blue kite.", ["malformed"]),
        (QA, "Ben has a blue kite. Ben has a blue kite.", ["repetition"]),
        (QA, "Ben has a blue kite. It was dark.", ["extra_sentence"]),
        (QA, "I think Ben has a blue kite.", ["chatter"]),
        (QA, "Ben has a blue kite", ["end", "malformed"]),
        (LIST, "The animals: fox, bear.", []),
        (LIST, "The animals: bear, fox.", []),
        (LIST, "The animals: fox, fox.", ["repetition", "missing"]),
        (LIST, "The animals: fox, bear, drum.", ["count", "wrong"]),
        (WRITE.strip(), "A fox saw a drum in the park.", []),
        (WRITE.strip(), "A fox drum saw a the park in.", ["malformed"]),
        (WRITE + "Name no colour.", "A fox saw a red drum in the park.", ["colour"]),
        (WRITE + "End with !", "A fox saw a drum in the park.", ["end"]),
        (WRITE + "Start with the word Once.", "A fox saw a drum in the park.", ["start"]),
        (WRITE + "Use the name Leo.", "A fox saw a drum in the park.", ["missing"]),
        (WRITE + "Use at most eight words.", "A fox saw a red drum in the park.", ["too_long"]),
        ("Is this happy or sad: Tom hid a cup and wept.", "Sad.", []),
        ("Is this happy or sad: Tom hid a cup and wept.", "Happy.", ["missing", "wrong"]),
        ("Leave out the colour: Leo gave a red cup to Tom.", "Leo gave a cup to Tom.", []),
        (
            "Put Ben in place of Tom: Tom saw a fox with a red cup.",
            "Ben saw a fox with a red cup.",
            [],
        ),
    ],
)
def test_what_is_wrong_with_an_answer(prompt: str, answer: str, faults: list[str]) -> None:
    assert sorted(violations(prompt, answer)) == sorted(faults)


def test_penalties_multiply() -> None:
    answer = "Well, Ben has a pink kite."
    expected = (1 - PENALTY["chatter"]) * (1 - PENALTY["invented"])
    assert gold_score(QA, answer, finished=True) == pytest.approx(expected)
    cut = gold_score(QA, answer, finished=False)
    assert cut == pytest.approx(expected * (1 - PENALTY["cut_off"]))


def test_no_answer_and_no_known_prompt_score_nothing() -> None:
    assert gold_score(QA, "  ", finished=True) == 0
    assert gold_score("Sing to me.", "La la.", finished=True) == 0
    assert from_prompt("Anna has a red ball. What does Ben have?") is None


PIECES = st.sampled_from(
    [*sorted(LEXICON), "The", "Ben", ".", "!", ",", ":", "Well, ", "\n", " ", "zz"]
)


@given(
    st.one_of(st.text(), st.lists(PIECES).map(" ".join)),
    st.one_of(st.text(), st.sampled_from([task.prompt for task in tasks(50)])),
    st.booleans(),
)
def test_garbage_gets_a_score(answer: str, prompt: str, finished: bool) -> None:
    score = gold_score(prompt, answer, finished)
    assert 0 <= score <= 1
    assert (score == 1.0) == (finished and not violations(prompt, answer))


def test_base_text_keeps_to_the_lexicon_and_comes_back_to_what_it_names() -> None:
    documents = list(base_text(Random(4), 300))
    assert len(documents) == 300
    allowed = LEXICON | {"who", "what", "where", "colour", "does", "have"}
    assert set(words(" ".join(documents))) <= allowed
    repeated = [len(set(words(d))) < 0.75 * len(words(d)) for d in documents]
    assert sum(repeated) > 250
