import gzip
from pathlib import Path

import pytest

from contracts.errors import InvalidInput
from instructloop.text import hold_out, read_documents


def test_paragraphs_become_documents_of_four(tmp_path: Path) -> None:
    paragraphs = [f"paragraph {i}\r\ngoes on" for i in range(6)]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\r\n\r\n".join(paragraphs).encode()))
    documents = read_documents([f"{tmp_path}/*.txt.gz"])
    assert [d.count("\n") + 1 for d in documents] == [4, 2]
    assert documents[0].startswith("paragraph 0 goes on\nparagraph 1 goes on")


def test_a_pattern_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"text: .*nothing-here"):
        read_documents([f"{tmp_path}/nothing-here-*.txt"])


def test_one_document_in_twenty_is_held_out() -> None:
    train, held_out = hold_out([str(i) for i in range(40)])
    assert held_out == ["0", "20"]
    assert len(train) == 38
    assert not set(train) & set(held_out)
