"""Runs, grafts and deltas that version 0.1.0 wrote are read for good; `fixtures/make.py` says what they are.

The oracle of a graft is what 0.1.0 wrote, byte for byte, beside sums worked out here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from families import load
from oracle import exact, round_exact
from peft import LoraConfig
from repository import ROOT
from tiny import preference_data, sft_data

from shadow_trl import (
    ShadowDPOConfig,
    ShadowDPOTrainer,
    ShadowSFTConfig,
    ShadowSFTTrainer,
    extract_delta,
    gap,
    graft,
    verify,
)
from shadow_trl.checkpoints.manifest import read_manifest
from shadow_trl.cli import main as command
from shadow_trl.errors import CheckpointError, ConfigError, InputError, OutputExistsError
from shadow_trl.recipes.pipeline_options import is_done, read_plan
from shadow_trl.training.resuming import last_complete

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
HOME = ROOT / "tests" / "fixtures" / "version_0_1_0"
EXPECTED = json.loads((HOME / "expected.json").read_text())
PAIR = {"base": "base", "instruct": "instruct"}
# How 0.1.0 made each graft, said again.
MADE_FROM = {
    "full/grafted": {**PAIR, "tuned": "full"},
    "lora/grafted": {**PAIR, "tuned": "lora"},
    "pissa/grafted": {**PAIR, "tuned": "pissa"},
    "pissa/checkpoint-1/shadow/grafted": {**PAIR, "tuned": "pissa/checkpoint-1"},
    "pipeline/sft/grafted": {**PAIR, "tuned": "pipeline/sft"},
    "pipeline/dpo/grafted": {**PAIR, "tuned": "pipeline/dpo"},
    "grafts/lora_as_adapter": {**PAIR, "tuned": "lora", "format": "adapter"},
    "grafts/pissa_as_adapter": {**PAIR, "tuned": "pissa", "format": "adapter"},
    "grafts/from_delta": {"instruct": "instruct", "delta": "delta"},
    "grafts/from_delta_of_lora": {"instruct": "instruct", "delta": "delta_of_lora"},
    "grafts/from_delta_as_lora": {**PAIR, "tuned": "delta_as_lora"},
    "grafts/weighted": {
        **PAIR, "tuned": ["full:0.5", "lora:0.25"], "scale": 0.5, "modules": "linear", "rounding": "stochastic",
        "seed": 7, "max_shard_size": "8KB",
    },
}  # fmt: skip
SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 3,
}


@pytest.fixture(autouse=True)
def _old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a copy of the files the current folder: the paths in the manifests start there."""
    shutil.copytree(HOME, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")


def digests(folder: str | Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).glob("*.safetensors")}


def product(adapter: str | Path) -> dict[str, torch.Tensor]:
    """Return what a LoRA adds to each weight, in float64."""
    found, config = load(Path(adapter)), json.loads((Path(adapter) / "adapter_config.json").read_text())
    names = [name.removesuffix(".lora_A.weight") for name in found if name.endswith(".lora_A.weight")]
    assert 2 * len(names) == len(found)
    factor = config["lora_alpha"] / config["r"]
    return {
        f"{name.removeprefix('base_model.model.')}.weight": factor
        * (found[f"{name}.lora_B.weight"].double() @ found[f"{name}.lora_A.weight"].double())
        for name in names
    }


