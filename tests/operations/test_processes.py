"""A graft by several processes is the graft of one: files, figures, manifest and errors."""

from __future__ import annotations

import pytest
import torch
from families import family, load, lora, moved, tensors, write
from shards import write_shards

from shadow_trl import graft
from shadow_trl.errors import ConfigError, GraftError
from shadow_trl.grafting.options import GraftOptions


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_for(tmp_path, numbers, **given) -> None:
    found = []
    for number in numbers:
        output = tmp_path / "output"
        graft(**given, output=str(output), processes=number, progress=False)
        found.append(contents(output))
        output.rename(tmp_path / f"{number} processes")
    assert all(one == found[0] for one in found)
    assert sum(name.endswith(".safetensors") for name in found[0]) >= 3


@pytest.mark.parametrize(
    "options",
    [
        {"rounding": "stochastic", "scale": 0.7},
        pytest.param({"instruct_scale": 0.5, "dtype": "float32"}, marks=pytest.mark.slow),
        pytest.param({"max_shard_size": "500B", "modules": "linear"}, marks=pytest.mark.slow),
    ],
)
def test_every_byte_and_figure_is_that_of_one_process(tmp_path, options):
    folders = {role: str(folder) for role, folder in family(tmp_path, shards=(1, 3, 2)).items()}
    same_for(tmp_path, (1, 2), **folders, **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "shards", "pickled", "delta"])
def test_whatever_was_trained_can_be_shared_out(tmp_path, kind):
    folders = family(tmp_path, shards=(1, 3, 1))
    given = {"base": str(folders["base"]), "instruct": str(folders["instruct"]), "tuned": str(folders["tuned"])}
    if kind == "lora":
        given["tuned"] = str(lora(tmp_path / "adapter"))
    if kind == "shards":
        given["tuned"] = str(write_shards(tmp_path / "shards", load(folders["tuned"])))
    if kind == "pickled":  # of which a part has to be loaded as a whole
        weights = load(folders["tuned"])
        name = "model.layers.0.self_attn.q_proj.weight"
        weights[name] = weights[name].T.contiguous().T
        torch.save(weights, folders["tuned"] / "pytorch_model.bin")
        (folders["tuned"] / "model.safetensors").unlink()
    if kind == "delta":
        from shadow_trl import extract_delta

        extract_delta(base=given["base"], tuned=given.pop("tuned"), output=str(tmp_path / "learnt"))
        given = {"instruct": given["instruct"], "delta": str(tmp_path / "learnt")}
    same_for(tmp_path, (1, 3), **given)


@pytest.mark.slow
def test_an_error_in_one_process_is_told_and_leaves_nothing(tmp_path):
    folders = family(tmp_path, shards=(1, 3, 1))
    weights = moved(tensors(0), 2, 1e-2)
    weights["model.norm.weight"][3] = torch.nan
    tuned = write(tmp_path / "bad", weights)
    given = {"base": str(folders["base"]), "instruct": str(folders["instruct"]), "tuned": str(tuned)}
    texts = []
    for number in (1, 2):
        with pytest.raises(GraftError, match=r"model\.norm\.weight  not finite in tuned") as error:
            graft(**given, output=str(tmp_path / "output"), processes=number, progress=False)
        texts.append(str(error.value))
    assert texts[0] == texts[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "base", "instruct", "tuned"]


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "two"])
def test_a_number_of_processes_is_a_whole_one_from_1_on(number):
    with pytest.raises(ConfigError, match="processes must be a whole number of at least 1"):
        GraftOptions(processes=number)
