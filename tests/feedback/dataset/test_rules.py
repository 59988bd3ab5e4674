import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from pydantic import ValidationError

from contracts.dataset import SetName
from contracts.v1 import events_pb2 as pb
from feedback.consent import ConsentState, Standing
from feedback.dataset import admission, content, duplicates, people, raters
from feedback.dataset.outline import prompt_of, words_of
from feedback.dataset.people import split_of
from feedback.dataset.row import Given, Kept, Prompt, Row, Share
from feedback.dataset.rules import apply_rules
from feedback.dataset.settings import PAPER_MIX, RuleSettings

SETTINGS = RuleSettings()
NOTHING_KNOWN = Given(SETTINGS)
GRANTED = ConsentState.on_all(Standing("1"))


def share(user_id: str, *, source: str = "api", notice: str = "1", at: float = 1.0) -> Share:
    return Share(user_id, source, notice, at)


@functools.cache
def prompt(words: str, prefix: int) -> Prompt:
    return prompt_of(pb.Prompt(text=words), prefix)


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
    prefix: int = SETTINGS.common_prefix_chars,
) -> Row:
    return Row(
        set=set,
        id=id,
        owner=share(owner) if isinstance(owner, str) else owner,
        prompt=prompt(words, prefix),
        responses=tuple(words_of(response) for response in responses),
        rater=share(rater) if isinstance(rater, str) else rater,
        completion_id=completion_id,
        at=(0, offset),
    )


def ids(kept: Kept) -> list[str]:
    return [r.id for r in kept[0]]


@pytest.mark.parametrize(
    ("owner", "state", "admitted"),
    [
        (share("ann"), GRANTED, True),
        (share("ann"), ConsentState(), False),
        (share("ann"), ConsentState.on_all(Standing(granted=None, withdrawn_at=9.0)), False),
        (share("ann", at=3.0), ConsentState.on_all(Standing(granted="1", withdrawn_at=9.0)), False),
        (share("ann", at=10.0), ConsentState.on_all(Standing(granted="1", withdrawn_at=9.0)), True),
        (share("ann", notice="licence:MIT"), GRANTED, False),
        (share("ann", source="import", notice="licence:MIT"), ConsentState(), True),
        (share("ann", source="import", notice="1"), ConsentState(), False),
        (
            share("ann", source="import", notice="licence:MIT"),
            ConsentState.on_all(Standing(granted=None, withdrawn_at=9.0)),
            False,
        ),
    ],
)
def test_consented(owner: Share, state: ConsentState, admitted: bool) -> None:
    kept, notes = admission.consented([row("1", owner)], Given(SETTINGS, {"ann": state}))
    assert [r.id for r in kept] == (["1"] if admitted else [])
    assert notes == {"people_left_out": 0 if admitted else 1}


def test_a_ranking_needs_the_consent_of_owner_and_rater() -> None:
    rows = [row("1", "ann", set="rm", rater="bob"), row("2", "bob", set="rm", rater="ann")]
    assert ids(admission.consented(rows, Given(SETTINGS, {"ann": GRANTED}))) == []
    assert ids(admission.consented(rows, Given(SETTINGS, {"ann": GRANTED, "bob": GRANTED}))) == [
        "1",
        "2",
    ]


def test_short_enough() -> None:
    settings = RuleSettings(max_prompt_chars=5, max_response_chars=3)
    rows = [
        row("1", words="12345"),
        row("2", words="123456"),
        row("3", words="1", set="rm", responses=("123", "1234")),
        row("4", words="1", set="sft", responses=("123",)),
    ]
    kept = content.short_enough(rows, Given(settings, {}))
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
    assert ids(duplicates.said_once(rows, Given(SETTINGS, {}))) == ["1", "3", "4", "6", "8", "9"]


