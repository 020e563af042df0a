"""What a run starts from: the policy, the BASE its delta is measured from, and the INSTRUCT that receives it.

A raw BASE is its own origin. The folder of an earlier shadow run carries a manifest that names both, so that a second
stage (DPO after SFT) repeats nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints.checkpoint import ADAPTER_CONFIG, read_json
from ..checkpoints.delta import refuse_deltas
from ..checkpoints.manifest import Entry, adapter_base, from_manifest, read_manifest
from ..errors import AdapterError, ConfigError, InputError, list_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WAYS_OUT = (
    "Save the model first (model.save_pretrained(folder)) and pass model=folder, or name the origin of the delta with "
    "base_model=..."
)


@dataclass(frozen=True)
class Origins:
    """Where the parts of a run come from; each a local folder or a hub id with its revision, as the user gave it.

    Args:
        policy: what the model is loaded from; under `adapter`, the model below it. None for an object without a name.
        base: origin of the delta; None where neither it nor the policy has a name.
        instruct: receiver of the delta; None only where nothing is grafted.
        adapter: folder of the PEFT adapter that is trained further; None where there is none.
    """

    policy: Entry | None
    base: Entry | None
    instruct: Entry | None
    adapter: str | None = None

    @property
    def from_raw_base(self) -> bool:
        """Whether training starts from BASE itself, so that the delta starts at zero."""
        return self.adapter is None and self.policy == self.base


def resolve_origins(
    policy: str | None,
    *,
    base: str | None = None,
    instruct: str | None = None,
    policy_revision: str | None = None,
    base_revision: str | None = None,
    instruct_revision: str | None = None,
) -> Origins:
    """Find BASE and INSTRUCT of a run that starts from `policy`.

    Args:
        policy: folder or hub id that training starts from: a BASE, the folder of a shadow run (model or adapter), or
            a PEFT adapter. None for a model that exists in memory only.
        base: BASE as the user named it; wins over the manifest, with a line of log.
        instruct: the same for INSTRUCT.
        policy_revision: branch, tag or commit of `policy` on the hub.
        base_revision: the same for `base`.
        instruct_revision: the same for `instruct`.

    Returns:
        the origins; `instruct` is None where neither the user nor a manifest names one.

    Raises:
        InputError: `policy` is a grafted folder, or a manifest names a folder that is not to be found or has changed.
        AdapterError: an adapter that does not say what it was trained on.
    """
    start, origin, receiver = (
        Entry(source, revision) if source else None
        for source, revision in ((policy, policy_revision), (base, base_revision), (instruct, instruct_revision))
    )
    home = Path(policy or "")
    manifest = read_manifest(home) if policy else None
    if manifest is not None and manifest["kind"] == "graft":
        run = (manifest.get("tuned") or {}).get("source", "unknown")
        raise InputError(
            f"{policy} is a grafted model: INSTRUCT with the delta already added. Training continues from the tuned "
            f"model; give the folder of the run instead: {run}."
        )
    if manifest is not None and manifest["kind"] == "delta":
        refuse_deltas(model=policy)
        manifest = None  # a LoRA made from a delta is an adapter like any other
    adapter = policy if policy and (home / ADAPTER_CONFIG).is_file() else None
    if manifest is not None:
        origin = from_manifest("base", manifest, home, origin)
        receiver = from_manifest("instruct", manifest, home, receiver)
        if adapter is not None:
            # It was trained on BASE, or on the full model of a stage before.
            on_base = Entry.read(manifest, "policy") == Entry.read(manifest, "base")
            start = origin if on_base else from_manifest("policy", manifest, home)
    elif adapter is not None:
        start = origin or _adapter_base(home, base_revision)
    if origin is None and start is not None:
        origin = Entry(start.source, base_revision or start.revision)
    return Origins(start, origin, receiver, adapter)


def _adapter_base(adapter: Path, revision: str | None) -> Entry:
    found = adapter_base(read_json(adapter / ADAPTER_CONFIG), adapter)
    if found is None:
        raise AdapterError(
            f"the adapter in {adapter} does not say what it was trained on (base_model_name_or_path is empty). "
            "Name it with base_model=..."
        )
    return Entry(found.source, revision or found.revision)


def check_unchanged(model: PreTrainedModel, source: Entry) -> None:
    """Check that a loaded model still has the weights of `source`, cast to its dtype: the delta is measured from there.

    Args:
        model: the model that training starts from.
        source: the folder or hub id its config names.

    Raises:
        InputError: the model has weights that differ from those of `source`.
    """
    fresh = (
        type(model).from_pretrained(source.source, revision=source.revision or "main", dtype=model.dtype).state_dict()
    )
    state = model.state_dict()
    changed = [
        f"{name}: {tuple(fresh[name].shape) if name in fresh else 'absent'} in {source}, "
        f"{tuple(state[name].shape) if name in state else 'absent'} in memory"
        for name in sorted(fresh.keys() | state.keys())
        if name not in fresh or name not in state or not fresh[name].equal(state[name].to(fresh[name].device))
    ]
    if changed:
        raise InputError(
            f"the model was changed after it was loaded: {len(changed)} of {len(state)} weights differ from those of "
            f"{source}, from which the delta would be measured.\n{list_names(changed)}\n{_WAYS_OUT}"
        )


def require_base(origins: Origins) -> Entry:
    """Return BASE of `origins`; InputError where the model has no name, and none was given."""
    if origins.base is None:
        raise InputError(f"the model has no name, so BASE cannot be found on the disk. {_WAYS_OUT}")
    return origins.base


def require_instruct(origins: Origins) -> Entry:
    """Return INSTRUCT of `origins`; ConfigError where none is known."""
    if origins.instruct is None:
        raise ConfigError(
            "no INSTRUCT is known: neither instruct_model=... was given nor does the model come from a shadow run. "
            "Name the model that receives the delta, or pass graft=False to train BASE only."
        )
    return origins.instruct