def plus(weights: dict[str, torch.Tensor], *terms: tuple[float, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return weights + factor * term + ..., in float64; a term has some of the names or all."""
    total = {name: value.double() for name, value in weights.items()}
    for factor, term in terms:
        assert term.keys() <= total.keys()
        total |= {name: total[name] + factor * value.double() for name, value in term.items()}
    return total


def assert_sum(folder: str | Path, total: dict[str, torch.Tensor], error: float) -> None:
    """Check the weights of `folder` within `error` of each value, and what fp32 loses of a product's largest."""
    found = load(Path(folder))
    assert found.keys() == total.keys()
    for name, value in found.items():
        allowed = error * total[name].abs() + 2e-7 * total[name].abs().max()
        assert ((value.double() - total[name]).abs() <= allowed).all(), name


def spoil_base() -> None:
    """Give BASE other weights of the same shapes."""
    shutil.copy("instruct/model.safetensors", "base/model.safetensors")


def next_stage(kind: str, run: str, output: str | Path, **changes):
    """A trainer that is told the folder of a run, and neither BASE nor INSTRUCT."""
    trainer, config, data = {
        "sft": (ShadowSFTTrainer, ShadowSFTConfig, sft_data),
        "dpo": (ShadowDPOTrainer, ShadowDPOConfig, preference_data),
    }[kind]
    return trainer(model=run, args=config(str(output), **{**SETTINGS, **changes}), train_dataset=data(8))


def test_every_graft_is_here_as_it_was_written():
    kinds = {str(path.parent): read_manifest(path.parent)["kind"] for path in sorted(Path().rglob("shadow.json"))}
    assert {folder for folder, kind in kinds.items() if kind == "graft"} == MADE_FROM.keys() == EXPECTED.keys()
    assert {folder: digests(folder) for folder in EXPECTED} == EXPECTED
    assert set(kinds.values()) == {"run", "graft", "delta"}


@pytest.mark.parametrize("folder", MADE_FROM)
def test_the_same_graft_has_the_same_bytes(tmp_path, folder):
    report = graft(**MADE_FROM[folder], output=tmp_path / "again", progress=False)
    assert digests(tmp_path / "again") == EXPECTED[folder]
    assert not [text for text in report.warnings if "another base" in text]


@pytest.mark.parametrize("folder", MADE_FROM)
def test_it_is_the_graft_that_its_manifest_says(folder):
    report = verify(folder, progress=False)
    assert report.same, report.text()
    assert report.compared == len(load(Path(folder)))


def test_it_is_verified_from_another_folder_with_its_sides_named(tmp_path, monkeypatch):
    old = Path.cwd()
    monkeypatch.chdir(tmp_path)
    for run in ("full", "pissa", "pipeline/sft"):
        sides = {"base": old / "base", "instruct": old / "instruct", "tuned": old / run}
        assert verify(old / run / "grafted", **sides, progress=False).same
    assert verify(
        old / "grafts/from_delta", instruct=old / "instruct", delta=old / "delta", base=old / "base", progress=False
    ).same


def test_the_grafts_are_the_sums():
    base, instruct, full = (load(Path(name)) for name in ("base", "instruct", "full"))
    found = load(Path("full/grafted"))
    for name, value in plus(instruct, (1, full), (-1, base)).items():
        assert found[name].dtype == torch.bfloat16
        assert exact(found[name]) == [round_exact(one, torch.bfloat16) for one in exact(value)], name
    once = 2**-8  # one rounding to bfloat16
    assert_sum("lora/grafted", plus(instruct, (1, product("lora"))), once)
    start = product("pissa/shadow/start")
    assert_sum("pissa/grafted", plus(instruct, (1, product("pissa")), (-1, start)), once)
    assert_sum(
        "pissa/checkpoint-1/shadow/grafted", plus(instruct, (1, product("pissa/checkpoint-1")), (-1, start)), once
    )
    both = ((1, load(Path("pipeline/sft"))), (-1, base), (1, product("pipeline/dpo")))
    assert_sum("pipeline/dpo/grafted", plus(instruct, *both), once)
    assert_sum("grafts/from_delta_as_lora", plus(instruct, (1, product("delta_as_lora"))), once)


def test_deltas_are_made_again_with_the_same_bytes(tmp_path):
    extract_delta(base="base", tuned="full", output=tmp_path / "full", progress=False)
    assert digests(tmp_path / "full") == digests("delta")
    extract_delta(
        base="base", tuned="lora", output=tmp_path / "lora", dtype="bfloat16", max_shard_size="8KB", progress=False
    )
    assert digests(tmp_path / "lora") == digests("delta_of_lora")
    # The sign of a singular vector is not the same on every machine; the product is.
    extract_delta(base="base", tuned="full", output=tmp_path / "rank", rank=2, progress=False)
    wanted = product("delta_as_lora")
    for name, value in product(tmp_path / "rank").items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-6)


def test_a_delta_is_grafted_on_the_command_line_without_base_and_tuned(tmp_path, capsys):
    for gone in ("base", "full"):
        shutil.rmtree(gone)
    output = str(tmp_path / "again")
    assert command(["graft", "--delta", "delta", "--instruct", "instruct", "--output", output, "--quiet"]) == 0
    # A delta of 16-bit checkpoints is exact: the bits are those of the direct graft.
    assert digests(output) == EXPECTED["full/grafted"]
    assert command(["verify", "grafts/from_delta"]) == 0
    assert "is that graft" in capsys.readouterr().out


def test_the_gap_of_the_pair_and_a_run():
    base, instruct, full = (load(Path(name)) for name in ("base", "instruct", "full"))

    def total(one, *other) -> float:
        return sum(float((one[name].double() - sum(side[name].double() for side in other)).abs().sum()) for name in one)

    report = gap("base", "instruct", "full", progress=False)
    assert report.sigma == pytest.approx(total(base, instruct) / (total(base) + total(instruct)))
    assert report.delta_to_gap == pytest.approx(total(full, base) / total(base, instruct))


@pytest.mark.parametrize(("kind", "run"), [("dpo", "full"), ("sft", "pipeline/dpo"), ("sft", "pissa/checkpoint-1")])
def test_a_next_stage_finds_the_pair(tmp_path, kind, run):
    trainer = next_stage(kind, run, tmp_path / "next")
    origins = trainer.origins
    assert (str(origins.base), str(origins.instruct)) == ("base", "instruct")
    # An adapter lies on BASE, or on the full model of the stage before.
    policy = {"full": "full", "pipeline/dpo": "pipeline/sft", "pissa/checkpoint-1": "base"}[run]
    assert (str(origins.policy), origins.adapter) == (policy, None if run == "full" else run)
    assert trainer.processing_class.chat_template == Path("instruct/chat_template.jinja").read_text()


@pytest.mark.parametrize(("kind", "run"), [("dpo", "lora"), ("sft", "pissa")])
def test_the_graft_of_a_next_stage_carries_both_deltas(tmp_path, kind, run):
    trainer = next_stage(kind, run, tmp_path / "next", max_steps=1, graft_dtype="float32")
    origins = trainer.origins
    assert (str(origins.base), str(origins.instruct), origins.adapter) == ("base", "instruct", run)
    trainer.train()
    learnt = product(tmp_path / "next")
    before = product(run)
    assert max(float((learnt[name] - before[name]).abs().max()) for name in learnt) > 1e-3
    start = [(-1, product("pissa/shadow/start"))] if run == "pissa" else []
    assert_sum(tmp_path / "next/grafted", plus(load(Path("instruct")), (1, learnt), *start), 2**-24)


def test_a_run_is_resumed_from_its_checkpoint():
    wanted, before = load(Path("pissa")), load(Path("pissa/checkpoint-1"))
    shutil.rmtree("pissa/grafted")
    (Path("pissa") / "adapter_model.safetensors").unlink()
    assert last_complete(Path("pissa")) == "pissa/checkpoint-1"
    trainer = ShadowSFTTrainer(
        model="base",
        instruct_model="instruct",
        args=ShadowSFTConfig("pissa", **{**SETTINGS, "save_strategy": "steps", "save_steps": 1}),
        train_dataset=sft_data(),
        peft_config=LoraConfig(
            r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights="pissa"
        ),
    )
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2
    found = load(Path("pissa"))
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-4)
        assert float((value - before[name]).abs().max()) > 5e-3  # Adam's step is about the learning rate
    total = plus(load(Path("instruct")), (1, product("pissa")), (-1, product("pissa/shadow/start")))
    assert_sum("pissa/grafted", total, 2**-8)