def test_prefix_once_keeps_the_first_of_a_cluster_with_all_its_rows() -> None:
    rows = [
        row("1", words="abcd one", set="sft", prefix=4),
        row("2", words="abcd two", set="sft", prefix=4),
        row("3", words="abcd one", set="sft", prefix=4),
        row("4", words="abcd three", set="sft", prefix=4),
        row("5", words="abc", set="sft", prefix=4),
        row("6", words="abce", set="sft", prefix=4),
        row("7", words="abcd two", set="ppo", prefix=4),
    ]
    kept = duplicates.prefix_once(rows, NOTHING_KNOWN)
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
    kept = people.capped_per_user(rows, Given(settings, {}))
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
    kept, notes = people.split_by_user(rows, Given(SETTINGS, {}))
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
    kept, counts = apply_rules(rows, Given(SETTINGS, {"ann": GRANTED}))
    assert [r.id for r in kept] == ["1"]
    assert [(c.rule, c.rows_in["ppo"], c.rows_out["ppo"]) for c in counts] == [
        ("consented", 3, 2),
        ("from_sources", 2, 2),
        ("language_recorded", 2, 2),
        ("short_enough", 2, 2),
        ("said_once", 2, 1),
        ("near_once", 1, 1),
        ("prefix_once", 1, 1),
        ("capped_per_user", 1, 1),
        ("use_case_known", 1, 1),
        ("masked", 1, 1),
        ("reviewed", 1, 1),
        ("known_answers_right", 1, 1),
        ("ranked_apart", 1, 1),
        ("agreeing", 1, 1),
        ("split_by_user", 1, 1),
        ("permitted", 1, 1),
        ("bounded_weight", 1, 1),
        ("mixed", 1, 1),
    ]
    assert counts[7].settings == {"prompts_per_user": 200}


def test_only_wanted_sources_stay_and_each_is_counted() -> None:
    rows = [row("1", share("ann", source="api")), row("2", share("bob", source="labeler"))]
    kept = admission.from_sources(rows, Given(RuleSettings(sources=("labeler", "import"))))
    assert (ids(kept), kept[1]) == (["2"], {"from_labeler": 1})


def test_a_row_serves_only_what_everyone_in_it_agreed_to() -> None:
    only_evaluation = ConsentState(evaluation=Standing("1"))
    rows = [row("1", "ann"), replace(row("2", "ann"), split="test"), row("3", "bob")]
    given_ = Given(SETTINGS, {"ann": only_evaluation, "bob": GRANTED})
    assert ids(admission.consented(rows, given_)) == ["1", "2", "3"]
    assert ids(admission.permitted(rows, given_)) == ["2", "3"]


def test_the_language_is_recorded() -> None:
    rows = [row("1", words="Where is the next station, please?"), row("2", words="今天天气怎么样")]
    kept, notes = content.language_recorded(rows, NOTHING_KNOWN)
    assert [r.prompt.language for r in kept] == ["en", "zh"]
    assert notes == {"en": 1, "zh": 1}


@pytest.mark.parametrize(
    ("words", "use_case"),
    [
        ("Summarize this for a second-grade student: ...", "summarisation"),
        ("Write a short story about a bear.", "generation"),
        ("List five ideas for a birthday party", "brainstorming"),
        ("Translate to French: good morning", "rewrite"),
        ("What is the capital of Peru?", "open_qa"),
        ("Extract all names from the text below", "extract"),
        ("Rate it: is the sentiment of this review good?", "classification"),
        ("Answer based on the following text: ...", "closed_qa"),
        ("hm", "other"),
    ],
)
def test_a_prompt_without_a_label_gets_the_class_its_words_hint_at(
    words: str, use_case: str
) -> None:
    labelled = replace(row("2", words=words), use_case="mine")
    kept, notes = content.use_case_known([row("1", words=words), labelled], NOTHING_KNOWN)
    assert [(r.use_case, r.use_case_by) for r in kept] == [
        (use_case, "classifier"),
        ("mine", "label"),
    ]
    assert notes == {f"{use_case}_by_classifier": 1, "mine_by_label": 1}
    off = Given(RuleSettings(classify_use_case=False))
    assert content.use_case_known([row("1", words=words)], off)[0][0].use_case == ""


