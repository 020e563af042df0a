"""Torch distributed checkpoints: weights as torch's own reader loads them, their names, and files made to harm."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import zipfile

import pytest
import torch
from accelerate.utils import merge_fsdp_weights
from families import family, load, lora, tensors
from safetensors.torch import load_file
from shards import cut, entry, write_shards
from torch.distributed import checkpoint as distributed
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties

from shadow_trl import extract_delta, gap, graft
from shadow_trl.checkpoints.checkpoint import Checkpoint
from shadow_trl.errors import CheckpointError
from shadow_trl.operations.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SHAPES = {"cube": (5, 4, 6), "matrix": (7, 3), "vector": (11,), "scalar": (), "row": (1, 9), "none": (0, 4)}
CODES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)


def made() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        f"{name}.{dtype}": (torch.randn(shape, generator=generator) * 100).to(dtype)
        for name, shape in SHAPES.items()
        for dtype in CODES
    }


@pytest.mark.parametrize("along", [(), (0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("parts", [3])
def test_every_range_of_a_tensor_that_is_cut_along_any_dimensions_is_as_torch_loads_it(tmp_path, along, parts):
    folder = write_shards(tmp_path / "shards", made(), parts=parts, along=along)
    expected = {name: torch.zeros_like(tensor) for name, tensor in made().items()}
    distributed.load({"model": expected}, checkpoint_id=folder, no_dist=True)
    found = Checkpoint.open(folder)
    assert found.specs.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.equal(made()[name])
        flat = tensor.reshape(-1)
        assert found.tensor(name).equal(tensor)
        assert found.specs[name].dtype == tensor.dtype
        for start in range(0, flat.numel(), 7):
            for stop in (start, start + 1, min(start + 29, flat.numel()), flat.numel()):
                assert found.block(name, start, stop).equal(flat[start:stop]), (name, start, stop)


def test_what_torch_saves_itself_is_read_without_the_state_of_an_optimiser(tmp_path):
    state = {"state": {"model.norm.weight": {"exp_avg": torch.ones(8)}}, "param_groups": [{"lr": 1e-3}]}
    for key, content in {"nested": {"model": tensors(7), "optimizer": state}, "flat": tensors(7)}.items():
        distributed.save(content, checkpoint_id=tmp_path / key, no_dist=True)
        found = Checkpoint.open(tmp_path / key)
        assert found.specs.keys() == tensors(7).keys()
        assert all(found.tensor(name).equal(tensor) for name, tensor in tensors(7).items())
    distributed.save({"optimizer": state}, checkpoint_id=tmp_path / "other", no_dist=True)
    with pytest.raises(CheckpointError, match="holds no weights under the key 'model'"):
        Checkpoint.open(tmp_path / "other")


def same(one, other) -> None:
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert names == sorted(path.name for path in other.glob("*.safetensors")) != []
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_graft_of_shards_is_that_of_the_merged_folder(tmp_path, dtype):
    """A tied family, whose extra head FSDP2 saves too."""
    folders = family(tmp_path, dtypes=(torch.bfloat16, torch.bfloat16, dtype))
    pair = {role: str(folders[role]) for role in ("base", "instruct")}
    tuned = load(folders["tuned"])
    tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"]
    saved = tmp_path / "run/checkpoint-1"
    shards = write_shards(saved / "pytorch_model_fsdp_0", tuned, parts=3)
    merge_fsdp_weights(str(shards), str(tmp_path / "merged"))
    options = {"base_dtype": "float32", "rounding": "stochastic", "scale": 0.7}
    for number, source in enumerate((saved, shards, tmp_path / "merged")):
        graft(**pair, tuned=str(source), output=str(tmp_path / str(number)), **options)
    same(tmp_path / "0", tmp_path / "2")
    same(tmp_path / "1", tmp_path / "2")
    assert verify(tmp_path / "0").same
    first, second = (gap(**pair, tuned=str(source)).to_dict() for source in (saved, tmp_path / "merged"))
    assert first == second
    for source in (saved, tmp_path / "merged"):
        extract_delta(base=pair["base"], tuned=str(source), output=str(tmp_path / f"delta {source.name}"))
    same(tmp_path / f"delta {saved.name}", tmp_path / "delta merged")


def test_base_and_instruct_can_be_shards_with_a_config(tmp_path):
    folders = family(tmp_path)
    given = {}
    for role, folder in folders.items():
        given[role] = str(tmp_path / "shards" / role)
        write_shards(tmp_path / "shards" / role, load(folder))
        shutil.copy(folder / "config.json", given[role])
    graft(**given, output=str(tmp_path / "ours"))
    graft(**{role: str(folder) for role, folder in folders.items()}, output=str(tmp_path / "whole"))
    ours, whole = load(tmp_path / "ours"), load(tmp_path / "whole")
    assert ours.keys() == whole.keys()
    assert all(ours[name].equal(whole[name]) for name in whole)


def peft_names(factors: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the names of a whole model under a LoRA in memory."""
    found = {name.replace(".weight", ".default.weight"): tensor for name, tensor in factors.items()}
    adapted = {name.partition(".lora_")[0] for name in factors}
    for name, tensor in weights.items():
        module, _, end = f"base_model.model.{name}".rpartition(".")
        found[f"{module}.base_layer.{end}" if module in adapted else f"{module}.{end}"] = tensor
    return found


