"""The demo's world at one door: tasks, demonstrations, the known taste and plain text.

All of it is pure: whoever calls passes the `random.Random`.
"""

from demo.faults import FAULT_RATE, FAULT_RATES, demonstration, faulty_answers
from demo.gold import PENALTY, gold_score, violations
from demo.phrasings import PHRASINGS, Task
from demo.prompts import from_prompt, good_answer, make_task
from demo.texts import base_text
from demo.use_cases import USE_CASES

__all__ = [
    "FAULT_RATE",
    "FAULT_RATES",
    "PENALTY",
    "PHRASINGS",
    "USE_CASES",
    "Task",
    "base_text",
    "demonstration",
    "faulty_answers",
    "from_prompt",
    "gold_score",
    "good_answer",
    "make_task",
    "violations",
]
