"""Which rounding a graft takes where it may choose: measured on a sample, the same for every way to the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_pair

from shadow_trl import graft, verify
from shadow_trl.checkpoints.manifest import read_manifest
from shadow_trl.grafting.options import GraftOptions
from shadow_trl.grafting.reports import GraftReport
from shadow_trl.operations.in_memory import open_grafts

# Weights of std 0.02 have steps of 2^-13 in bf16 at their middle: deltas above them, below them, and far below.
SIZES = {"nearest": 1e-3, "stochastic": 1e-5, "float32": 1e-7}


@pytest.fixture(scope="module")
def sides(tmp_path_factory) -> dict[str, Path]:
    """Return BASE and INSTRUCT in bf16, and TUNED in fp32 with a random delta of each size."""
    root = tmp_path_factory.mktemp("sides")
    base, instruct = make_pair(root, dtype=torch.bfloat16)
    found = {"base": base, "instruct": instruct}
    state = load_file(base / "model.safetensors")
    for name, size in SIZES.items():
        torch.manual_seed(7)
        folder = root / name
        folder.mkdir()
        for path in base.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        tuned = {key: value.float() + size * torch.randn(value.shape) for key, value in state.items()}
        save_file(tuned, folder / "model.safetensors", metadata={"format": "pt"})
        found[name] = folder
    return found


def made(sides: dict[str, Path], name: str, output: Path, **options: Any) -> GraftReport:
    return graft(base=sides["base"], instruct=sides["instruct"], tuned=sides[name], output=output, progress=False,
                 **options)  # fmt: skip


def share(sides: dict[str, Path], name: str, folder: Path, dtype: torch.dtype | None = None) -> float:
    """<r,d>/<d,d> of all weights in float64, of the files alone; first rounded to `dtype` as a load does."""
    places = (sides["base"], sides["instruct"], sides[name], folder)
    base, instruct, tuned, grafted = (load_file(place / "model.safetensors") for place in places)
    along = size = 0.0
    for key, value in grafted.items():
        stored = value if dtype is None else value.to(dtype)
        delta = tuned[key].double() - base[key].double()
        along += float(((stored.double() - instruct[key].double()) * delta).sum())
        size += float(delta.square().sum())
    return along / size


@pytest.mark.parametrize("name", SIZES)
def test_the_size_of_the_delta_decides(sides, tmp_path, name):
    report = made(sides, name, tmp_path / "out")
    taken = "float32" if report.dtype == "float32" else report.rounding
    assert taken == name
    assert report.realised == pytest.approx(share(sides, name, tmp_path / "out"), abs=1e-3)
    assert report.realised == pytest.approx(1.0, abs=0.1)
    assert report.realised_in_bf16 == pytest.approx(share(sides, name, tmp_path / "out", torch.bfloat16), abs=1e-3)
    assert (report.realised_in_bf16 > 0.9) == (name != "float32")
    assert report.warnings == []
    assert (report.rounded_because is None) == (name == "nearest")
    stored = {str(value.dtype) for value in load_file(tmp_path / "out/model.safetensors").values()}
    assert stored == {f"torch.{report.dtype}"}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == report.dtype
    manifest = read_manifest(tmp_path / "out")
    assert manifest["options"]["rounding"] == ("stochastic" if name == "stochastic" else "nearest")
    assert manifest["options"]["dtype"] == ("float32" if name == "float32" else "auto")
    assert manifest["rounded_because"] == report.rounded_because
    card = (tmp_path / "out/README.md").read_text()
    assert f"Serve in {report.dtype}" in card
    assert 'AutoModelForCausalLM.from_pretrained("FOLDER")' in card
    assert verify(tmp_path / "out", progress=False).same


def test_what_rounding_to_nearest_would_keep_is_said_as_it_is(sides, tmp_path):
    made(sides, "stochastic", tmp_path / "nearest", rounding="nearest")
    measured = share(sides, "stochastic", tmp_path / "nearest")
    because = made(sides, "stochastic", tmp_path / "auto").rounded_because
    # Weights this small are tried whole.
    assert because == f"rounding to nearest would keep {measured:.2g} of the delta"


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("stochastic", {"rounding": "nearest"}, ("bfloat16", "nearest")),
        ("nearest", {"rounding": "stochastic"}, ("bfloat16", "stochastic")),
        ("stochastic", {"dtype": "float32"}, ("float32", "nearest")),
        ("float32", {"dtype": "bfloat16"}, ("bfloat16", "stochastic")),  # the dtype is the user's, the rounding is not
        ("float32", {"scale": 1e4}, ("bfloat16", "nearest")),  # it is the delta as it is added that counts
        ("nearest", {"scale": 0.0}, ("bfloat16", "nearest")),
    ],
)
def test_what_the_user_chose_stays(sides, tmp_path, name, options, expected):
    report = made(sides, name, tmp_path / "out", **options)
    assert (report.dtype, report.rounding) == expected
    assert (report.rounded_because is None) == (expected[1] == "nearest" or "rounding" in options)


@pytest.mark.parametrize("name", ["stochastic", "float32"])
def test_a_loss_has_one_warning_with_a_command_that_mends_it(sides, tmp_path, name):
    import shlex

    from shadow_trl.cli import main

    how = {"rounding": "nearest"} if name == "stochastic" else {"dtype": "bfloat16"}
    (warning,) = made(sides, name, tmp_path / "o u t", scale=0.5, modules=["proj", "norm"], **how).warnings
    words = shlex.split(warning.splitlines()[1])
    assert words[0] == "shadow-trl"
    assert main([*words[1:], "--quiet"]) == 0
    again = tmp_path / "o u t-float32"
    assert read_manifest(again)["realised"] == pytest.approx(1.0, abs=1e-2)
    options = read_manifest(again)["options"]
    assert (options["scale"], options["modules"], options["dtype"]) == (0.5, ["proj", "norm"], "float32")


@pytest.mark.parametrize("name", ["stochastic", "float32"])
def test_a_graft_in_memory_is_rounded_as_the_written_one(sides, tmp_path, name):
    with open_grafts(base=sides["base"], instruct=sides["instruct"], tuned=sides[name], beside=tmp_path) as grafts:
        found = grafts.graft(GraftOptions(format="model"))
    report = made(sides, name, tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(found.weights[key], value) for key, value in written.items())
    assert (found.dtype, found.rounding) == (report.dtype, report.rounding)


def test_a_comparison_says_which_rounding_was_taken(sides, tmp_path, monkeypatch):
    from shadow_trl.evaluation import steps

    monkeypatch.setattr(steps, "load", lambda *_, **__: None)
    with open_grafts(
        base=sides["base"], instruct=sides["instruct"], tuned=sides["stochastic"], beside=tmp_path
    ) as made:
        step = steps.Step(steps.Settings("shadow"), made, GraftOptions(format="model"))
        found = steps.measure(step, exams={}, tokenizer=None, ends=[], dtype="float32", device="cpu")
    assert found.precision == "bfloat16 (stochastic rounding)"


def test_a_sample_of_a_large_weight_stands_for_all_of_it(sides, tmp_path, monkeypatch):
    from shadow_trl.grafting import precision

    whole = made(sides, "stochastic", tmp_path / "whole").rounded_because
    monkeypatch.setattr(precision, "_PART", 16)
    monkeypatch.setattr(precision, "_SAMPLE", 40 * 64)
    tried = []
    graft_of = precision.JobGrafter.graft
    monkeypatch.setattr(
        precision.JobGrafter, "graft",
        lambda self, job, out, start, stop: (tried.append((job.name, start, stop)),
                                             graft_of(self, job, out, start, stop))[1],
    )  # fmt: skip
    part = made(sides, "stochastic", tmp_path / "part").rounded_because
    spans = [(start, stop) for name, start, stop in tried if name == "model.embed_tokens.weight"]
    parts = sum(stop - start == 16 for start, stop in spans) // 2  # tried in both ways, then grafted whole
    first = spans[:parts]
    assert [stop - start for start, stop in first] == [16] * parts
    assert sorted(start * parts // 784 for start, _ in first) == list(range(parts))  # spread over its 784 elements
    assert parts > 1
    keeps = [float(text.split(" of the delta")[0].split()[-1]) for text in (whole, part)]
    assert keeps[1] == pytest.approx(keeps[0], abs=0.05)
