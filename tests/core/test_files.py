"""Files and folders that are written completely or not at all."""

import errno
import threading
from pathlib import Path

import pytest

from pipeline.core import files
from pipeline.core.errors import PipelineError


def test_a_failed_write_leaves_the_existing_folder(tmp_path):
    path = tmp_path / "artifact"
    path.mkdir()
    (path / "content").write_text("old", encoding="utf-8")
    full = OSError(errno.ENOSPC, "No space left on device")
    for error in (full, RuntimeError("RESOURCE_EXHAUSTED: x.tmp; No space left on device")):
        with (
            pytest.raises(PipelineError, match="artifact") as raised,
            files.atomic_write(path) as temporary,
        ):
            temporary.mkdir()
            (temporary / "content").write_text("half", encoding="utf-8")
            raise error
        assert raised.value.exit_code == 1
    with pytest.raises(ZeroDivisionError), files.atomic_write(path) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise ZeroDivisionError
    assert (path / "content").read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]


@pytest.mark.parametrize("killed", [False, True])
def test_an_interruption_between_the_two_renames_loses_nothing(tmp_path, monkeypatch, killed):
    path = tmp_path / "artifact"

    def write(text):
        with files.atomic_write(path) as temporary:
            temporary.mkdir()
            (temporary / "content").write_text(text, encoding="utf-8")

    write("old")
    replace = Path.replace

    def stop_at_the_second(self, target):
        if self.name.startswith(".tmp-"):
            assert not path.exists()
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop_at_the_second)
        if killed:  # nothing is removed, and the kernel releases the lock
            patch.setattr(files, "_clear", lambda *_: (_ for _ in ()).throw(OSError))
        with pytest.raises(KeyboardInterrupt):
            write("new")
    if killed:
        assert not path.exists()
        with pytest.raises(ZeroDivisionError), files.atomic_write(path):
            raise ZeroDivisionError
    assert (path / "content").read_text(encoding="utf-8") == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "artifact"]


def test_a_path_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    with pytest.raises(PipelineError, match="file/artifact") as error:
        files.write(tmp_path / "file" / "artifact", b"content")
    assert error.value.exit_code == 1


def test_concurrent_writers_leave_one_complete_folder(tmp_path):
    path = tmp_path / "artifact"
    failures = []

    def write(mark):
        try:
            with files.atomic_write(path) as temporary:
                temporary.mkdir()
                for part in range(20):
                    (temporary / str(part)).write_text(mark, encoding="utf-8")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(str(index),)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "artifact"]
    assert len(list(path.iterdir())) == 20
    assert len({p.read_text(encoding="utf-8") for p in path.iterdir()}) == 1, "parts of two writers in one folder"
