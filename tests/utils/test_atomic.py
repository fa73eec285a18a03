"""Tests of lightning_prune.utils.atomic."""

import errno
import os
import re
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import lightning_prune
from benchmarks.robustness.fuzz.files import table
from lightning_prune import AtomicCheckpointIO, PruningRecord, save_pruned
from lightning_prune.distillation.teacher import Teacher
from lightning_prune.latency.store import save as save_table
from lightning_prune.reporting.figure import write_png
from lightning_prune.reporting.run_folder import Summary, save_net
from lightning_prune.utils.atomic import atomic_write, write_text


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


def test_many_writers_of_one_path_do_not_disturb_each_other(tmp_path: Path) -> None:
    path, texts = tmp_path / "it.txt", [str(number) * 20_000 for number in range(4)]
    errors: list[BaseException] = []

    def write_often(text: str) -> None:
        try:
            for _ in range(25):
                write_text(path, text)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write_often, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert path.read_text() in texts
    assert names_in(tmp_path) == ["it.txt"]


def test_a_full_disk_leaves_nothing_under_the_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "it.txt", "new")
    assert names_in(tmp_path) == []


def test_the_longest_name_of_a_file_system_can_be_written(tmp_path: Path) -> None:
    name = "n" * 251 + ".txt"
    write_text(tmp_path / name, "new")
    assert names_in(tmp_path) == [name]


#: Functions that write, in modules whose files nobody reads again, or whose writer is replaced when it is complete.
WRITES = re.compile(
    r"\.write_(text|bytes)\(|\.savefig\(|torch\.save\(|save_file\(|OmegaConf\.save\(|open\(.*\"[wax]b?\""
)


def test_everything_that_the_package_writes_is_written_atomically() -> None:
    package = Path(lightning_prune.__file__).parent
    lines = [
        (path.relative_to(package).as_posix(), line.strip())
        for path in sorted(package.rglob("*.py"))
        for line in path.read_text().splitlines()
        if WRITES.search(line) and "..." not in line and "``" not in line
    ]
    unnamed = ("temporary", "file)", "buffer)")  # these are no files under their final names
    elsewhere = [(path, line) for path, line in lines if not any(name in line for name in unnamed)]
    assert [path for path, _ in elsewhere] == ["serialization/export.py"]


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Let every file end after 1000 bytes, as on a full disk: further writes raise OSError."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


RECORD = PruningRecord({"weight": {0: list(range(400))}}, {"weight": [500, 2]})
WRITERS: dict[str, Callable[[Path], object]] = {
    "record": lambda path: RECORD.save(path),
    "summary": lambda path: Summary(error="x" * 2000).save(path.parent),
    "network": lambda path: save_net(path, nn.Linear(40, 40), RECORD),
    "safetensors": lambda path: save_pruned(nn.Linear(40, 40), None, path.with_suffix(".safetensors")),
    "checkpoint": lambda path: AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(999)}, path),
    "teacher": lambda path: Teacher(nn.Linear(40, 40)).save(path),
    "table": lambda path: save_table(replace(table(), info={"text": "x" * 2000}), path),
    "figure": lambda path: write_png(Figure(), path),
}


@pytest.mark.usefixtures("small_disk")
@pytest.mark.parametrize("name", WRITERS)
def test_no_writer_leaves_half_a_file_on_a_full_disk(tmp_path: Path, name: str) -> None:
    with pytest.raises((OSError, RuntimeError)):  # torch.save raises the second
        WRITERS[name](tmp_path / "it.json")
    assert names_in(tmp_path) == []
