import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from contracts.dataset import SetName
from feedback.consent import ConsentState
from feedback.dataset import rules
from feedback.dataset.rules import Row, RuleSettings, Share, apply_rules, split_of

SETTINGS = RuleSettings()
GRANTED = ConsentState(granted="1")


def share(user_id: str, *, source: str = "api", notice: str = "1", at: float = 1.0) -> Share:
    return Share(user_id, source, notice, at)


def row(
    id: str,
    owner: Share | str = "ann",
    words: str = "hello",
    *,
    set: SetName = "ppo",
    responses: tuple[str, ...] = (),
    rater: Share | str | None = None,
    completion_id: str = "",
    offset: int = 0,
) -> Row:
    return Row(
        set=set,
        id=id,
        owner=share(owner) if isinstance(owner, str) else owner,
        text=words,
        messages=(),
        words=words,
        responses=responses,
        rater=share(rater) if isinstance(rater, str) else rater,
        completion_id=completion_id,
        offset=offset,
    )


def ids(kept: rules.Kept) -> list[str]:
    return [r.id for r in kept[0]]


@pytest.mark.parametrize(
    ("owner", "state", "admitted"),
    [
        (share("ann"), GRANTED, True),
        (share("ann"), ConsentState(), False),
        (share("ann"), ConsentState(granted=None, withdrawn_at=9.0), False),
        (share("ann", at=3.0), ConsentState(granted="1", withdrawn_at=9.0), False),
        (share("ann", at=10.0), ConsentState(granted="1", withdrawn_at=9.0), True),
        (share("ann", notice="licence:MIT"), GRANTED, False),
        (share("ann", source="import", notice="licence:MIT"), ConsentState(), True),
        (share("ann", source="import", notice="1"), ConsentState(), False),
        (
            share("ann", source="import", notice="licence:MIT"),
            ConsentState(granted=None, withdrawn_at=9.0),
            False,
        ),
    ],
)
def test_consented(owner: Share, state: ConsentState, admitted: bool) -> None:
    kept, notes = rules.consented([row("1", owner)], SETTINGS, {"ann": state})
    assert [r.id for r in kept] == (["1"] if admitted else [])
    assert notes == {"people_left_out": 0 if admitted else 1}


def test_a_ranking_needs_the_consent_of_owner_and_rater() -> None:
    rows = [row("1", "ann", set="rm", rater="bob"), row("2", "bob", set="rm", rater="ann")]
    assert ids(rules.consented(rows, SETTINGS, {"ann": GRANTED})) == []
    assert ids(rules.consented(rows, SETTINGS, {"ann": GRANTED, "bob": GRANTED})) == ["1", "2"]


def test_short_enough() -> None:
    settings = RuleSettings(max_prompt_chars=5, max_response_chars=3)
    rows = [
        row("1", words="12345"),
        row("2", words="123456"),
        row("3", words="1", set="rm", responses=("123", "1234")),
        row("4", words="1", set="sft", responses=("123",)),
    ]
    kept = rules.short_enough(rows, settings, {})
    assert ids(kept) == ["1", "4"]
    assert kept[1] == {"prompt_too_long": 1, "response_too_long": 1}


def test_said_once() -> None:
    rows = [
        row("1", words="hi"),
        row("2", "bob", words="hi"),
        row("3", words="hi", set="sft", responses=("a",)),
        row("4", words="hi", set="sft", responses=("b",)),
        row("5", words="hi", set="sft", responses=("a",)),
        row("6", set="rm", rater="ann", completion_id="c", offset=8),
        row("7", set="rm", rater="ann", completion_id="c", offset=7),
        row("8", set="rm", rater="bob", completion_id="c", offset=1),
        row("9", set="rm", rater="ann", completion_id="d", offset=2),
    ]
    assert ids(rules.said_once(rows, SETTINGS, {})) == ["1", "3", "4", "6", "8", "9"]


def test_prefix_once_keeps_the_first_of_a_cluster_with_all_its_rows() -> None:
    settings = RuleSettings(common_prefix_chars=4)
    rows = [
        row("1", words="abcd one", set="sft"),
        row("2", words="abcd two", set="sft"),
        row("3", words="abcd one", set="sft"),
        row("4", words="abcd three", set="sft"),
        row("5", words="abc", set="sft"),
        row("6", words="abce", set="sft"),
        row("7", words="abcd two", set="ppo"),
    ]
    kept = rules.prefix_once(rows, settings, {})
    assert ids(kept) == ["1", "3", "5", "6", "7"]
    assert kept[1] == {"clusters": 1, "prompts_dropped": 2}


def test_the_cap_counts_the_prompts_of_an_owner_over_all_sets() -> None:
    settings = RuleSettings(prompts_per_user=2)
    rows = [
        row("1", words="a", set="rm", rater="ann"),
        row("2", words="a"),
        row("3", words="b"),
        row("4", words="c"),
        row("5", words="b", set="rm", rater="ann"),
        row("6", "bob", words="c"),
    ]
    kept = rules.capped_per_user(rows, settings, {})
    assert ids(kept) == ["1", "2", "3", "5", "6"]
    assert kept[1] == {"people_capped": 1}


