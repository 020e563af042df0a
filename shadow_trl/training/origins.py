"""What a run starts from: the policy, the BASE its delta is measured from, and the INSTRUCT that receives it.

All of it is known from the trainer's arguments and the manifest of an earlier run, before any model is loaded.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from trl.trainer.utils import get_config_model_id

from ..checkpoints.checkpoint import ADAPTER_CONFIG, Checkpoint
from ..checkpoints.delta import refuse_deltas
from ..checkpoints.json_files import read_json
from ..checkpoints.manifest import Entry, adapter_base, check_weights, from_manifest, read_manifest
from ..checkpoints.schemas import AdapterConfig
from ..errors import AdapterError, ConfigError, InputError, list_names
from .loading import Loading, bare_model, is_adapted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BELOW = re.compile(r"\.(?:token_adapter\.)?(?:base_layer|original_module)(?=\.)")

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

    def pinned(self) -> Origins:
        """Return the same with the commit of each that is on the hub: what a branch means may change in training."""
        named = [entry for entry in (self.policy, self.base, self.instruct) if entry is not None]
        found = {entry: entry.pinned() for entry in dict.fromkeys(named)}
        policy, base, instruct = (entry and found[entry] for entry in (self.policy, self.base, self.instruct))
        return Origins(policy, base, instruct, self.adapter)

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
        policy_revision: branch, tag or commit of `policy` on the hub. Default: `base_revision` where it is BASE.
        base_revision: the same for `base`.
        instruct_revision: the same for `instruct`.

    Raises:
        InputError: `policy` is a grafted folder, or a manifest names a folder that is not to be found or has changed.
        AdapterError: an adapter that does not say what it was trained on.
    """
    home = Path(policy or "")
    manifest = read_manifest(home) if policy else None
    if policy_revision is None and base in (None, policy) and not home.is_dir():
        policy_revision = base_revision
    start = Entry(policy, policy_revision) if policy else None
    origin, receiver = (
        _given("base", base, base_revision, manifest),
        _given("instruct", instruct, instruct_revision, manifest),
    )
    if manifest is not None and manifest["kind"] == "graft":
        run = (manifest.get("tuned") or {}).get("source", "unknown")
        raise InputError(
            f"{policy} is a grafted model: INSTRUCT with the delta already added. Training continues from the tuned "
            f"model; give the folder of the run instead: {run}."
        )
    if manifest is not None and manifest["kind"] == "delta":
        refuse_deltas(model=policy)
        manifest = None  # a LoRA made from a delta is an adapter like any other
    if manifest is not None:
        check_weights(home)
    adapter = policy if policy and (home / ADAPTER_CONFIG).is_file() else None
    if manifest is not None:
        origin = from_manifest("base", manifest, home, origin)
        receiver = from_manifest("instruct", manifest, home, receiver)
        if adapter is not None:
            # It was trained on BASE, or on the full model of a stage before.
            on_base = Entry.read(manifest, "policy") == Entry.read(manifest, "base")
            start = origin if on_base else from_manifest("policy", manifest, home)
    elif adapter is not None:
        found = origin or adapter_base(read_json(home / ADAPTER_CONFIG, AdapterConfig), home)
        if found is None:
            raise AdapterError(
                f"the adapter in {adapter} does not say what it was trained on (base_model_name_or_path is empty). "
                "Name it with base_model=..."
            )
        start = replace(found, revision=base_revision or found.revision)
    if origin is None and start is not None:
        origin = replace(start, revision=base_revision or start.revision)
    return Origins(start, origin, receiver, adapter)


def _given(role: str, source: str | None, revision: str | None, manifest: Mapping[str, Any] | None) -> Entry | None:
    """Return what the user named for `role`; a revision alone is one of the repository that the manifest names.

    Raises:
        ConfigError: an object in the place of a name.
    """
    if source is not None and not isinstance(source, (str, os.PathLike)):
        raise ConfigError(
            f"{role}_model is a {type(source).__name__}; it has to be the folder or hub id of {role.upper()}, whose "
            f"files the graft reads. A loaded model can be saved: {role}_model.save_pretrained(folder)."
        )
    known = Entry.read(manifest, role)
    if source is None and revision is not None and known is not None and not known.folder:
        source = known.source
    return Entry(source, revision) if source else None


def require_base(origins: Origins) -> Entry:
    """Return BASE; InputError where the model has no name and none was given."""
    if origins.base is None:
        raise InputError(f"the model has no name, so BASE cannot be found on the disk. {_WAYS_OUT}")
    return origins.base


def require_instruct(origins: Origins) -> Entry:
    """Return INSTRUCT; ConfigError where none is known."""
    if origins.instruct is None:
        raise ConfigError(
            "no INSTRUCT is known: neither instruct_model=... was given nor does the model come from a shadow run. "
            "Name the model that receives the delta, or pass graft=False to train BASE only."
        )
    return origins.instruct


