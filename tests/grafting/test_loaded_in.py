"""In which dtypes training loaded BASE: from the run's record, from the weights, or not known, and then said."""

from __future__ import annotations

import json

import pytest
import torch
from adapter_cases import adapter_on
from families import load, moved, tensors, write
from peft import LoraConfig
from runs import LORA
from safetensors.torch import load_file, save_file
from tiny import make_pair

from shadow_trl import extract_delta, graft, verify
from shadow_trl.checkpoints.manifest import write_manifest
from shadow_trl.errors import InputError

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NARROW = "narrower than base's"

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def sides(tmp_path):
    """BASE and INSTRUCT in fp32; TUNED, BASE in bf16 with a norm left in fp32, learnt something."""
    base = tensors(0, FP32)
    tuned = {name: value if "norm" in name else value.to(BF16) for name, value in moved(base, 2, 1e-2, FP32).items()}
    return {
        "base": write(tmp_path / "base", base),
        "instruct": write(tmp_path / "instruct", moved(base, 1, 1e-3)),
        "tuned": write(tmp_path / "tuned", tuned),
        "progress": False,
    }


def recorded(sides, dtypes: list[str] | None) -> None:
    """Make TUNED the folder of a run; one of version 0.1.0 for None."""
    entry = {role: {"source": str(sides["base"])} for role in ("base", "policy")}
    write_manifest(sides["tuned"], {"kind": "run", **entry, **({} if dtypes is None else {"loaded_in": dtypes})})


@pytest.mark.parametrize("dtypes", [None, ["bfloat16"], ["float16", "bfloat16"]])
def test_what_the_run_recorded_is_subtracted(sides, tmp_path, dtypes):
    recorded(sides, dtypes)
    report = graft(**sides, output=tmp_path / "out", digest="none")
    assert not any(NARROW in warning for warning in report.warnings)
    base, tuned, instruct = (load(sides[role]) for role in ("base", "tuned", "instruct"))
    for name, value in load(tmp_path / "out").items():
        start = base[name]
        if tuned[name].dtype == BF16:  # the norm was left as it was
            start = (start.half() if dtypes and len(dtypes) == 2 else start).bfloat16()
        wanted = instruct[name].double() + tuned[name].double() - start.double()
        assert float((value.double() - wanted).abs().max()) < 1e-8, name
    assert verify(tmp_path / "out", progress=False).same


def test_a_given_dtype_wins_and_a_folder_without_a_run_is_taken_as_stored(sides, tmp_path):
    base, tuned, instruct = (load(sides[role]) for role in ("base", "tuned", "instruct"))
    assert any(NARROW in warning for warning in graft(**sides, output=tmp_path / "plain").warnings)
    recorded(sides, ["bfloat16"])
    graft(**sides, output=tmp_path / "fp16", base_dtype="float16")
    for name, value in load(tmp_path / "plain").items():
        learnt = tuned[name].double() - base[name].double()
        assert float((value.double() - instruct[name].double() - learnt).abs().max()) < 1e-8, name
        learnt = tuned[name].double() - base[name].half().double()
        assert float((load(tmp_path / "fp16")[name].double() - instruct[name].double() - learnt).abs().max()) < 1e-8


def test_a_graft_of_0_1_0_that_subtracted_base_as_stored_is_still_that_graft(sides, tmp_path):
    recorded(sides, None)
    graft(**sides, output=tmp_path / "out", base_dtype=())
    path = tmp_path / "out" / "shadow.json"
    content = json.loads(path.read_text())
    del content["loaded_in"]
    content["options"]["base_dtype"] = None
    path.write_text(json.dumps(content))
    assert verify(tmp_path / "out", progress=False).same
    base, tuned, instruct = (load(sides[role]) for role in ("base", "tuned", "instruct"))
    for name, value in load(tmp_path / "out").items():
        learnt = tuned[name].double() - base[name].double()
        assert float((value.double() - instruct[name].double() - learnt).abs().max()) < 1e-8, name


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["int8"], r'loaded_in\[0\]  "int8", must be one of tuned'),
        ("bfloat8", 'loaded_in  "bfloat8", must be a list'),
        ([1], r"loaded_in\[0\]  1, must be one of tuned"),
    ],
)
def test_a_record_that_names_no_dtype_is_refused(sides, tmp_path, value, message):
    recorded(sides, value)
    with pytest.raises(InputError, match=message):
        graft(**sides, output=tmp_path / "out")


def test_narrower_weights_are_reported_of_sums_and_deltas(sides, tmp_path):
    pair = {"base": sides["base"], "progress": False}
    reports = {
        "sum": graft(**pair, instruct=sides["instruct"], tuned=[(sides["tuned"], 0.5)], output=tmp_path / "sum"),
        "delta": extract_delta(**pair, tuned=sides["tuned"], output=tmp_path / "delta"),
    }
    for name, report in reports.items():
        warning = next((text for text in report.warnings if NARROW in text), "")
        assert "17 weights" in warning, name
    again = extract_delta(**pair, tuned=sides["tuned"], output=tmp_path / "cast", base_dtype="tuned")
    assert not any(NARROW in warning for warning in again.warnings)


def test_narrower_weights_are_reported_of_a_delta_of_low_rank(tmp_path):
    base, _ = make_pair(tmp_path / "pair", tied=False)
    narrow = {name: value.to(BF16) for name, value in load(base).items()}
    tuned = write(tmp_path / "tuned", narrow, config=json.loads((base / "config.json").read_text()))
    report = extract_delta(base=base, tuned=tuned, output=tmp_path / "lora", rank=2, progress=False)
    assert any(NARROW in warning for warning in report.warnings)


@pytest.mark.parametrize("form", ["model", "adapter", "delta"])
def test_narrower_stored_values_of_an_adapter_are_reported(tmp_path, form):
    base, instruct = make_pair(tmp_path / "pair", tied=False)
    config = LoraConfig(**{**LORA, "target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]})
    adapter_on((base, instruct), tmp_path / "run", config)
    path = tmp_path / "run" / "adapter_model.safetensors"
    stored = {n: value if "lora_" in n else value.to(BF16) for n, value in load_file(path).items()}
    save_file(stored, path, metadata={"format": "pt"})
    sides, found = {"base": base, "tuned": tmp_path / "run", "progress": False}, []
    for number, base_dtype in enumerate((None, "tuned")):
        out = tmp_path / f"out-{number}"
        if form == "delta":
            report = extract_delta(**sides, output=out, base_dtype=base_dtype)
        else:
            report = graft(**sides, instruct=instruct, output=out, format=form, base_dtype=base_dtype)
        found.append([warning for warning in report.warnings if NARROW in warning])
    assert len(found[0]) == 1
    assert "2 weights" in found[0][0]
    assert "input_layernorm.weight  base F32, tuned BF16" in found[0][0]
    assert not found[1]
