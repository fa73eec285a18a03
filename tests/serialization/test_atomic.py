"""Tests of lightning_prune.serialization.atomic."""

import os
from pathlib import Path

import pytest

from lightning_prune.serialization.atomic import atomic_write


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_new_content_replaces_the_old_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "it.txt"
    path.write_text("old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names_in(tmp_path) == ["it.txt"]


def test_missing_folders_are_made_and_the_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a" / "b" / "it.txt") as temporary:
        temporary.write_text("new")
    (tmp_path / "plain.txt").write_text("new")
    modes = {path.stat().st_mode for path in (tmp_path / "a" / "b" / "it.txt", tmp_path / "plain.txt")}
    assert len(modes) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("before", ["old", None])
def test_a_failure_leaves_nothing_but_the_old_content(
    tmp_path: Path, error: type[BaseException], before: str | None
) -> None:
    path = tmp_path / "it.txt"
    if before is not None:
        path.write_text(before)

    def fail() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half of it")
            raise error

    with pytest.raises(error):
        fail()
    assert names_in(tmp_path) == ([] if before is None else ["it.txt"])
    assert before is None or path.read_text() == before


def test_two_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "it.txt"
    with atomic_write(path) as first:
        first.write_text("first")
        with atomic_write(path) as second:
            assert first != second
            second.write_text("second")
        assert path.read_text() == "second"
        assert first.read_text() == "first"
    assert path.read_text() == "first"
    assert names_in(tmp_path) == ["it.txt"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    target.write_text("of another")
    link.symlink_to(target)
    with atomic_write(link) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "of another"
    assert not link.is_symlink()
    assert link.read_text() == "new"


def test_a_link_under_the_temporary_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda count: "0" * 2 * count)
    target = tmp_path / "target.txt"
    target.write_text("of another")
    (tmp_path / "it.txt.00000000.part").symlink_to(target)
    with pytest.raises(FileExistsError), atomic_write(tmp_path / "it.txt") as temporary:
        temporary.write_text("new")
    assert target.read_text() == "of another"
    assert names_in(tmp_path) == ["it.txt.00000000.part", "target.txt"]


def test_the_content_is_on_disk_before_the_file_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, exists_at_flush = tmp_path / "it.txt", []
    monkeypatch.setattr(os, "fsync", lambda descriptor: exists_at_flush.append(path.exists()))
    with atomic_write(path) as temporary:
        temporary.write_text("new")
    assert exists_at_flush == [False]
    assert path.exists()


def test_the_temporary_name_ends_as_the_writer_needs(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "net.onnx", suffix=".onnx") as temporary:
        assert temporary.suffix == ".onnx"
        assert temporary.parent == tmp_path
