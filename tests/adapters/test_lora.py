from __future__ import annotations

import json
import math

import huggingface_hub
import pytest
import torch
from families import LINEAR, family, load, lora, moved, shapes, write
from hub_cache import into_cache
from peft import LoraConfig, PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file

from shadow_trl import graft
from shadow_trl.adapters.kinds import check_has_delta, kind_of
from shadow_trl.adapters.lora import streams
from shadow_trl.checkpoints.checkpoint import Checkpoint
from shadow_trl.checkpoints.manifest import read_manifest, write_manifest
from shadow_trl.errors import AdapterError, ConfigError, GraftError

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def sides(tmp_path):
    found = family(tmp_path / "models", dtypes=(FP32,) * 3)
    return {"base": found["base"], "instruct": found["instruct"]}


def run(sides, tuned, output, **options):
    return graft(**sides, tuned=tuned, output=output, progress=False, **options)


def deltas(adapter, factor: float) -> dict[str, torch.Tensor]:
    found = load_file(adapter / "adapter_model.safetensors")
    wanted = {}
    for name in LINEAR:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in found:
            left, right = found[f"{module}.lora_B.weight"], found[f"{module}.lora_A.weight"]
            wanted[name] = factor * left.double() @ right.double()
    return wanted


def check(output, instruct, wanted, rtol=1e-6):
    found, before = load(output), load(instruct)
    assert set(found) == set(before)
    for name, value in found.items():
        if name in wanted:
            total = before[name].double() + wanted[name]
            assert float((value.double() - total).norm() / total.norm()) < rtol, name
        else:
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4 / math.sqrt(2)),
        ({"lora_alpha": 1}, 0.5),
        ({"init_lora_weights": "gaussian"}, 2.0),
    ],
)
def test_the_product_is_added_in_fp32(sides, tmp_path, config, factor):
    adapter = lora(tmp_path / "adapter", **config)
    report = run(sides, adapter, tmp_path / "out")
    check(tmp_path / "out", sides["instruct"], deltas(adapter, factor))
    assert (report.form, report.grafted, report.copied) == ("model", 4, len(shapes()) - 4)
    assert report.sigma is None
    norm = math.sqrt(sum(float(value.norm()) ** 2 for value in deltas(adapter, factor).values()))
    assert report.delta_norm == pytest.approx(norm, rel=1e-5)


def test_patterns_of_rank_and_alpha(sides, tmp_path):
    config = {"alpha_pattern": {"layers.0.self_attn.q_proj": 16, "q_proj": 6}, "rank_pattern": {"down_proj": 2}, "r": 2}
    adapter = lora(tmp_path / "adapter", **config)
    run(sides, adapter, tmp_path / "out")
    wanted = deltas(adapter, 1.0)
    factors = {"model.layers.0.self_attn.q_proj.weight": 8, "model.layers.1.self_attn.q_proj.weight": 3}
    check(tmp_path / "out", sides["instruct"], {name: factors.get(name, 2) * value for name, value in wanted.items()})
    lora(tmp_path / "wrong", rank_pattern={"down_proj": 4})
    with pytest.raises(AdapterError, match="has rank 2 in the weights and 4"):
        run(sides, tmp_path / "wrong", tmp_path / "out2")


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_blocks_that_cut_rows_do_not_change_the_sum(sides, tmp_path, monkeypatch, block):
    from shadow_trl.grafting import stream as streaming

    monkeypatch.setattr(streaming, "CHUNK", 4096)
    monkeypatch.setattr(streaming, "BLOCK", block)
    adapter = lora(tmp_path / "adapter")
    run(sides, adapter, tmp_path / "out", scale=0.5)
    check(tmp_path / "out", sides["instruct"], deltas(adapter, 1.0))


def test_base_may_be_left_out_and_its_weights_are_not_read(sides, tmp_path):
    adapter = lora(tmp_path / "adapter", base_model_name_or_path=str(sides["base"]))
    (sides["base"] / "model.safetensors").unlink()
    graft(instruct=sides["instruct"], tuned=adapter, output=tmp_path / "out", progress=False)
    check(tmp_path / "out", sides["instruct"], deltas(adapter, 2.0))
    nameless = lora(tmp_path / "nameless", base_model_name_or_path=None)
    with pytest.raises(ConfigError, match="base is missing"):
        graft(instruct=sides["instruct"], tuned=nameless, output=tmp_path / "out2", progress=False)


