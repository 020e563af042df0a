"""Is a folder the graft that its `shadow.json` says it is? It is made again beside the folder and compared.

The weights are compared by name, block by block, the other files byte by byte, the figures as numbers, the card by its
digest in `shadow.json`.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.checkpoint import ADAPTER_CONFIG, Checkpoint
from ..checkpoints.delta import refuse_deltas
from ..checkpoints.digests import file_digest
from ..checkpoints.hub import Source, local_folder, locate
from ..checkpoints.json_files import read_json
from ..checkpoints.manifest import MANIFEST_NAME, Entry, kind_found, read_manifest
from ..errors import CheckpointError, ConfigError, ends_with, list_names
from ..grafting.options import GraftOptions, declared
from ..grafting.tuned import weighted_sources
from ..results.folder import Scratch
from ..runtime.machine import check_space
from .graft import BESIDE, graft

if TYPE_CHECKING:
    import torch

_CARD = "README.md"
# What of the manifest is no figure: facts about the files, prose, and what the graft is made again from.
_NO_FIGURES = {
    "trained", "kind", "format", "versions", "card", "files", "options", "warnings", "dense_because",
    "rounded_because", "beside", "text_class",
}  # fmt: skip
_FIGURE_TOLERANCE = 1e-6
"""Sums of another processor or torch may add up in another order."""


@dataclass(frozen=True)
class VerifyReport:
    """Whether a folder is the graft that its manifest says.

    Args:
        folder: as the user gave it.
        compared: number of weights of the graft.
        weights: name -> what is different about it.
        files: other files that are missing, changed or not of the graft.
        figures: entries of `shadow.json` that are missing, changed or not of the graft.
        digests: `role: file` of inputs that are not those named in the manifest.
        equal: names of the other files that are equal.
        not_compared: what a graft writes and was not compared.
        warnings: of the graft that was made to compare with.
        inputs: which kind of change to an input would have been found.
    """

    folder: str
    compared: int
    weights: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    equal: list[str] = field(default_factory=list)
    not_compared: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    inputs: str = ""

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.weights or self.files or self.figures or self.digests)

    def to_dict(self) -> dict[str, Any]:
        """Return everything in types that JSON knows."""
        return {"same": self.same, **asdict(self)}

    def text(self) -> str:
        """Return what was compared when the folder is the graft, else what differs."""
        if self.same:
            return (
                f"{self.folder} is that graft. {self.compared} weights, the figures of {MANIFEST_NAME} and "
                f"{', '.join(self.equal)} are equal. Not compared: {'; '.join(self.not_compared)}. {self.inputs}"
            )
        lines = [f"{self.folder} is not that graft. {self.inputs}"]
        named = (
            (f"{len(self.weights)} of {self.compared} weights differ", [f"{k}  {v}" for k, v in self.weights.items()]),
            (f"{len(self.files)} other files differ", self.files),
            (f"{len(self.figures)} entries of {MANIFEST_NAME} differ", self.figures),
            (f"{len(self.digests)} input files are not those of the manifest", self.digests),
        )
        for title, rows in named:
            if rows:
                lines += [title, list_names(rows)]
        return "\n".join(lines)


@ends_with("", instead=True)  # of the graft that is made to compare with nothing stays
def verify(
    folder: Source,
    *,
    base: Source | None = None,
    instruct: Source | None = None,
    tuned: Source | Sequence[Any] | None = None,
    delta: Source | None = None,
    progress: bool = True,
) -> VerifyReport:
    """Make the graft in `folder` again, with the options in its `shadow.json`, and say whether it is that graft.

    Compared are every weight, bit by bit; the metadata of every header; index, config, tokenizer and other files, byte
    by byte; the figures of `shadow.json`, to 1e-6; its digests, with the inputs and the card. Hidden files and what
    `shadow.json` says in words (warnings, versions, paths) are not. The graft is made again in a temporary folder
    beside `folder`, which needs its size on the disk; memory does not grow with it.

    Args:
        folder: of a graft, in dense or adapter form, or a hub id.
        base: as for `graft`. Default: the one that `shadow.json` names, from here or from `folder`.
        instruct: the same for INSTRUCT.
        tuned: the same for TUNED; of several each, with its weight.
        delta: in the place of `tuned`, as for `graft`.
        progress: whether to show a bar on a terminal. Default True.

    Raises:
        InputError: `folder` holds no graft, an input is not to be found, or the inputs cannot be grafted.
        GraftError: the graft failed (values that are not finite, full disk).
    """
    refuse_deltas(folder=folder)
    there = Checkpoint.open(folder)
    manifest = read_manifest(there.path)
    if manifest is None or manifest["kind"] != "graft":
        raise CheckpointError(f"{there} is not a graft: {kind_found(manifest)}. Give the folder that `graft` wrote.")
    given = {"base": base, "instruct": instruct, "tuned": tuned, "delta": delta}
    sides = _sides(given, manifest, there.path)
    begun = tuned is None and delta is None and "start" in manifest
    start = {"start": _found("start", manifest, there.path)} if begun else {}
    wrong = _other_digests({**sides, **start}, manifest)
    scratch_home = there.path.absolute().parent
    if not os.access(scratch_home, os.W_OK):
        scratch_home = Path(tempfile.gettempdir())
    check_space(scratch_home, sum(spec.nbytes for spec in there.specs.values()))
    with Scratch(scratch_home / f"{there.path.absolute().name}.verify") as scratch:
        made, recorded = scratch.part / "graft", manifest["options"]
        options = {name: recorded[name] for name, option in declared().items() if option.recorded and name in recorded}
        options["format"] = manifest["form"]
        unrecorded = "tuned" in sides and "loaded_in" not in manifest  # by 0.1.0, which then subtracted BASE as stored
        if unrecorded and options.get("base_dtype") is None:
            options["base_dtype"] = ()
        try:
            GraftOptions(**options)
        except ConfigError as error:
            raise CheckpointError(f"cannot use the options in {there.path / MANIFEST_NAME}: {error}") from error
        measured = bool(manifest.get("by_kind") or manifest.get("delta_norm") is not None)
        report = graft(**sides, output=made, **options, digest="none", stats=measured, progress=progress)
        again = Checkpoint.open(made)
        weights, (equal, files) = _other_weights(there, again), _other_files(there, again)
        remade = read_manifest(made) or {}
        if unrecorded:
            del remade["loaded_in"]
        if "chat_template" not in recorded:  # by 0.1.0
            remade.pop("chat_template", None)
        if "realised_in_bf16" not in manifest:  # the same
            remade.pop("realised_in_bf16", None)
        figures = _other_figures(manifest, remade)
    left = [f"warnings, versions and paths in {MANIFEST_NAME}", *_compare_card(there, manifest, equal, files)]
    if manifest.get("beside"):
        folder_beside = f"{BESIDE}{os.sep}"
        files = [row for row in files if not row.startswith(folder_beside)]
        left.append(f"{BESIDE}/, a graft of its own that can be verified as this one")
    if "max_shard_size" not in recorded:  # by 0.1.0
        left.append("which file holds which weight, the index and the metadata of headers, as the size is not recorded")
        files = [row for row in files if row.split("  ")[0] not in _stored_in(there, again)]
    if ("delta" in sides) != ("delta" in manifest):
        left.append(f"the figures in {MANIFEST_NAME}, which a delta and a tuned model do not share")
        figures = []
    return VerifyReport(str(folder), len(again.specs), weights, files, figures, wrong, equal, left,
                        report.warnings, _found_changes(manifest))  # fmt: skip


def _sides(given: Mapping[str, Any], manifest: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the inputs of the graft, by role: what was given, else what the manifest names."""
    learnt = [role for role in ("tuned", "delta") if given[role] is not None]
    if len(learnt) > 1:
        raise ConfigError("give either tuned or delta.")
    role = learnt[0] if learnt else ("delta" if "delta" in manifest else "tuned")
    # BASE of a delta is only checked, and where an adapter needs none the manifest still names it.
    wanted = [role, "instruct", *(["base"] if role == "tuned" or given["base"] is not None else [])]
    found = {name: _found(name, manifest, folder) if given[name] is None else given[name] for name in wanted}
    if role == "tuned" and given["tuned"] is None and manifest.get("tuned_weights"):
        names = ["tuned", *(f"tuned_{number}" for number in range(2, len(manifest["tuned_weights"]) + 1))]
        sources = [_found(name, manifest, folder) for name in names]
        found["tuned"] = list(zip(sources, manifest["tuned_weights"], strict=True))
    return found


