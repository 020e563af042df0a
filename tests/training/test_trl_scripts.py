"""TRL's own scripts with the names of trainer and config replaced: nothing else of them changes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import trl
from other_trainers import kto_data
from tiny import preference_data, sft_data

pytestmark = pytest.mark.slow
SCRIPTS = Path(trl.__file__).parent / "scripts"
OPTIONS = ["--use_cpu", "--bf16", "false", "--max_steps", "2", "--report_to", "none", "--learning_rate", "1e-2",
           "--model_name_or_path", "base", "--dataset_name", "data", "--output_dir", "out"]  # fmt: skip


def ported(kind: str) -> str:
    """Return TRL's script `kind`, importing our trainer and config under the names of TRL's."""
    text = (SCRIPTS / f"{kind}.py").read_text(encoding="utf-8")
    names = [f"{kind.upper()}Trainer", f"{kind.upper()}Config"]
    for name in names:
        text, replaced = re.subn(rf"(from trl import .*?)\b{name}\b,? ?", r"\1", text, count=1)
        assert replaced
    text = text.replace("from trl import , ", "from trl import ")
    ours = ", ".join(f"Shadow{name} as {name}" for name in names)
    return text.replace("import argparse\n", f"import argparse\nfrom shadow_trl import {ours}\n", 1)


@pytest.mark.parametrize(("kind", "peft"), [("sft", False), ("dpo", True), ("kto", False)])
def test_a_ported_script_trains_and_grafts(kind: str, peft: bool, pair: tuple[Path, Path], tmp_path: Path) -> None:
    for name, folder in zip(("base", "instruct"), pair, strict=True):
        (tmp_path / name).symlink_to(folder)
    rows = {"sft": sft_data, "dpo": preference_data, "kto": kto_data}[kind]()
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        rows.to_json(tmp_path / "data" / f"{split}.jsonl")
    (tmp_path / "script.py").write_text(ported(kind), encoding="utf-8")
    more = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "all-linear"] if peft else []
    more += ["--eval_strategy", "steps", "--eval_steps", "1"]
    done = subprocess.run(
        [sys.executable, "script.py", *OPTIONS, "--instruct_model", "instruct", *more],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / ("adapter_model.safetensors" if peft else "model.safetensors")).is_file()
    assert (tmp_path / "out" / "grafted" / "model.safetensors").is_file()
