import csv
import gzip
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from contracts.errors import InvalidInput
from contracts.log import Log
from contracts.v1 import events_pb2 as pb
from feedback.importers import ImportReport, import_file
from feedback.log import open_log

# sha256("name[Aromi], area[riverside]") by coreutils' sha256sum.
MR = "name[Aromi], area[riverside]"
MR_HASH = "1123a21ebf5d"


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    log = open_log(f"sqlite:///{tmp_path}/log.sqlite")
    yield log
    log.close()


def events(log: Log, topic: str) -> list[pb.Event]:
    return [record.event for record in log.read(topic, 0, 0, 1000)]


def reasons(report: ImportReport) -> list[tuple[int, str]]:
    return [(bad.row, bad.reason) for bad in report.malformed]


def csv_file(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def json_lines(path: Path, values: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def test_e2e(tmp_path: Path, log: Log) -> None:
    rows = [
        ("mr", "ref"),
        (MR, "Aromi is by the river."),
        (MR, ""),
        (MR,),
        (MR, "At the riverside: Aromi."),
    ]
    report = import_file("e2e", csv_file(tmp_path / "e2e.csv.gz", rows), log)
    assert (report.rows, report.events) == (2, 2)
    assert reasons(report) == [
        (3, "ref: expected a text, got 'an empty one'"),
        (4, "expected 2 columns, got 1"),
    ]
    assert str(report.malformed[0]).startswith(f"{tmp_path}/e2e.csv.gz:3: ref: ")
    first, second = events(log, "demonstrations")
    assert first.user_id == second.user_id == f"e2e:{MR_HASH}"
    assert first.time.ToNanoseconds() == 0
    assert first.demonstration == pb.Demonstration(
        prompt=pb.Prompt(messages=[pb.Message(role="user", content=MR)]),
        response="Aromi is by the river.",
        source=pb.SOURCE_IMPORT,
        notice_version="licence:CC-BY-SA-4.0",
        metadata={"use_case": "generation"},
    )


def test_a_second_time_adds_nothing_but_repeated_rows_count(tmp_path: Path, log: Log) -> None:
    rows = [("mr", "ref"), (MR, "Aromi."), (MR, "Aromi."), (MR, "Riverside.")]
    path = csv_file(tmp_path / "e2e.csv.gz", rows)
    first = import_file("e2e", path, log)
    assert import_file("e2e", path, log) == first
    assert [e.demonstration.response for e in events(log, "demonstrations")] == [
        "Aromi.",
        "Aromi.",
        "Riverside.",
    ]
    csv_file(path, [*rows, (MR, "New.")])
    import_file("e2e", path, log)
    assert len(events(log, "demonstrations")) == 4


def test_the_licence_can_be_given(tmp_path: Path, log: Log) -> None:
    path = csv_file(tmp_path / "e2e.csv.gz", [("mr", "ref"), (MR, "Aromi.")])
    import_file("e2e", path, log, licence="CC0-1.0")
    assert events(log, "demonstrations")[0].demonstration.notice_version == "licence:CC0-1.0"


RANKME_ROW = {
    "_created_at": "11/28/2017 14:51:43",
    "_started_at": "11/28/2017 14:50:13",
    "_trust": "0.9",
    "_worker_id": "w1",
    "mr": MR,
    "dupl_ref4": "5",
    "dupl_ref5": "4",
}
RANKME_ROW |= dict(
    zip(
        [f"ref{i}" for i in range(1, 6)],
        ["A one.", "B two.", "C three.", "D four.", "d four"],
        strict=True,
    )
)
RANKME_ROW |= dict(
    zip([f"quality{i}" for i in range(1, 6)], ["60", "100", "60", "7.5", "99"], strict=True)
)
RANKME_ROW |= dict(
    zip(
        [f"check{i}" for i in range(1, 6)],
        ["ok", "missing", "added\nmissing", "ok", "ok"],
        strict=True,
    )
)


def rankme(path: Path, *changes: dict[str, str]) -> Path:
    rows = [list((RANKME_ROW | change).values()) for change in changes]
    return csv_file(path, [list(RANKME_ROW), *rows])


def test_rankme(tmp_path: Path, log: Log) -> None:
    report = import_file("rankme", rankme(tmp_path / "q.csv.gz", {}, {"_worker_id": "w2"}), log)
    assert (report.rows, report.events, report.malformed) == (2, 4, ())
    (completion,) = events(log, "completions")
    assert completion.user_id == f"e2e:{MR_HASH}"
    assert [o.text for o in completion.completion.outputs] == [
        "A one.",
        "B two.",
        "C three.",
        "D four.",
        "d four",
    ]
    first, second = events(log, "rankings")
    assert (first.user_id, second.user_id) == ("rankme:w1", "rankme:w2")
    assert first.time.ToJsonString() == "2017-11-28T14:51:43Z"
    # 100 > 60 = 60 > 7.5; the fifth repeats the fourth but for a capital and a full stop.
    assert first.ranking == pb.Ranking(
        completion_id=completion.completion.completion_id,
        groups=[
            pb.RankGroup(outputs=[1]),
            pb.RankGroup(outputs=[0, 2]),
            pb.RankGroup(outputs=[3]),
        ],
        instruction_version="rankme",
        seconds_spent=90.0,
        source=pb.SOURCE_IMPORT,
        notice_version="licence:unclear",
        metadata={
            "criterion": "quality",
            "trust": "0.9",
            "check1": "ok",
            "check2": "missing",
            "check3": "added missing",
            "check4": "ok",
            "check5": "ok",
        },
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"quality2": "-1"}, "quality2: expected a finite number >= 0, got '-1'"),
        ({"quality1": "nan"}, "quality1: expected a finite number >= 0, got 'nan'"),
        ({"quality3": "inf"}, "quality3: expected a finite number >= 0, got 'inf'"),
        ({"quality3": "good"}, "quality3: expected a finite number >= 0, got 'good'"),
        ({"ref3": " "}, "ref3: expected a text, got 'an empty one'"),
        ({"_worker_id": ""}, "_worker_id: expected a text, got 'an empty one'"),
        (
            {"_created_at": "yesterday"},
            "_created_at: expected month/day/year hours:minutes:seconds, got 'yesterday'",
        ),
        (
            {f"ref{i}": "Same." for i in range(1, 6)},
            "ref1..5: expected two outputs that differ, got 'five times the same'",
        ),
    ],
)
def test_a_malformed_rankme_row_is_left_out(
    tmp_path: Path, log: Log, change: dict[str, str], reason: str
) -> None:
    report = import_file("rankme", rankme(tmp_path / "q.csv.gz", change, {}), log)
    # A cell with a line break makes the row end one line later.
    assert reasons(report) == [(3, reason)]
    assert len(events(log, "rankings")) == 1