@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "whole model"])
def test_a_lora_in_shards_is_grafted_as_its_own_file(tmp_path, whole):
    folders, adapter = family(tmp_path), lora(tmp_path / "adapter")
    pair = {role: str(folders[role]) for role in ("base", "instruct")}
    factors = load_file(adapter / "adapter_model.safetensors")
    saved = tmp_path / "checkpoint-1"
    shards = write_shards(saved / "pytorch_model_fsdp_0", peft_names(factors, tensors(0)) if whole else factors)
    with pytest.raises(CheckpointError, match=r"no adapter_config.json, which has its scale. Copy"):
        graft(**pair, tuned=str(saved), output=str(tmp_path / "refused"))
    shutil.copy(adapter / "adapter_config.json", saved)
    for number, source in enumerate((adapter, saved, shards)):
        graft(**pair, tuned=str(source), output=str(tmp_path / str(number)))
        same(tmp_path / "0", tmp_path / str(number))
        graft(**pair, tuned=str(source), output=str(tmp_path / f"adapter {number}"), format="adapter", scale=0.5)
    names = [load(tmp_path / f"adapter {number}") for number in range(3)]
    assert all(one.keys() == names[0].keys() for one in names)
    assert all(one[name].equal(tensor) for one in names for name, tensor in names[0].items())


def test_more_than_a_plain_lora_in_a_whole_model_is_refused(tmp_path):
    adapter = lora(tmp_path / "adapter")
    factors = load_file(adapter / "adapter_model.safetensors")
    names = peft_names(factors, tensors(0))
    names["base_model.model.lm_head.modules_to_save.default.weight"] = torch.ones(20, 8)
    shutil.copy(adapter / "adapter_config.json", write_shards(tmp_path / "shards", names))
    with pytest.raises(CheckpointError, match="more than a plain LoRA"):
        Checkpoint.open(tmp_path / "shards")


def test_whole_weights_beside_shards_are_never_taken_for_them(tmp_path):
    folder = family(tmp_path)["tuned"]
    shards = write_shards(folder / "pytorch_model_fsdp_0", tensors(7))
    assert Checkpoint.open(folder).files == [folder / "model.safetensors"]
    found = Checkpoint.open(shards)
    assert found.source == str(shards)
    assert found.tensor("model.norm.weight").equal(tensors(7)["model.norm.weight"])


class Calls:
    """A pickle that calls a function as it is read."""

    def __init__(self, function, *given):
        self.call = function, given

    def __reduce__(self):
        return self.call


def first(content):
    return next(iter(content.storage_data.items()))


def places(**changes):
    def change(content):
        index, info = first(content)
        content.storage_data[index] = _StorageInfo(**{**vars(info), **changes})

    return change


def chunks(edit):
    return lambda content: edit(next(iter(content.state_dict_metadata.values())).chunks)


def grow(content):
    entry = next(iter(content.state_dict_metadata.values()))
    entry.size = torch.Size([2**40, 2**20])


