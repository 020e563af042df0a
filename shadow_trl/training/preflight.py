"""What a trainer refuses before any work: options, folders and data that would make the graft fail at the end."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.kinds import check_has_delta, is_subtracted, kind_of, lost_start, more_than_a_product, start_setting
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.hub import local_folder
from ..checkpoints.manifest import GRAFTED_FOLDER
from ..checkpoints.sharded import merge_command, shards_of
from ..errors import AdapterError, ConfigError, OutputExistsError, list_names
from ..operations.checks import check_graft
from ..pair.pairs import ModelPair
from .adapter import rescaled_modules
from .loading import bare_model, is_adapted
from .origins import Start, check_unchanged
from .publishing import refuse_local_adapter, refuse_publishing

if TYPE_CHECKING:
    from peft import PeftConfig

# What an adapter's config says of its origin and use, not of its form.
_NOT_FORM = {"base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version", "auto_mapping"}


def refuse_rewards(trainer: type) -> None:
    """Refuse a class of trainers that learn to score answers, ConfigError.

    By its name: to import TRL's would take every start its time.
    """
    for base in trainer.__mro__:
        if base.__name__ == "RewardTrainer" and base.__module__.startswith("trl."):
            raise ConfigError(
                f"{trainer.__name__} trains a reward model: the head that scores answers is made anew for it, INSTRUCT "
                "has none that could receive its delta, and a graft would be no reward model. Use RewardTrainer itself "
                "on INSTRUCT."
            )


def refuse_unsupported(config: Any) -> None:
    """Refuse options of a config with which no graft could be written or published.

    Raises:
        ConfigError: options of the hub, or a `chat_template_path` that resizes the embeddings.
    """
    refuse_publishing(config)
    template = getattr(config, "chat_template_path", None)
    if (
        template
        and (config.graft or config.eval_grafted)
        and not (os.path.isfile(template) and template.endswith((".jinja", ".j2")))
    ):
        raise ConfigError(
            f"chat_template_path={template!r} would resize the embeddings of BASE, which then no longer fit INSTRUCT. "
            "Leave it out (INSTRUCT's template is used) or give a .jinja file."
        )


def check_before_loading(start: Start, config: Any, given: Mapping[str, Any]) -> list[str]:
    """Find before any model is loaded what would keep the run from ending in a graft, or from evaluating one.

    Returns:
        what the user should know of the pair.
    """
    grafts = config.graft or config.eval_grafted
    refuse_shards(start)
    check_predicts_tokens(start)
    check_adapter(start, grafts=grafts)
    if start.loads_adapter and given.get("peft_config") is not None:
        check_same_adapter(given["peft_config"], str(start.origins.adapter))
    if config.graft:
        check_folders(Path(config.output_dir), start)
        refuse_local_adapter(config, start)
    if config.eval_grafted and start.is_quantised:
        raise ConfigError(
            "eval_grafted=True is not possible here: BASE is quantised and the graft is not, so it may not fit where "
            "BASE does. Pass eval_grafted=False and score the grafted folder after training."
        )
    warnings = _check_graft(start, config, given) if grafts else []
    has_adapter = start.adapter is not None
    if start.is_compared and not (has_adapter and start.is_quantised):
        check_unchanged(start.model, start.origins.policy or start.base, adapter=has_adapter)
    return warnings


def _check_graft(start: Start, config: Any, given: Mapping[str, Any]) -> list[str]:
    instruct, base = str(start.instruct), str(start.base)
    warnings = ModelPair.open(base, instruct).check(
        level=config.pair_check or ("weights" if start.adapter is None else "headers"),
        need_template=given.get("processing_class") is None and is_conversational(given.get("train_dataset")),
        template=template_of(config, given.get("processing_class")),
        allow_wide_gap=config.allow_wide_gap,
        vocab=config.graft_vocab,
    )
    check_graft(
        base=base,
        instruct=instruct,
        # Where none is kept, an earlier one does not matter.
        output=Path(config.output_dir, GRAFTED_FOLDER if config.graft else f".{GRAFTED_FOLDER}"),
        # An adapter on the full model of an earlier run is grafted as one full model.
        adapter=start.adapter_on_base,
        adapter_config=start.adapter,
        **config.graft_options(),
    )
    return warnings


def check_folders(output_dir: Path, start: Start) -> None:
    """Refuse an output folder in which TUNED would overwrite an input or mix with weights of the other kind."""
    for role in ("policy", "base", "instruct", "adapter"):
        source = getattr(start.origins, role)
        if source and (there := Path(str(source))).exists() and output_dir.exists() and output_dir.samefile(there):
            raise OutputExistsError(
                f"output_dir {output_dir} is the folder of {role}: saving TUNED there would overwrite it. Choose "
                "another output_dir."
            )
    adapter = start.adapter is not None
    other = sorted(output_dir.glob("model*.safetensors" if adapter else "adapter_*"))
    if other:
        raise OutputExistsError(
            f"output_dir {output_dir} holds {other[0].name} of another run; beside "
            f"{'an adapter' if adapter else 'a full model'} the folder could not be loaded. Choose another "
            "output_dir."
        )


def refuse_shards(start: Start) -> None:
    """Refuse models of which a folder holds the shards of FSDP alone: a graft reads them, loading a model does not."""
    for role in ("policy", "instruct", "adapter"):
        source = getattr(start.origins, role)
        folder = local_folder(str(source)) if source else None
        shards = shards_of(folder) if folder is not None else None
        whole = ("*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin", "adapter_model.bin")
        if folder is None or shards is None or any(any(folder.glob(pattern)) for pattern in whole):
            continue
        renamed = ", with its weights renamed to adapter_model.safetensors," if role == "adapter" else ""
        raise ConfigError(
            f"{role} {folder} holds the shards of a torch distributed checkpoint, which cannot be loaded for training. "
            f"Merge them with\n  {merge_command(shards)}\ncopy the configuration and the tokenizer into OUT, and give "
            f"OUT{renamed} in its place."
        )


def check_predicts_tokens(start: Start) -> None:
    """Refuse a model that has no language head with ConfigError: one that classifies, or gives hidden states alone."""
    import transformers

    kind: Any
    if start.in_memory:
        kind = type(bare_model(start.model))
    else:  # TRL makes the class that the config names first; one of remote code is not known here
        names = Checkpoint.open(str(start.origins.policy), weights=False).config.get("architectures") or [""]
        kind = getattr(transformers, names[0], None)
    if kind is not None:
        check_head(kind)


def check_head(kind: Any) -> None:
    """Refuse a class of models that predicts no tokens with ConfigError."""
    if not kind.can_generate():
        raise ConfigError(
            f"the model is a {kind.__name__}, which predicts no tokens: INSTRUCT has no counterpart of its head. Load "
            "BASE with AutoModelForCausalLM, or name a folder whose config.json has such a class in `architectures`."
        )


def check_adapter(start: Start, *, grafts: bool) -> None:
    """Refuse an adapter that could be trained but not grafted (if the run `grafts`), or that does not load as it was.

    Raises:
        AdapterError: it changes no weight, its start cannot be known, or loading it makes another model than the one
            that was trained.
    """
    if grafts and getattr(start.model, "_hf_peft_config_loaded", False):
        raise AdapterError(
            "the model in memory has an adapter that was added by transformers (add_adapter, load_adapter) and not by "
            "peft. Pass the model without it and the settings as peft_config, or the adapter's folder as model."
        )
    if start.adapter is None:
        return
    setting = start_setting(start.adapter)
    lost = lost_start(setting)
    if start.origins.adapter is not None and lost is not None:
        raise AdapterError(
            f"an adapter of init_lora_weights={setting!r} cannot be trained further: on loading, {lost}. Merge it in "
            "the process that trained it, or use 'pissa'."
        )
    if not grafts:
        return
    if start.origins.policy is None:
        raise AdapterError(
            "the model in memory has no name, so a graft could not find the weights that the adapter is trained on. "
            "Save it (model.save_pretrained(folder)) and pass model=folder."
        )
    if is_adapted(start.model) and start.model.active_adapters != ["default"]:
        raise AdapterError(
            "the adapter called `default` is the one that is grafted, and the model in memory has other active "
            f"adapters: {', '.join(start.model.active_adapters) or 'none'} (of {', '.join(start.model.peft_config)}). "
            "Save the one that is to be trained (save_pretrained(folder, selected_adapters=[name])) and load it alone: "
            "PeftModel.from_pretrained(base, folder/name, is_trainable=True)."
        )
    check_has_delta(start.adapter)
    if is_adapted(start.model) and is_subtracted(setting):
        raise AdapterError(
            f"the model in memory has an adapter of init_lora_weights={setting!r}, whose delta is what it becomes less "
            "what it was when it was made. Pass the model without an adapter and the settings as peft_config, so that "
            "the start is kept."
        )
    if is_adapted(start.model) and (rescaled := rescaled_modules(start.model)):
        raise AdapterError(
            f"in {len(rescaled)} modules the adapter in memory has another scaling than its settings make, which "
            f"saving does not keep.\n{list_names(rescaled)}\nSet it back (set_scale(adapter, 1) of these layers), or "
            "give the adapter another lora_alpha."
        )
    obstacles = kind_of(start.adapter).obstacles
    if obstacles and lost is not None:
        raise more_than_a_product(setting, obstacles)


def check_head_is_plain(model: Any) -> None:
    """Refuse a loaded model, with AdapterError, whose head TRL cannot read: its losses take weight and bias from it."""
    head = bare_model(model).get_output_embeddings()
    if head is not None and not hasattr(head, "bias"):
        raise AdapterError(
            "trainable_token_indices trains rows of the head too where it is tied to the embeddings, and TRL's losses "
            f"cannot read such a head (a {type(head).__name__}): training would end in its first step. Leave "
            "trainable_token_indices out, or train a BASE with a head of its own (tie_word_embeddings: false)."
        )


def check_same_adapter(peft_config: PeftConfig, adapter: str) -> None:
    """Check that a `peft_config` given beside the folder of an adapter describes that same adapter.

    Raises:
        AdapterError: a setting differs; the adapter cannot be trained further with other settings.
    """
    stored, given = _form(type(peft_config).from_pretrained(adapter)), _form(peft_config)
    if "all-linear" in (stored.get("target_modules"), given.get("target_modules")):
        given["target_modules"] = stored.get("target_modules")  # written as the names it stands for
    changed = [
        f"{name}: {stored.get(name)!r} in {adapter}, {given.get(name)!r} in peft_config"
        for name in sorted(stored.keys() | given.keys())
        if stored.get(name) != given.get(name)
    ]
    if changed:
        raise AdapterError(
            f"the adapter in {adapter} is trained further, but {len(changed)} settings of peft_config differ from it.\n"
            f"{list_names(changed)}\nLeave peft_config out (in a recipe: --use_peft false) to train the same adapter "
            "further. To start a new one, merge the old one first (PeftModel.merge_and_unload, then save_pretrained) "
            "and pass that folder as model with base_model=... naming BASE."
        )


def _form(config: PeftConfig) -> dict[str, Any]:
    """Return the settings of an adapter's form; nothing given and nothing listed are the same, as is another order."""
    known = {name: value or None for name, value in config.to_dict().items() if name not in _NOT_FORM}
    return {name: sorted(value, key=str) if isinstance(value, set | list) else value for name, value in known.items()}


