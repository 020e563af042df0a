"""Options of the pipeline SFT, then DPO: one YAML file with a section for each stage, and what is left to do.

Keys at the top level are meant for both stages, keys in a section for that stage only. What the stages share is
given once: BASE and INSTRUCT belong to the SFT stage; the DPO stage finds them in the manifest of its folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl import get_peft_config

from ..checkpoints.manifest import Entry, read_manifest, weight_digests
from ..errors import ConfigError, InputError, OutputExistsError, list_names
from ..training.preflight import GRAFTED_FOLDER
from .options import Options, UnknownKeysError, names_model, parse, read_yaml

STAGES = ("sft", "dpo")
"""Stages of the pipeline in order; also the names of their sections and folders."""

ORIGIN_KEYS = (
    "model_name_or_path",
    "model_revision",
    "instruct_model",
    "instruct_revision",
    "base_model",
    "base_revision",
)
"""Keys that, at the top level, are for the SFT stage alone: the DPO stage reads them from its manifest."""

TOP_KEYS = ("output_dir", "score_rows", "score_batch_size", "score_max_new_tokens", "score_dtype", "torch_threads")
"""Keys of the whole pipeline, which no section may have."""


@dataclass(frozen=True)
class Plan:
    """The options of a pipeline, and what is left to do.

    Args:
        stages: the selected stages, in order.
        options: options of each stage that has any, selected or not.
        output: folder of the pipeline; None if it gets a new one.
        left: for each selected stage that is not done, the checkpoint it resumes from, or None.

    """

    stages: tuple[str, ...]
    options: Mapping[str, Options]
    output: Path | None
    left: Mapping[str, str | None]


def read_plan(argv: Sequence[str], default_config: str | Path | None = None) -> Plan:
    """Read the options of the pipeline and find out which of its stages are done.

    Args:
        argv: `--config FILE`, `--stages sft,dpo`, and overrides: `--sft.KEY VALUE` and `--dpo.KEY VALUE` for one stage,
            `--KEY VALUE` for both.
        default_config: YAML file for a command line that names neither `--config` nor a model.

    Returns:
        The checked plan; nothing was written.

    Raises:
        ConfigError: an unknown stage, or an unknown, misplaced, repeated or wrong key or value.
        InputError: the DPO stage alone was asked for, and there is no SFT stage to start from.
        OutputExistsError: a folder holds a later stage of an SFT stage that is not done, or of other models.

    """
    given = _route(argv)
    stages, config, words = _stages(given.stages), given.config, given.words
    if config is None and not names_model(words["sft"]):
        if default_config is None or not Path(default_config).is_file():
            raise ConfigError(
                "no configuration: pass --config FILE.yaml with the sections sft and dpo. Ready ones are in "
                "recipes/configs/pipelines of the repository. Nothing was written."
            )
        config = str(default_config)
    sections = read_yaml(Path(config)) if config is not None else {}
    wanted = [stage for stage in STAGES if stage in stages or stage in sections]
    options = {stage: _parse(stage, config, words[stage]) for stage in wanted}
    _check_together(stages, options)
    first = options[stages[0]]
    output = Path(first.training.output_dir) if first.output_given else None
    return Plan(stages, options, output, _left(stages, options, output))


def is_done(folder: Path) -> bool:
    """Whether `folder` holds a run that has ended: the manifest of a run, and a complete graft."""
    grafted = folder / GRAFTED_FOLDER
    kinds = [(read_manifest(place) or {}).get("kind") for place in (folder, grafted)]
    return kinds == ["run", "graft"] and any(grafted.glob("*.safetensors"))


def last_checkpoint(folder: Path) -> str | None:
    """Return the last complete checkpoint in `folder`, from which a stage can resume, or None."""
    found = [
        path
        for path in folder.glob("checkpoint-*")
        # The state is what a trainer writes last: without it the checkpoint was cut off.
        if path.name.rpartition("-")[2].isdigit()
        and (path / "trainer_state.json").is_file()
        and (path / "optimizer.pt").is_file()
    ]
    return str(max(found, key=lambda path: int(path.name.rpartition("-")[2]))) if found else None


@dataclass(frozen=True)
class _CommandLine:
    words: Mapping[str, list[str]]
    """Stage -> the words for it; those for this stage alone last, so that they win."""
    config: str | None = None
    stages: str | None = None


def _route(argv: Sequence[str]) -> _CommandLine:
    """Sort the words of the command line: the pipeline's own options, and those of its stages."""
    own: dict[str, list[str]] = {}
    shared: dict[str, list[str]] = {stage: [] for stage in STAGES}
    single: dict[str, list[str]] = {stage: [] for stage in STAGES}
    targets: list[list[str]] = list(shared.values())
    for word in argv:
        rest = word
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            stage, dot, key = name.partition(".")
            if name in ("config", "stages"):
                if name in own:
                    raise ConfigError(f"--{name} was given more than once. Nothing was written.")
                targets, rest = [own.setdefault(name, [])], value
                if not equals:
                    continue
            elif dot and stage in STAGES:
                _check_section(stage, [key.replace("-", "_")])
                targets, rest = [single[stage]], f"--{key}{equals}{value}"
            else:
                targets = [shared["sft"]] if name.replace("-", "_") in ORIGIN_KEYS else list(shared.values())
        for target in targets:
            target.append(rest)
    for name, values in own.items():
        if len(values) != 1:
            raise ConfigError(f"--{name} needs one value, not {len(values)}: {' '.join(values)}. Nothing was written.")
    words = {stage: shared[stage] + single[stage] for stage in STAGES}
    return _CommandLine(words, **{name: values[0] for name, values in own.items()})


