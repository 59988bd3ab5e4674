"""docs/recipe.md names a test in every row, and each is there."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "recipe.md"
NODE = re.compile(r"`([\w/]+\.py)::(test_\w+)`")


def rows() -> list[str]:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|") and not line.startswith("|---")]
    return [line for line in table if not line.endswith("| test |")]


def names_in(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_test_that_the_recipe_names_is_there() -> None:
    named = {node for row in rows() for node in NODE.findall(row)}
    assert len(named) > 60
    assert [f"{file}::{name}" for file, name in sorted(named) if name not in names_in(file)] == []


def test_a_row_names_a_test_or_says_what_is_not_done() -> None:
    assert [row for row in rows() if not NODE.search(row) and "**not done**" not in row] == []


def test_all_details_and_checks_are_listed() -> None:
    numbers = [int(n) for row in rows() for n in re.findall(r"^\| (\d+) \|", row)]
    assert numbers == [*range(1, 26), *range(1, 21)]
