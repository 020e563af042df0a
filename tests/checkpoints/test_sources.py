"""Which folder or hub id a manifest or an adapter means, seen from any folder, and whether it changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from families import family, load, lora

from shadow_trl import extract_delta, graft, verify
from shadow_trl.checkpoints.checkpoint import Checkpoint
from shadow_trl.checkpoints.json_files import read_json
from shadow_trl.checkpoints.manifest import Entry, adapter_base, read_manifest, write_manifest
from shadow_trl.errors import CheckpointError
from shadow_trl.training.origins import resolve_origins


@pytest.fixture
def no_hub(monkeypatch):
    def ask(name, **options):
        raise AssertionError(f"the hub was asked for {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", ask)


def place(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def test_a_name_is_found_from_here_then_from_the_manifest(tmp_path, monkeypatch):
    monkeypatch.chdir(place(tmp_path / "here"))
    home = place(tmp_path / "run")
    entry = Entry("own/base", None, {}, folder=True)
    with pytest.raises(CheckpointError, match=rf"own/base is neither a folder here nor in {home}"):
        entry.find(home, "base")
    beside = place(home / "own" / "base")
    assert str(entry.find(home, "base")) == str(beside)
    place(Path("own/base"))
    assert str(entry.find(home, "base")) == "own/base"


def test_a_hub_id_is_not_taken_from_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place(Path("own/base"))
    assert str(Entry("own/base", "v1", None, folder=False).find(tmp_path, "base")) == "own/base@v1"
    # Where it is not recorded, a folder wins: it has no revision.
    assert str(Entry("own/base", "v1").find(tmp_path, "base")) == "own/base"
    assert str(Entry("own/other", "v1").find(tmp_path, "base")) == "own/other@v1"


def test_version_0_1_0_took_digests_of_folders_only_in_its_runs():
    sides = {"base": {"source": "a", "revision": None, "digests": {}}, "instruct": {"source": "b", "digests": None}}
    entries = {kind: [Entry.read({"kind": kind, **sides}, role) for role in sides] for kind in ("run", "graft")}
    assert [entry.folder for entry in entries["run"]] == [True, False]
    assert [entry.folder for entry in entries["graft"]] == [None, None]
    assert Entry.read({"kind": "run", "base": None}, "base") is None
    assert Entry.read(None, "base") is None


def test_a_changed_and_a_missing_file_are_named(tmp_path):
    digests = {}
    for name in ("a.safetensors", "b.safetensors", "c.safetensors"):
        (tmp_path / name).write_text(name)
        digests[name] = f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"
    entry = Entry(str(tmp_path), None, digests, folder=True)
    assert entry.changed(tmp_path) == []
    (tmp_path / "b.safetensors").write_text("other")
    (tmp_path / "c.safetensors").unlink()
    assert entry.changed(tmp_path) == ["b.safetensors", "c.safetensors"]
    assert Entry("own/base").changed(tmp_path) == []


def test_a_name_without_its_revision_is_another_name(tmp_path, monkeypatch):
    # Opened at `v2`, which is a commit now.
    side = Checkpoint("own/base", "0" * 40, tmp_path, asked="v2")
    names = {
        revision: Entry("own/base", revision, folder=False).names(side, tmp_path) for revision in ("v1", "v2", None)
    }
    assert names == {"v1": False, "v2": True, None: False}
    assert Entry("own/base", "0" * 40, folder=False, asked="v3").names(side, tmp_path)
    assert not Entry("own/base", "1" * 40, folder=False, asked="v2").names(side, tmp_path)
    folder = place(tmp_path / "base")
    monkeypatch.chdir(place(tmp_path / "here"))
    assert Entry("../base", folder=True).names(Checkpoint(str(folder), None, folder), tmp_path / "run")
    assert not Entry("../base", folder=True).names(Checkpoint("x", None, tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("name", "revision", "found"),
    [
        ("owner/base", "v1", ("owner/base", "v1")),
        ("../base", None, ("{adapter}/../base", None)),
        ("below", "v1", ("{adapter}/below", None)),
        ("here", None, ("here", None)),
    ],
)
def test_an_adapter_names_one_base_for_training_and_for_a_graft(tmp_path, monkeypatch, name, revision, found):
    sides = family(tmp_path / "sides")
    monkeypatch.chdir(place(tmp_path / "cwd"))
    adapter = lora(tmp_path / "home" / "adapter", base_model_name_or_path=name, revision=revision)
    for folder in (tmp_path / "home" / "base", adapter / "below", Path("here"), adapter / "here"):
        shutil.copytree(sides["base"], folder)
    source, at = found[0].format(adapter=adapter), found[1]
    origins = resolve_origins(str(adapter))
    assert origins.policy == origins.base == Entry(source, at)
    if at is None:
        graft(instruct=sides["instruct"], tuned=adapter, output=tmp_path / "out", progress=False)
        extract_delta(tuned=adapter, output=tmp_path / "delta", progress=False)
        for output in ("out", "delta"):
            entry = read_manifest(tmp_path / output)["base"]
            assert (entry["source"], entry["revision"], entry["folder"]) == (source, None, True)
        assert verify(tmp_path / "out", progress=False).same
    else:
        with pytest.raises(CheckpointError, match=f"{source}@{at} is neither a folder here nor a repository"):
            graft(instruct=sides["instruct"], tuned=adapter, output=tmp_path / "out", progress=False)


def test_a_revision_that_was_given_wins_over_the_adapter(tmp_path):
    adapter = lora(tmp_path / "adapter", base_model_name_or_path="owner/base", revision="v1")
    origins = resolve_origins(str(adapter), base_revision="v2")
    assert origins.policy == origins.base == Entry("owner/base", "v2")


def test_another_revision_of_the_same_name_is_not_the_raw_base():
    assert resolve_origins("owner/base", policy_revision="v1").from_raw_base
    assert not resolve_origins("owner/base", policy_revision="v1", base="owner/base").from_raw_base
    assert not resolve_origins("owner/base", policy_revision="v1", base_revision="v2").from_raw_base
    # A revision of BASE alone is that of the model too, which is BASE.
    assert resolve_origins("owner/base", base_revision="v2").policy == Entry("owner/base", "v2")
    assert resolve_origins("owner/tuned", base="owner/base", base_revision="v2").policy == Entry("owner/tuned")


@pytest.mark.parametrize("digest", ["sha256", "none"])
def test_a_folder_of_a_graft_is_never_asked_of_the_hub(tmp_path, monkeypatch, no_hub, digest):
    family(tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    sides = {role: f"own/{role}" for role in ("base", "instruct", "tuned")}
    graft(**sides, output="out", digest=digest, progress=False)
    monkeypatch.chdir(place(tmp_path / "elsewhere"))
    given = {role: tmp_path / source for role, source in sides.items()}
    for role in sides:
        others = {other: folder for other, folder in given.items() if other != role}
        with pytest.raises(CheckpointError, match=rf"{role} of .*out is gone: own/{role} is neither .* --{role}"):
            verify(tmp_path / "out", **others, progress=False)
    assert verify(tmp_path / "out", **given, progress=False).same


@pytest.mark.parametrize("role", ["policy", "base"])
def test_the_folder_under_an_adapter_of_a_run_is_never_asked_of_the_hub(tmp_path, monkeypatch, no_hub, role):
    """The adapter's config has the name alone; the manifest beside it knows that it was a folder."""
    sides = family(tmp_path / "own")
    adapter = lora(tmp_path / "run", base_model_name_or_path="own/base")
    entry = {"source": "own/base", "revision": None, "digests": {}, "folder": True}
    write_manifest(adapter, {"kind": "run", role: entry})
    monkeypatch.chdir(place(tmp_path / "elsewhere"))
    with pytest.raises(CheckpointError, match="own/base is neither a folder here nor in"):
        adapter_base(read_json(adapter / "adapter_config.json"), adapter)
    write_manifest(adapter, {"kind": "run", "base": entry, "policy": entry})
    with pytest.raises(CheckpointError, match=r"own/base is neither a folder here nor in .*run\. .* --base"):
        graft(instruct=sides["instruct"], tuned=adapter, output="out", progress=False)
    shutil.copytree(sides["base"], adapter / "own" / "base")
    graft(instruct=sides["instruct"], tuned=adapter, output="out", progress=False)