def test_hh(tmp_path: Path, log: Log) -> None:
    talk = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: A joke?\n\nAssistant:"
    good = {"chosen": f"{talk} Knock knock.", "rejected": f"{talk} No."}
    bad = [
        {"chosen": f"{talk} a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"},
        {"chosen": f"{talk} a", "rejected": f"{talk}  a "},
        {"chosen": f"{talk} a", "rejected": talk},
        {"chosen": f"{talk} a\n\nHuman: b", "rejected": f"{talk} b"},
        {"chosen": f"{talk} a"},
    ]
    report = import_file("hh", json_lines(tmp_path / "hh.jsonl", [*bad, good]), log)
    assert report.rows == 1
    assert [row for row, _ in reasons(report)] == [1, 2, 3, 4, 5]
    (completion,), (ranking,) = events(log, "completions"), events(log, "rankings")
    assert [(m.role, m.content) for m in completion.completion.prompt.messages] == [
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "A joke?"),
    ]
    texts = [o.text for o in completion.completion.outputs]
    assert sorted(texts) == ["Knock knock.", "No."]
    assert [[texts[i] for i in g.outputs] for g in ranking.ranking.groups] == [
        ["Knock knock."],
        ["No."],
    ]
    assert ranking.user_id == completion.user_id
    assert ranking.ranking.completion_id == completion.completion.completion_id


