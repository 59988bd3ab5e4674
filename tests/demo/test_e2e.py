"""E2E answers: slots told, left out, told otherwise or made up; BLEU against many references."""

import csv
import gzip
import os
from collections import defaultdict
from pathlib import Path

import pytest

from contracts.errors import InvalidInput
from demo.e2e import bleu, parse, slot_error_rate, slot_errors, slots
from training.data import PromptRow

MR = (
    "name[The Eagle], eatType[pub], food[French], priceRange[less than £20], "
    "customer rating[5 out of 5], area[city centre], familyFriendly[no], near[Café Rouge]"
)
ALL_TOLD = (
    "The Eagle is a cheap French pub in the city center near Cafe Rouge. "
    "It is not family friendly and customers rated it five stars."
)


def row(mr: str) -> PromptRow:
    return PromptRow("p", "u", "", ({"role": "user", "content": mr},), "generation")


def test_parse() -> None:
    assert parse("name[Blue Spice], eatType[coffee shop], area[city centre]") == {
        "name": "Blue Spice",
        "eatType": "coffee shop",
        "area": "city centre",
    }


@pytest.mark.parametrize(
    "mr", ["", "Tell me about it", "name[A", "colour[red]", "name[A], food[Martian]"]
)
def test_parse_refuses_what_is_no_input_and_does_not_repeat_it(mr: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse(mr)
    assert "Martian" not in str(refused.value) and "colour" not in str(refused.value)


def test_an_answer_that_tells_all() -> None:
    errors = slot_errors(MR, ALL_TOLD)
    assert (errors.missing, errors.wrong, errors.added, errors.slots) == ((), (), (), 8)


def test_an_empty_answer_leaves_out_every_slot() -> None:
    errors = slot_errors(MR, "")
    assert set(errors.missing) == set(parse(MR))
    assert errors.rate == 1.0


@pytest.mark.parametrize(
    ("slot", "told", "changed"),
    [
        ("name", "The Eagle", "The Mill"),
        ("near", "Cafe Rouge", "Burger King"),
        ("eatType", "pub", "coffee shop"),
        ("food", "French", "Indian"),
        ("priceRange", "a cheap", "an expensive"),
        ("customer rating", "five stars", "as average"),
        ("area", "city center", "riverside area"),
        ("familyFriendly", "not family friendly", "family friendly"),
    ],
)
def test_one_changed_value_is_one_wrong_slot(slot: str, told: str, changed: str) -> None:
    assert told in ALL_TOLD
    errors = slot_errors(MR, ALL_TOLD.replace(told, changed))
    assert (errors.missing, errors.wrong, errors.added) == ((), (slot,), ())


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("eatType[coffee shop]", "a café"),
        ("eatType[restaurant]", "a restaurant"),
        ("food[Fast food]", "fast-food"),
        ("food[English]", "British food"),
        ("priceRange[cheap]", "low-priced"),
        ("priceRange[cheap]", "prices are quite low"),
        ("priceRange[less than £20]", "under £20"),
        ("priceRange[less than £20]", "a low price range"),
        ("priceRange[moderate]", "reasonably priced"),
        ("priceRange[moderate]", "its price range is moderate"),
        ("priceRange[£20-25]", "£20 to £25"),
        ("priceRange[£20-25]", "mid-priced"),
        ("priceRange[high]", "not cheap"),
        ("priceRange[high]", "a high price range and a customer rating"),
        ("priceRange[more than £30]", "more than £30"),
        ("customer rating[low]", "1 out of 5"),
        ("customer rating[low]", "poorly rated by customers"),
        ("customer rating[low]", "has not got the best ratings"),
        ("customer rating[1 out of 5]", "one star"),
        ("customer rating[1 out of 5]", "an average customer rating of 1 out of 5"),
        ("customer rating[average]", "rated average"),
        ("customer rating[3 out of 5]", "3/5"),
        ("customer rating[high]", "a high price range and highly rated"),
        ("customer rating[5 out of 5]", "excellent reviews"),
        ("area[riverside]", "by the river"),
        ("area[riverside]", "by the river, not in the city centre"),
        ("area[city centre]", "in the center of town"),
        ("familyFriendly[yes]", "children are welcome"),
        ("familyFriendly[yes]", "not only cosy but kid friendly"),
        ("familyFriendly[yes]", "not expensive, kid-friendly"),
        ("familyFriendly[no]", "adults only"),
        ("familyFriendly[no]", "not for families with children"),
        ("familyFriendly[no]", "no kids"),
        ("familyFriendly[no]", "children are not allowed"),
        ("familyFriendly[no]", "kid unfriendly"),
    ],
)
def test_paraphrases(value: str, told: str) -> None:
    mr = f"name[Cotto], {value}"
    errors = slot_errors(mr, f"Cotto: {told}.")
    assert (errors.missing, errors.wrong) == ((), ())


