"""Publishing by the real client of the hub, against a hub on this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from families import family, lora
from hub_cache import into_cache
from hub_server import HubServer, client
from huggingface_hub import ModelCard, constants, snapshot_download

from shadow_trl import cli
from shadow_trl.checkpoints.digests import file_digest
from shadow_trl.checkpoints.manifest import read_manifest
from shadow_trl.errors import CheckpointError, ConfigError, UploadError
from shadow_trl.operations.graft import graft
from shadow_trl.results.upload import claim, upload


@pytest.fixture
def hub():
    with HubServer() as server, client(server):
        yield server


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The graft of a tiny family of folders, with the folder above them all."""
    root = tmp_path_factory.mktemp("made")
    graft(**family(root), output=root / "out", progress=False)
    return root / "out"


def test_what_comes_back_is_what_was_written_without_the_paths_of_this_machine(made, hub, tmp_path):
    repo = claim("grafted", token="of-the-user", private=True)
    assert (repo, hub.private) == ("me/grafted", {"me/grafted": True})
    found = upload(made, repo, token="of-the-user", message="the words")
    assert (found.oid, hub.messages) == (hub.commit, ["the words"])
    there = Path(snapshot_download(repo, cache_dir=tmp_path, endpoint=hub.url))
    files = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    assert {str(path.relative_to(there)) for path in there.rglob("*")} == {*files, ".gitattributes"}
    for name in files - {"shadow.json"}:
        assert (there / name).read_bytes() == (made / name).read_bytes(), name
    published, kept = read_manifest(there), read_manifest(made)
    assert {role: published[role]["source"] for role in ("base", "instruct", "tuned")} == {
        role: role for role in ("base", "instruct", "tuned")
    }
    for role in ("base", "instruct", "tuned"):
        published[role]["source"] = kept[role]["source"]
    assert len(published.pop("warnings")) == len(kept.pop("warnings"))
    assert published == kept
    assert hub.tokens == {"of-the-user"} | hub.tokens & {""}
    for content in hub.files[repo]["main"].values():
        assert str(made.parent).encode() not in content
        assert b"of-the-user" not in content


def test_paths_in_texts_are_replaced_whole(made, hub, tmp_path):
    copy = shutil.copytree(made, tmp_path / "copy")
    manifest = read_manifest(copy)
    source = manifest["base"]["source"]
    manifest["warnings"] = [f"base {source} and {source}-2, {source}/x", "an other/base of the text"]
    (copy / "shadow.json").write_text(json.dumps(manifest))
    upload(copy, claim("me/texts"))
    found = json.loads(hub.files["me/texts"]["main"]["shadow.json"])["warnings"]
    assert found == [f"base base and {source}-2, base/x", "an other/base of the text"]


def test_a_branch_is_made_and_another_form_leaves_the_repository(made, hub):
    repo = claim("me/forms")
    hub.files[repo]["main"] |= {"adapter_config.json": b"{}", "model-00001-of-00002.safetensors": b"", "notes.md": b""}
    upload(made, claim(repo, revision="next"), revision="next")
    assert hub.files[repo]["main"].keys() > {"adapter_config.json", "notes.md"}
    there = hub.files[repo]["next"]
    assert there.keys() == {path.name for path in made.iterdir()} | {"notes.md", ".gitattributes"}


def test_the_card_gets_what_the_caller_knows(made, hub):
    repo = claim("me/card")
    upload(made, repo, title="A title", datasets=["own/rows"], tags=["mine"])
    files = hub.files[repo]["main"]
    card = ModelCard(files["README.md"].decode())
    assert card.data.datasets == ["own/rows"]
    assert card.data.tags[-1] == "mine"
    assert card.text.lstrip().startswith("# A title\n")
    assert "own/rows" not in (made / "README.md").read_text()  # the folder stays as it was
    (made.parent / "card").write_bytes(files["README.md"])
    assert json.loads(files["shadow.json"])["card"] == file_digest(made.parent / "card")


def test_a_failed_upload_says_how_to_repeat_it(made, hub, capsys):
    repo = claim("me/fails", revision="next")
    hub.refuses["/commit/"] = 403
    with pytest.raises(UploadError, match="the upload failed: ") as failed:
        upload(made, repo, revision="next")
    command = str(failed.value).splitlines()[-1].strip()
    assert f"{made} is whole" in str(failed.value)
    assert command == f"shadow-trl push {made} me/fails@next"
    assert cli.main(command.split()[1:]) == 1
    assert command in capsys.readouterr().err
    hub.refuses.clear()
    assert cli.main(command.split()[1:]) == 0
    assert f"{hub.url}/me/fails/commit/" in capsys.readouterr().out
    assert "model.safetensors" in hub.files["me/fails"]["next"]