def test_a_merged_adapter_gives_the_same_graft(sides, tmp_path):
    adapter = lora(tmp_path / "adapter")
    wanted = deltas(adapter, 2.0)
    base = load(sides["base"])
    merged = write(tmp_path / "merged", {n: (v.double() + wanted.get(n, 0)).float() for n, v in base.items()})
    run(sides, adapter, tmp_path / "a")
    run(sides, merged, tmp_path / "b")
    other = load(tmp_path / "b")
    for name, value in load(tmp_path / "a").items():
        assert float((value - other[name]).norm() / value.norm()) < 1e-6


def test_an_untrained_adapter_is_instruct_bit_by_bit(sides, tmp_path):
    weights = {name: value.bfloat16() for name, value in load(sides["instruct"]).items()}
    for value in weights.values():
        value.view(-1)[::3] = -0.0
    sides["instruct"] = write(tmp_path / "instruct", weights)
    adapter = lora(tmp_path / "adapter")
    found = load_file(adapter / "adapter_model.safetensors")
    save_file({n: v * 0 if "lora_B" in n else v for n, v in found.items()}, adapter / "adapter_model.safetensors")
    run(sides, adapter, tmp_path / "out")
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (sides["instruct"] / name).read_bytes()


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_instruct_scale_moves_every_weight(sides, tmp_path, scale):
    adapter = lora(tmp_path / "adapter")
    run(sides, adapter, tmp_path / "out", instruct_scale=0.25, scale=scale)
    base, instruct, wanted = load(sides["base"]), load(sides["instruct"]), deltas(adapter, 2.0)
    for name, value in load(tmp_path / "out").items():
        total = (
            base[name].double() + 0.25 * (instruct[name].double() - base[name].double()) + scale * wanted.get(name, 0)
        )
        assert float((value.double() - total).norm() / total.norm()) < 1e-6


def test_modules_choose_among_the_adapters(sides, tmp_path):
    adapter = lora(tmp_path / "adapter")
    assert run(sides, adapter, tmp_path / "out", modules="q_proj").grafted == 2
    wanted = {name: value for name, value in deltas(adapter, 2.0).items() if "q_proj" in name}
    check(tmp_path / "out", sides["instruct"], wanted)
    with pytest.raises(ConfigError, match="match no weight"):
        run(sides, adapter, tmp_path / "out2", modules="k_proj")


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_adapter_form(sides, tmp_path, scale):
    adapter = lora(tmp_path / "adapter")
    (sides["instruct"] / "chat_template.jinja").write_text("{{ x }}")
    (sides["instruct"] / "generation_config.json").write_text("{}")
    report = run(sides, adapter, tmp_path / "out", format="adapter", scale=scale)
    assert (report.form, report.grafted) == ("adapter", 4)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "README.md",
        "shadow.json",
    }
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config == {
        **json.loads((adapter / "adapter_config.json").read_text()),
        "base_model_name_or_path": str(sides["instruct"]),
        "revision": None,
    }
    found, before = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", adapter))
    for name, value in found.items():
        assert torch.equal(value, before[name] * (scale if "lora_B" in name else 1))
    assert read_manifest(tmp_path / "out")["form"] == "adapter"


def test_auto_gives_the_adapter_form_for_a_hub_instruct_only(sides, tmp_path, monkeypatch):
    adapter = lora(tmp_path / "adapter")
    assert run(sides, adapter, tmp_path / "a").form == "model"
    into_cache(tmp_path / "cache", "someone/model", "1" * 40, sides["instruct"], branch="v2")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub = {**sides, "instruct": "someone/model@v2"}
    assert run(hub, adapter, tmp_path / "b").form == "adapter"
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/model", "1" * 40)
    assert run(hub, adapter, tmp_path / "c", dtype="float32").form == "model"
    assert run(hub, adapter, tmp_path / "d", modules="q_proj").form == "model"