@pytest.mark.parametrize(
    ("made_up", "slot"),
    [
        ("It is near Burger King.", "near"),
        ("It is a pub.", "eatType"),
        ("It serves sweet Indian food.", "food"),
        ("It is expensive.", "priceRange"),
        ("It has 3 stars.", "customer rating"),
        ("It is in the city centre.", "area"),
        ("It welcomes children.", "familyFriendly"),
    ],
)
def test_what_was_not_asked_for_is_added(made_up: str, slot: str) -> None:
    errors = slot_errors("name[Cotto]", f"Cotto is a nice restaurant. {made_up}")
    assert (errors.missing, errors.wrong, errors.added) == ((), (), (slot,))


def test_the_right_value_and_another_one_too_is_added() -> None:
    errors = slot_errors("name[Cotto], area[riverside]", "Cotto, riverside, is in the city centre.")
    assert (errors.missing, errors.wrong, errors.added) == ((), (), ("area",))


def test_names_tell_no_other_slot() -> None:
    mr = "name[Cotto], near[Raja Indian Cuisine], food[Chinese]"
    assert slot_errors(mr, "Cotto is near Raja Indian Cuisine.").missing == ("food",)
    assert slot_errors(mr, "Cotto is Chinese and near Raja Indian Cuisine.").count == 0


def test_a_leading_the_and_letter_case_do_not_matter() -> None:
    assert slot_errors("name[The Eagle]", "the eagle").count == 0
    assert slot_errors("name[The Eagle]", "Eagle is a place").count == 0
    assert slot_errors("name[The Eagle]", "Eagles").missing == ("name",)


def test_slot_error_rate() -> None:
    """Of 8 + 2 slots one is missing and one is wrong, and one more is added: 3 errors."""
    without_rating = ALL_TOLD.replace("customers rated it five stars", "we like it")
    texts = [without_rating, "Cotto is a kid friendly place with Indian food.", "Cotto, French."]
    small = row("name[Cotto], food[French]")
    measured = slot_error_rate()([row(MR), small, small], texts)
    assert measured == {
        "slot_error_rate": pytest.approx(3 / 12),
        "missing": pytest.approx(1 / 12),
        "wrong": pytest.approx(1 / 12),
        "added": pytest.approx(1 / 12),
        "perfect_share": pytest.approx(1 / 3),
    }


def test_the_judge_prefers_fewer_errors_and_finished_answers() -> None:
    prompt = row("name[Cotto], food[French]")
    texts = ["Cotto serves French food.", "Cotto.", "Cotto serves French food.", "It is cheap."]
    assert slots()([prompt] * 4, texts, [True, True, False, True]) == [0.0, -0.5, -1.0, -1.5]


def references(path: Path, rows: list[tuple[str, ...]], header: str = "mr,ref") -> str:
    with gzip.open(path, "wt", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return str(path)


FEW = "name[Cotto], food[French]"
MANY = "name[Cotto], area[riverside]"


def test_bleu_groups_references_by_input_and_leaves_out_unknown_ones(tmp_path: Path) -> None:
    file = references(
        tmp_path / "refs.csv.gz",
        [
            (FEW, "Cotto serves French food ."),
            (MANY, "Cotto is by the river ."),
            (MANY, "You find Cotto at the riverside ."),
        ],
    )
    rows = [row(FEW), row("area[riverside], name[Cotto]"), row("name[Aromi]")]
    texts = ["Cotto serves French food .", "You find Cotto at the riverside .", "Aromi ."]
    measured = bleu(file)(rows, texts)
    assert measured == {"bleu": pytest.approx(100), "hypotheses": 2, "left_out": 1}


def test_bleu_of_several_answers_by_hand(tmp_path: Path) -> None:
    """Precisions 9/10, 7/8, 5/6, 3/4, no brevity penalty: one of ten words is another."""
    file = references(tmp_path / "refs.csv.gz", [(FEW, "a b c d e"), (MANY, "x"), (MANY, "y")])
    measured = bleu(file)([row(FEW), row(FEW)], ["a b c d e", "a b c d f"])
    by_hand = 100 * (9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25
    assert measured == {"bleu": pytest.approx(by_hand), "hypotheses": 2, "left_out": 0}


def test_bleu_without_a_single_reference_is_refused(tmp_path: Path) -> None:
    measure = bleu(references(tmp_path / "refs.csv.gz", [(FEW, "Cotto serves French food.")]))
    with pytest.raises(InvalidInput, match="references of the prompts"):
        measure([row(MANY)], ["Cotto"])


def test_references_without_the_columns_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="a column ref"):
        bleu(references(tmp_path / "refs.csv.gz", [(FEW, "Cotto")], header="mr,text"))


def test_references_with_a_damaged_row_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="expected 2 columns, got 1"):
        bleu(references(tmp_path / "refs.csv.gz", [(FEW,)]))


DATA = Path(os.environ.get("INSTRUCTLOOP_DATA", "no data folder"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="INSTRUCTLOOP_DATA names no data folder")


def table(name: str) -> list[dict[str, str]]:
    with gzip.open(DATA / name, "rt", encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


@needs_data
@pytest.mark.parametrize("name", ["e2e_devset", "e2e_testset_w_refs"])
def test_human_references_have_few_slot_errors(name: str) -> None:
    rows = table(f"demonstrations/{name}.csv.gz")
    measured = slot_error_rate()([row(r["mr"]) for r in rows], [r["ref"] for r in rows])
    assert 0.02 < measured["slot_error_rate"] < 0.09
    assert measured["wrong"] + measured["added"] < 0.015


@needs_data
def test_slot_errors_agree_with_what_people_found_wrong() -> None:
    """Three or more RankME workers say the same: the facts are right, or some are not."""
    checks = defaultdict(list)
    for r in table("rankings/e2e_rankme_quality.csv.gz"):
        for i in range(1, 6):
            checks[r["mr"], r[f"ref{i}"]].append(r[f"check{i}"] != "ok")
    clear = {key: said[0] for key, said in checks.items() if len(said) > 2 and len({*said}) == 1}
    found = {key: slot_errors(*key).count > 0 for key in clear}
    agreement = sum(found[key] == clear[key] for key in clear) / len(clear)
    assert len(clear) > 1000
    assert agreement > 0.93


@needs_data
def test_a_reference_scores_high_against_all_references() -> None:
    file = DATA / "demonstrations/e2e_testset_w_refs.csv.gz"
    rows = table("demonstrations/e2e_testset_w_refs.csv.gz")[:200]
    measured = bleu(str(file))([row(r["mr"]) for r in rows], [r["ref"] for r in rows])
    assert measured == {"bleu": pytest.approx(100), "hypotheses": 200, "left_out": 0}
