"""Is a folder the graft that its `shadow.json` says it is? It is made again and compared.

The weights are compared by name, block by block as they are computed, the other files byte by byte, the figures as
numbers, the card by its digest in `shadow.json`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.delta import refuse_deltas
from ..checkpoints.hub import Source, locate
from ..checkpoints.manifest import MANIFEST_NAME, Entry, kind_found, read_manifest
from ..errors import CheckpointError, ConfigError, ends_with, list_names
from ..grafting.options import GraftOptions, declared
from ..grafting.tuned import weighted_sources
from ..results.folder import Scratch
from .differences import Comparison, compare_card, other_figures, other_files, other_weights, stored_in
from .graft import BESIDE, write_graft


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
    `shadow.json` says in words (warnings, versions, paths) are not. The graft is made again, block by block, and its
    weights are compared without being written; the other files go to a temporary folder beside `folder`. Neither memory
    nor disk grow with the model.

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
    scratch_home = there.path.absolute().parent
    if not os.access(scratch_home, os.W_OK):
        scratch_home = Path(tempfile.gettempdir())
    comparison, settings = Comparison(there), _settings(manifest, there, sides)
    scratch_of = scratch_home / f"{there.path.absolute().name}.verify"
    with Scratch(scratch_of) as scratch, ThreadPoolExecutor(1, thread_name_prefix="digest") as pool:
        digested = pool.submit(_other_digests, {**sides, **start}, manifest)
        made = scratch.part / "graft"
        report = write_graft(sides, made, settings, progress=progress, seen=comparison.add)
        again = Checkpoint.open(made)
        if report.form == "adapter":  # which was written
            comparison.read(again)
        weights, (equal, files) = other_weights(there, again, comparison), other_files(there, again)
        figures = other_figures(manifest, _recorded_by_then(read_manifest(made) or {}, manifest, sides))
        wrong = digested.result()
    recorded = manifest["options"]
    left = [f"warnings, versions and paths in {MANIFEST_NAME}", *compare_card(there, manifest, equal, files)]
    if manifest.get("beside"):
        folder_beside = f"{BESIDE}{os.sep}"
        files = [row for row in files if not row.startswith(folder_beside)]
        left.append(f"{BESIDE}/, a graft of its own that can be verified as this one")
    if "max_shard_size" not in recorded:  # by 0.1.0
        left.append("which file holds which weight, the index and the metadata of headers, as the size is not recorded")
        files = [row for row in files if row.split("  ")[0] not in stored_in(there, again)]
    if ("delta" in sides) != ("delta" in manifest):
        left.append(f"the figures in {MANIFEST_NAME}, which a delta and a tuned model do not share")
        figures = []
    return VerifyReport(str(folder), len(again.specs), weights, files, figures, wrong, equal, left,
                        report.warnings, _found_changes(manifest))  # fmt: skip


def _settings(manifest: Mapping[str, Any], there: Checkpoint, sides: Mapping[str, Any]) -> GraftOptions:
    """Return the options that the manifest of `there` records."""
    recorded = manifest["options"]
    options = {name: recorded[name] for name, option in declared().items() if option.recorded and name in recorded}
    options["format"] = manifest["form"]
    if _is_unrecorded(manifest, sides) and options.get("base_dtype") is None:
        options["base_dtype"] = ()
    measured = bool(manifest.get("by_kind") or manifest.get("delta_norm") is not None)
    try:
        return GraftOptions(**options, digest="none", stats=measured)
    except ConfigError as error:
        raise CheckpointError(f"cannot use the options in {there.path / MANIFEST_NAME}: {error}") from error


def _is_unrecorded(manifest: Mapping[str, Any], sides: Mapping[str, Any]) -> bool:
    """Whether the dtype in which BASE was loaded is not recorded: 0.1.0 subtracted BASE as stored."""
    return "tuned" in sides and "loaded_in" not in manifest


def _recorded_by_then(
    remade: dict[str, Any], manifest: Mapping[str, Any], sides: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return the new manifest without what 0.1.0, which wrote `manifest`, did not record."""
    newer = ["loaded_in"] if _is_unrecorded(manifest, sides) else []
    newer += [] if "chat_template" in manifest["options"] else ["chat_template"]
    newer += [] if "realised_in_bf16" in manifest else ["realised_in_bf16"]
    return {name: value for name, value in remade.items() if name not in newer}


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
