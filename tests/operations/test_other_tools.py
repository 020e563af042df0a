"""Folders as axolotl, LLaMA-Factory, torchtune and unsloth lay them out are grafted, by the sum in float64."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stages import tuned_weights, weights

from shadow_trl import graft
from shadow_trl.errors import CheckpointError

# As each tool writes it: torchtune the least, unsloth the name of a repository of quantised weights.
TORCHTUNE = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "peft_type": "LORA"}
PEFT = {**TORCHTUNE, "bias": "none", "task_type": "CAUSAL_LM", "inference_mode": True, "lora_dropout": 0.05}
UNSLOTH = {
    **PEFT, "base_model_name_or_path": "unsloth/qwen3-0.6b-base-unsloth-bnb-4bit",
    "auto_mapping": {"base_model_class": "Qwen3ForCausalLM", "unsloth_fixed": True},
}  # fmt: skip


def factors(base: Path, rank: int = 2) -> dict[str, torch.Tensor]:
    """A LoRA on the query and value projections, under PEFT's names."""
    torch.manual_seed(4)
    found = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if "q_proj" in name or "v_proj" in name:
            place = f"base_model.model.{name.removesuffix('.weight')}"
            found[f"{place}.lora_A.weight"] = 0.1 * torch.randn(rank, weight.shape[1])
            found[f"{place}.lora_B.weight"] = 0.1 * torch.randn(weight.shape[0], rank)
    return found


