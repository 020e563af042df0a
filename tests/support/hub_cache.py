"""A cache as huggingface_hub lays it out, so that hub ids are found offline."""

from __future__ import annotations

import hashlib
from pathlib import Path


def into_cache(cache: Path, name: str, commit: str, folder: Path, *, branch: str) -> Path:
    """Put a checkpoint into a hub cache: blobs by digest, links in the snapshot, the branch in refs."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for place in (repository / "blobs", repository / "refs", snapshot):
        place.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / branch).write_text(commit)
    for path in folder.iterdir():
        content = path.read_bytes()
        # As the hub does: SHA-256 for large files, 40 digits of git for small ones.
        kind = hashlib.sha256 if path.suffix == ".safetensors" else hashlib.sha1
        blob = repository / "blobs" / kind(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot
