"""Files and folders that are written completely or not at all."""

import errno
import fcntl
import subprocess
import sys
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
        files.write_bytes(tmp_path / "file" / "artifact", b"content")
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


def test_a_full_disk_is_a_disk_error(tmp_path):
    with (
        pytest.raises(PipelineError, match="PIPELINE_CACHE"),
        files.atomic_write(tmp_path / "x", cache=True) as temporary,
    ):
        temporary.symlink_to("/dev/full")
        temporary.write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_folder_that_cannot_be_created_names_the_variable(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(PipelineError, match="PIPELINE_CACHE"):
        files.cache_folder(tmp_path / "file" / "inside")


def test_cache_folder_comes_from_the_argument_the_variable_or_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path / "env"))
    assert files.cache_folder(tmp_path / "given") == tmp_path / "given"
    assert files.cache_folder() == tmp_path / "env"
    monkeypatch.delenv("PIPELINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_folder() == tmp_path / "xdg" / "gpu-image-pipeline"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / ".cache" / "gpu-image-pipeline"


KILLED = """
import pathlib, sys, time
from pipeline.core import files
with files.atomic_write(pathlib.Path(sys.argv[1]), cache=True) as temporary:
    temporary.write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_the_next_write_removes_the_files_of_a_killed_one(tmp_path):
    path = tmp_path / "cache.parquet"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        with files.atomic_write(path, cache=True) as temporary:  # the files of a running writer stay
            temporary.write_bytes(b"mine")
        assert len(list(tmp_path.glob(".tmp-*-cache.parquet"))) == 1
        process.kill()
        process.wait()
    assert path.read_bytes() == b"mine"
    with files.atomic_write(path, cache=True) as temporary:
        temporary.write_bytes(b"again")
    assert [p.name for p in tmp_path.iterdir()] == ["cache.parquet"]
    assert path.read_bytes() == b"again"


def test_a_second_writer_does_not_replace_a_folder_in_the_cache(tmp_path):
    path = tmp_path / "folder"
    with files.atomic_write(path, cache=True) as first, files.atomic_write(path, cache=True) as second:
        for temporary, content in ((first, "1"), (second, "2")):
            temporary.mkdir()
            (temporary / "x").write_text(content, encoding="utf-8")
    assert (path / "x").read_text(encoding="utf-8") == "2"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "folder"]


def test_a_writer_locks_its_temporary_file(tmp_path):
    with files.atomic_write(tmp_path / "x", cache=True) as temporary:
        temporary.write_bytes(b"")
        with (
            temporary.with_name(temporary.name.replace(".tmp", ".lock")).open() as lock,
            pytest.raises(BlockingIOError),
        ):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_closed_pipe_inside_the_block_is_not_a_disk_error(tmp_path):
    with pytest.raises(BrokenPipeError), files.atomic_write(tmp_path / "x"):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    code = f"""
import pathlib, time
from pipeline.core import files
with files.locked(pathlib.Path({str(tmp_path)!r})):
    print("locked", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(PipelineError, match="in use"), files.locked(tmp_path, "in use"):
            pass
        process.kill()
        process.wait()
    with files.locked(tmp_path, "in use"):
        pass
