"""Gap: the relative distance of INSTRUCT from BASE is what its definition says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import (
    ROLES,
    in_memory,
)
from families import CONFIG, family, load, shapes, tensors, write
from layout_cases import with_head
from oracle import relative_distance
from safetensors.torch import save_file

from shadow_trl.checkpoints.manifest import Entry, write_manifest
from shadow_trl.errors import GraftError, PairMismatchError
from shadow_trl.operations.gap import gap
from shadow_trl.operations.in_memory import open_grafts

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("dtypes", [(BF16, BF16, BF16), (FP32, BF16, FP32)])
def test_gap_equals_its_definition(tmp_path, dtypes):
    sides = family(tmp_path, dtypes=dtypes, shards=(2, 1, 1))
    report = gap(**sides, progress=False)
    base, instruct, tuned = (load(sides[role]) for role in ("base", "instruct", "tuned"))

    def sigma(names, other):
        return relative_distance(*({name: side[name] for name in names} for side in (base, other)))

    assert report.sigma == pytest.approx(sigma(shapes(), instruct), rel=1e-5)
    assert report.delta == pytest.approx(sigma(shapes(), tuned), rel=1e-5)
    layer = [name for name in shapes() if ".layers.1." in name]
    assert report.by_layer["model.layers.1"]["sigma"] == pytest.approx(sigma(layer, instruct), rel=1e-5)
    assert list(report.by_layer) == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"]
    kind = [name for name in shapes() if "q_proj.weight" in name]
    assert report.by_kind["q_proj"]["sigma"] == pytest.approx(sigma(kind, instruct), rel=1e-5)
    assert report.weights == len(shapes())


def test_what_training_changed_is_measured_from_base_as_training_loaded_it(tmp_path):
    """A run in bf16 from a BASE in fp32: what loading rounded away is neither learnt nor of any direction."""
    base = tensors(1, FP32)
    instruct = {name: value + 1e-3 * torch.randn_like(value) for name, value in base.items()}
    loaded = {name: value.to(BF16) for name, value in base.items()}
    tuned = {name: (value.float() + 2e-4 * (torch.rand(value.shape) < 0.1)).to(BF16) for name, value in loaded.items()}
    sides = {"base": base, "instruct": instruct, "tuned": tuned}
    folders = {role: write(tmp_path / role, side) for role, side in sides.items()}
    named = {role: Entry(str(folders[role])).recorded() for role in ("base", "instruct")}
    write_manifest(folders["tuned"], {"kind": "run", **named, "policy": named["base"], "loaded_in": ["bfloat16"]})

    def flat(side):
        return torch.cat([side[name].double().flatten() for name in base])

    delta, direction = flat(tuned) - flat(loaded), flat(instruct) - flat(loaded)
    wanted = {
        "sigma": relative_distance(base, instruct), "delta": relative_distance(loaded, tuned),
        "delta_to_gap": float(delta.abs().sum() / (flat(instruct) - flat(base)).abs().sum()),
        "cosine": float(delta @ direction / (delta.norm() * direction.norm())),
    }  # fmt: skip
    with open_grafts(**folders, beside=tmp_path / "beside") as grafts:
        for report in (gap(**folders, progress=False), gap(tuned=folders["tuned"], progress=False), grafts.gap()):
            assert {name: getattr(report, name) for name in wanted} == pytest.approx(wanted, rel=1e-4)


def test_gap_of_unrelated_models_is_large_and_of_equal_ones_zero(tmp_path):
    one, other = write(tmp_path / "one", tensors(0)), write(tmp_path / "other", tensors(1))
    assert gap(one, other, progress=False).sigma == pytest.approx(0.707, abs=0.03)
    assert gap(one, one, progress=False).sigma == 0.0


def test_gap_names_values_that_are_not_finite(tmp_path):
    sides = family(tmp_path)
    weights = load(sides["base"])
    weights["model.norm.weight"][0] = float("inf")
    save_file(weights, sides["base"] / "model.safetensors")
    with pytest.raises(GraftError, match=r"model\.norm\.weight"):
        gap(sides["base"], sides["instruct"], progress=False)


@pytest.mark.parametrize("other", ["qwen3_moe", "gemma3"])
def test_gap_over_layouts(other: str, families: Any) -> None:
    family = families(other)
    report = gap(family / "base", family / "instruct-memory", family / "tuned", progress=False)
    tied = {"lm_head.weight"} if other == "gemma3" else set()  # one weight under two names
    b, i, t = ({k: v for k, v in in_memory(other, family / role).items() if k not in tied} for role in ROLES)
    assert report.sigma == pytest.approx(relative_distance(b, i), rel=1e-6)
    apart = sum((i[key].double() - b[key].double()).abs().sum() for key in b)
    moved = sum((t[key].double() - b[key].double()).abs().sum() for key in b)
    assert report.delta_to_gap == pytest.approx(float(moved / apart), rel=1e-6)
    learnt, gap_ = (torch.cat([(side[key].double() - b[key].double()).flatten() for key in b]) for side in (t, i))
    assert report.cosine == pytest.approx(float(learnt @ gap_ / (learnt.norm() * gap_.norm())), rel=1e-5)


def test_gap_of_a_head_that_one_side_has_of_its_own(families: Any, tmp_path: Path) -> None:
    family = families("qwen3")
    base = with_head(family / "base", tmp_path / "base", "own", tied=False)
    report = gap(base, family / "instruct", progress=False)
    wanted = relative_distance(in_memory("qwen3", base), in_memory("qwen3", family / "instruct"))
    assert report.sigma == pytest.approx(wanted, rel=1e-6)


def test_gap_of_two_networks_says_so(tmp_path):
    sides = family(tmp_path)
    other = write(tmp_path / "other", load(sides["instruct"]), config={**CONFIG, "num_hidden_layers": 7})
    with pytest.raises(PairMismatchError, match=r"different networks(.|\n)*num_hidden_layers"):
        gap(sides["base"], other, progress=False)