def check_reference_options(args: Any, *, ref_model: Any) -> None:
    """Refuse options that contradict the chosen reference policy.

    Raises:
        ConfigError: an explicit `ref_model` with a `ref_policy`, or `sync_ref_model` with INSTRUCT or a graft.
    """
    if args.ref_policy == "init":
        return
    if ref_model is not None:
        raise ConfigError(
            f"both ref_model=... and ref_policy={args.ref_policy!r} name a reference policy. Pass one of them."
        )
    if args.sync_ref_model:
        raise ConfigError(
            f"sync_ref_model=True moves the reference towards the policy, which is a BASE; with ref_policy="
            f"{args.ref_policy!r} the reference is another model and the mixture is neither. Use ref_policy='init', or "
            "sync_ref_model=False."
        )


def template_of(config: Any, processing_class: Any) -> str | None:
    """Return the chat template that a run was given, by `chat_template_path` or the tokenizer; None for INSTRUCT's.

    Raises:
        ConfigError: the file is not text.
    """
    path = getattr(config, "chat_template_path", None)
    if path:
        try:
            return Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read chat_template_path={path!r}: {error}. Give a template in UTF-8.") from error
    own = getattr(processing_class, "chat_template", None)
    return own.get("default") if isinstance(own, dict) else own


def is_conversational(dataset: Any) -> bool:
    """Return whether the first row of `dataset` holds messages; False for what has no rows, which TRL refuses."""
    from trl import is_conversational as trl_is_conversational

    first = next(iter(dataset), None) if isinstance(dataset, Iterable) else None
    return isinstance(first, dict) and bool(trl_is_conversational(first))
