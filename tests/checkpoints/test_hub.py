"""Hub ids: a cache as huggingface_hub lays it out, a repository behind a stand-in for the download, offline mode."""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import xxhash
from families import family, load, moved, write
from hub_cache import into_cache
from huggingface_hub import constants, errors

from shadow_trl import extract_delta, graft, verify
from shadow_trl.checkpoints.checkpoint import Checkpoint
from shadow_trl.checkpoints.hub import locate, output_folder
from shadow_trl.checkpoints.manifest import read_manifest
from shadow_trl.errors import CheckpointError, ConfigError


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """BASE, INSTRUCT and TUNED in a hub cache, INSTRUCT in two revisions; their folders by name."""
    sides = family(tmp_path / "local")
    newer = write(tmp_path / "local" / "newer", moved(load(sides["instruct"]), 9, 1e-3))
    cache = tmp_path / "cache"
    for number, (role, folder) in enumerate(sides.items()):
        into_cache(cache, f"nano/{role}", f"{number}" * 40, folder, branch="main")
    into_cache(cache, "nano/instruct", "9" * 40, newer, branch="v2")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    return {**sides, "newer": newer}


def same(one, other):
    first, second = load(one), load(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_all_sides_by_hub_id_and_revision(tmp_path, cached):
    hub = {"base": "nano/base", "instruct": "nano/instruct@v2", "tuned": f"nano/tuned@{'2' * 40}"}
    graft(**hub, output=tmp_path / "a", progress=False)
    local = {"base": cached["base"], "instruct": cached["newer"], "tuned": cached["tuned"]}
    graft(**local, output=tmp_path / "b", progress=False)
    assert same(tmp_path / "a", tmp_path / "b")
    graft(**{**hub, "instruct": "nano/instruct"}, output=tmp_path / "c", progress=False)
    assert not same(tmp_path / "a", tmp_path / "c")
    found = read_manifest(tmp_path / "a")
    recorded = {role: (found[role]["source"], found[role]["revision"], found[role]["asked"]) for role in hub}
    assert recorded == {
        "base": ("nano/base", "0" * 40, None),
        "instruct": ("nano/instruct", "9" * 40, "v2"),
        "tuned": ("nano/tuned", "2" * 40, "2" * 40),
    }
    card = (tmp_path / "a" / "README.md").read_text()
    assert "base_model:\n- nano/instruct\nbase_model_relation: finetune\n" in card
    assert verify(tmp_path / "a", progress=False).same
    assert verify(tmp_path / "a", instruct="nano/instruct", progress=False).digests == ["instruct: model.safetensors"]


def test_two_revisions_of_one_repository_are_two_models(tmp_path, cached):
    pair = {"base": "nano/instruct@v2", "instruct": "nano/instruct"}
    graft(**pair, tuned="nano/tuned", output=tmp_path / "out", progress=False)
    # A graft as TUNED would bring instruct - base a second time.
    with pytest.raises(ConfigError, match="is a graft of this base"):
        graft(**pair, tuned=tmp_path / "out", output=tmp_path / "twice", progress=False)
    assert not (tmp_path / "twice").exists()


def test_the_digest_of_a_cached_weight_file_is_its_blob_name(tmp_path, cached):
    """Which is the SHA-256 of the hub. TUNED's blob has another name here: a digest of its bytes would show."""
    link = tmp_path / "cache" / "models--nano--tuned" / "snapshots" / ("2" * 40) / "model.safetensors"
    blob = link.resolve().rename(link.resolve().with_name("ab" * 32))
    link.unlink()
    link.symlink_to(f"../../blobs/{blob.name}")
    graft(base="nano/base", instruct="nano/instruct", tuned="nano/tuned", output=tmp_path / "a", progress=False)
    found = read_manifest(tmp_path / "a")
    assert found["tuned"]["digests"] == {"model.safetensors": f"sha256:{'ab' * 32}"}
    for role in ("base", "instruct"):
        content = (cached[role] / "model.safetensors").read_bytes()
        assert found[role]["digests"]["model.safetensors"] == f"sha256:{hashlib.sha256(content).hexdigest()}"
    small = (cached["instruct"] / "config.json").read_bytes()  # which the hub calls by its digest under git
    assert found["instruct"]["digests"]["config.json"] == f"xxh3:{xxhash.xxh3_128_hexdigest(small)}"


def test_a_delta_of_hub_ids(tmp_path, cached):
    extract_delta(base="nano/base", tuned="nano/tuned", output=tmp_path / "delta", progress=False)
    assert "base_model:\n- nano/base\n" in (tmp_path / "delta" / "README.md").read_text()
    graft(instruct="nano/instruct@v2", delta=tmp_path / "delta", output=tmp_path / "a", progress=False)
    graft(base="nano/base", instruct=cached["newer"], tuned="nano/tuned", output=tmp_path / "b", progress=False)
    assert same(tmp_path / "a", tmp_path / "b")


def test_offline_mode_is_respected(cached, monkeypatch):
    """What is not in the cache is an error; nothing is asked of the network."""

    def ask(*arguments, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", ask)
    assert locate("nano/base")[2].is_dir()
    for missing in ("nano/nothing", "nano/base@v7"):
        with pytest.raises(CheckpointError, match="offline mode"):
            Checkpoint.open(missing)


@pytest.mark.parametrize(
    ("kind", "text", "told"),
    [
        ("GatedRepoError", "403 Client Error.", ("model's page", "hf auth login", "HF_TOKEN")),
        ("RepositoryNotFoundError", "401 Client Error.", ("Check the name", "HF_TOKEN")),
        ("RevisionNotFoundError", "404 Client Error.", ("no such revision",)),
        ("LocalEntryNotFoundError", "Got: ConnectError: refused\nAn error", ("not be reached (refused)", "connection")),
        ("HfHubHTTPError", "500 Server Error: broken", ("500 Server Error", "access")),
    ],
)
def test_a_download_that_fails_says_what_to_do(monkeypatch, kind, text, told):
    made = getattr(errors, kind)
    answer = {} if kind.startswith("Local") else {"response": SimpleNamespace(headers={}, request=None)}

    def fail(*arguments, **options):
        raise made(text, **answer) from OSError("refused")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError) as found:
        locate("own/model@v2")
    said = str(found.value)
    assert said.startswith(
        "own/model@v2 is neither a folder here nor a repository that could be fetched from the hub: "
    )
    for part in told:
        assert part in said
    assert "Got:" not in said
    assert "offline mode" not in said


REPOSITORY = {
    "wanted": (
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
        "chat_template.jinja", "preprocessor_config.json", "LICENSE", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "model.safetensors.index.json", "additional_chat_templates/tool.jinja",
    ),
    "not wanted": (
        "pytorch_model.bin", "consolidated.safetensors", "model.gguf", "optimizer.pt", "tf_model.h5", "onnx/model.onnx",
        "original/consolidated.00.pth", "fp32/model.safetensors", "training_args.bin", "figure.png",
    ),
}  # fmt: skip


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A repository behind a stand-in for `snapshot_download`: what was asked for is copied."""
    source, copied = tmp_path / "remote", tmp_path / "copied"

    def download(name, *, revision=None, allow_patterns=(), ignore_patterns=(), local_files_only=False):
        for path in source.rglob("*"):
            relative = str(path.relative_to(source))
            ours = any(fnmatch.fnmatch(relative, pattern) for pattern in allow_patterns)
            if path.is_file() and ours and not any(fnmatch.fnmatch(relative, pattern) for pattern in ignore_patterns):
                (copied / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copied / relative)
        return str(copied)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    def put(*names):
        for name in names:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_text("x")
        return lambda: {str(path.relative_to(copied)) for path in copied.rglob("*") if path.is_file()}

    return put


def test_only_weights_configs_and_tokenizer_are_downloaded(remote):
    found = remote(*REPOSITORY["wanted"], *REPOSITORY["not wanted"])
    locate("owner/name", weights=True)
    assert found() == set(REPOSITORY["wanted"])


def test_without_weights_no_weight_is_downloaded(remote):
    found = remote(*REPOSITORY["wanted"], *REPOSITORY["not wanted"])
    locate("owner/name", weights=False)
    assert found() == {name for name in REPOSITORY["wanted"] if not name.endswith(".safetensors")}


@pytest.mark.parametrize(
    "weights",
    [
        ("pytorch_model.bin",),
        ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"),
        ("adapter_model.safetensors", "adapter_config.json"),
        ("delta-00001-of-00002.safetensors", "delta-00002-of-00002.safetensors", "delta.safetensors.index.json"),
    ],
)
def test_other_forms_of_weights_are_found(remote, weights):
    found = remote("config.json", "other.gguf", *weights)
    locate("owner/name")
    assert found() == {"config.json", *weights}


def test_safetensors_are_taken_where_there_are_pickles_too(remote):
    both = [f"{name}-0000{number}-of-00002{end}" for name, end in (("model", ".safetensors"), ("pytorch_model", ".bin"))
            for number in (1, 2)]  # fmt: skip
    found = remote("config.json", *both, "model.safetensors.index.json", "pytorch_model.bin.index.json")
    locate("owner/name")
    assert {name for name in found() if not name.endswith(".json")} == set(both[:2])


def test_a_name_that_no_output_can_have_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for name, words in (
        ("n" * 230, "more than 200 bytes"),  # a file system's 255, less what siblings add
        ("n" * 300, "File name too long"),
        ("file/out", "Not a directory"),
        ("a\0b", "NUL"),
    ):
        with pytest.raises(ConfigError, match=rf"cannot write to .*{words}"):
            output_folder(str(tmp_path / name))
    assert output_folder(tmp_path / ("n" * 200)) == tmp_path / ("n" * 200)
    assert output_folder(tmp_path / "file") == tmp_path / "file"