BAD = {
    "a call": (lambda c: c.planner_data.update(x=Calls(os.system, "touch harmed")), "names posix.system"),
    "a call by a path": (lambda c: c.planner_data.update(x=Calls(getattr, "x", "upper")), "names builtins.getattr"),
    "a class of torch": (lambda c: c.planner_data.update(x=torch.nn.Linear(1, 1)), "which no such file needs"),
    "out of the folder": (places(relative_path="../outside"), "outside the folder"),
    "an absolute path": (places(relative_path="/etc/hostname"), "outside the folder"),
    "a missing file": (places(relative_path="__9_0.distcp"), "lacks the weight file"),
    "behind the end": (places(offset=10**9), "no place of their own"),
    "a negative place": (places(offset=-1), "a whole number from 0 on is expected"),
    "a huge length": (places(length=2**62), "no place of their own"),
    "a place that is a text": (places(offset="0"), "a whole number from 0 on is expected"),
    "compressed files": (places(transform_descriptors=["zstd"]), "cannot be read in parts"),
    "a huge tensor": (grow, "of its 1152921504606846976 elements"),
    "a missing part": (chunks(lambda found: found.pop()), "of its"),
    "a part twice": (chunks(lambda found: found.append(found[0])), "overlap"),
    "a part out of the tensor": (chunks(lambda found: setattr(found[1], "sizes", torch.Size([99, 8]))), "reaches out"),
    "no bytes": (lambda c: c.storage_data.pop(first(c)[0]), "has no bytes for its part"),
    "another dtype": (
        lambda c: setattr(
            next(iter(c.state_dict_metadata.values())), "properties", TensorProperties(dtype=torch.float32)
        ),
        r"it is BF16 .* and not F32",
    ),
    "bytes of two tensors": (
        lambda c: c.storage_data.update({list(c.storage_data)[2]: first(c)[1]}),
        "no place of their own",
    ),
    "a bad name": (
        lambda c: c.planner_data.update({next(iter(c.planner_data)): ("model", "a\nb")}),
        "names that no weight can have",
    ),
    "two of one name": (
        lambda c: c.planner_data.update(dict.fromkeys(list(c.planner_data)[:2], ("model", "x"))),
        "holds 1 weights twice",
    ),
    "an index of another kind": (
        lambda c: c.storage_data.update({"x": first(c)[1]}),
        "str where MetadataIndex is expected",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_description_that_cannot_be_right_is_refused(tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outside").write_bytes(b"x" * 10_000)
    change, expected = BAD[case]
    write_shards(tmp_path / "shards", tensors(7), change=change)
    with pytest.raises(CheckpointError, match=expected):
        Checkpoint.open(tmp_path / "shards")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x80\x04", pickle.dumps([1]), pickle.dumps({"a": 1}), b"cos\nsystem\n(S'touch harmed'\ntR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch harmed\x85R.", b"\x80\x02\x82\x01.", b"Pid\n.",
        # An attribute of a class, and a place of the memo that takes 64 GB.
        b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\nN}\x8c\x04name\x8c\x01xs\x86b.",
        b"\x80\x02Nr\xff\xff\xff\xff.", b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    ],
)  # fmt: skip
def test_a_pickle_of_something_else_is_refused_and_not_run(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match="does not describe a torch distributed checkpoint"):
        Checkpoint.open(tmp_path)
    assert not (tmp_path / "harmed").exists()


def compressed(data: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return made.getvalue()


ENTRIES = {
    "a call": lambda data: entry(Calls(os.system, "touch harmed")),
    "a dictionary": lambda data: entry({"x": torch.ones(10, 8)}),
    "another shape": lambda data: entry(torch.ones(8, 10, dtype=torch.bfloat16)),
    "columns": lambda data: entry(torch.ones(8, 10, dtype=torch.bfloat16).T),
    "one number": lambda data: entry(torch.ones(1, dtype=torch.bfloat16).expand(10, 8)),
    "another place": lambda data: data.replace(b"data/0", b"data/1"),
    "no values": lambda data: entry(torch.empty(10, 8, dtype=torch.bfloat16, device="meta")),
    "compressed": compressed,
    "another order of bytes": lambda data: data.replace(b"little", b"big   "),
    "no archive": lambda data: b"x" * len(data),
    "cut short": lambda data: data[:300],
}


@pytest.mark.parametrize("case", ENTRIES)
def test_an_entry_that_is_no_plain_tensor_is_refused_and_not_run(tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"w": torch.ones(20, 8, dtype=torch.bfloat16)}
    data = ENTRIES[case](entry(names["w"][:10].clone()))

    def change(content):
        content.storage_data[MetadataIndex("model.w", (0, 0))] = _StorageInfo("__0_0.distcp", 0, len(data))

    folder = write_shards(tmp_path / "shards", names, change=change)
    (folder / "__0_0.distcp").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"does not hold the shards that \.metadata names"):
        Checkpoint.open(folder)
    assert not (tmp_path / "harmed").exists()


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    folder = write_shards(tmp_path / "shards", tensors(7))
    (folder / "__0_0.distcp").rename(tmp_path / "elsewhere")
    (folder / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link to"):
        Checkpoint.open(folder)


def test_cut_covers_a_shape():
    assert cut((5, 2), 2) == [((0, 0), (3, 2)), ((3, 0), (2, 2))]
    assert cut((1,), 2) == [((0,), (1,)), ((1,), (0,))]
