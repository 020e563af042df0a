"""SFT, then DPO from its folder: nothing is repeated, and the graft carries both deltas."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from runs import LORA, dpo, log_probability, lora, settings, sft
from stages import tuned_weights, weights
from tiny import make_pair, preference_data
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadow_trl import ShadowDPOConfig, ShadowDPOTrainer, graft
from shadow_trl.checkpoints.manifest import read_manifest
from shadow_trl.errors import AdapterError, InputError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def go_on(run: Path, folder: Path, **changes) -> ShadowDPOTrainer:
    """The second stage as a user writes it: the run's folder, and nothing of the first stage said again."""
    peft_config = changes.pop("peft_config", None)
    trainer = ShadowDPOTrainer(
        model=str(run),
        args=ShadowDPOConfig(**settings(folder, **changes)),
        train_dataset=preference_data(),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-6, atol=1e-8, msg=lambda text, name=name: name + text
        )


def test_full_after_full_carries_both_deltas(fp32_pair, full_run, tmp_path):
    trainer = go_on(full_run, tmp_path)
    base, instruct, tuned = weights(fp32_pair[0]), weights(fp32_pair[1]), weights(tmp_path)
    assert str(trainer.origins.base) == str(fp32_pair[0])
    assert_close(weights(tmp_path / "grafted"), {name: instruct[name] + (tuned[name] - base[name]) for name in tuned})
    # graft of SFT then DPO = graft(SFT) + (DPO - SFT), and the second stage did move the weights
    first, stage = weights(full_run / "grafted"), weights(full_run)
    assert_close(weights(tmp_path / "grafted"), {name: first[name] + (tuned[name] - stage[name]) for name in tuned})
    assert max((tuned[name] - stage[name]).abs().max().item() for name in tuned) > 1e-3


def test_one_adapter_through_both_stages(fp32_pair, lora_run, tmp_path):
    trainer = go_on(lora_run, tmp_path)
    assert list(trainer.model.peft_config) == ["default", "ref"]
    manifest = read_manifest(tmp_path)
    assert (manifest["adapter"], manifest["ref_policy"]) == ({"source": str(lora_run)}, "init")
    assert (manifest["trainer"], manifest["loaded_in"]) == ("ShadowDPOTrainer", ["float32", "float32"])
    base, instruct = weights(fp32_pair[0]), weights(fp32_pair[1])
    tuned, stage = tuned_weights(fp32_pair[0], tmp_path), tuned_weights(fp32_pair[0], lora_run)
    assert max((tuned[name] - stage[name]).abs().max().item() for name in tuned) > 1e-4
    assert_close(weights(tmp_path / "grafted"), {name: instruct[name] + (tuned[name] - base[name]) for name in tuned})


@pytest.mark.parametrize("policy", ["init", pytest.param("base", marks=pytest.mark.slow), "grafted"])
def test_adapter_after_full_carries_both_deltas(fp32_pair, full_run, tmp_path, policy):
    go_on(full_run, tmp_path / "dpo", peft_config=lora(), ref_policy=policy)
    base, instruct = weights(fp32_pair[0]), weights(fp32_pair[1])
    tuned, stage = tuned_weights(full_run, tmp_path / "dpo"), weights(full_run)
    assert max((tuned[name] - stage[name]).abs().max().item() for name in tuned) > 1e-4
    expected = {name: instruct[name] + (tuned[name] - base[name]) for name in tuned}
    assert_close(weights(tmp_path / "dpo" / "grafted"), expected)
    # The same from the folder, as on the command line.
    graft(instruct=fp32_pair[1], tuned=tmp_path / "dpo", output=tmp_path / "again")
    assert_close(weights(tmp_path / "again"), expected)
    manifest = read_manifest(tmp_path / "again")
    assert manifest["tuned"]["source"] == str(tmp_path / "dpo")
    assert set(manifest["tuned"]["digests"]) == {"adapter_model.safetensors"}
    assert manifest["start"]["source"] == str(full_run)
    assert manifest["base"]["source"] == str(fp32_pair[0])
    assert not [path.name for path in tmp_path.glob("**/.shadow*")]


def test_full_after_merged_adapter_carries_both_deltas(fp32_pair, lora_run, tmp_path):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(fp32_pair[0]), lora_run).merge_and_unload()
    model.save_pretrained(tmp_path / "merged")
    trainer = ShadowDPOTrainer(
        model=str(tmp_path / "merged"),
        base_model=str(fp32_pair[0]),
        instruct_model=str(fp32_pair[1]),
        args=ShadowDPOConfig(**settings(tmp_path / "dpo")),
        train_dataset=preference_data(),
    )
    trainer.train()
    base, instruct, tuned = weights(fp32_pair[0]), weights(fp32_pair[1]), weights(tmp_path / "dpo")
    expected = {name: instruct[name] + (tuned[name] - base[name]) for name in tuned}
    assert_close(weights(tmp_path / "dpo" / "grafted"), expected)


def test_peft_config_of_the_same_adapter_goes_on_and_another_is_refused(lora_run, tmp_path):
    trainer = go_on(lora_run, tmp_path / "same", peft_config=lora(), graft=False)
    assert trainer.model.peft_config["default"].r == 4
    with pytest.raises(AdapterError, match=r"r: 4 in .*, 8 in peft_config"):
        go_on(lora_run, tmp_path / "other", peft_config=LoraConfig(**{**LORA, "r": 8}))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("policy", ["init", "base", "instruct", "grafted"])