def test_the_better_answer_has_no_place_of_its_own(tmp_path: Path, log: Log) -> None:
    pairs = [
        {
            "chosen": f"\n\nHuman: {i}\n\nAssistant: good {i}",
            "rejected": f"\n\nHuman: {i}\n\nAssistant: bad {i}",
        }
        for i in range(50)
    ]
    import_file("hh", json_lines(tmp_path / "hh.jsonl", pairs), log)
    first = [e.ranking.groups[0].outputs[0] for e in events(log, "rankings")]
    # 25 of 50 expected; 14..36 is three standard deviations of a fair coin.
    assert 14 <= first.count(0) <= 36


def message(role: str, text: str, *replies: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "text": text, "replies": list(replies), **more}


def test_oasst(tmp_path: Path, log: Log) -> None:
    again = message(
        "prompter",
        "And now?",
        message("assistant", "x", rank=1),
        message("assistant", "y", rank=0),
        message("assistant", "z", rank=1),
        message("assistant", "unranked", rank=None),
        message("assistant", "gone", rank=2, deleted=True),
    )
    tree = message(
        "prompter",
        "Why?",
        message("assistant", "Because.", again, rank=0),
        message("assistant", "No.", rank=1),
    )
    single = message("prompter", "Alone", message("assistant", "One.", rank=0))
    many = message("prompter", "Many", *(message("assistant", f"{i}", rank=i) for i in range(10)))
    odd = message(
        "prompter",
        "Odd",
        message("assistant", "a", rank="0"),
        message("assistant", "b", rank=1),
    )
    listed = {"prompt": message("prompter", "Listed") | {"role": ["prompter"]}}
    wanted = "a role of prompter or assistant and a list of replies"
    trees = [*({"prompt": t} for t in (tree, single, many, odd)), {}, listed]
    report = import_file("oasst", json_lines(tmp_path / "trees.jsonl", trees), log)
    assert (report.rows, report.events) == (2, 4)
    assert reasons(report) == [
        (3, "replies: expected at most 9 ranked answers, got 10"),
        (4, "rank: expected an integer, 0 for the best, got 'str'"),
        (5, "message: expected an object, got 'NoneType'"),
        (6, f"message: expected {wanted}, got ['prompter']"),
    ]
    ranked = []
    for completion, ranking in zip(
        events(log, "completions"), events(log, "rankings"), strict=True
    ):
        prompt, texts = (
            completion.completion.prompt,
            [o.text for o in completion.completion.outputs],
        )
        groups = [sorted(texts[i] for i in g.outputs) for g in ranking.ranking.groups]
        ranked.append(([m.content for m in prompt.messages], groups))
        assert completion.completion.completion_id == ranking.ranking.completion_id
    assert ranked == [
        (["Why?"], [["Because."], ["No."]]),
        (["Why?", "Because.", "And now?"], [["y"], ["x", "z"]]),
    ]
    assert len({e.user_id for e in [*events(log, "completions"), *events(log, "rankings")]}) == 1


def test_a_row_nested_too_deep_is_a_bad_row(tmp_path: Path, log: Log) -> None:
    """One depth can be read and not written: which, the frames below decide."""
    rows = ['{"a":' + "[" * depth + "]" * depth + "}" for depth in range(900, 1000)]
    (tmp_path / "deep.jsonl").write_text("\n".join(rows), encoding="utf-8")
    report = import_file("hh", tmp_path / "deep.jsonl", log)
    assert report.rows == 0 and len(report.malformed) == len(rows)


ALPACA = [
    {"instruction": "Add.", "input": "1 + 1", "output": "2"},
    {"instruction": "Greet.", "input": "", "output": "Hello."},
    {"instruction": "Bye.", "output": ""},
    {"instruction": "List.", "input": ["a"], "output": "a"},
    "text",
]


@pytest.mark.parametrize("form", ["array", "lines"])
def test_alpaca(tmp_path: Path, log: Log, form: str) -> None:
    path = tmp_path / "alpaca.json"
    path.write_text(
        json.dumps(ALPACA, indent=1) if form == "array" else "\n".join(map(json.dumps, ALPACA))
    )
    report = import_file("alpaca", path, log)
    assert report.rows == 2
    assert reasons(report) == [
        (3, "output: expected a text, got 'an empty one'"),
        (4, "input: expected a text, or none, got 'list'"),
        (5, "expected a JSON object, got str"),
    ]
    got = [
        (e.demonstration.prompt.messages[0].content, e.demonstration.response)
        for e in events(log, "demonstrations")
    ]
    assert got == [("Add.\n\n1 + 1", "2"), ("Greet.", "Hello.")]


