"""Publishing a graft or a delta on the Hugging Face hub, with huggingface_hub's own client.

What is uploaded is the folder, but for the paths of this machine: its manifest names local folders by their last part.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.digests import file_digest
from ..checkpoints.hub import brief, inside, is_commit, is_hub_id, local_folder
from ..checkpoints.json_files import read_json
from ..checkpoints.manifest import MANIFEST_NAME, entries_of, kind_found, read_manifest
from ..checkpoints.schemas import AdapterConfig
from ..errors import CheckpointError, ConfigError, UploadError
from .cards import CARD_NAME, amend
from .folder import files_in

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = logging.getLogger(__name__)

_ADAPTER_CONFIG = "adapter_config.json"
_OTHER_FORM = (
    "model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json",
    "adapter_model.*", _ADAPTER_CONFIG, "config.json", "delta*.safetensors", "delta.safetensors.index.json",
)  # fmt: skip
"""Files of an earlier upload that would be loaded in the place of, or beside, those of this one."""


def claim(repo: str, *, token: str | None = None, private: bool | None = None, revision: str | None = None) -> str:
    """Make a repository, and its branch `revision`, where they are missing; return its full id.

    Args:
        repo: `owner/name`, or `name` for one of the user whose token it is.
        token: of the hub. Default: the one that `hf auth login` keeps.
        private: whether a new repository is private. Default: public, unless its organisation says otherwise.
        revision: branch, made if need be, or `refs/pr/N`. Default: `main`.

    Raises:
        ConfigError: no valid id, a commit as `revision`, or a repository that cannot be written to.
    """
    check_target(repo, revision)
    try:
        with _explained():
            api = _api(token)
            found: str = api.create_repo(repo, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(found, branch=revision, exist_ok=True)
    except UploadError as reason:
        raise ConfigError(
            f"cannot write to the repository {repo} on the hub: {reason}\nLog in with `hf auth login` or give a token "
            "that may write (in training hub_token), check the name and whether offline mode is on, or leave the "
            "upload out."
        ) from reason
    return found


def check_target(repo: str | None, revision: str | None) -> None:
    """Check the name of a repository that is to be written to, and the branch.

    Raises:
        ConfigError: no valid id, or a commit as `revision`.
    """
    if repo is not None and not is_hub_id(repo):
        raise ConfigError(f"{repo!r} is no repository of the hub. Give owner/name.")
    if is_commit(revision):
        raise ConfigError(f"nothing can be uploaded to {revision}, which is a commit. Give a branch.")


def check_publishable(folder: Path) -> Mapping[str, Any]:
    """Return the manifest of a folder that may be published.

    Raises:
        CheckpointError: neither a graft nor a delta.
        ConfigError: an adapter for a model that is a folder of this machine.
    """
    manifest = read_manifest(folder)
    if manifest is None or manifest["kind"] == "run":
        hint = f" Its graft is {folder / 'grafted'}." if read_manifest(folder / "grafted") else ""
        raise CheckpointError(
            f"{folder} is neither a graft nor a delta: {kind_found(manifest)}.{hint} Anything else is uploaded with "
            "`hf upload`."
        )
    path = folder / _ADAPTER_CONFIG
    if path.is_file():
        check_adapter_base(read_json(path, AdapterConfig).get("base_model_name_or_path"))
    return manifest


def check_adapter_base(name: str | None) -> None:
    """Raise ConfigError if `name`, of the model that an adapter is for, is a folder: nobody else could load it."""
    if name and (local_folder(name) is not None or not is_hub_id(name)):
        raise ConfigError(
            f"the adapter is for the local folder {name}, where nobody else would find a model. Graft to dense weights "
            "(--format model; in training graft_format='model'), or name INSTRUCT by its hub id."
        )


def upload(
    folder: Path,
    repo: str,
    *,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Upload a graft",
    title: str | None = None,
    datasets: Iterable[str] = (),
    tags: Iterable[str] = (),
) -> CommitInfo:
    """Upload a graft or a delta to a repository, which loses the weights of another form; return the commit.

    Args:
        folder: of the result.
        repo: full id, as `claim` returns it.
        token: of the hub. Default: the one that `hf auth login` keeps.
        revision: branch. Default: `main`.
        message: of the commit.
        title: of the card. Default: as it is.
        datasets: on the hub, for the card.
        tags: for the card.

    Raises:
        InputError: the folder is nothing that may be published, lacks a file, or has a link out of it.
        UploadError: the hub cannot be reached, or refuses.
    """
    manifest = check_publishable(folder)
    with tempfile.TemporaryDirectory(prefix="shadow-trl-upload-") as staged:
        part = Path(staged)
        names = _published_files(folder, manifest)
        for name in names:
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).symlink_to(inside(folder, name, below=True).absolute())
        published = _without_paths(manifest)
        if "files" in published:
            published["files"] = names
        if (folder / CARD_NAME).is_file():
            _replace(part / CARD_NAME, (folder / CARD_NAME).read_text(encoding="utf-8"))
            amend(part, title=title, datasets=datasets, tags=tags)
            if published.get("card"):
                published["card"] = file_digest(part / CARD_NAME)
        _replace(part / MANIFEST_NAME, json.dumps(published, indent=2, ensure_ascii=False) + "\n")
        with _explained(lambda: f"{folder} is whole. To upload it again:\n  {push_command(folder, repo, revision)}"):
            return _api(token).upload_folder(
                repo_id=repo, folder_path=part, commit_message=message, revision=revision,
                delete_patterns=list(_OTHER_FORM),
            )  # fmt: skip


def _published_files(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return the files of a result that are uploaded beside its manifest: not what somebody put there.

    Folders with a manifest of their own are results of their own. Before manifests listed the files, all count.
    """
    nested = [path.parent for path in folder.rglob(MANIFEST_NAME) if path.parent != folder]
    found = manifest.get("files") or [name for name in files_in(folder) if not name.startswith(".")]
    of_own = [name for name in found if not any(part in (folder / name).parents for part in nested)]
    return sorted(set(of_own) - {MANIFEST_NAME})


def push_command(folder: Path, repo: str, revision: str | None = None) -> str:
    """Return the command that uploads a result."""
    return shlex.join(["shadow-trl", "push", str(folder), f"{repo}@{revision}" if revision else repo])


def _api(token: str | None) -> Any:
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="shadow-trl")


@contextmanager
def _explained(ending: Callable[[], str] = str) -> Iterator[None]:
    """Let what the hub's client raises leave the block as UploadError that ends with `ending`."""
    from huggingface_hub.errors import HTTPError  # of the library that its version uses

    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        failed = UploadError(f"the upload failed: {brief(error)}")
        failed.ending = ending()
        raise failed from error


def _replace(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")


def _without_paths(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest in which sides that were folders have the last part of their path, in its texts too."""
    sources = {role: entry.source for role, entry in entries_of(manifest).items() if entry.is_folder}
    names = {source: Path(source).absolute().name for source in sources.values()}
    names |= {os.path.abspath(source): name for source, name in names.items()}
    text = json.dumps(manifest, ensure_ascii=False)
    for source in sorted((one for one in names if "/" in one), key=len, reverse=True):  # one may lie in another
        shown, name = (json.dumps(one, ensure_ascii=False)[1:-1] for one in (source, names[source]))
        text = re.sub(rf"(?<![\w./-]){re.escape(shown)}(?![\w-])", name.replace("\\", r"\\"), text)
    found: dict[str, Any] = json.loads(text)
    for role, source in sources.items():
        found[role]["source"] = names[source]
    return found