def test_every_module_must_land(sides, tmp_path):
    adapter = lora(tmp_path / "adapter")
    found = load_file(adapter / "adapter_model.safetensors")
    strange = {name.replace("layers.1", "layers.7"): value for name, value in found.items()}
    save_file(strange, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"2 of 4 modules(.|\n)*layers\.7\.mlp\.down_proj  nearest: model\.layers\."):
        run(sides, adapter, tmp_path / "out")
    save_file({f"base_model.model.x.{n}": v for n, v in found.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="4 of 4 modules"):
        run(sides, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_shapes_are_refused(sides, tmp_path):
    adapter = lora(tmp_path / "adapter")
    found = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    found[key] = torch.zeros(2, 25)
    save_file(found, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"another shape(.|\n)*\(8, 25\)(.|\n)*\(8, 24\)"):
        run(sides, adapter, tmp_path / "out")


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "IA3"}, {"use_dora": True}, {"bias": "all"}, {"init_lora_weights": "pissa"}, {"lora_bias": True},
        {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1]}, {"target_parameters": ["x"]},
        {"something_new": True},
    ],
)  # fmt: skip
def test_features_beyond_a_product_are_named(config):
    (name, value), *_ = config.items()
    found = kind_of({"peft_type": "LORA", "r": 2, "bias": "none", **config}).beyond
    assert [line.partition("  ")[0] for line in found] == [f"{name} = {value}"]


def test_settings_unknown_to_peft_are_named(sides, tmp_path):
    adapter = lora(tmp_path / "adapter", something_new=True)
    with pytest.raises(AdapterError, match=r"does not know\.\n  something_new = True"):
        run(sides, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_beyond_two_factors_are_named(sides, tmp_path):
    adapter = lora(tmp_path / "adapter")
    found = load_file(adapter / "adapter_model.safetensors")
    extra = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    save_file({**found, extra: torch.ones(8)}, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=extra):
        run(sides, adapter, tmp_path / "out")


def test_the_settings_of_peft_itself_are_a_plain_lora():
    peft = pytest.importorskip("peft")
    for options in ({}, {"use_rslora": True}, {"rank_pattern": {"q": 4}}, {"init_lora_weights": False}):
        config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **options).to_dict()
        assert kind_of({**config, "peft_type": "LORA"}).beyond == ()