@pytest.mark.parametrize(
    "precompute", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["precomputed", "in memory"]
)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_first_margin_of_the_second_stage_by_hand(
    fp32_pair, full_run, lora_run, tmp_path, policy, kind, precompute, monkeypatch
):
    run = full_run if kind == "full" else lora_run
    base, instruct = weights(fp32_pair[0]), weights(fp32_pair[1])
    start = weights(run) if kind == "full" else tuned_weights(fp32_pair[0], run)
    scale = 0.5
    states = {
        "init": start,
        "base": base,
        "instruct": instruct,
        "grafted": {name: instruct[name] + scale * (start[name] - base[name]) for name in start},
    }
    model = AutoModelForCausalLM.from_pretrained(fp32_pair[0], dtype=torch.float64)
    tokenizer, rows, margins = AutoTokenizer.from_pretrained(fp32_pair[1]), preference_data(4), []
    logps = {}
    for name in ("init", policy):
        model.load_state_dict(states[name], strict=False)
        model.tie_weights()
        for place, row in enumerate(rows):
            for answer in ("chosen", "rejected"):
                logps[name, place, answer] = log_probability(model, tokenizer, row, answer)
    for place in range(len(rows)):
        gains = {
            answer: logps["init", place, answer] - logps[policy, place, answer] for answer in ("chosen", "rejected")
        }
        margins.append(2.0 * (gains["chosen"] - gains["rejected"]))

    trainer = ShadowDPOTrainer(
        model=str(run),
        args=ShadowDPOConfig(
            **settings(
                tmp_path,
                ref_policy=policy,
                precompute_ref_log_probs=precompute,
                beta=2.0,
                max_steps=1,
                graft=False,
                graft_scale=scale,
            )
        ),
        train_dataset=rows,
    )
    assert not list(tmp_path.glob(".*shadow-part*"))
    trainer.train()
    assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(sum(margins) / len(margins), abs=2e-5)
    if policy != "init":
        assert abs(sum(margins)) > 1e-4


def test_moved_folder_resolves_beside_the_manifest(tmp_path, monkeypatch):
    make_pair(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    sft((Path("base"), Path("instruct")), Path("run")).train()
    # Seen from the run's own folder, the pair is found at the same relative place.
    shutil.move(tmp_path / "here", tmp_path / "there")
    shutil.copytree(tmp_path / "there" / "base", tmp_path / "there" / "run" / "base")
    shutil.copytree(tmp_path / "there" / "instruct", tmp_path / "there" / "run" / "instruct")
    monkeypatch.chdir(tmp_path)
    trainer = go_on(tmp_path / "there" / "run", tmp_path / "dpo")
    assert str(trainer.origins.base) == str(tmp_path / "there" / "run" / "base")


def test_deleted_and_changed_base_are_refused(tmp_path):
    pair = make_pair(tmp_path / "pair")
    sft(pair, tmp_path / "run", peft_config=lora()).train()
    other = make_pair(tmp_path / "other", gap=0.5)[1]
    kept = pair[0] / "model.safetensors"
    shutil.move(kept, tmp_path / "kept")
    shutil.copy(other / "model.safetensors", kept)
    with pytest.raises(InputError, match="has changed since: 1 of 1 weight files"):
        go_on(tmp_path / "run", tmp_path / "dpo")
    shutil.move(pair[0], tmp_path / "away")
    with pytest.raises(InputError, match=r"is gone: .* base_model="):
        go_on(tmp_path / "run", tmp_path / "dpo")
    assert not (tmp_path / "dpo").exists()
    shutil.move(tmp_path / "kept", tmp_path / "away" / "model.safetensors")
    trainer = ShadowDPOTrainer(
        model=str(tmp_path / "run"),
        base_model=str(tmp_path / "away"),
        args=ShadowDPOConfig(**settings(tmp_path / "dpo")),
        train_dataset=preference_data(),
    )
    trainer.train()
    assert (tmp_path / "dpo" / "grafted" / "model.safetensors").exists()


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_run_with_relative_paths_grafts_from_another_folder(tmp_path, monkeypatch, with_lora):
    make_pair(tmp_path / "pair")
    monkeypatch.chdir(tmp_path / "pair")
    sft((Path("base"), Path("instruct")), Path("run"), peft_config=lora() if with_lora else None).train()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    # All sides are given: what the manifest calls them from another folder does not matter.
    pair = tmp_path / "pair"
    graft(base=pair / "base", instruct=pair / "instruct", tuned=pair / "run", output="again")
    assert_close(weights(Path("again")), weights(pair / "run" / "grafted"))


def test_graft_of_the_first_stage_by_folder_equals_its_own(fp32_pair, lora_run, tmp_path):
    graft(base=fp32_pair[0], instruct=fp32_pair[1], tuned=lora_run, output=tmp_path / "again")
    for name, tensor in weights(tmp_path / "again").items():
        assert torch.equal(tensor, weights(lora_run / "grafted")[name])


def test_reference_of_full_and_lora_from_a_raw_base_writes_nothing(fp32_pair, tmp_path):
    dpo(fp32_pair, tmp_path / "out", ref_policy="grafted")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