def test_personal_data_becomes_its_kind_and_only_the_kind_is_recorded() -> None:
    asked = pb.Prompt(messages=[pb.Message(role="user", content="I am at 203.0.113.7")])
    chat = replace(
        row("1", set="rm", responses=("Mail a@example.com", "ok"), rater="ann"),
        prompt=prompt_of(asked, 200),
        annotated=("EMAIL",),
    )
    (kept,), notes = content.masked([chat], NOTHING_KNOWN)
    assert (kept.prompt.chars, kept.prompt.masked_chars) == (19, len("I am at [IP]"))
    assert [words.masked_chars for words in kept.responses] == [len("Mail [EMAIL]"), 2]
    assert (kept.masked, notes) == (("EMAIL", "IP"), {"EMAIL": 2, "IP": 1})
    assert content.masked([chat], Given(RuleSettings(mask_pii=False))) == ([chat], {})


def test_what_a_reviewer_dropped_or_may_not_read_is_out() -> None:
    hit = [replace(row(i, who), masked=("EMAIL",)) for i, who in ("1a", "2b", "3c")]
    plain = row("4", "c")
    no_reading = ConsentState(training=Standing("1"))
    consents = {"a": GRANTED, "b": GRANTED, "c": no_reading}
    rows, decisions = [*hit, plain], {"2": False, "1": True}
    for review, stay in (("none", ["1", "3", "4"]), ("masked", ["1", "4"]), ("all", ["1"])):
        settings = RuleSettings.model_validate({"review": review})
        assert ids(admission.reviewed(rows, Given(settings, consents, decisions))) == stay


def test_nearly_equal_prompts_are_one() -> None:
    long = "Please write a friendly letter to my landlord about the broken heating in the kitchen"
    rows = [
        row("1", words=long),
        row("2", words=long + "!"),
        row("3", words="Explain how a heat pump works to a child of six years"),
        row("4", words=long + "!", set="sft"),
        row("5", words=long),
    ]
    kept = duplicates.near_once(rows, NOTHING_KNOWN)
    assert (ids(kept), kept[1]) == (["1", "3", "4", "5"], {"prompts_dropped": 1})
    off = Given(RuleSettings(near_duplicate_similarity=1.0))
    assert ids(duplicates.near_once(rows, off)) == ["1", "2", "3", "4", "5"]


def ranked(
    id: str, rater: str, ranks: tuple[int, ...], completion: str = "c", **more: object
) -> Row:
    answers = tuple("abcdefghi"[: len(ranks)])
    base = row(id, set="rm", rater=rater, responses=answers, completion_id=completion)
    return replace(base, ranks=ranks, **more)


def test_who_fails_known_answers_is_out_and_the_checks_are_no_data() -> None:
    known = ((0, 1),)
    good = [ranked(f"g{i}", "good", (0, 1), known=known) for i in range(3)]
    bad = [ranked(f"b{i}", "bad", (1, 0), known=known) for i in range(3)]
    few = [ranked(f"f{i}", "few", (1, 0), known=known) for i in range(2)]
    data = [ranked(who, who, (0, 1)) for who in ("good", "bad", "few")]
    kept = raters.known_answers_right([*good, *bad, *few, *data], NOTHING_KNOWN)
    assert (ids(kept), kept[1]) == (["good", "few"], {"raters_left_out": 1, "checks": 8})


def test_who_orders_against_the_others_is_out() -> None:
    settings = RuleSettings(min_rater_pairs=6)
    rows = [
        ranked(f"{who}{c}", who, (2, 1, 0) if who == "troll" else (0, 1, 2), completion=str(c))
        for who in ("a", "b", "c", "troll")
        for c in range(2)
    ]
    kept, notes = raters.agreeing(rows, Given(settings))
    assert {r.rater_id for r in kept} == {"a", "b", "c"}
    assert notes == {"raters_left_out": 1, "raters_compared": 4}
    off = Given(RuleSettings(min_rater_agreement=0.0, min_rater_pairs=6))
    assert len(raters.agreeing(rows, off)[0]) == 8


