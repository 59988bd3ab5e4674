import math

import pytest
from pydantic import ValidationError

from contracts.errors import InvalidInput
from contracts.shares import Shares

PEOPLE = [f"user-{i}" for i in range(20_000)]


def counted(shares: Shares) -> dict[str | None, int]:
    taken = [shares.release_of(person) for person in PEOPLE]
    return {name: taken.count(name) for name in {*taken}}


def test_without_shares_everybody_is_answered_by_what_is_served() -> None:
    assert counted(Shares()) == {None: len(PEOPLE)}


def test_each_release_has_its_part_of_the_people() -> None:
    found = counted(Shares(parts={"r2": 0.1, "r3": 0.25}))
    wanted: dict[str | None, float] = {"r2": 0.1, "r3": 0.25, None: 0.65}
    for name, part in wanted.items():
        # Five standard deviations of a binomial count.
        bound = 5 * math.sqrt(len(PEOPLE) * part * (1 - part))
        assert abs(found[name] - part * len(PEOPLE)) < bound


def test_a_share_of_one_leaves_nobody_else() -> None:
    assert counted(Shares(parts={"r2": 1.0})) == {"r2": len(PEOPLE)}
    assert counted(Shares(parts={"r2": 0.5, "r3": 0.5})).keys() == {"r2", "r3"}


def moves(before: Shares, after: Shares) -> set[tuple[str | None, str | None]]:
    found = {(before.release_of(person), after.release_of(person)) for person in PEOPLE}
    return {(was, now) for was, now in found if was != now}


def test_a_share_that_grows_loses_nobody_and_the_last_one_takes_from_no_other() -> None:
    shares = Shares(parts={"r2": 0.1, "r3": 0.3})
    assert moves(shares, shares.having("r3", 0.5)) == {(None, "r3")}
    assert moves(shares, shares.having("r4", 0.5)) == {(None, "r4")}
    assert "r2" not in {was for was, _ in moves(shares, shares.having("r2", 0.4))}
    assert abs(counted(shares.having("r2", 0.4))["r3"] / len(PEOPLE) - 0.3) < 0.02


def test_who_tried_one_release_is_no_likelier_to_try_the_next() -> None:
    first, second = Shares(parts={"r2": 0.2}), Shares(parts={"r3": 0.2})
    both = sum(first.release_of(p) is not None and second.release_of(p) is not None for p in PEOPLE)
    assert abs(both / len(PEOPLE) - 0.2 * 0.2) < 0.01


@pytest.mark.parametrize("share", [-0.1, 0.61, 1.5, math.nan])
def test_a_share_that_is_not_there_to_give_is_refused(share: float) -> None:
    shares = Shares(parts={"r2": 0.1, "r3": 0.4})
    with pytest.raises(InvalidInput, match=r"share: expected a number from 0 to 0\.6"):
        shares.having("r2", share)
    with pytest.raises(ValidationError):
        Shares(parts={"r2": 0.7, "r3": 0.4})


def test_a_share_is_replaced_and_taken_away() -> None:
    shares = Shares().having("r2", 0.1).having("r3", 0.3).having("r2", 0.7)
    assert shares.parts == {"r2": 0.7, "r3": 0.3}
    assert shares.having("r3", 0).parts == {"r2": 0.7}
    assert shares.having("r9", 0) == shares
