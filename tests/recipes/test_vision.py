"""Recipes on pictures: the shipped configs train a tiny model of the same make, with the tower frozen or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from repository import ROOT
from safetensors.torch import load_file

from shadow_trl.recipes.run import main_dpo, main_sft

pytest.importorskip("PIL", reason="vision data needs Pillow")

from vision import make_vision_pair, picture_rows

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]

MAINS = {"sft": main_sft, "dpo": main_dpo}
DRY = ["--use_cpu", "--bf16", "false", "--max_steps", "2", "--gradient_accumulation_steps", "1", "--train_rows", "8",
       "--learning_rate", "1e-2", "--lr_scheduler_type", "constant", "--activation_checkpointing", "false",
       "--output_dir", "out", "--dtype", "float32"]  # fmt: skip


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_vision_pair(tmp_path)
    for kind in MAINS:
        picture_rows(kind).to_parquet(f"{kind}.parquet")
    return tmp_path


def run(kind: str, how: str, *words: str) -> int:
    config = ROOT / "recipes/configs/gemma-3-4b" / f"{kind}_{how}.yaml"
    models = ["--model_name_or_path", "base", "--instruct_model", "instruct", "--dataset_name", f"{kind}.parquet"]
    return MAINS[kind](["--config", str(config), *models, *DRY, *words])


def moved() -> set[str]:
    """Return which parts of the model differ between BASE and TUNED."""
    base, tuned = (load_file(Path(folder, "model.safetensors")) for folder in ("base", "out"))
    names = {name for name in base if not torch.equal(base[name], tuned[name])}
    return {part for part in ("vision_tower", "projector", "language_model") if any(part in name for name in names)}


@pytest.mark.parametrize("kind", MAINS)
def test_a_frozen_tower_is_not_trained(kind: str, workspace: Path) -> None:
    assert run(kind, "full") == 0
    assert moved() == {"projector", "language_model"}
    base, instruct, tuned, grafted = (
        load_file(Path(folder, "model.safetensors")) for folder in ("base", "instruct", "out", "out/grafted")
    )
    for name, weight in grafted.items():
        exact = instruct[name].double() + (tuned[name].double() - base[name].double())
        torch.testing.assert_close(weight.double(), exact, rtol=1e-6, atol=1e-8)


def test_without_freeze_all_of_it_is_trained(workspace: Path) -> None:
    assert run("sft", "full", "--freeze", "embed_tokens.weight_that_is_not_there") == 2
    assert not Path("out").exists()
    config = (ROOT / "recipes/configs/gemma-3-4b/sft_full.yaml").read_text()
    lines = [line for line in config.splitlines() if not line.startswith("freeze")]
    Path("all.yaml").write_text("\n".join(lines))
    models = ["--model_name_or_path", "base", "--instruct_model", "instruct", "--dataset_name", "sft.parquet"]
    assert main_sft(["--config", "all.yaml", *models, *DRY]) == 0
    assert moved() == {"vision_tower", "projector", "language_model"}


@pytest.mark.parametrize("kind", MAINS)
def test_a_lora_is_on_the_language_model_alone(kind: str, workspace: Path) -> None:
    assert run(kind, "lora", "--lora_r", "4") == 0
    names = load_file("out/adapter_model.safetensors")
    assert names
    assert all("language_model" in name for name in names)
    instruct, grafted = (load_file(Path(folder, "model.safetensors")) for folder in ("instruct", "out/grafted"))
    changed = {name for name in instruct if not torch.equal(instruct[name], grafted[name])}
    assert changed
    assert all("language_model" in name for name in changed)
