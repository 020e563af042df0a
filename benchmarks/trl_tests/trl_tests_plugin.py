"""Plugin of pytest: TRL's tests find the Shadow trainers under TRL's names, and small data in the hub's place.

`__main__.py` starts pytest with it and sets the variables of the environment that it reads.
"""

from __future__ import annotations

import json
import os
from functools import wraps
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl

DATA = Path(os.environ["TRL_TESTS_DATA"])
OUTCOMES: dict[str, dict[str, str]] = {}

_load_dataset = datasets.load_dataset


@wraps(_load_dataset)
def _load(path: str, name: str | None = None, *args: Any, **kwargs: Any) -> Any:
    folder = DATA / path / (name or "")
    return (
        _load_dataset(str(folder), *args, **kwargs) if folder.is_dir() else _load_dataset(path, name, *args, **kwargs)
    )


def _instruct_of(model: Any) -> str:
    """Return the INSTRUCT beside a model of the hub; of a model that has none, the model itself."""
    name = model if isinstance(model, str) else str(model.config._name_or_path)
    beside = f"{name}-instruct"
    cached = Path(os.environ["HF_HUB_CACHE"], f"models--{beside.replace('/', '--')}")
    return beside if cached.is_dir() else name


def _with_instruct(trainer: type) -> type:
    """Return the trainer with an INSTRUCT where none is given, which is all that TRL's tests do not say."""

    class WithInstruct(trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, instruct_model: str | None = None, **kwargs: Any) -> None:
            model = args[0] if args else kwargs.get("model")
            super().__init__(*args, instruct_model=instruct_model or _instruct_of(model), **kwargs)

    WithInstruct.__name__ = trainer.__name__
    return WithInstruct


def _put_ours() -> None:
    import shadow_trl

    for kind in ("SFT", "DPO"):
        setattr(trl, f"{kind}Trainer", _with_instruct(getattr(shadow_trl, f"Shadow{kind}Trainer")))
        setattr(trl, f"{kind}Config", getattr(shadow_trl, f"Shadow{kind}Config"))


def _on_the_cpu(config: type) -> None:
    """Let a config of TRL's mean the CPU: its default precision, bfloat16, is for accelerators."""
    whole = config.__post_init__  # type: ignore[attr-defined]

    def __post_init__(self: Any) -> None:
        self.use_cpu = True
        self.bf16 = bool(self.bf16)  # None stands for the default
        whole(self)

    config.__post_init__ = __post_init__  # type: ignore[attr-defined]


# At the import of this module, and so before that of the tests, which keep the names.
datasets.load_dataset = _load
if not torch.accelerator.is_available():
    for one in (trl.SFTConfig, trl.DPOConfig):
        _on_the_cpu(one)
if os.environ["TRL_TESTS_OF"] == "shadow":
    _put_ours()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the outcome of a test; a failure of its set-up or end counts."""
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        error = crash.message if crash is not None else str(report.longrepr or "")
        OUTCOMES[report.nodeid] = {"outcome": report.outcome, "error": error[:600] if report.failed else ""}


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Keep that a file of tests cannot be imported."""
    if report.failed:
        OUTCOMES[report.nodeid] = {"outcome": "failed", "error": str(report.longrepr)[-600:]}


def pytest_sessionfinish() -> None:
    """Write the outcomes."""
    Path(os.environ["TRL_TESTS_REPORT"]).write_text(json.dumps(OUTCOMES))