def test_factors_that_are_not_finite_are_named(sides, tmp_path):
    adapter = lora(tmp_path / "adapter")
    found = load_file(adapter / "adapter_model.safetensors")
    found["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"][0, 0] = float("nan")
    save_file(found, adapter / "adapter_model.safetensors")
    with pytest.raises(GraftError, match=r"model\.layers\.0\.mlp\.down_proj\.weight  not finite in tuned"):
        run(sides, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    instruct = load(sides["instruct"])
    instruct["model.layers.0.mlp.down_proj.weight"][0, 0] = float("inf")
    sides["instruct"] = write(tmp_path / "instruct", instruct)
    with pytest.raises(GraftError) as caught:  # the factors of this one are finite
        run(sides, lora(tmp_path / "finite"), tmp_path / "out")
    assert f"down_proj.weight  not finite in instruct {sides['instruct']}\n" in str(caught.value)
    assert "tuned" not in str(caught.value)


def test_adapter_on_bf16_instruct_is_rounded_once(sides, tmp_path):
    sides["instruct"] = write(tmp_path / "instruct", moved(load(sides["base"]), 4, 1e-3, BF16))
    adapter = lora(tmp_path / "adapter")
    run(sides, adapter, tmp_path / "out")
    before, wanted = load(sides["instruct"]), deltas(adapter, 2.0)
    off = sum(
        int((value != (before[name].double() + wanted.get(name, 0)).float().bfloat16()).sum())
        for name, value in load(tmp_path / "out").items()
    )
    assert off <= 1  # a product in fp32 beside a tie


@pytest.mark.parametrize("config", [{"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}])
def test_a_shared_head_takes_no_product_wherever_the_config_says_that_it_is_shared(tmp_path, config):
    weights = {"model.embed_tokens.weight": torch.ones(4, 2), "lm_head.weight": torch.ones(4, 2)}
    tied = Checkpoint.open(write(tmp_path / "tied", weights, config=config))
    untied = Checkpoint.open(write(tmp_path / "untied", weights, config={"tie_word_embeddings": False}))
    adapter = lora(tmp_path / "adapter")
    factors = {f"base_model.model.lm_head.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(factors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    assert [streams(Checkpoint.open(adapter), receiver) for receiver in (tied, untied, None)] == [False, True, True]


def test_an_untie_without_effect_is_reported(sides, tmp_path):
    report = run(sides, lora(tmp_path / "adapter"), tmp_path / "out", untie=True)
    assert [text for text in report.warnings if "untie changes nothing" in text]


@pytest.mark.parametrize(
    ("config", "same"),
    [
        *(({"peft_type": name}, True) for name in (
            "LOHA", "LOKR", "VERA", "PVERA", "VBLORA", "UNILORA", "RANDLORA", "FOURIERFT", "WAVEFT", "C3A", "GRALORA",
            "DELORA", "SHIRA", "MISS", "BEFT", "LN_TUNING", "TRAINABLE_TOKENS",
        )),
        ({"peft_type": "MISS", "init_weights": True}, True),
        ({"peft_type": "MISS", "init_weights": "bat"}, False),
        ({"peft_type": "PVERA", "sample_at_inference": False}, True),
        ({"peft_type": "PVERA", "sample_at_inference": True}, False),
        ({"peft_type": "SHIRA", "mask_type": "random"}, True),
        ({"peft_type": "SHIRA", "mask_type": "weight_magnitude"}, False),
        *(({"peft_type": name}, False) for name in ("OFT", "BOFT", "HRA", "IA3", "HIRA", "GLORA", "ROAD")),
    ],
)  # fmt: skip
def test_other_types_mean_the_same_delta_on_instruct_with_some_settings_only(config, same):
    assert kind_of(config).needs_base
    assert (kind_of(config).obstacles == ()) is same


def test_settings_that_do_not_change_the_product_stand_in_no_way():
    """Where it is from, how it was trained and where it sits; as PEFT stores them."""
    config = LoraConfig(
        task_type="CAUSAL_LM", inference_mode=True, revision="v1", base_model_name_or_path="a/b", lora_dropout=0.1, r=4,
        target_modules=["q_proj"], exclude_modules=["x"], lora_alpha=3, use_rslora=True, layers_to_transform=[0],
        layers_pattern="layers", rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 2}, init_lora_weights="gaussian",
    ).to_dict()  # fmt: skip
    config["peft_type"] = "LORA"
    assert not kind_of(config).obstacles
    assert kind_of({**config, "a_setting_of_the_future": 1}).obstacles


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({}, "Its delta is the exact product of its factors"),
        ({"use_dora": True}, "worked out on the BASE that is given"),
    ],
)
def test_an_adapter_trained_on_a_quantised_base_is_said_to_be(sides, tmp_path, changes, how):
    adapter = lora(tmp_path / "adapter", **changes)
    if changes:
        shapes_of = {name: value.shape for name, value in load(adapter).items()}
        more = {
            name.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(shape[0])
            for name, shape in shapes_of.items() if "lora_B" in name
        }  # fmt: skip
        save_file({**load(adapter), **more}, adapter / "adapter_model.safetensors")
    entry = {"source": str(sides["base"]), "revision": None, "digests": None, "folder": True}
    write_manifest(adapter, {"kind": "run", "base": entry, "policy": entry, "instruct": None, "quantised": "nf4"})
    report = graft(**{**sides, "tuned": adapter}, output=tmp_path / "out", progress=False)
    (said,) = [warning for warning in report.warnings if "quantised by nf4" in warning]
    assert how in said


def test_every_type_of_peft_that_learns_a_prompt_has_no_delta():
    prompts = [name for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if issubclass(config, PromptLearningConfig)]
    assert len(prompts) >= 5
    for name in prompts:
        with pytest.raises(AdapterError, match="it learns a prompt, not weights"):
            check_has_delta({"peft_type": str(name.value)})


@pytest.mark.parametrize(
    "config", [{"peft_type": "lora"}, {"megatron_config": 3}, {"peft_type": "OFT", "oft_block_size": 2}]
)
def test_settings_that_peft_cannot_use_are_one_error(sides, tmp_path, config):
    """PEFT raises a KeyError, a ModuleNotFoundError and a ValueError."""
    adapter = lora(tmp_path / "strange", **config)
    with pytest.raises(AdapterError, match="PEFT cannot use the settings of adapter"):
        graft(base=sides["base"], instruct=sides["instruct"], tuned=adapter, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