def _found(role: str, manifest: Mapping[str, Any], folder: Path) -> Source:
    """Return the source that the manifest of `folder` names: from the current folder, else from `folder`."""
    entry = Entry.read(manifest, role)
    if entry is None:
        option, _, number = role.partition("_")
        way_out = f"all of them, each with --{option} {option[0].upper()}:WEIGHT" if number else f"it with --{option}"
        raise ConfigError(f"{MANIFEST_NAME} of {folder} names no {role}. Give {way_out}.")
    return str(entry.find(folder, role))


def _found_changes(manifest: Mapping[str, Any]) -> str:
    """Return which kind of change to an input its recorded digest shows."""
    recorded = [side["digests"] for side in manifest.values() if isinstance(side, dict) and side.get("digests")]
    kinds = {digest.partition(":")[0] for digests in recorded for digest in digests.values()}
    if not kinds:
        return "The inputs have no digests: a change of theirs shows in the weights alone."
    if kinds == {"sha256"}:
        return "The inputs were compared by SHA-256: any change would show."
    return "The inputs were compared by XXH3: a change by accident would show, a forged file might not."


def _other_digests(sides: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    """Return `role: file` of the inputs whose digest is not the one in the manifest."""
    wrong = []
    for side, source in sides.items():
        parts = weighted_sources(source) if side == "tuned" else [(source, 1.0)]
        for number, (part, _) in enumerate(parts, 1):
            role = side if number == 1 else f"{side}_{number}"
            entry = Entry.read(manifest, role)
            if entry is not None and entry.digests:
                wrong += [f"{role}: {name}" for name in entry.changed(locate(part).path)]
    return wrong


def _other_weights(there: Checkpoint, again: Checkpoint) -> dict[str, str]:
    """Return name -> what is different about it, for each weight of either folder."""
    found = {name: "not in the graft" for name in there.specs if name not in again.specs}
    for name, spec in again.specs.items():
        other = there.specs.get(name)
        if other is None:
            found[name] = "missing in the folder"
        elif (other.shape, other.code) != (spec.shape, spec.code):
            found[name] = f"{other.code} {list(other.shape)} instead of {spec.code} {list(spec.shape)}"
        else:
            count, largest = _difference(there, again, name)
            if count:
                found[name] = f"{count} of {spec.numel} values, by at most {largest:.3g}"
    return found


def _difference(there: Checkpoint, again: Checkpoint, name: str) -> tuple[int, float]:
    """Return how many values have other bits, and the largest difference between two of them."""
    from ..arithmetic.grafter import BLOCK

    count, largest = 0, 0.0
    for start in range(0, again.specs[name].numel, BLOCK):
        stop = min(start + BLOCK, again.specs[name].numel)
        ours, theirs = (side.block(name, start, stop) for side in (there, again))
        unequal = _bits(ours) != _bits(theirs)
        if unequal.any():
            count += int(unequal.sum())
            # NaN against a number is as different as can be.
            apart = (ours[unequal].double() - theirs[unequal].double()).abs().nan_to_num(nan=math.inf, posinf=math.inf)
            largest = max(largest, float(apart.max()))
    return count, largest


def _bits(values: torch.Tensor) -> torch.Tensor:
    import torch

    return values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize])


