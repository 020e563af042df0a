"""The folder of a run is enough: BASE and INSTRUCT are those that its manifest names, unless they are given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import family, load, lora, moved, write

from shadow_trl import cli, extract_delta, gap, graft
from shadow_trl.checkpoints.digests import weight_digests
from shadow_trl.checkpoints.manifest import Entry, write_manifest
from shadow_trl.errors import AdapterError, CheckpointError, ConfigError, InputError


def recorded(folder: Path, base: Path, instruct: Path | None) -> Path:
    """Give `folder` the manifest of a run that started from `base`."""
    sides = {"base": Entry(str(base)).recorded(), "instruct": instruct and Entry(str(instruct)).recorded()}
    write_manifest(folder, {"kind": "run", **sides, "policy": sides["base"], "weights": weight_digests(folder)})
    return folder


@pytest.fixture
def sides(tmp_path):
    found = family(tmp_path / "models", dtypes=(torch.float32,) * 3)
    recorded(found["tuned"], found["base"], found["instruct"])
    return {role: str(folder) for role, folder in found.items()}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_of_a_run_is_enough_for_every_command(sides, tmp_path):
    graft(**sides, output=tmp_path / "named")
    assert cli.main(["graft", "--tuned", sides["tuned"], "--output", str(tmp_path / "found"), "--quiet"]) == 0
    assert files(tmp_path / "found") == files(tmp_path / "named")
    learnt = {"base": sides["base"], "tuned": sides["tuned"]}
    extract_delta(**learnt, output=tmp_path / "named delta")
    assert cli.main(["delta", "--tuned", sides["tuned"], "--output", str(tmp_path / "found delta"), "--quiet"]) == 0
    assert files(tmp_path / "found delta") == files(tmp_path / "named delta")
    assert gap(tuned=sides["tuned"]).to_dict() == gap(**sides).to_dict()
    assert cli.main(["gap", "--tuned", sides["tuned"], "--quiet"]) == 0


def test_compare_takes_them_too(sides, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("shadow_trl.evaluation.scales.compare_scales", lambda sources, *_, **__: seen.append(sources))
    for words in ([], ["--base", sides["instruct"], "--instruct", sides["base"]]):
        assert cli.main(["compare", "--tuned", sides["tuned"], *words, "--output", "out", "--quiet"]) == 0
    found = [{"base": one.base, "instruct": one.instruct, "tuned": one.tuned} for one in seen]
    assert found == [sides, {**sides, "base": sides["instruct"], "instruct": sides["base"]}]


def test_what_is_given_wins(sides, tmp_path):
    others = {
        role: write(tmp_path / f"other {role}", moved(load(Path(sides[role])), seed, 1e-2))
        for seed, role in enumerate(("base", "instruct"), start=7)
    }
    for role, other in others.items():
        graft(tuned=sides["tuned"], output=tmp_path / f"of {role}", **{role: str(other)})
        used = {name: load(Path(folder)) for name, folder in {**sides, role: other}.items()}
        for name, weight in load(tmp_path / f"of {role}").items():
            expected = used["instruct"][name].double() + used["tuned"][name].double() - used["base"][name].double()
            torch.testing.assert_close(weight.double(), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("role", ["base", "instruct"])
def test_sides_that_are_gone_or_have_changed_are_refused(sides, tmp_path, role):
    weights = Path(sides[role], "model.safetensors")
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(InputError, match=rf"{role} of the run .* has changed since(.|\n)*--{role}(.|\n)*Nothing was"):
        graft(tuned=sides["tuned"], output=tmp_path / "out")
    Path(sides[role]).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"{role} of .* is gone(.|\n)*--{role}"):
        graft(tuned=sides["tuned"], output=tmp_path / "out")
    Path(tmp_path, "elsewhere", "model.safetensors").write_bytes(before)
    graft(tuned=sides["tuned"], output=tmp_path / "out", **{role: str(tmp_path / "elsewhere")})


def test_runs_with_several_instructs_need_one_named(sides, tmp_path):
    other = write(tmp_path / "other", moved(load(Path(sides["instruct"])), 9, 1e-3))
    second = recorded(write(tmp_path / "second", load(Path(sides["tuned"]))), Path(sides["base"]), other)
    tuned = [f"{sides['tuned']}:0.5", f"{second}:0.5"]
    with pytest.raises(ConfigError, match=r"2 different instruct models(.|\n)*other(.|\n)*--instruct"):
        graft(tuned=tuned, output=tmp_path / "out")
    graft(tuned=tuned, instruct=sides["instruct"], output=tmp_path / "out")
    graft(**sides, output=tmp_path / "once")
    for name, weight in load(tmp_path / "out").items():
        torch.testing.assert_close(weight, load(tmp_path / "once")[name], rtol=0, atol=1e-8)


def test_an_instruct_that_nothing_names_is_asked_for(sides, tmp_path):
    plain = write(tmp_path / "plain", load(Path(sides["tuned"])))
    without = recorded(write(tmp_path / "without", load(Path(sides["tuned"]))), Path(sides["base"]), None)
    for tuned in (plain, without):
        for work in (graft, gap):
            output = {"output": tmp_path / "out"} if work is graft else {}
            with pytest.raises(ConfigError, match=r"instruct is missing(.|\n)*--instruct"):
                work(base=sides["base"], tuned=str(tuned), **output)
    with pytest.raises(ConfigError, match="base is missing"):
        gap(instruct=sides["instruct"], tuned=str(plain))


def test_gap_of_a_lora_run_says_that_it_is_an_adapter(sides, tmp_path):
    """Not that its BASE is unknown: the folder of a run was given."""
    adapter = lora(tmp_path / "run", base_model_name_or_path=sides["base"])
    recorded(adapter, Path(sides["base"]), Path(sides["instruct"]))
    with pytest.raises(AdapterError, match=r"tuned .* is an adapter; gap compares full checkpoints. Merge it"):
        gap(tuned=str(adapter))


def test_the_base_of_an_adapter_is_not_read_for_its_run_either(sides, tmp_path):
    adapter = lora(tmp_path / "run", base_model_name_or_path=sides["base"])
    recorded(adapter, Path(sides["base"]), Path(sides["instruct"]))
    graft(**{**sides, "tuned": str(adapter)}, output=tmp_path / "named")
    Path(sides["base"], "model.safetensors").unlink()
    graft(tuned=str(adapter), output=tmp_path / "found")
    assert load(tmp_path / "found").keys() == load(tmp_path / "named").keys()
    assert all(load(tmp_path / "found")[name].equal(weight) for name, weight in load(tmp_path / "named").items())