def user_in(split: str, *, but: str = "") -> str:
    names = (f"user-{i}" for i in range(1000))
    return next(n for n in names if split_of(n, SETTINGS) == split and n != but)


def test_rankings_go_with_the_rater_and_apart_from_another_split() -> None:
    here, near, away = user_in("train"), user_in("train", but=user_in("train")), user_in("test")
    imported = share(away, source="import", notice="licence:MIT")
    rows = [
        row("1", here, set="rm", rater=near),
        row("2", away, set="rm", rater=near),
        row("3", imported, set="rm", rater=near),
        row("4", away),
    ]
    kept, notes = rules.split_by_user(rows, SETTINGS, {})
    assert [(r.id, r.split) for r in kept] == [("1", "train"), ("3", "train"), ("4", "test")]
    assert notes == {"owner_and_rater_apart": 1}


@pytest.mark.parametrize(
    ("name", "split"),
    # First bytes by `printf 'instructloop split 1\0%s' NAME | sha256sum`; 0.8 is cccc, 0.9 is e666.
    [
        ("user-2", "train"),  # 2a47
        ("user-1", "train"),  # c985
        ("user-27", "validation"),  # d64c
        ("user-51", "validation"),  # e1c8
        ("user-0", "test"),  # e83b
    ],
)
def test_the_split_of_a_name_is_fixed_for_ever(name: str, split: str) -> None:
    assert split_of(name, SETTINGS) == split


def test_the_fractions_are_met() -> None:
    got = [split_of(f"user-{i}", SETTINGS) for i in range(10_000)]
    # Three standard deviations of a binomial: 120 and 90.
    assert abs(got.count("train") - 8000) < 120
    assert abs(got.count("validation") - 1000) < 90


@pytest.mark.parametrize(
    "wrong", [{"max_prompt_char": 1}, {"prompts_per_user": 0}, {"train_fraction": 0.95}]
)
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        RuleSettings.model_validate(wrong)


def test_counts_say_what_each_rule_let_through() -> None:
    rows = [row("1"), row("2"), row("3", "bob")]
    kept, counts = apply_rules(rows, SETTINGS, {"ann": GRANTED})
    assert [r.id for r in kept] == ["1"]
    assert [(c.rule, c.rows_in["ppo"], c.rows_out["ppo"]) for c in counts] == [
        ("consented", 3, 2),
        ("short_enough", 2, 2),
        ("said_once", 2, 1),
        ("prefix_once", 1, 1),
        ("capped_per_user", 1, 1),
        ("split_by_user", 1, 1),
    ]
    assert counts[4].settings == {"prompts_per_user": 200}


PEOPLE = ("ann", "bob", "cat")
CONSENTS = dict.fromkeys(PEOPLE, GRANTED)
ROWS = st.lists(
    st.builds(
        lambda set_, owner, words, answer: row(
            "",
            owner,
            words,
            set=set_,
            responses=() if set_ == "ppo" else (answer,),
            rater=owner if set_ == "rm" else None,
            completion_id=words + answer,
        ),
        st.sampled_from(("sft", "rm", "ppo")),
        st.sampled_from(PEOPLE),
        st.text("ab", max_size=6),
        st.text("x", max_size=4),
    ),
    max_size=30,
).map(lambda rows: [dataclasses.replace(r, id=f"{i:04}", offset=i) for i, r in enumerate(rows)])
SMALL = RuleSettings(
    max_prompt_chars=5, max_response_chars=3, common_prefix_chars=3, prompts_per_user=2
)


@given(ROWS)
def test_applying_the_rules_again_changes_nothing(rows: list[Row]) -> None:
    once, _ = apply_rules(rows, SMALL, CONSENTS)
    twice, _ = apply_rules(once, SMALL, CONSENTS)
    assert twice == once


@given(ROWS)
def test_the_order_of_the_rows_does_not_matter(rows: list[Row]) -> None:
    assert apply_rules(rows[::-1], SMALL, CONSENTS) == apply_rules(rows, SMALL, CONSENTS)


@given(ROWS)
def test_nobody_has_more_prompts_than_the_cap(rows: list[Row]) -> None:
    kept, _ = apply_rules(rows, SMALL, CONSENTS)
    for name in PEOPLE:
        assert len({r.prompt for r in kept if r.owner.user_id == name}) <= 2


@given(ROWS, ROWS)
def test_a_person_is_on_one_side_whatever_else_comes(rows: list[Row], more: list[Row]) -> None:
    later = [dataclasses.replace(r, id="later" + r.id) for r in more]
    now, _ = apply_rules(rows, SMALL, CONSENTS)
    then, _ = apply_rules([*rows, *later], SMALL, CONSENTS)
    sides = {(r.owner.user_id, r.split) for r in [*now, *then]}
    assert len({person for person, _ in sides}) == len(sides)
