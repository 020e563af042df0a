from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from kills import killed_at_every_step
from safetensors import SafetensorError
from safetensors.torch import save_file

from shadow_trl.checkpoints.manifest import write_manifest
from shadow_trl.errors import ConfigError, GraftError, OutputExistsError
from shadow_trl.results import folder
from shadow_trl.results.folder import OutputFolder, Scratch, check_place, recover, whole_file
from shadow_trl.results.shard_writer import ALIGNMENT, ShardWriter
from shadow_trl.runtime.machine import check_space, is_full

GRAFT = {"kind": "graft", "form": "model", "options": {}}


def make(path, text: str, **options):
    with OutputFolder(path, **options) as place:
        write_manifest(place.part, GRAFT)
        (place.part / "file").write_text(text)
        place.commit()


def siblings(path):
    return sorted(entry.name for entry in path.parent.iterdir())


def test_a_result_appears_whole(tmp_path):
    path = tmp_path / "new" / "deep" / "out"
    with OutputFolder(path) as place:
        (place.part / "file").write_text("1")
        assert not path.exists()
        place.commit()
    assert (path / "file").read_text() == "1"
    assert siblings(path) == ["out"]


def test_a_failure_leaves_nothing(tmp_path):
    path = tmp_path / "new" / "deep" / "out"

    def fail():
        with OutputFolder(path) as place:
            (place.part / "file").write_text("1")
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [OutputFolder, Scratch])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_says_so(tmp_path, place, error):
    with pytest.raises(GraftError, match=r"is full.*bytes free"), place(tmp_path / "out"):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_safetensors_words_it_in_a_way_that_is_recognised(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(Exception, match="os error") as found:
            save_file({"x": torch.zeros(2**16)}, tmp_path / "x.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert is_full(found.value)


def test_an_existing_result_is_kept_unless_overwritten(tmp_path):
    path = tmp_path / "out"
    make(path, "old")
    with pytest.raises(OutputExistsError, match="exists"):
        make(path, "new")
    make(path, "new", overwrite=True)
    assert (path / "file").read_text() == "new"
    assert siblings(path) == ["out"]


def test_only_grafts_are_overwritten(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    (path / "thesis.tex").write_text("years")
    for kind in (None, "run"):
        if kind:
            write_manifest(path, {"kind": kind})
        with pytest.raises(OutputExistsError, match="is not a graft"):
            make(path, "new", overwrite=True)
    assert (path / "thesis.tex").read_text() == "years"
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OutputExistsError):
        make(tmp_path / "link", "new", overwrite=True)


def test_the_old_result_stays_until_the_new_one_is_in_place(tmp_path):
    """Every step may be the last: the next run finds the old result or the new one, whole."""
    path = tmp_path / "out"
    make(path, "old")
    found = []
    for _ in killed_at_every_step(lambda: make(path, "new", overwrite=True), path):
        recover(path)
        found.append((path / "file").read_text())
        assert siblings(path) == ["out"]
        make(path, "old", overwrite=True)
    assert {"old", "new"} == set(found)
    assert found == sorted(found, reverse=True)  # the old one first


def test_files_are_synced_before_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename

    def name_of(descriptor):
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", lambda number: (events.append(("sync", name_of(number))), fsync(number)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append(("rename", b.name)), rename(a, b)))
    make(tmp_path / "out", "1")
    renamed = events.index(("rename", "out"))
    assert {name for kind, name in events[:renamed] if kind == "sync"} >= {"file", "shadow.json"}
    assert events[renamed - 1][1].startswith(".out.shadow-part")
    assert events[renamed + 1] == ("sync", tmp_path.name)


def test_parts_of_a_killed_run_are_removed_and_of_a_running_one_kept(tmp_path):
    path = tmp_path / "out"
    program = (
        "import sys, time, pathlib\nfrom shadow_trl.results.folder import OutputFolder\n"
        "place = OutputFolder(pathlib.Path(sys.argv[1])).__enter__()\n(place.part / 'x').write_text('1')\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        recover(path)
        assert len(siblings(path)) == 2  # the part and the lock
        with pytest.raises(OutputExistsError, match=rf"process {process.pid} on .* is writing to"):
            make(path, "2")
        assert len(siblings(path)) == 2
    finally:
        process.kill()
        process.wait()
    make(path, "1")
    assert siblings(path) == ["out"]


def test_two_results_for_one_path_at_a_time_are_refused_and_the_first_stays(tmp_path):
    path = tmp_path / "new" / "out"
    for overwrite in (False, True):
        with OutputFolder(path, overwrite) as first:
            (first.part / "file").write_text("first")
            write_manifest(first.part, GRAFT)
            with pytest.raises(OutputExistsError, match=f"process {os.getpid()} on .* is writing"):
                make(path, "second", overwrite=True)
            first.commit()
    assert (path / "file").read_text() == "first"
    assert siblings(path) == ["out"]


@pytest.mark.parametrize("error", [OSError(errno.ENOTSUP, "no locks"), NotImplementedError("no locks")])
@pytest.mark.parametrize("late", ["before the check", "after it"])
def test_without_locks_the_rename_decides(tmp_path, monkeypatch, error, late):
    def fail(self, *arguments, **options):
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", fail)
    path = tmp_path / "out"

    checked = folder.check_free

    def second():
        with OutputFolder(path) as place:
            (place.part / "file").write_text("second")
            if late == "before the check":
                make_elsewhere(tmp_path / "elsewhere", path)
            else:
                monkeypatch.setattr(folder, "check_free", checked_early)
            place.commit()

    def checked_early(*given):
        monkeypatch.setattr(folder, "check_free", checked)
        checked(*given)
        make_elsewhere(tmp_path / "elsewhere", path)

    def make_elsewhere(other, path):
        make(other, "first")
        os.rename(other, path)

    with pytest.raises(OutputExistsError):
        second()
    assert (path / "file").read_text() == "first"
    assert siblings(path) == ["out"]


def test_an_old_result_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch):
    """As another user's: its folder can be renamed, what is in it cannot be removed."""
    path = tmp_path / "out"
    make(path, "old")
    real = shutil.rmtree

    def refuse(place, *arguments, **options):
        if "shadow-old" in str(place):
            raise PermissionError(errno.EACCES, "Permission denied", str(place))
        real(place, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    for text in ("new", "newer"):
        with pytest.warns(UserWarning, match="could not be removed.*Remove .*shadow-old-00"):
            make(path, text, overwrite=True)
        assert (path / "file").read_text() == text
    assert siblings(path) == [".out.shadow-old-000", ".out.shadow-old-001", "out"]
    monkeypatch.undo()
    recover(path)
    assert siblings(path) == ["out"]


def test_files_of_the_user_are_not_overwritten(tmp_path):
    path = tmp_path / "out"
    with OutputFolder(path) as place:
        (place.part / "file").write_text("old")
        write_manifest(place.part, {**GRAFT, "files": ["file", "shadow.json"]})
        place.commit()
    (path / ".git").mkdir()
    (path / ".git" / "HEAD").write_text("x")
    (path / "thesis.tex").write_text("years")
    with pytest.raises(OutputExistsError, match=r"2 files that the graft.*\n  \.git/HEAD\n  thesis\.tex\n"):
        make(path, "new", overwrite=True)
    assert (path / "thesis.tex").read_text() == "years"
    assert siblings(path) == ["out"]


def test_scratch_of_a_dead_process_goes_with_the_next(tmp_path):
    dead = tmp_path / ".name.shadow-part-1-2"
    dead.mkdir()
    (dead / "weights").write_text("x")
    with Scratch(tmp_path / "name2"):
        assert dead.exists()
    with Scratch(tmp_path / "name") as one:
        assert not dead.exists()
        with Scratch(tmp_path / "name") as other:
            assert {one.part, other.part} == set(tmp_path.iterdir())
        assert siblings(tmp_path / "name") == [one.part.name]
    assert list(tmp_path.iterdir()) == []


def test_siblings_of_other_results_are_left_alone(tmp_path):
    for name in (".out2.shadow-part-1-2", ".ou[t].shadow-part-1", "out.shadow-part-1-2"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.shadow-part-1-2").mkdir()
    recover(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".ou[t].shadow-part-1",
        ".out2.shadow-part-1-2",
        "out.shadow-part-1-2",
    ]
    recover(tmp_path / "ou[t]")
    assert not (tmp_path / ".ou[t].shadow-part-1").exists()


def test_the_output_must_not_touch_an_input(tmp_path):
    base = tmp_path / "models" / "base"
    base.mkdir(parents=True)
    (tmp_path / "link").symlink_to(base)
    for place, how in (
        ("models/base", "is"),
        ("models/base/sub", "lies in"),
        ("models", "lies around"),
        ("link", "is"),
    ):
        with pytest.raises(ConfigError, match=f"the output .* {how} the folder of base"):
            check_place(tmp_path / place, [("base", base)])
    check_place(tmp_path / "models" / "base2", [("base", base)])
    check_place(base / "grafted", [("tuned", base)])
    with pytest.raises(ConfigError):
        check_place(base, [("tuned", base)])


def test_space_is_checked_before(tmp_path):
    check_space(tmp_path / "not" / "there", 1)
    with pytest.raises(GraftError, match=r"needs 1,000,000,000,000,000,000 bytes"):
        check_space(tmp_path / "out", 10**18)


@pytest.mark.parametrize("direct", [True, False])
def test_shards_are_written_in_any_order(tmp_path, direct):
    content = os.urandom(3 * ALIGNMENT + 777)
    writer = ShardWriter(tmp_path / "shard", len(content), direct=direct)
    writer.open()
    buffer = mmap.mmap(-1, ALIGNMENT)
    for start in (3 * ALIGNMENT, 0, 2 * ALIGNMENT, ALIGNMENT):
        part = content[start : start + ALIGNMENT]
        buffer[: len(part)] = part
        writer.write(start, buffer, len(part))
    writer.close()
    assert (tmp_path / "shard").read_bytes() == content


def test_a_file_system_without_direct_writes_is_written_through_the_cache(tmp_path, monkeypatch):
    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system opens no file for direct writes")
    real, refused = os.pwrite, []

    def refuse(descriptor, data, offset):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, data, offset)

    writer = ShardWriter(tmp_path / "shard", 100)
    writer.open()
    monkeypatch.setattr(os, "pwrite", refuse)
    buffer = mmap.mmap(-1, ALIGNMENT)
    buffer[:100] = bytes(range(100))
    writer.write(0, buffer, 100)
    writer.close()
    assert (tmp_path / "shard").read_bytes() == bytes(range(100))
    assert refused == [0]


def test_every_spelling_of_a_path_is_one_output(tmp_path):
    (tmp_path / "deep" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "below")
    whole = tmp_path / "deep" / "out"
    spellings = [whole, tmp_path / "link" / ".." / "out", tmp_path / "deep" / "below" / ".." / "out",
                 Path(f"{whole}/"), Path(os.path.relpath(whole))]  # fmt: skip
    for spelt in spellings:
        with OutputFolder(spelt) as first:
            for other in spellings:
                with pytest.raises(OutputExistsError, match="is writing to"):
                    make(other, "second")
            write_manifest(first.part, GRAFT)
            first.commit()
        assert (tmp_path / "deep" / "out" / "shadow.json").is_file()
        assert siblings(tmp_path / "deep" / "out") == ["below", "out"]
        shutil.rmtree(tmp_path / "deep" / "out")


@pytest.mark.parametrize("step", [0, 1])
def test_an_interrupt_between_the_renames_restores_the_old_result(tmp_path, monkeypatch, step):
    path, real, taken = tmp_path / "out", os.rename, []
    make(path, "old")

    def interrupted(source, target):
        taken.append(target)
        if len(taken) == 2 - step:
            if step:
                real(source, target)
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(path, "new", overwrite=True)
    assert (path / "file").read_text() == "old"
    assert siblings(path) == ["out"]


@pytest.mark.parametrize("lost", [1, 2, 9])
def test_scratch_that_another_run_took_for_dead_is_made_again(tmp_path, monkeypatch, lost):
    """Between making a folder and locking it, a run that starts at that moment may remove it."""
    real, taken = folder._lock, []

    def stolen(part):
        taken.append(part)
        if len(taken) > lost:
            return real(part)
        shutil.rmtree(part)
        return -1

    monkeypatch.setattr(folder, "_lock", stolen)
    with Scratch(tmp_path / "out") as scratch:
        (scratch.part / "x").write_text("x")
    assert len(taken) == min(lost + 1, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("old")

    def fail():
        with whole_file(path) as new:
            new.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(GraftError, match="is full"):
        fail()
    assert path.read_text() == "old"
    with whole_file(path) as new:
        new.write_text("new")
    assert path.read_text() == "new"
    assert siblings(path) == ["figures.json"]


@pytest.mark.parametrize("step", ["mkdir", "acquire", "rename", "remove", "release"])
def test_an_interrupt_within_a_step_on_the_disk_leaves_nothing_half_done(tmp_path, monkeypatch, step):
    """Each step is interrupted while it is done; what it belongs to is finished first, or taken back."""
    path = tmp_path / "out"
    make(path, "old")
    places = {
        "mkdir": (Path, "mkdir"), "acquire": (FileLock, "acquire"), "rename": (folder.os, "rename"),
        "remove": (folder, "_remove_old"), "release": (FileLock, "release"),
    }  # fmt: skip
    owner, name = places[step]
    original = getattr(owner, name)

    def interrupted(*args, **kwargs):
        monkeypatch.setattr(owner, name, original)
        result = original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(path, "new", overwrite=True)
    assert (path / "file").read_text() == ("old" if step in ("mkdir", "acquire") else "new")
    assert [found.name for found in tmp_path.iterdir()] == ["out"]
