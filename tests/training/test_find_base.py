"""A trainer and a recipe without a model: BASE is what INSTRUCT was made from, where the user says so."""

from __future__ import annotations

import pytest
from hub_cache import into_cache
from huggingface_hub import constants
from runs import settings
from tiny import sft_data

from shadow_trl import ShadowSFTConfig, ShadowSFTTrainer
from shadow_trl.errors import ConfigError
from shadow_trl.recipes.options import parse


def test_a_trainer_without_a_model(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for number, (name, folder) in enumerate(zip(("base", "it"), pair, strict=True)):
        into_cache(tmp_path / "cache", f"own/{name}", f"{number}" * 40, folder, branch="main")
    head = tmp_path / "cache" / "models--own--it" / "snapshots" / ("1" * 40) / "README.md"
    head.write_text("---\nbase_model: own/base\n---\n")
    given = {"instruct_model": "own/it", "train_dataset": sft_data()}
    for args in (None, ShadowSFTConfig(**settings(tmp_path / "out"))):
        with pytest.raises(ConfigError, match=r"model \(BASE\) is missing. Name it, or pass find_base=True"):
            ShadowSFTTrainer(args=args, **given)
    with pytest.raises(ConfigError, match="no INSTRUCT is named"):
        ShadowSFTTrainer(args=ShadowSFTConfig(**settings(tmp_path / "out")), train_dataset=sft_data())
    assert not (tmp_path / "out").exists()
    (head.parent.parent.parent / "refs" / "main").write_text("1" * 40)
    (tmp_path / "cache/models--own--base/snapshots" / ("0" * 40) / "README.md").write_text("---\nlicense: mit\n---\n")
    trainer = ShadowSFTTrainer(args=ShadowSFTConfig(**settings(tmp_path / "out", find_base=True)), **given)
    assert (trainer.origins.base.source, trainer.origins.base.revision) == ("own/base", "0" * 40)
    assert trainer.origins.policy == trainer.origins.base


def test_a_recipe_without_a_model():
    words = ["--instruct_model", "Qwen/Qwen3-0.6B", "--dataset_name", "rows.jsonl", "--use_cpu", "--bf16", "false"]
    with pytest.raises(ConfigError, match=r"model_name_or_path \(BASE\) is missing. Qwen/Qwen3-0.6B was made from"):
        parse("sft", ["--model_name_or_path", "", *words])
    assert parse("sft", ["--find_base", *words]).model.model_name_or_path == "Qwen/Qwen3-0.6B-Base"
