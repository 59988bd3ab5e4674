"""Tasks from randomness or from a prompt, and what they ask for."""

from random import Random

from demo.phrasings import PATTERNS, PHRASINGS, Task, slot_names
from demo.use_cases import USE_CASES, Expectation


def make_task(rng: Random) -> Task:
    """A random task, in one of the phrasings of its use case."""
    use_case = rng.choices(list(USE_CASES), [u.rate for u in USE_CASES.values()])[0]
    slots = USE_CASES[use_case].make(rng)
    fitting = [p for p in PHRASINGS[use_case] if set(slot_names(p)) == set(slots)]
    prompt = rng.choice(fitting).format_map(slots)
    return Task(use_case, prompt, tuple(sorted(slots.items())))


def from_prompt(prompt: str) -> Task | None:
    """The task whose prompt this is; None where it is none of this world's."""
    for use_case, pattern in PATTERNS:
        if match := pattern.fullmatch(prompt):
            task = Task(use_case, prompt, tuple(sorted(match.groupdict().items())))
            if expectation(task) is not None:
                return task
    return None


def expectation(task: Task) -> Expectation | None:
    """What a right answer must be; None where the prompt makes no sense."""
    return USE_CASES[task.use_case].expect(task)


def good_answer(task: Task, rng: Random) -> str:
    """An answer that meets every constraint."""
    return USE_CASES[task.use_case].answer(task, rng)
