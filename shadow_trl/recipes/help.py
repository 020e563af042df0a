"""The help of a recipe, on one screen: its own options and the usual ones of TRL; `--help-all` lists the thousand."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from dataclasses import fields

from ..training.config import ShadowArguments
from .launch_options import LAUNCHING

HELP, HELP_ALL = ("-h", "--help"), "--help-all"

_WIDTH, _COLUMN = 120, 32
_MODELS = (
    "model_name_or_path", "instruct_model", "base_model", "find_base", "instruct_revision", "base_revision",
    "dataset_name", "test_split_size", "output_dir",
)  # fmt: skip
_CHECKS = ("pair_check", "allow_wide_gap")
_TRAINING = (
    "ref_policy", "beta", "learning_rate", "num_train_epochs", "per_device_train_batch_size",
    "gradient_accumulation_steps", "max_length", "use_peft", "lora_r", "dtype", "use_cpu", "resume_from_checkpoint",
    "push_to_hub", "hub_model_id",
)  # fmt: skip
_TEXTS = {
    "model_name_or_path": "BASE: folder or hub id; or the folder of an earlier run, which is trained further.",
    "output_dir": "Folder of the run. Default: a new one below outputs/.",
    "dataset_name": "Hub id, folder, or file (.jsonl, .json, .parquet).",
    "test_split_size": "Evaluate on this share of the rows, or this many of them, and train on the others.",
    "graft": "Whether to save TUNED and graft at the end of training.",
    "push_to_hub": "Upload the graft to the hub.",
    "hub_model_id": "Repository of the graft, owner/name.",
    "dtype": "Dtype in which BASE is loaded.",
    "resume_from_checkpoint": "Folder of a checkpoint, or true for the last complete one.",
}
"""Where TRL's own says something else, or nothing."""


def is_asked(words: Sequence[str]) -> bool:
    """Whether a command line asks for help."""
    return not {*HELP, HELP_ALL}.isdisjoint(words)


def help_of(kind: str, parser: argparse.ArgumentParser, recipe: type, words: Sequence[str]) -> str:
    """Return what a command line asks for: one screen, or all options.

    Args:
        kind: "sft" or "dpo".
        parser: of the recipe.
        recipe: the arguments of the recipe itself.
        words: the command line.
    """
    if HELP_ALL in words:
        return parser.format_help()
    known = {action.dest: action for action in parser._actions}
    own = [item.name for item in fields(ShadowArguments) if item.name not in (*_MODELS, *_CHECKS)]
    groups = {
        "models and data": _MODELS,
        "graft": own,
        "checks": _CHECKS,
        "recipe": [item.name for item in fields(recipe)],
        "training, as in TRL": _TRAINING,
    }
    lines = [
        f"usage: shadow-trl {kind} --config FILE.yaml [--KEY VALUE ...]", "",
        f"Train BASE with {kind.upper()}, then graft what it learnt onto INSTRUCT. The keys are those of the file.",
    ]  # fmt: skip
    for title, names in groups.items():
        lines += ["", f"{title}:"]
        for name in (name for name in names if name in known):
            text = _TEXTS.get(name) or str(known[name].help or "").partition(". ")[0].rstrip(".") + "."
            lines.append(_option(name, " ".join(text.split())))
        if title == "recipe":
            lines.append(_option("json", "Print report.json on stdout, and all else on stderr."))
    example = f"shadow-trl {kind} --config recipes/configs/qwen3-0.6b/{kind}_lora.yaml --learning_rate 1e-5"
    more = f"`shadow-trl {kind} {HELP_ALL}` lists every option of TRL and transformers. {LAUNCHING}"
    return "\n".join([*lines, "", "example:", f"  {example}", "", *textwrap.wrap(more, _WIDTH)]) + "\n"


def _option(name: str, text: str) -> str:
    shown = textwrap.shorten(text[:1].upper() + text[1:], _WIDTH - _COLUMN, placeholder=" ...")
    return f"  --{name:<{_COLUMN - 5}} {shown}"
