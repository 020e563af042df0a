"""What a command says that it has written is what is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shadow_trl.errors import ConfigError, ends_with
from shadow_trl.results.written import tells_what_is_written


def said(work, *outputs: Path, instead: bool = False) -> str:
    def interrupted():
        with tells_what_is_written(*outputs, instead=instead):
            work()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as found:
        interrupted()
    return found.value.ending


def test_nothing_new_is_nothing_written(tmp_path):
    out = tmp_path / "new" / "out"
    assert said(lambda: None, out) == "Nothing was written."
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "weights").write_text("x")
    assert said((tmp_path / "old" / "empty").mkdir, tmp_path / "old") == "Nothing was written."


def test_empty_folders_that_were_made_go_and_those_of_the_user_stay(tmp_path):
    (tmp_path / "mine").mkdir()
    assert said(lambda: (tmp_path / "new" / "out").mkdir(parents=True), tmp_path / "new" / "out").startswith("Nothing")
    assert said(lambda: None, tmp_path / "mine").startswith("Nothing")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_new_and_changed_entries_are_named_by_their_first_part(tmp_path):
    out = tmp_path / "out"
    (out / "checkpoint-1").mkdir(parents=True)
    for name in ("kept", "changed", "checkpoint-1/weights"):
        (out / name).write_text("x")

    def work():
        os.truncate(out / "changed", 0)
        (out / "checkpoint-1" / "weights").write_text("longer")
        (out / "checkpoint-2" / "shadow").mkdir(parents=True)
        (out / "checkpoint-2" / "shadow" / "weights").write_text("x")

    names = ("changed", "checkpoint-1", "checkpoint-2")
    assert said(work, out) == f"Written so far: {', '.join(str(out / name) for name in names)}."


def test_a_file_of_its_own_and_a_long_list(tmp_path):
    assert said((tmp_path / "a.json").touch, tmp_path / "a.json", tmp_path / "b.png") == (
        f"Written so far: {tmp_path / 'a.json'}."
    )
    out = tmp_path / "out"

    def work():
        out.mkdir()
        for number in range(11):
            (out / f"{number:02d}").touch()

    assert said(work, out).endswith(f"{out / '07'} and 3 more.")


def test_the_inner_block_is_believed_unless_told_otherwise(tmp_path):
    for instead, text in ((False, "no. TUNED is in x."), (True, "no. Nothing was written.")):
        with pytest.raises(ConfigError) as found, tells_what_is_written(tmp_path, instead=instead), \
                ends_with("TUNED is in x."):  # fmt: skip
            raise ConfigError("no.")
        assert str(found.value) == text