PIPELINE = ["--config", "pipeline.yaml", "--output_dir", "pipeline"]


def test_both_stages_of_the_pipeline_are_done(capsys):
    assert is_done(Path("pipeline/sft"))
    assert is_done(Path("pipeline/dpo"))
    assert command(["sft-dpo", *PIPELINE]) == 0
    shown = capsys.readouterr().out
    assert "SFT is done: pipeline/sft/grafted" in shown
    assert "DPO is done: pipeline/dpo/grafted" in shown
    for stage in ("sft", "dpo"):
        assert digests(f"pipeline/{stage}/grafted") == EXPECTED[f"pipeline/{stage}/grafted"]
        assert digests(f"pipeline/{stage}") == digests(HOME / "pipeline" / stage)
    # The figures of the report are those of the manifest.
    figures = json.loads(Path("pipeline/report.json").read_text())["graft"]
    manifest = read_manifest("pipeline/dpo/grafted")
    for name in ("sigma", "realised", "noise", "delta_norm"):
        assert figures[name] == manifest[name] is not None


def test_the_pipeline_goes_on_where_a_stage_is_missing_and_knows_its_pair():
    assert read_plan(PIPELINE).left == {}
    shutil.move("base", "elsewhere")  # the same weights by another name
    plan = read_plan([*PIPELINE, "--model_name_or_path", "elsewhere"])
    assert (plan.left, plan.options["dpo"].training.base_model) == ({}, "elsewhere")
    with pytest.raises(OutputExistsError, match="was run with another base: base there, instruct in"):
        read_plan([*PIPELINE, "--model_name_or_path", "instruct"])
    shutil.rmtree("pipeline/dpo/grafted")
    assert read_plan([*PIPELINE, "--model_name_or_path", "elsewhere"]).left == {"dpo": None}