@pytest.mark.parametrize(
    ("repo", "revision", "text"),
    [("a/b/c", None, "is no repository"), ("me/x", "a" * 40, "is a commit"), ("other/x", None, "cannot write to")],
)
def test_what_cannot_be_written_to_is_found_first(hub, repo, revision, text):
    hub.refuses["/repos/create"] = 403
    with pytest.raises(ConfigError, match=text):
        claim(repo, revision=revision)
    assert hub.files == {}


def test_offline_is_said():
    assert constants.HF_HUB_OFFLINE
    with pytest.raises(ConfigError, match="offline mode"):
        claim("me/x")


def test_only_grafts_and_deltas_are_uploaded(made, hub, tmp_path):
    with pytest.raises(CheckpointError, match=r"neither a graft nor a delta: it has no shadow\.json"):
        upload(made.parent / "base", "me/x")
    shutil.copytree(made, tmp_path / "run" / "grafted")
    (tmp_path / "run" / "shadow.json").write_text('{"kind": "run"}')
    with pytest.raises(CheckpointError, match=f"of kind run. Its graft is {tmp_path}/run/grafted"):
        upload(tmp_path / "run", "me/x")


def test_what_is_not_of_the_graft_stays_here(made, hub, tmp_path):
    copy = shutil.copytree(made, tmp_path / "copy")
    (copy / "training_args.bin").write_bytes(b"hf_token")
    shutil.copytree(made, copy / "adapter")  # a result of its own
    manifest = read_manifest(copy)
    manifest["files"] += ["adapter/shadow.json", "adapter/model.safetensors"]
    (copy / "shadow.json").write_text(json.dumps(manifest))
    upload(copy, claim("me/own"))
    ours = hub.files["me/own"]["main"]
    assert ours.keys() == {".gitattributes", *(path.name for path in made.iterdir())}
    assert json.loads(ours["shadow.json"])["files"] == sorted(
        path.name for path in made.iterdir() if path.name != "shadow.json"
    )
    (tmp_path / "secret").write_text("of the user")
    (copy / "config.json").unlink()
    (copy / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="is a link to"):
        upload(copy, "me/own")
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the file config\.json"):
        upload(copy, "me/own")
    assert b"of the user" not in b"".join(hub.files["me/own"]["main"].values())


def test_an_adapter_for_a_folder_is_refused_before_the_graft(hub, tmp_path, capsys):
    sides = family(tmp_path)
    adapter = lora(tmp_path / "lora")
    words = ["graft", f"--base={sides['base']}", f"--instruct={sides['instruct']}", f"--tuned={adapter}"]
    words += [f"--output={tmp_path / 'out'}", "--push-to-hub=me/x"]
    assert cli.main([*words, "--format=adapter"]) == 2
    error = capsys.readouterr().err
    assert f"the adapter is for the local folder {sides['instruct']}" in error
    assert error.endswith("Nothing was written.\n")
    assert not (tmp_path / "out").exists()
    assert hub.files == {}
    graft(**{**sides, "tuned": adapter}, output=tmp_path / "adapter", format="adapter", progress=False)
    with pytest.raises(ConfigError, match="the adapter is for the local folder"):
        upload(tmp_path / "adapter", "me/x")
    assert cli.main([*words, "--format=model", "--private", "--quiet"]) == 0
    assert hub.private == {"me/x": True}
    assert hub.files["me/x"]["main"]["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_an_adapter_for_a_model_of_the_hub(hub, tmp_path, monkeypatch):
    sides = family(tmp_path)
    (sides["instruct"] / "README.md").write_text("---\nlicense: apache-2.0\n---\n# It\n")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    into_cache(tmp_path / "cache", "own/it", "b" * 40, sides["instruct"], branch="main")
    graft(base=sides["base"], instruct="own/it", tuned=lora(tmp_path / "lora"), output=tmp_path / "o", progress=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    upload(tmp_path / "o", claim("me/adapter"))
    files = hub.files["me/adapter"]["main"]
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "own/it"
    card = ModelCard(files["README.md"].decode()).data
    assert (card.base_model, card.base_model_relation) == (["own/it"], "adapter")
    assert (card.license, card.library_name, card.pipeline_tag) == ("apache-2.0", "peft", "text-generation")
    assert str(tmp_path).encode() not in b"".join(files.values())
