"""What a trainer refuses before any work: options, folders and data that would make the graft fail at the end."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..adapters.kinds import check_has_delta, is_subtracted, kind_of, lost_start, more_than_a_product, start_setting
from ..errors import AdapterError, ConfigError, OutputExistsError
from .origins import Origins

GRAFTED_FOLDER = "grafted"
SHARDED = (
    "{} is not supported: TUNED would be saved in shards or not at all, and the graft would read an incomplete model. "
    "Launch with plain data parallelism (accelerate launch --multi_gpu). Nothing was written."
)


def refuse_unsupported(config: Any) -> None:
    """Refuse options of a config with which no graft could be written or published.

    Raises:
        ConfigError: `push_to_hub`, FSDP, DeepSpeed, or a `chat_template_path` that resizes the embeddings.
    """
    if config.push_to_hub:
        raise ConfigError(
            "push_to_hub=True would publish the tuned BASE, not the graft. Pass push_to_hub=False and upload the "
            f"folder {GRAFTED_FOLDER}/ when the run has ended. Nothing was written."
        )
    if config.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        raise ConfigError(SHARDED.format("FSDP"))
    if config.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("1", "true"):
        raise ConfigError(SHARDED.format("DeepSpeed"))
    template = getattr(config, "chat_template_path", None)
    if template and not (os.path.isfile(template) and template.endswith((".jinja", ".j2"))):
        raise ConfigError(
            f"chat_template_path={template!r} would resize the embeddings of BASE, which then no longer fit INSTRUCT. "
            "Leave it out (INSTRUCT's template is used) or give a .jinja file. Nothing was written."
        )


def check_folders(output_dir: Path, origins: Origins, adapter: bool) -> None:
    """Refuse an output folder in which TUNED would overwrite an input or mix with weights of the other kind."""
    for role in ("policy", "base", "instruct", "adapter"):
        source = getattr(origins, role)
        if source is not None and output_dir.exists() and Path(source).exists() and output_dir.samefile(source):
            raise OutputExistsError(
                f"output_dir {output_dir} is the folder of {role}: saving TUNED there would overwrite it. Choose "
                "another output_dir. Nothing was written."
            )
    other = sorted(output_dir.glob("model*.safetensors" if adapter else "adapter_*"))
    if other:
        raise OutputExistsError(
            f"output_dir {output_dir} holds {other[0].name} of another run; beside "
            f"{'an adapter' if adapter else 'a full model'} the folder could not be loaded. Choose another "
            "output_dir. Nothing was written."
        )


def check_adapter(
    config: Mapping[str, Any], *, grafts: bool = True, goes_on: bool = False, loaded: bool = False
) -> None:
    """Refuse an adapter that could be trained but not grafted, or that does not load as it was.

    Args:
        config: settings of the adapter, as PEFT stores them in `adapter_config.json`.
        grafts: whether the run ends with a graft.
        goes_on: whether an adapter that was trained before is trained further.
        loaded: whether it came on a model in memory, of which nobody knows whether it was trained.

    Raises:
        AdapterError: it changes no weight, its start cannot be known, or loading it makes another model than the one
            that was trained.
    """
    start = start_setting(config)
    lost = lost_start(start)
    if goes_on and lost is not None:
        raise AdapterError(
            f"an adapter of init_lora_weights={start!r} cannot go on: on loading, {lost}. Merge it in the process that "
            "trained it, or use 'pissa'. Nothing was written."
        )
    if not grafts:
        return
    check_has_delta(config)
    if loaded and is_subtracted(start):
        raise AdapterError(
            f"the model in memory has an adapter of init_lora_weights={start!r}, whose delta is what it becomes less "
            "what it was when it was made. Pass the model without an adapter and the settings as peft_config, so that "
            "the start is kept. Nothing was written."
        )
    obstacles = kind_of(config).obstacles
    if obstacles and lost is not None:
        raise more_than_a_product(start, obstacles)


def is_conversational(dataset: Any) -> bool:
    """Return whether the first row of `dataset` holds messages; False for no dataset."""
    from trl import is_conversational as trl_is_conversational

    return dataset is not None and trl_is_conversational(next(iter(dataset)))
