"""A graft in memory against the graft that is written: every weight and every logit, bit by bit."""

from __future__ import annotations

from pathlib import Path

import families as files
import pytest
import torch
from transformers import AutoModelForCausalLM

from shadow_trl.errors import ConfigError, GraftError
from shadow_trl.evaluation.models import load
from shadow_trl.grafting.options import GraftOptions
from shadow_trl.operations.graft import graft
from shadow_trl.operations.in_memory import open_grafts

SETTINGS = {
    "plain": {},
    "half": {"scale": 0.5},
    "some modules": {"scale": 1.25, "modules": "attention"},
    "fp32": {"scale": 0.7, "dtype": "float32"},
    "readapt": {"instruct_scale": 0.5},
    "stochastic": {"scale": 0.3, "rounding": "stochastic", "seed": 3},
}


@pytest.mark.parametrize("learnt", ["full", "lora"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_weights_are_those_of_the_written_graft(tmp_path: Path, name: str, learnt: str) -> None:
    options = SETTINGS[name]
    if (learnt, options.get("modules")) == ("lora", "attention"):
        options = {**options, "modules": "mlp"}
    sides = files.family(tmp_path, shards=(1, 2, 1))
    if learnt == "lora":
        sides["tuned"] = files.lora(tmp_path / "lora")
    graft(**sides, output=tmp_path / "out", format="model", progress=False, **options)
    with open_grafts(**sides, beside=tmp_path / "kept") as grafts:
        grafts.graft(GraftOptions(format="model", scale=2.0))  # what came before leaves no trace
        found = grafts.graft(GraftOptions(format="model", **options))
        wanted = files.load(tmp_path / "out")
        assert found.weights.keys() == wanted.keys()
        for key, weight in wanted.items():
            assert found.weights[key].dtype == weight.dtype
            assert torch.equal(found.weights[key].view(torch.uint8), weight.view(torch.uint8)), key
        for path in found.folder.iterdir():
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} <= {"base", "instruct", "tuned", "lora", "out"}


@pytest.mark.parametrize("dtype", ["float32", "auto"])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_the_model_is_the_one_that_loads_from_the_written_graft(
    families, tmp_path: Path, kind: str, dtype: str
) -> None:
    """Fused experts and ties: the loader puts them where it puts those of files."""
    root = families(kind)
    sides = {role: root / role for role in ("base", "instruct", "tuned")}
    graft(**sides, output=tmp_path / "out", scale=0.5, format="model", progress=False)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).state_dict()
    with open_grafts(**sides, beside=tmp_path / "kept") as grafts:
        found = load(grafts.graft(GraftOptions(scale=0.5, format="model")), dtype=dtype).state_dict()
    assert found.keys() == written.keys()
    for name, weight in written.items():
        assert found[name].dtype == weight.dtype
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("learnt", ["full", "lora"])
def test_the_gap_is_that_of_the_files(tmp_path: Path, learnt: str) -> None:
    """Sigma of the pair, and the size of what training changed, by hand from the weights; a LoRA is merged for it."""
    sides = files.family(tmp_path, shards=(1, 2, 1))
    base, instruct, tuned = (files.load(sides[role]) for role in ("base", "instruct", "tuned"))
    if learnt == "lora":
        sides["tuned"] = files.lora(tmp_path / "lora")
        graft(base=sides["base"], instruct=sides["base"], tuned=sides["tuned"], output=tmp_path / "merged",
              format="model", dtype="float32", progress=False)  # fmt: skip
        tuned = files.load(tmp_path / "merged")
    before = sorted(tmp_path.rglob("*"))
    with open_grafts(**sides, beside=tmp_path / "kept") as grafts:
        found = grafts.gap()
    assert sorted(tmp_path.rglob("*")) == before

    def relative(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], part: str) -> float:
        pairs = [(one[name].double(), other[name].double()) for name in one if f"{part}.weight" in name]
        return float(sum((a - b).abs().sum() for a, b in pairs) / sum(a.abs().sum() + b.abs().sum() for a, b in pairs))

    for kind in ("up_proj", "q_proj"):
        assert found.by_kind[kind]["sigma"] == pytest.approx(relative(base, instruct, kind), rel=1e-5)
        assert found.by_kind[kind]["delta"] == pytest.approx(relative(base, tuned, kind), rel=1e-5, abs=1e-12)
    assert max(group["delta"] for group in found.by_kind.values()) > 0


def test_bad_settings_and_values_are_those_of_graft(tmp_path: Path) -> None:
    sides = files.family(tmp_path)
    weights = files.load(sides["tuned"])
    name = next(iter(weights))
    with (
        open_grafts(**sides, beside=tmp_path / "kept") as grafts,
        pytest.raises(ConfigError, match="no weight"),
    ):
        grafts.graft(GraftOptions(modules="nowhere"))
    sides["tuned"] = files.write(tmp_path / "infinite", {**weights, name: weights[name] * float("inf")})
    with open_grafts(**sides, beside=tmp_path / "kept") as grafts, pytest.raises(GraftError, match="not finite"):
        grafts.graft(GraftOptions())
