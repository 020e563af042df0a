"""Options of the pipeline SFT, then DPO: one YAML file with a section for each stage, and what is left to do."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl import get_peft_config

from ..checkpoints.manifest import GRAFTED_FOLDER, Entry, read_manifest
from ..errors import ConfigError, InputError, OutputExistsError, ends_with, list_names, one_of
from ..training.resuming import last_complete
from .launch_options import without_launch_keys
from .options import Options, find_config, parse_values, take_option
from .record import check_record, record_of
from .yaml_files import read_yaml

STAGES = ("sft", "dpo")
"""Stages of the pipeline in order; also the names of their sections and folders."""

ORIGIN_KEYS = (
    "model_name_or_path",
    "model_revision",
    "instruct_model",
    "instruct_revision",
    "base_model",
    "base_revision",
    "find_base",
)
"""Keys that, at the top level, are for the SFT stage alone: the DPO stage reads them from its manifest."""

TOP_KEYS = ("output_dir", "score_rows", "score_batch_size", "score_max_new_tokens", "score_dtype", "torch_threads")
"""Keys of the whole pipeline, which no section may have."""


_ONE_STAGE = "\nA key that only one stage knows belongs in its section, or after --sft. or --dpo. on the command line."


@dataclass(frozen=True)
class Plan:
    """The options of a pipeline, and what is left to do.

    Args:
        stages: the selected stages, in order.
        options: options of each stage that has any, selected or not.
        output: folder of the pipeline; None if it gets a new one.
        left: for each selected stage that is not done, the checkpoint it resumes from, or None.
        records: for each stage that has options, what is recorded of them beside its results.
    """

    stages: tuple[str, ...]
    options: Mapping[str, Options]
    output: str | None
    left: Mapping[str, str | None]
    records: Mapping[str, dict[str, Any]]


@ends_with("Nothing was written.")
def read_plan(argv: Sequence[str], default_config: str | Path | None = None) -> Plan:
    """Read and check the options of the pipeline, and find out which of its stages are done.

    Args:
        argv: `--config FILE`, `--stages sft,dpo`, and overrides: `--sft.KEY VALUE` and `--dpo.KEY VALUE` for one stage,
            `--KEY VALUE` for both.
        default_config: YAML file for a command line that names neither `--config` nor a model.

    Raises:
        ConfigError: an unknown stage, or an unknown, misplaced, repeated or wrong key or value.
        InputError: the DPO stage alone was asked for, and there is no SFT stage to start from.
        OutputExistsError: a folder holds a later stage of an SFT stage that is not done, or of other models or options.
    """
    needs = "pass --config FILE.yaml with the sections sft and dpo. Ready ones are in recipes/configs/pipelines"
    config, words = find_config(argv, default_config, needs=needs)
    given, words = take_option("stages", words)
    named = given.split(",") if given is not None else STAGES
    selected = {one_of("each of --stages", name.strip(), STAGES) for name in named}
    stages = tuple(stage for stage in STAGES if stage in selected)
    routed, content = _route(words), without_launch_keys(read_yaml(config), config) if config is not None else {}
    wanted = [stage for stage in STAGES if stage in stages or stage in content]
    options = {stage: _parse(stage, routed[stage], content, config) for stage in wanted}
    _check_together(stages, options)
    output = options[stages[0]].output
    left, records = _left(stages, options, output), {stage: record_of(one) for stage, one in options.items()}
    for stage, record in records.items():
        if output is not None and left.get(stage, "done") is not None:  # done, or to be resumed
            check_record(Path(output, stage), record)
    return Plan(stages, options, output, left, records)


def is_done(folder: Path) -> bool:
    """Whether `folder` holds a run that has ended: the manifest of a run, and a complete graft."""
    grafted = folder / GRAFTED_FOLDER
    kinds = [(read_manifest(place) or {}).get("kind") for place in (folder, grafted)]
    return kinds == ["run", "graft"] and any(grafted.glob("*.safetensors"))


def _route(words: Sequence[str]) -> dict[str, list[str]]:
    """Sort the words of the command line by stage; those for one stage alone come last, so that they win."""
    shared: dict[str, list[str]] = {stage: [] for stage in STAGES}
    single: dict[str, list[str]] = {stage: [] for stage in STAGES}
    targets = list(shared.values())
    for given in words:
        word = given
        if given.startswith("--"):
            stage, dot, rest = given[2:].partition(".")
            name = given[2:].partition("=")[0].replace("-", "_")
            if dot and stage in STAGES:
                _check_section(stage, [name.partition(".")[2]])
                targets, word = [single[stage]], f"--{rest}"
            else:
                targets = [shared["sft"]] if name in ORIGIN_KEYS else list(shared.values())
        for target in targets:
            target.append(word)
    return {stage: shared[stage] + single[stage] for stage in STAGES}


def _parse(stage: str, words: list[str], content: Mapping[str, Any], config: Path | None) -> Options:
    """Return the options of one stage; in errors it is named."""
    if stage == "dpo":
        # Set to the folder of the SFT stage once that has a name.
        words = [*words, "--model_name_or_path", STAGES[0]]
    try:
        section = _section(stage, content) if config is not None else {}
        return parse_values(stage, words, section, config, unknown=_ONE_STAGE)
    except ConfigError as error:
        raise ConfigError(f"stage {stage}: {error}") from error


def _section(stage: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the YAML file that are meant for `stage`; its own win over those of the top level."""
    section = content.get(stage)
    if not isinstance(section, dict):
        found = "is missing" if section is None else f"is a {type(section).__name__}, not a mapping"
        raise ConfigError(f"the section {stage} of the configuration {found}.")
    _check_section(stage, section)
    left_out = (*STAGES, *(ORIGIN_KEYS if stage == "dpo" else ()))
    return {**{key: value for key, value in content.items() if key not in left_out}, **section}


