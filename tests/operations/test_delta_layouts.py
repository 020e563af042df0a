"""Deltas of real architectures: other names and layouts on each side, and adapters that PEFT loads."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from architectures import ROLES, SCALE, assert_sum, in_memory, model_class

from shadow_trl import extract_delta, graft

QUIET = {"digest": "none", "progress": False}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "qwen2_5_vl", "qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.slow
@pytest.mark.parametrize("other", [(), ("tuned",), ("instruct",)])
def test_a_delta_lands_whatever_the_layouts(name: str, other: tuple[str, ...], families: Any, tmp_path: Any) -> None:
    """Single experts or fused ones, old prefixes or new: the graft of the delta is the sum of the models in memory."""
    folder = families(name)
    base, instruct, tuned = (folder / (f"{role}-memory" if role in other else role) for role in ROLES)
    report = extract_delta(base=base, tuned=tuned, output=tmp_path / "delta", **QUIET)
    assert report.exact
    graft(instruct=instruct, delta=tmp_path / "delta", output=tmp_path / "out", scale=SCALE, dtype="float32", **QUIET)
    assert_sum(name, base, instruct, tuned, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta", "out"]


def test_a_delta_from_another_layout_needs_no_base(families: Any, tmp_path: Any) -> None:
    folder = families("mixtral")
    extract_delta(base=folder / "base", tuned=folder / "tuned-memory", output=tmp_path / "delta", **QUIET)
    (tmp_path / "moved").mkdir()
    delta = (tmp_path / "delta").rename(tmp_path / "moved" / "delta")
    instruct = folder / "instruct-memory"
    graft(instruct=instruct, delta=delta, output=tmp_path / "out", scale=SCALE, dtype="float32", **QUIET)
    assert_sum("mixtral", folder / "base", instruct, folder / "tuned", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "gemma3", "gpt_oss"])
def test_low_rank_forms_load_with_peft_and_name_what_has_none(name: str, families: Any, tmp_path: Any) -> None:
    folder = families(name)
    base, tuned = folder / "base", folder / "tuned"
    report = extract_delta(base=base, tuned=tuned, output=tmp_path / "lora", rank=24, **QUIET)
    model = model_class(name).from_pretrained(base, dtype=torch.float32)
    linear = {n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "lora")
    adapted = {n for n, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == set(report.modules) == linear - ({"lm_head"} if model.config.tie_word_embeddings else set())
    merged = dict(loaded.merge_and_unload().state_dict())
    t = in_memory(name, tuned)
    for module in adapted:  # rank 24 is at least the smaller side of all of them: everything is kept
        key = f"{module}.weight"
        assert report.modules[module]["energy"] == pytest.approx(1, abs=1e-6)
        torch.testing.assert_close(merged[key], t[key], rtol=1e-5, atol=1e-5)
    assert any("norm" in lost for lost in report.lost)
    assert any("embed_tokens" in lost for lost in report.lost)
    assert any("experts" in lost for lost in report.lost) == (name in ("qwen3_moe", "gpt_oss"))
    shares = sum(module["share"] for module in report.modules.values()) + sum(report.lost.values())
    assert shares == pytest.approx(1, abs=1e-9)