def check_unchanged(model: PreTrainedModel, source: Entry, *, adapter: bool) -> None:
    """Check that a loaded model still has the weights of `source`, cast to its dtype.

    The delta of a full model is measured from there; an `adapter` is taken to have been trained on it.

    Raises:
        InputError: the model has weights that differ from those of `source`.
    """
    bare = bare_model(model)
    with torch.random.fork_rng():
        fresh = type(bare).from_pretrained(source.source, revision=source.revision or "main", dtype=bare.dtype)
    known, state = fresh.state_dict(), dict(bare.state_dict())
    if is_adapted(model):
        # What an adapter trains is its own, and stored with it; the rest has a name of its own under it.
        own = {name for name, parameter in bare.named_parameters() if parameter.requires_grad}
        below = {_BELOW.sub("", name): value for name, value in state.items() if name not in own}
        state = {name: below.get(name, value) for name, value in known.items()}
    changed = [
        f"{name}: {tuple(known[name].shape) if name in known else 'absent'} in {source}, "
        f"{tuple(state[name].shape) if name in state else 'absent'} in memory"
        for name in sorted(known.keys() | state.keys())
        if name not in known or name not in state or not known[name].equal(state[name].to(known[name].device))
    ]
    what, ways_out = "from which the delta would be measured", _WAYS_OUT
    if adapter:
        what = "the model that the saved adapter would name"
        ways_out = "Save it (model.save_pretrained(folder)) and pass model=folder, with base_model=... naming BASE."
    if changed:
        raise InputError(
            f"the model was changed after it was loaded: {len(changed)} of {len(state)} weights differ from those of "
            f"{source}, {what}.\n{list_names(changed)}\n{ways_out}"
        )


@dataclass(frozen=True)
class Start:
    """What training starts from, and what the delta is measured from.

    Args:
        model: as given: a name, or a loaded model.
        origins: the names of policy, BASE and INSTRUCT.
        loading: how the policy is loaded, and so any model beside it.
        adapter: settings of the adapter that will be trained, as PEFT stores them; None in full fine-tuning.
        base_named: whether the user named the origin of the delta.
    """

    model: Any
    origins: Origins
    loading: Loading
    adapter: Mapping[str, Any] | None
    base_named: bool

    @classmethod
    def of(
        cls,
        given: Mapping[str, Any],
        config: Any,
        *,
        base_model: str | None,
        instruct_model: str | None,
        loads_as: str = "float32",
    ) -> Start:
        """Return the start of a run with the arguments `given` to the TRL trainer and the two of ours.

        `loads_as` is the dtype in which that trainer loads a model where it is told none.
        """
        model, base = given["model"], base_model or config.base_model
        origins = resolve_origins(
            (model if isinstance(model, str) else get_config_model_id(bare_model(model).config)) or None,
            base=base,
            instruct=instruct_model or config.instruct_model,
            policy_revision=(config.model_init_kwargs or {}).get("revision"),
            base_revision=config.base_revision,
            instruct_revision=config.instruct_revision,
        ).pinned()
        adapter = None
        if given.get("peft_config") is not None:
            adapter = given["peft_config"].to_dict()
        elif is_adapted(model):
            adapter = model.peft_config[model.active_adapters[0]].to_dict()
        elif origins.adapter is not None:
            adapter = read_json(Path(origins.adapter) / ADAPTER_CONFIG, AdapterConfig)
        # A copy: the trainer changes its config while it is built.
        loading = Loading(copy.copy(config), given.get("quantization_config"), loads_as=loads_as)
        loading = loading.like(origins.policy if origins.adapter or isinstance(model, str) else model)
        return cls(model, origins, loading, adapter, bool(base))

    @property
    def in_memory(self) -> bool:
        """Whether the model was given as an object."""
        return not isinstance(self.model, str)

    @property
    def loads_adapter(self) -> bool:
        """Whether the adapter of an earlier run is loaded and trained further."""
        return self.origins.adapter is not None and not self.in_memory

    @property
    def is_free(self) -> bool:
        """Whether the model may hold anything: an object whose origin was named is not compared with that origin."""
        return self.in_memory and self.base_named

    @property
    def is_compared(self) -> bool:
        """Whether an object must hold what its name stands for: the delta's origin, or the model under an adapter."""
        grafts = self.loading.args.graft or self.loading.args.eval_grafted
        return self.in_memory and grafts and (self.adapter is not None or not self.base_named)

    @property
    def stage(self) -> str | None:
        """What an earlier stage trained and this one trains further: an adapter, or a full model."""
        if self.origins.adapter is not None or self.adapter is not None:
            return self.origins.adapter
        return None if self.origins.policy in (None, self.origins.base) else str(self.origins.policy)

    @property
    def is_raw_base(self) -> bool:
        """Whether training starts from BASE's own weights, so that the delta starts at zero."""
        # A loaded model with an adapter has the name of the model below it, and need not be BASE.
        return self.origins.from_raw_base and not self.is_free and not is_adapted(self.model)

    @property
    def adapter_on_base(self) -> bool:
        """Whether an adapter is trained on BASE, not on the full model of an earlier run."""
        return self.adapter is not None and self.origins.policy == self.origins.base

    @property
    def is_quantised(self) -> bool:
        """Whether the policy is quantised, by its own attributes, the arguments, or its config on the disk."""
        names = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
        if self.in_memory:
            return any(getattr(bare_model(self.model), name, False) for name in names)
        if self.loading.quantization_config or (self.loading.args.model_init_kwargs or {}).get("quantization_config"):
            return True
        return Checkpoint.open(str(self.origins.policy), weights=False).quantisation is not None

    @property
    def base(self) -> Entry:
        """BASE; InputError where it is not known."""
        return require_base(self.origins)

    @property
    def instruct(self) -> Entry:
        """INSTRUCT; ConfigError where it is not known."""
        return require_instruct(self.origins)