def test_the_wrong_kind_of_folder_is_refused(tmp_path):
    output = tmp_path / "out"
    for folder, run in (("full/grafted", "full"), ("pipeline/dpo/grafted", "pipeline/dpo")):
        with pytest.raises(InputError, match=rf"is a grafted model(.|\n)*folder of the run instead: {run}\."):
            next_stage("sft", folder, output)
    with pytest.raises(ConfigError, match="model delta is a delta, not a model"):
        next_stage("sft", "delta", output)
    with pytest.raises(ConfigError, match="tuned delta_of_lora is a delta, not a model"):
        graft(**PAIR, tuned="delta_of_lora", output=output)
    with pytest.raises(CheckpointError, match=r"full is not a delta: its shadow\.json is of kind run"):
        graft(instruct="instruct", delta="full", output=output)
    with pytest.raises(CheckpointError, match="delta_as_lora is a LoRA adapter made from a delta"):
        graft(instruct="instruct", delta="delta_as_lora", output=output)
    with pytest.raises(CheckpointError, match=r"lora is not a graft: its shadow\.json is of kind run"):
        verify("lora")
    with pytest.raises(ConfigError, match="folder delta is a delta, not a model"):
        verify("delta")
    assert not output.exists()


def test_only_a_result_of_the_same_kind_is_overwritten():
    graft(**PAIR, tuned="lora", output="full/grafted", overwrite=True, progress=False)
    assert digests("full/grafted") == EXPECTED["lora/grafted"]
    extract_delta(base="base", tuned="lora", output="delta", overwrite=True, progress=False)
    for wrong in ("pipeline/sft", "delta_of_lora"):
        with pytest.raises(OutputExistsError, match="is not a graft"):
            graft(**PAIR, tuned="full", output=wrong, overwrite=True)
    with pytest.raises(OutputExistsError, match="is not a delta"):
        extract_delta(base="base", tuned="full", output="lora/grafted", overwrite=True)


def test_a_changed_base_is_found(tmp_path, capsys):
    spoil_base()
    for kind, run in (("dpo", "full"), ("sft", "lora"), ("sft", "pissa"), ("sft", "pipeline/dpo")):
        with pytest.raises(InputError, match=rf"base of the run in {run} has changed since: 1 of 1 weight files"):
            next_stage(kind, run, tmp_path / "next")
    assert not (tmp_path / "next").exists()
    for folder in ("full/grafted", "pipeline/dpo/grafted", "grafts/weighted"):
        assert "base: model.safetensors" in verify(folder, progress=False).digests
    assert command(["verify", "full/grafted"]) == 1
    assert "is not that graft" in capsys.readouterr().out
    report = graft(base="base", instruct="instruct", tuned="full", output=tmp_path / "out", progress=False)
    assert any("was trained on another base with other weights" in text for text in report.warnings)
    with pytest.raises(ConfigError, match="base base is not what delta delta was taken from: 1 of 1 files"):
        graft(base="base", instruct="instruct", delta="delta", output=tmp_path / "of_delta")


def test_a_changed_stage_before_is_found(tmp_path):
    shutil.copy("full/model.safetensors", "pipeline/sft/model.safetensors")
    assert verify("pipeline/dpo/grafted", progress=False).same  # both runs have the same weights
    shutil.copy("base/model.safetensors", "pipeline/sft/model.safetensors")
    with pytest.raises(InputError, match="policy of the run in pipeline/dpo has changed since"):
        graft(**PAIR, tuned="pipeline/dpo", output=tmp_path / "out")
    with pytest.raises(InputError, match="policy of the run in pipeline/dpo has changed since"):
        next_stage("dpo", "pipeline/dpo", tmp_path / "out")