def _other_files(there: Checkpoint, again: Checkpoint) -> tuple[list[str], list[str]]:
    """Return the names of the equal files, and those that are missing, changed or not of the graft."""
    ours, theirs = _files(there), _files(again)
    changed = {name for name in ours & theirs if _content(there, name) != _content(again, name)}
    return sorted((ours & theirs) - changed - {path.name for path in again.files}), [
        *(f"{name}  missing" for name in sorted(theirs - ours)),
        *(f"{name}  changed" for name in sorted(changed)),
        *(f"{name}  not of the graft" for name in sorted(ours - theirs)),
    ]


def _files(side: Checkpoint) -> set[str]:
    found = {path.relative_to(side.path) for path in side.path.rglob("*") if path.is_file()}
    names = {str(name) for name in found if not any(part.startswith(".") for part in name.parts)}
    return names - {MANIFEST_NAME, _CARD}


def _stored_in(*sides: Checkpoint) -> set[str | None]:
    return {name for side in sides for name in (side.index, *(path.name for path in side.files))}


def _compare_card(there: Checkpoint, manifest: Mapping[str, Any], equal: list[str], files: list[str]) -> list[str]:
    """Add the card to the files that are equal or to those that differ; else return why it was not compared."""
    path = there.path / _CARD
    if "card" not in manifest or local_folder(there.source) is None:
        return [f"{_CARD}, of which {MANIFEST_NAME} has no digest" if "card" not in manifest else f"{_CARD} on the hub"]
    if path.is_file() and file_digest(path) == manifest["card"]:
        equal.append(_CARD)
    else:
        files.append(f"{_CARD}  {'changed' if path.is_file() else 'missing'}")
    return []


def _other_figures(there: Mapping[str, Any], again: Mapping[str, Any]) -> list[str]:
    """Return the entries of the manifest that differ: counts, names, figures, and options that there are none of."""
    ours, theirs = (_flat({key: value for key, value in side.items() if key not in _NO_FIGURES and not _is_side(value)})
                    for side in (there, again))  # fmt: skip
    return [
        *(f"{key}  missing" for key in theirs.keys() - ours.keys()),
        *(
            f"{k}  {ours[k]!r} instead of {theirs[k]!r}"
            for k in ours.keys() & theirs.keys()
            if not _near(ours[k], theirs[k])
        ),
        *(f"{key}  not of the graft" for key in ours.keys() - theirs.keys()),
        *(f"options.{key}  not of the graft" for key in there["options"].keys() - again["options"].keys()),
    ]


def _is_side(value: Any) -> bool:
    return isinstance(value, dict) and "source" in value


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value, in which no value is a dictionary that has entries."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    parts = [_flat(inner, f"{prefix}.{key}" if prefix else str(key)) for key, inner in value.items()]
    return {key: inner for part in parts for key, inner in part.items()}


def _near(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=_FIGURE_TOLERANCE, abs_tol=_FIGURE_TOLERANCE**2)
    return type(one) is type(other) and one == other


def _content(side: Checkpoint, name: str) -> Any:
    path = side.path / name
    if path in side.headers:
        return side.headers[path].metadata  # the weights behind it are compared by name
    if path.name != ADAPTER_CONFIG:
        return path.read_bytes()
    # The model's name in it is as the user gave it; a path may lead there from another folder by another name.
    named = ("base_model_name_or_path", "revision")
    return {key: value for key, value in read_json(path).items() if key not in named}
