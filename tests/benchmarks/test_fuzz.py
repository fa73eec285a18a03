"""A few hundred damaged files of every kind; ``python -m benchmarks.robustness.fuzz`` makes thousands."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.robustness.fuzz.__main__ import HANG, attack, is_clean, outcome, page
from benchmarks.robustness.fuzz.files import KINDS, FileKind
from lightning_prune.utils.hashing import value_digest


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_refused_or_read_with_the_same_contents(name: str) -> None:
    row = attack(KINDS[name], mutations=40, seed=1)
    assert is_clean(row), row
    assert row["verified"]["refused"] > 20


def test_the_fuzzer_finds_a_reader_that_trusts_its_file(tmp_path: Path) -> None:
    kind = FileKind(
        "text",
        "it.json",
        lambda folder: (folder / "it.json").write_text("5"),
        lambda path, verify: path.read_bytes(),
    )
    row = attack(kind, mutations=5)
    assert row["verified"] == {"other contents": 5}
    assert not is_clean(row)
    content = {"date": "", "versions": {"torch": ""}, "machine": "", "mutations": 5, "kinds": [row]}
    assert "- text, mutation 0: other contents" in page({**content, "memory_mb": 1, "memory_before_mb": 1})


def test_the_fuzzer_finds_hangs_and_other_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.robustness.fuzz.__main__.LIMIT", 1)
    slow = FileKind("slow", "it", lambda folder: None, lambda path, verify: time.sleep(9))
    broken = FileKind("broken", "it", lambda folder: None, lambda path, verify: [][1])
    assert outcome(slow, tmp_path / "it", True, value_digest(None)) == HANG
    assert outcome(broken, tmp_path / "it", True, "") == "IndexError: list index out of range"