def _check_section(stage: str, keys: Collection[str]) -> None:
    """Refuse keys of the whole pipeline in a section, and a model for the stage that starts from the one before."""
    misplaced = [key for key in keys if key in TOP_KEYS]
    if misplaced:
        raise ConfigError(
            f"{', '.join(misplaced)} in {stage} belongs to the whole pipeline: give it at the top level of the "
            "configuration, or on the command line without the name of a stage."
        )
    if stage == "dpo" and "model_name_or_path" in keys:
        raise ConfigError(
            "model_name_or_path in dpo: the DPO stage starts from the folder of the SFT stage. For DPO from another "
            "model use recipes/shadow_dpo.py."
        )


def _check_together(stages: Sequence[str], options: Mapping[str, Options]) -> None:
    """Refuse options that cannot be combined in a pipeline."""
    faults = [
        f"{name} in {stage} is for a single recipe: the pipeline grafts each stage and resumes by itself."
        for stage, one in options.items()
        for name, given in (
            ("compare_direct", one.recipe.compare_direct),
            ("graft: false", not one.training.graft),
            ("resume_from_checkpoint", one.training.resume_from_checkpoint),
        )
        if given
    ]
    sft, dpo = (options.get(stage) for stage in STAGES)
    if sft is not None and sft.recipe.merge_adapter:
        faults.append(
            "merge_adapter in sft: there is no adapter before the first stage. Give it in the section dpo, or as "
            "--dpo.merge_adapter."
        )
    if sft is not None and dpo is not None:
        before, after = sft.training.use_cpu, dpo.training.use_cpu
        if before != after and len(stages) > 1:
            faults.append(
                f"use_cpu differs: {before} in sft, {after} in dpo. One process has only one; give it at the top "
                "level, or run the stages one by one with --stages."
            )
        faults += _adapter_faults(sft, dpo)
    if faults:
        raise ConfigError("\n".join(faults))


def _adapter_faults(sft: Options, dpo: Options) -> list[str]:
    """Return what is wrong with the adapter that goes from one stage into the next."""
    before, after = (get_peft_config(one.model) for one in (sft, dpo))
    if dpo.recipe.merge_adapter:
        return ["merge_adapter in dpo: the stage sft trains no adapter (use_peft)."] if before is None else []
    if before is None or after is None:
        return []
    old, new = before.to_dict(), after.to_dict()
    changed = [f"{key}: {old[key]!r} in sft, {new[key]!r} in dpo" for key in old if old[key] != new[key]]
    fault = (
        f"one adapter goes through both stages, but {len(changed)} of its settings differ:\n{list_names(changed)}\n"
        "Give them at the top level, or leave them out of dpo."
    )
    return [fault] if changed else []


def _left(stages: Sequence[str], options: Mapping[str, Options], output: str | None) -> dict[str, str | None]:
    """Return what is left to do: stage -> checkpoint to resume from, or None."""
    if output is None:
        if STAGES[0] not in stages:
            raise InputError("--stages dpo needs the output_dir of a pipeline whose SFT stage is done.")
        return dict.fromkeys(stages)
    first, second = (Path(output, stage) for stage in STAGES)
    done = is_done(first)
    if done and "sft" in options:
        _check_models(first, options)
    if not done and "sft" not in stages:
        raise InputError(f"--stages dpo starts from {first}, which holds no run with its graft.")
    if not done and second.is_dir() and any(second.iterdir()):
        raise OutputExistsError(
            f"{second} is not empty, but the SFT stage before it is not done: it would not belong to the new one. "
            f"Remove {second}, or choose another output_dir."
        )
    return {stage: last_complete(Path(output, stage)) for stage in stages if not is_done(Path(output, stage))}


def _check_models(folder: Path, options: Mapping[str, Options]) -> None:
    """Check that the SFT stage in `folder` was run on the models that the configuration names.

    A folder with the same weights under another name is passed to the DPO stage under that name.
    """
    manifest = read_manifest(folder) or {}
    given = {"base": options["sft"].model.model_name_or_path, "instruct": options["sft"].training.instruct_model}
    for role, source in given.items():
        entry = Entry.read(manifest, role)
        same_name = entry is not None and source == entry.source
        there = Path(source or "").expanduser()
        if source is None or (same_name and not there.is_dir()):
            continue
        changed = entry.changed(there) if entry is not None and entry.digests else []
        if same_name and changed:
            raise OutputExistsError(
                f"the SFT stage in {folder} was run with other weights of {role}: since then {', '.join(changed)} in "
                f"{source} changed. Restore them, or choose another output_dir."
            )
        if same_name:
            continue
        if entry is None or not entry.digests or changed:
            raise OutputExistsError(
                f"the SFT stage in {folder} was run with another {role}: {entry} there, {source} in the "
                "configuration. Choose another output_dir."
            )
        if "dpo" in options and getattr(options["dpo"].training, f"{role}_model") is None:
            setattr(options["dpo"].training, f"{role}_model", source)