def test_the_same_order_of_the_same_answers_counts_once() -> None:
    rows = [
        ranked("1", "a", (0, 1), "c1"),
        ranked("2", "a", (0, 1), "c2"),
        ranked("3", "b", (0, 1)),
    ]
    assert ids(raters.ranked_apart(rows, NOTHING_KNOWN)) == ["1", "3"]


@pytest.mark.parametrize(
    ("share_", "left"), [(1.0, {"a": 8, "b": 2, "c": 2}), (0.5, {"a": 4, "b": 2, "c": 2})]
)
def test_one_rater_weighs_no_more_than_a_share(share_: float, left: dict[str, int]) -> None:
    counts = {"a": 8, "b": 2, "c": 2}
    rows = [ranked(f"{who}{i}", who, (0, 1)) for who, n in counts.items() for i in range(n)]
    kept, _ = raters.bounded_weight(rows, Given(RuleSettings(max_rater_share=share_)))
    assert {who: sum(r.rater_id == who for r in kept) for who in counts} == left


def test_training_rows_are_thinned_to_the_mix() -> None:
    labeler = [row(f"l{i}", share("l", source="labeler"), set="sft") for i in range(10)]
    customer = [row(f"c{i}", share("c"), set="sft") for i in range(10)]
    imported = [row("i", share("i", source="import"), set="sft")]
    test_side = [replace(row("t", share("t"), set="sft"), split="test")]
    settings = RuleSettings(mix={"sft": {"labeler": 4, "customer": 1}})
    kept, notes = people.mixed([*labeler, *customer, *imported, *test_side], Given(settings))
    # 10 labeler rows at 4 to 1 take 2.5 customer rows; round half to even.
    assert notes == {"sft_labeler": 10, "sft_customer": 2}
    assert "t" in [r.id for r in kept]


def test_the_papers_mix_is_a_preset() -> None:
    assert RuleSettings.model_validate({"mix": "paper"}).mix == PAPER_MIX
    with pytest.raises(ValidationError, match="above 0"):
        RuleSettings.model_validate({"mix": {"sft": {"labeler": 0}}})


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
            prefix=3,
        ),
        st.sampled_from(("sft", "rm", "ppo")),
        st.sampled_from(PEOPLE),
        st.text("ab", max_size=6),
        st.text("x", max_size=4),
    ),
    max_size=30,
).map(lambda rows: [replace(r, id=f"{i:04}", at=(0, i)) for i, r in enumerate(rows)])
SMALL = RuleSettings(
    max_prompt_chars=5, max_response_chars=3, common_prefix_chars=3, prompts_per_user=2
)


@given(ROWS)
def test_applying_the_rules_again_changes_nothing(rows: list[Row]) -> None:
    once, _ = apply_rules(rows, Given(SMALL, CONSENTS))
    twice, _ = apply_rules(once, Given(SMALL, CONSENTS))
    assert twice == once


@given(ROWS)
def test_the_order_of_the_rows_does_not_matter(rows: list[Row]) -> None:
    assert apply_rules(rows[::-1], Given(SMALL, CONSENTS)) == apply_rules(
        rows, Given(SMALL, CONSENTS)
    )


@given(ROWS)
def test_nobody_has_more_prompts_than_the_cap(rows: list[Row]) -> None:
    kept, _ = apply_rules(rows, Given(SMALL, CONSENTS))
    for name in PEOPLE:
        assert len({r.prompt.said for r in kept if r.owner.user_id == name}) <= 2


@given(ROWS, ROWS)
def test_a_person_is_on_one_side_whatever_else_comes(rows: list[Row], more: list[Row]) -> None:
    later = [replace(r, id="later" + r.id) for r in more]
    now, _ = apply_rules(rows, Given(SMALL, CONSENTS))
    then, _ = apply_rules([*rows, *later], Given(SMALL, CONSENTS))
    sides = {(r.owner.user_id, r.split) for r in [*now, *then]}
    assert len({person for person, _ in sides}) == len(sides)
