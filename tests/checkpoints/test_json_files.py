"""JSON files: what is no JSON for us, and how a schema says what is wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Required, TypedDict

import pytest

from shadow_trl.checkpoints import json_files
from shadow_trl.checkpoints.json_files import Rule, is_file_name, is_there, read_json
from shadow_trl.errors import CheckpointError
from shadow_trl.pair.vocabularies import Vocabulary


class Inner(TypedDict, total=False):
    name: Required[str]
    ids: list[int] | None


class Outer(TypedDict, total=False):
    kind: Literal["a", "b"]
    size: float
    on: bool
    even: Annotated[int, Rule("an even number", lambda value: value % 2 == 0)]
    inner: Inner | list[str]
    by_name: dict[str, Inner]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ({"kind": "a", "size": 1, "on": True, "even": 2, "other": [{}]}, []),
        ({"size": 2.5, "inner": ["x"], "by_name": {"x": {"name": "", "ids": None}}}, []),
        ({"kind": "c"}, ['kind  "c", must be one of a, b']),
        ({"size": True, "on": 1}, ["size  true, must be a finite number", "on  1, must be true or false"]),
        ({"size": float("inf")}, ["size  Infinity, must be a finite number"]),
        ({"size": 10**400}, [f"size  {'1' + '0' * 56}..., must be a finite number"]),
        ({"even": 3}, ["even  3, must be an even number"]),
        ({"even": "x"}, ['even  "x", must be an even number']),
        ({"inner": 3}, ["inner  3, must be an object or a list"]),
        (
            {"inner": {"ids": [1, "2"]}},
            ["inner.name  missing, must be text", 'inner.ids[1]  "2", must be a whole number'],
        ),
        ({"inner": ["x", None]}, ["inner[1]  null, must be text"]),
        ({"by_name": {"x": {"name": None}}}, ["by_name.x.name  null, must be text"]),
        ([1], ["the file  [1], must be an object"]),
    ],
)
def test_each_value_of_the_wrong_kind_is_named(tmp_path, content, lines):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    if not lines:
        assert read_json(path, Outer) == content
        return
    with pytest.raises(CheckpointError) as caught:
        read_json(path, Outer)
    head, *found, _ = str(caught.value).split("\n")
    assert [line.strip() for line in found] == lines
    verb = "value of it is" if lines[1:] == [] else "values of it are"
    assert head == f"cannot use {path}: {len(lines)} {verb} of the wrong kind."


def test_infinity_is_a_number_of_configs_and_a_key_may_stand_twice_outside_of_indices(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"time_step_limit": [0.0, Infinity], "a": 1, "a": 2}')
    assert read_json(path) == {"time_step_limit": [0.0, float("inf")], "a": 2}
    assert read_json(tmp_path / "none.json") == {}


def test_what_may_not_be_read_is_called_unreadable_not_missing(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")

    def refuse(self: Path, *args: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", refuse)
        with pytest.raises(CheckpointError, match=r"cannot read .*Permission denied\. Change its permissions"):
            is_there(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(CheckpointError, match=r"cannot read .*Permission denied\. Change its permissions"):
            Vocabulary(tmp_path, "model").exists  # noqa: B018
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(CheckpointError, match=r"cannot read .*Permission denied\. Change its permissions"):
        read_json(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: it is not a file"):
        read_json(tmp_path / "config.json")


def test_a_folder_in_the_place_of_a_file_is_not_called_missing(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: it is not a file"):
        read_json(tmp_path / "config.json")
    assert not is_there(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("a", True), ("a/b.c", True), ("...", True), ("", False), ("/a", False), ("../a", False), ("a/../b", False),
        ("a//b", False), ("a\\b", False), ("a\0", False), (".", False), ("a/", False),
    ],
)  # fmt: skip
def test_names_of_files_in_a_folder(name, inside):
    assert is_file_name(name) == inside


def test_a_file_beyond_the_largest_size_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text('{"a": 1}')
    monkeypatch.setattr(json_files, "_LARGEST", 8)
    assert read_json(path) == {"a": 1}
    monkeypatch.setattr(json_files, "_LARGEST", 7)
    with pytest.raises(CheckpointError, match=r"config\.json: it has more than 7 bytes"):
        read_json(path)


def test_an_index_has_each_key_once(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"weight_map": {"a": "1", "b": "1", "a": "2"}}')
    with pytest.raises(CheckpointError, match="it has the key 'a' twice"):
        read_json(path)


@pytest.mark.parametrize(("length", "shown"), [(58, f'"{"x" * 58}"'), (59, f'"{"x" * 56}...')])
def test_a_long_value_is_cut(tmp_path, length, shown):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"kind": "x" * length}))
    with pytest.raises(CheckpointError, match=f"  kind  {shown}, must be"):
        read_json(path, Outer)
