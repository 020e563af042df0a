"""Every file that is read, changed at random: an error or a result, never a traceback, a hang or litter."""

from __future__ import annotations

import io
import json
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from corpus import bounded, judge_refusal
from hostile import Sound
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from processes import Tally, judge_message, listing, litter, run, workplace
from safetensors.torch import load_file

FILES = [
    *(("base", name) for name in ("config.json", "model.safetensors", "tokenizer.json")),
    *(("instruct", name) for name in ("config.json", "generation_config.json", "model.safetensors")),
    *(("instruct", name) for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")),
    *(("tuned", name) for name in ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")),
    *(("adapter", name) for name in ("adapter_config.json", "adapter_model.safetensors")),
    *(("graft", name) for name in ("shadow.json", "model.safetensors", "config.json")),
    *(("delta", name) for name in ("shadow.json", "delta.safetensors", "base_config.json")),
]
KEYS = [
    "r", "lora_alpha", "target_modules", "rank_pattern", "peft_type", "eos_token_id", "eos_token", "chat_template",
    "model_type", "vocab_size", "weight_map", "metadata", "kind", "digests", "source", "options", "modules", "dtype",
    "shape", "data_offsets", "model", "added_tokens", "content", "id", "__metadata__", "text_config", "auto_map",
]  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.sampled_from(KEYS)
    | st.sampled_from(["../x", "/etc/passwd", "~x", "a\0b", "(.+)+x", "x" * 300, "model.safetensors", 2**63, -1, 0, 1])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6) | st.sampled_from(KEYS), inner, max_size=4)
    ),
)
PLACES = st.integers(0, 2**16)
BYTES = st.lists(st.tuples(st.sampled_from("fcid"), PLACES, st.binary(max_size=9)), min_size=1, max_size=5)
EDITS = st.lists(st.tuples(st.sampled_from("rrrrxk"), PLACES, st.sampled_from(KEYS), VALUES), min_size=1, max_size=3)
BATCH = 100


def fuzz(root: Path, seconds: float, *, seed: int = 0) -> Iterator[Tally]:
    """Change files for so many seconds, in batches that hypothesis makes of `seed`, `seed` + 1, ..."""
    root.mkdir(parents=True, exist_ok=True)
    sound, tally, end = Sound(root / "sound"), Tally("fuzzed files"), time.monotonic() + seconds
    files = [_seed(sound, side, name) for side, name in FILES]
    while time.monotonic() < end:
        _batch(root, sound, tally, files, seed, end)
        seed += 1
    yield tally


def _batch(
    root: Path, sound: Sound, tally: Tally, files: list[tuple[str, str, bytes]], number: int, end: float
) -> None:
    @seed(number)
    @settings(
        max_examples=BATCH,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(files), st.booleans(), BYTES, EDITS)
    def trial(file: tuple[str, str, bytes], structured: bool, bytes_: list, edits: list) -> None:
        if time.monotonic() < end:
            side, name, content = file
            changed = _edited(name, content, edits) if structured else None
            _one(root, sound, tally, (side, name), _spoilt(content, bytes_) if changed is None else changed)

    trial()


def _seed(sound: Sound, side: str, name: str) -> tuple[str, str, bytes]:
    """Return a sound file of this name: (side, name, its bytes)."""
    path = sound.root / side / name
    if path.is_file():
        return side, name, path.read_bytes()
    weights = load_file(sound.root / "tuned/model.safetensors")
    if name.endswith(".bin"):
        held = io.BytesIO()
        torch.save(weights, held)
        return side, name, held.getvalue()
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, "model.safetensors")}
    return side, name, json.dumps(index if "index" in name else {"eos_token_id": 1}).encode()


def _one(root: Path, sound: Sound, tally: Tally, file: tuple[str, str], content: bytes) -> None:
    side, name = file
    with workplace(root) as work:
        argv = sound.argv(work, side)
        if name.endswith((".bin", "index.json")):
            (work / side / "model.safetensors").unlink() if name.endswith(".bin") else None
        path = work / side / name
        path.write_bytes(content)
        before = listing(work)
        ended = run(argv, work, limit=bounded)
        changed = listing(work) != before
        tally.runs += 1
        tally.facts[f"exit {ended.code}"] += 1
        label = f"{side}/{name}"
        known = len(tally.details)
        if ended.code == 2:
            judge_refusal(tally, label, argv, ended, changed)
        else:
            judge_message(tally, label, ended, changed)
            if litter(work):
                tally.fault("left", f"{label}: {litter(work)}")
        if len(tally.details) > known:  # what did it, kept to be tried again
            kept = root.parent / "fuzz-findings" / f"{len(tally.details):04d}-{side}-{name}"
            kept.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, kept)


def _spoilt(content: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    """Flip, cut, insert or delete bytes; most of a weight file is values, so half of the places are near its start."""
    data = bytearray(content)
    for how, place, new in edits:
        at = place % max(min(len(data), 256) if place % 2 else len(data), 1)
        if how == "f":
            data[at : at + len(new)] = new[: max(len(data) - at, 0)]
        elif how == "i":
            data[at:at] = new
        else:
            del data[at : at + len(new) if how == "d" else len(data)]
    return bytes(data)


def _edited(name: str, content: bytes, edits: list[tuple[str, int, str, Any]]) -> bytes | None:
    """Change the JSON of a file, or of its header, or the pickle in a .bin; None where there is no structure."""
    if name.endswith(".safetensors"):
        size = int.from_bytes(content[:8], "little")
        header = _json(json.loads(content[8 : 8 + size]), edits)
        return len(header).to_bytes(8, "little") + header + content[8 + size :]
    if name.endswith(".bin"):
        held = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(held, "w") as new:
            for entry in old.infolist():
                data = old.read(entry)
                spoilt = [("fid"[len(key) % 3], place, key.encode()[:2]) for _, place, key, _ in edits]
                new.writestr(entry, _spoilt(data, spoilt) if entry.filename.endswith("data.pkl") else data)
        return held.getvalue()
    return _json(json.loads(content), edits) if name.endswith(".json") else None


def _json(content: Any, edits: list[tuple[str, int, str, Any]]) -> bytes:
    for how, place, key, value in edits:
        spots = list(_spots(content))
        if not spots:
            break
        section, at = spots[place % len(spots)]
        if how == "x":
            del section[at]
        elif how == "k" and isinstance(section, dict):
            section[key] = value
        else:
            section[at] = value
    return json.dumps(content).encode("utf-8", "surrogatepass")


def _spots(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (section, key) of every value below `content`."""
    for at in content if isinstance(content, dict) else range(len(content)):
        yield content, at
        if isinstance(content[at], dict | list):
            yield from _spots(content[at])