def test_a_bad_line_does_not_stop_the_next(tmp_path: Path, log: Log) -> None:
    good = json.dumps(
        {
            "chosen": "\n\nHuman: q\n\nAssistant: a",
            "rejected": "\n\nHuman: q\n\nAssistant: b",
        }
    )
    path = tmp_path / "hh.jsonl"
    # \xff is not UTF-8, and \ud800 is half a character.
    not_utf8 = good.replace("q", "Q").encode().replace(b"Q", b"\xff")
    half = good.replace("q", "\\ud800").encode()
    path.write_bytes(b"\n".join([b"{", not_utf8, b"", half, b"[1]", good.encode()]))
    report = import_file("hh", path, log)
    assert report.rows == 1
    assert reasons(report) == [
        (1, "not JSON: Expecting property name enclosed in double quotes"),
        (2, "chosen: expected text in UTF-8, got 'other bytes'"),
        (4, "chosen: expected text in UTF-8, got 'other bytes'"),
        (5, "expected a JSON object, got list"),
    ]


def test_what_is_not_the_format_at_all_is_refused(tmp_path: Path, log: Log) -> None:
    other = csv_file(tmp_path / "other.csv.gz", [("a", "b"), ("1", "2")])
    with pytest.raises(InvalidInput, match="a column mr, ref"):
        import_file("e2e", other, log)
    with pytest.raises(InvalidInput, match="one of alpaca, e2e, hh, oasst, rankme"):
        import_file("csv", other, log)
    with pytest.raises(InvalidInput, match="read to its end"):
        import_file("e2e", tmp_path / "none.csv", log)
    quoted = tmp_path / "quoted.csv"
    quoted.write_text('mr,"ref\nname[Aromi],Aromi.\n')
    with pytest.raises(InvalidInput, match="header: expected a line of CSV"):
        import_file("e2e", quoted, log)
    cut = tmp_path / "cut.csv.gz"
    good = csv_file(tmp_path / "good.csv.gz", [("mr", "ref"), (MR, "Aromi.")])
    cut.write_bytes(good.read_bytes()[:-9])
    with pytest.raises(InvalidInput, match="read to its end"):
        import_file("e2e", cut, log)


DATA = os.environ.get("INSTRUCTLOOP_DATA", "")


@pytest.mark.skipif(
    not (DATA and Path(DATA, "README.md").is_file()),
    reason="INSTRUCTLOOP_DATA names no data folder",
)
@pytest.mark.parametrize(
    (
        "format",
        "file",
        "rows",
        "malformed",
        "completions",
        "rankings",
        "demonstrations",
    ),
    [
        # As the data's README says, and a plain count of distinct outputs and ranked siblings.
        ("e2e", "demonstrations/e2e_devset.csv.gz", 4672, 0, 0, 0, 4672),
        ("rankme", "rankings/e2e_rankme_quality.csv.gz", 2020, 0, 960, 2020, 0),
        ("rankme", "rankings/e2e_rankme_naturalness.csv.gz", 2880, 0, 960, 2880, 0),
        ("hh", "comparisons/hh_helpful_base_test.jsonl.gz", 1736, 18, 1736, 1736, 0),
        ("oasst", "rankings/oasst_en_trees.jsonl", 60, 0, 122, 122, 0),
        ("alpaca", "demonstrations/alpaca_en_demo.json.gz", 999, 0, 0, 0, 999),
    ],
)
def test_published_files(
    log: Log,
    format: str,
    file: str,
    rows: int,
    malformed: int,
    completions: int,
    rankings: int,
    demonstrations: int,
) -> None:
    for _ in range(2):
        report = import_file(format, Path(DATA, file), log)
        assert (report.rows, len(report.malformed)) == (rows, malformed)
        assert log.ends("completions")[0] == completions
        assert log.ends("rankings")[0] == rankings
        assert log.ends("demonstrations")[0] == demonstrations