def write_adapter(folder: Path, base: Path, config: dict, *, pickled: bool = False, rank: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    state = factors(base, rank)
    if pickled:
        torch.save(state, folder / "adapter_model.bin")
    else:
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": rank, "lora_alpha": 2 * rank}))
    return folder


def trained(base: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    found = load_file(base / "model.safetensors")
    return {name: (value + 0.01 * torch.randn(value.shape)).to(value.dtype) for name, value in found.items()}


def write_full(
    folder: Path, base: Path, state: dict[str, torch.Tensor], *, name: str = "model-{}-of-{}", pickled: bool = False,
    also_listed: tuple[str, ...] = (),
) -> Path:  # fmt: skip
    """Two files and their index, beside all that BASE's folder has but weights."""
    folder.mkdir(parents=True)
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    suffix, stem = (".bin", "pytorch_model.bin") if pickled else (".safetensors", "model.safetensors")
    listed = {}
    for number in (1, 2):
        part = dict(list(state.items())[number - 1 :: 2])
        file = name.format(f"{number:05}", "00002") + suffix
        if pickled:
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
        listed |= dict.fromkeys([*part, *also_listed], file)
    index = {"metadata": {"total_size": 1}, "weight_map": listed}
    (folder / f"{stem}.index.json").write_text(json.dumps(index, indent=2))
    return folder


def state_of(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    """TUNED in float64, from the files alone."""
    if (folder / "adapter_model.bin").is_file():
        save_file(torch.load(folder / "adapter_model.bin", weights_only=True), folder / "adapter_model.safetensors")
    if (folder / "adapter_config.json").is_file():
        return tuned_weights(base, folder)
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    for path in folder.glob("*.bin"):
        found |= torch.load(path, weights_only=True)
    return {name: value.double() for name, value in found.items()}


def torchtune_full(root: Path, base: Path, **how) -> Path:
    # The index keeps what the checkpoint it started from listed; of old Llamas, buffers that are not written.
    old = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq")
    folder = write_full(root / "epoch_0", base, trained(base), also_listed=old, **how)
    (root / "recipe_state").mkdir()
    torch.save({"epochs_run": 1}, root / "recipe_state/recipe_state.pt")
    return folder


def torchtune_adapter(root: Path, base: Path, **how) -> Path:
    folder = write_adapter(root / "epoch_0", base, {**TORCHTUNE, "base_model_name_or_path": ""}, **how)
    torch.save({"layers.0.attn.q_proj.lora_a.weight": torch.zeros(2, 16)}, folder / "adapter_model.pt")
    shutil.copy(base / "config.json", folder)
    return folder


def axolotl_adapter(root: Path, base: Path) -> Path:
    config = {**PEFT, "base_model_name_or_path": str(base)}
    write_adapter(root / "checkpoint-2", base, config, rank=3)
    write_full(root / "merged", base, trained(base))
    torch.save({}, root / "training_args.bin")
    return write_adapter(root, base, config)


def axolotl_merged(root: Path, base: Path) -> Path:
    axolotl_adapter(root, base)
    return root / "merged"


def llama_factory_full(root: Path, base: Path) -> Path:
    folder = write_full(root / "sft", base, trained(base))
    for name in ("all_results.json", "trainer_state.json", "train_results.json"):
        (folder / name).write_text("{}")
    torch.save({}, folder / "training_args.bin")
    return folder


def llama_factory_pissa(root: Path, base: Path) -> Path:
    write_adapter(root, base, {**PEFT, "init_lora_weights": "pissa"})
    write_adapter(root / "pissa_init", base, {**PEFT, "init_lora_weights": True})
    return write_adapter(root / "pissa_converted", base, {**PEFT, "init_lora_weights": True}, rank=4)


def unsloth_merged(root: Path, base: Path) -> Path:
    state = trained(base)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()  # of a tied model
    return write_full(root / "merged", base, state)


LAYOUTS = {
    "torchtune full": torchtune_full,
    "torchtune full, older names": lambda root, base: torchtune_full(root, base, name="ft-model-{}-of-{}"),
    "torchtune full, pickled": lambda root, base: torchtune_full(root, base, pickled=True),
    "torchtune adapter": torchtune_adapter,
    "torchtune adapter, pickled": lambda root, base: torchtune_adapter(root, base, pickled=True),
    "axolotl adapter": axolotl_adapter,
    "axolotl merged": axolotl_merged,
    "LLaMA-Factory full": llama_factory_full,
    "LLaMA-Factory converted PiSSA": llama_factory_pissa,
    "unsloth adapter": lambda root, base: write_adapter(root / "lora", base, UNSLOTH),
    "unsloth merged": unsloth_merged,
}


def check_sum(pair, tuned: dict[str, torch.Tensor], output: Path) -> None:
    base, instruct, found = weights(pair[0]), weights(pair[1]), load_file(output / "model.safetensors")
    assert found.keys() == instruct.keys()
    for name, value in instruct.items():
        torch.testing.assert_close(found[name].double(), value + tuned[name] - base[name], rtol=1e-6, atol=1e-7)
    assert any((tuned[name] - base[name]).abs().max() > 1e-3 for name in base)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_grafted(pair, tmp_path, layout):
    tuned = LAYOUTS[layout](tmp_path / "out", pair[0])
    report = graft(
        base=pair[0], instruct=pair[1], tuned=tuned, output=tmp_path / "grafted", dtype="float32", format="model"
    )
    check_sum(pair, state_of(tuned, pair[0]), tmp_path / "grafted")
    renamed = [warning for warning in report.warnings if "was trained on another base by its name" in warning]
    assert len(renamed) == (layout == "unsloth adapter")


def test_an_adapter_beside_its_merged_model_is_grafted_once_it_has_a_folder_of_its_own(pair, tmp_path):
    """What torchtune's recipes of LoRA leave."""
    folder = torchtune_full(tmp_path / "out", pair[0])
    write_adapter(folder, pair[0], TORCHTUNE)
    given = {"base": pair[0], "instruct": pair[1], "output": tmp_path / "grafted", "dtype": "float32"}
    with pytest.raises(CheckpointError, match=r"both a model and an adapter(.|\n)*a folder of its own"):
        graft(tuned=folder, **given)
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).rename(tmp_path / "adapter" / name)
    graft(tuned=tmp_path / "adapter", format="model", **given)
    check_sum(pair, tuned_weights(pair[0], tmp_path / "adapter"), tmp_path / "grafted")


def test_other_weights_that_only_the_index_has_are_refused(pair, tmp_path):
    folder = write_full(tmp_path / "out", pair[0], trained(pair[0]), also_listed=("model.layers.2.mlp.up_proj.weight",))
    with pytest.raises(CheckpointError, match=r"1 weights of model\.safetensors\.index\.json(.|\n)*layers\.2"):
        graft(base=pair[0], instruct=pair[1], tuned=folder, output=tmp_path / "grafted")


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_names_that_torch_compile_gave_are_told_with_the_way_out(pair, tmp_path, kind):
    if kind == "full":
        state = {f"_orig_mod.{name}": value for name, value in trained(pair[0]).items()}
        folder = write_full(tmp_path / "out", pair[0], state)
    else:
        folder = write_adapter(tmp_path / "out", pair[0], PEFT)
        file = folder / "adapter_model.safetensors"
        save_file(
            {name.replace("model.model", "model._orig_mod.model"): v for name, v in load_file(file).items()}, file
        )
    with pytest.raises(CheckpointError, match=r"torch\.compile(.|\n)*model\._orig_mod\.save_pretrained"):
        graft(base=pair[0], instruct=pair[1], tuned=folder, output=tmp_path / "grafted")
    assert not (tmp_path / "grafted").exists()