def test_a_repository_is_never_taken_from_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    family(tmp_path / "own")
    with pytest.raises(CheckpointError, match="own/base is a local folder, which has no revision"):
        Entry("own/base", "0" * 40, folder=False).pinned()


@pytest.mark.parametrize(
    ("role", "options"),
    [("base", "--base, in training base_model="), ("tuned", "--tuned$"), ("tuned_2", "--tuned$"),
     ("delta", "--delta$"), ("start", "merge the adapter"), ("policy", "merge the adapter")],
)  # fmt: skip
def test_what_is_gone_is_named_with_the_options_that_there_are(tmp_path, role, options):
    with pytest.raises(CheckpointError, match=rf"{role} of .* is gone: own/side .*{options}"):
        Entry("own/side", folder=True).find(tmp_path, role)


def test_the_base_of_a_delta_is_looked_for_beside_it_and_not_on_the_hub(tmp_path, monkeypatch, no_hub):
    sides = family(tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    extract_delta(base="own/base", tuned="own/tuned", output="delta", progress=False)
    monkeypatch.chdir(place(tmp_path / "elsewhere"))
    # BASE of a delta is not needed; it is found beside the delta all the same.
    graft(instruct=sides["instruct"], delta=tmp_path / "delta", output="one", progress=False)
    shutil.copytree(tmp_path / "own", tmp_path / "delta" / "own")
    graft(instruct=sides["instruct"], delta=tmp_path / "delta", output="two", progress=False)
    graft(**sides, output="three", progress=False)
    wanted = load(Path("three"))
    for output in ("one", "two"):
        assert all(torch.equal(value, wanted[name]) for name, value in load(Path(output)).items())


def test_what_the_manifest_says_of_a_side(tmp_path):
    sides = family(tmp_path)
    graft(**sides, output=tmp_path / "out", digest="none", progress=False)
    written = json.loads((tmp_path / "out" / "shadow.json").read_text())["base"]
    assert written == {
        "source": str(sides["base"]), "revision": None, "digests": None, "folder": True, "asked": None,
    }  # fmt: skip