def _stages(given: str | None) -> tuple[str, ...]:
    """Return the selected stages in order; all if none was named."""
    names = [name.strip() for name in given.split(",")] if given is not None else list(STAGES)
    unknown = [repr(name) for name in names if name not in STAGES]
    if unknown:
        raise ConfigError(
            f"--stages has {len(unknown)} unknown stages: {', '.join(unknown)}; known are {', '.join(STAGES)}. "
            "Nothing was written."
        )
    return tuple(stage for stage in STAGES if stage in names)


def _parse(stage: str, config: str | None, words: list[str]) -> Options:
    """Return the options of one stage; in errors it is named."""
    if stage == "dpo":
        # Set to the folder of the SFT stage once that has a name.
        words = [*words, "--model_name_or_path", STAGES[0]]
    try:
        return parse(
            stage,
            ["--config", config, *words] if config is not None else words,
            select=lambda values: _section(stage, values),
        )
    except ConfigError as error:
        hint = (
            "\nA key that only one stage knows belongs in its section, or after --sft. or --dpo. on the command line."
        )
        unknown = isinstance(error, UnknownKeysError)
        raise ConfigError(f"stage {stage}: {error}{hint if unknown else ''}\nNothing was written.") from error


def _section(stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the YAML file that are meant for `stage`; its own win over those of the top level."""
    section = values.get(stage)
    if not isinstance(section, dict):
        found = "is missing" if section is None else f"is a {type(section).__name__}, not a mapping"
        raise ConfigError(f"the section {stage} of the configuration {found}.")
    _check_section(stage, section)
    left_out = (*STAGES, *(ORIGIN_KEYS if stage == "dpo" else ()))
    return {**{key: value for key, value in values.items() if key not in left_out}, **section}


def _check_section(stage: str, keys: Sequence[str] | Mapping[str, Any]) -> None:
    """Refuse keys of the whole pipeline in a section, and a model for the stage that starts from the one before."""
    misplaced = [key for key in keys if key in TOP_KEYS]
    if misplaced:
        raise ConfigError(
            f"{', '.join(misplaced)} in {stage} belongs to the whole pipeline: give it at the top level of the "
            "configuration, or on the command line without the name of a stage. Nothing was written."
        )
    if stage == "dpo" and "model_name_or_path" in keys:
        raise ConfigError(
            "model_name_or_path in dpo: the DPO stage starts from the folder of the SFT stage. For DPO from another "
            "model use recipes/shadow_dpo.py. Nothing was written."
        )


def _check_together(stages: Sequence[str], options: Mapping[str, Options]) -> None:
    """Refuse options that cannot be combined in a pipeline."""
    for stage, one in options.items():
        faults = {
            "compare_direct": one.recipe.compare_direct,
            "graft: false": not one.training.graft,
            "resume_from_checkpoint": one.training.resume_from_checkpoint,
        }
        named = [name for name, fault in faults.items() if fault]
        if named:
            raise ConfigError(
                f"{', '.join(named)} in {stage} is for a single recipe: the pipeline grafts each stage and resumes by "
                "itself. Nothing was written."
            )
    first = options.get(STAGES[0])
    if first is not None and first.recipe.merge_adapter:
        raise ConfigError(
            "merge_adapter in sft: there is no adapter before the first stage. Give it in the section dpo, or as "
            "--dpo.merge_adapter. Nothing was written."
        )
    if len(options) < len(STAGES):
        return
    sft, dpo = (options[stage] for stage in STAGES)
    for name in ("mixed_precision", "use_cpu"):
        values = [getattr(one.training, name) for one in (sft, dpo)]
        if values[0] != values[1] and len(stages) > 1:
            raise ConfigError(
                f"{name} differs: {values[0]} in sft, {values[1]} in dpo. One process has only one; give it at the top "
                "level (bf16, fp16, use_cpu), or run the stages one by one with --stages. Nothing was written."
            )
    if dpo.recipe.merge_adapter:
        if get_peft_config(sft.model) is None:
            raise ConfigError("merge_adapter in dpo: the stage sft trains no adapter (use_peft). Nothing was written.")
        return
    adapters = [adapter.to_dict() for one in (sft, dpo) if (adapter := get_peft_config(one.model)) is not None]
    if len(adapters) == len(STAGES):
        before, after = adapters
        changed = [
            f"{key}: {before[key]!r} in sft, {after[key]!r} in dpo" for key in before if before[key] != after[key]
        ]
        if changed:
            raise ConfigError(
                f"one adapter goes through both stages, but {len(changed)} of its settings differ:\n"
                f"{list_names(changed)}\nGive them at the top level, or leave them out of dpo. Nothing was written."
            )


def _left(stages: Sequence[str], options: Mapping[str, Options], output: Path | None) -> dict[str, str | None]:
    """Return what is left to do: stage -> checkpoint to resume from, or None."""
    if output is None:
        if STAGES[0] not in stages:
            raise InputError(
                "--stages dpo needs the output_dir of a pipeline whose SFT stage is done. Nothing was written."
            )
        return dict.fromkeys(stages)
    first, second = (output / stage for stage in STAGES)
    done = is_done(first)
    if done and "sft" in options:
        _check_models(first, options)
    if not done and "sft" not in stages:
        raise InputError(f"--stages dpo starts from {first}, which holds no run with its graft. Nothing was written.")
    if not done and second.is_dir() and any(second.iterdir()):
        raise OutputExistsError(
            f"{second} is not empty, but the SFT stage before it is not done: it would not belong to the new one. "
            f"Remove {second}, or choose another output_dir. Nothing was written."
        )
    return {stage: last_checkpoint(output / stage) for stage in stages if not is_done(output / stage)}


def _check_models(folder: Path, options: Mapping[str, Options]) -> None:
    """Check that the SFT stage in `folder` was run on the models that the configuration names.

    A folder with the same weights under another name is passed to the DPO stage under that name.
    """
    manifest = read_manifest(folder) or {}
    given = {"base": options["sft"].model.model_name_or_path, "instruct": options["sft"].training.instruct_model}
    for role, source in given.items():
        entry = Entry.read(manifest, role)
        if source is None or (entry is not None and source == entry.source):
            continue
        if entry is None or entry.digests is None or weight_digests(source) != entry.digests:
            raise OutputExistsError(
                f"the SFT stage in {folder} was run with another {role}: {entry} there, {source} in the "
                "configuration. Choose another output_dir. Nothing was written."
            )
        if "dpo" in options and getattr(options["dpo"].training, f"{role}_model") is None:
            setattr(options["dpo"].training, f"{role}_model", source)
