from __future__ import annotations

import errno
import gc
import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from families import CONFIG, family, load, lora, tensors, write
from safetensors.torch import save_file

from shadow_trl.checkpoints.checkpoint import Checkpoint, Place
from shadow_trl.checkpoints.delta import Zeros
from shadow_trl.checkpoints.header import dtype_of, pickled_specs, read_header
from shadow_trl.checkpoints.overlay import Overlay
from shadow_trl.errors import CheckpointError, GraftError


@pytest.fixture
def model(tmp_path):
    return write(tmp_path / "model", tensors(0))


def raw_file(path, header: dict, data: bytes = b"", length: int | None = None):
    text = json.dumps(header).encode()
    path.write_bytes((length if length is not None else len(text)).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize("dtype", ["bfloat16", "tuned"])
def test_base_is_read_in_the_dtype_training_loaded_it_in(tmp_path, dtype):
    base = torch.tensor([[1 + 2**-9, 1.0], [-2 - 2**-7, 3.0]])  # bf16 has 8 bits: 1 and -2 remain
    base = Checkpoint.open(write(tmp_path / "base", {"w": base}))
    tuned = Checkpoint.open(write(tmp_path / "tuned", {"w": torch.ones(2, 2, dtype=torch.bfloat16)}))
    loaded = base.loaded([dtype])
    place = Place(loaded, "w", loaded.casts(tuned.specs["w"]))
    assert place.tensor().tolist() == [[1.0, 1.0], [-2.0, 3.0]]
    assert place.tensor().dtype == torch.bfloat16
    assert place.block(2, 3).tolist() == [-2.0]
    as_stored = Place(base, "w", base.casts(tuned.specs["w"]))
    assert as_stored.tensor().tolist() == [[1 + 2**-9, 1.0], [-2 - 2**-7, 3.0]]


@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_are_those_of_the_files(tmp_path, shards):
    weights = tensors(3, torch.float16)
    folder = write(tmp_path / "model", weights, shards=shards)
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.specs) == set(weights)
    assert len(checkpoint.files) == shards
    for name, value in weights.items():
        assert torch.equal(checkpoint.tensor(name), value)
        assert checkpoint.specs[name].dtype == torch.float16
        assert torch.equal(checkpoint.block(name, 3, 7), value.flatten()[3:7])
    assert checkpoint.config["model_type"] == "llama"
    assert not checkpoint.is_adapter


@pytest.mark.parametrize("legacy", [False, True])
def test_bin_files_are_read_through_weights_only(tmp_path, legacy):
    weights = tensors(3)
    folder = write(tmp_path / "model", weights)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    checkpoint = Checkpoint.open(folder)
    assert all(torch.equal(checkpoint.tensor(name), value) for name, value in weights.items())


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    folder = write(tmp_path / "model", tensors(3))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Evil()}))
    with pytest.raises(CheckpointError, match="weights_only"):
        Checkpoint.open(folder)
    assert not (tmp_path / "ran").exists()


def test_an_adapter_is_told_from_a_model(tmp_path, model):
    adapter = Checkpoint.open(lora(tmp_path / "adapter"))
    assert adapter.is_adapter
    assert adapter.adapter_config["r"] == 2
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="both a model and an adapter"):
        Checkpoint.open(model)


def test_missing_folder_and_missing_weights(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="there is no folder"):
        Checkpoint.open(tmp_path / "nothing")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="has no weights"):
        Checkpoint.open(empty)
    (empty / "consolidated.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"It holds consolidated\.safetensors"):
        Checkpoint.open(empty)
    assert Checkpoint.open(empty, weights=False).specs == {}


def test_a_hub_id_that_cannot_be_fetched_says_so(monkeypatch):
    with pytest.raises(
        CheckpointError,
        match=r"nobody/nothing@v1 is neither a folder here nor a repository",
    ):
        Checkpoint.open("nobody/nothing@v1")
    with pytest.raises(CheckpointError, match="two revisions"):
        Checkpoint.open("nobody/nothing@v1", "v2")


def test_a_local_folder_has_no_revision_but_main(model, monkeypatch):
    """`main` is what TRL's scripts pass for every model, transformers reads the folder then."""
    with pytest.raises(CheckpointError, match="has no revision 'v1'"):
        Checkpoint.open(f"{model}@v1")
    monkeypatch.chdir(model.parents[1])
    as_hub_id = "/".join(model.parts[-2:])
    for found in (Checkpoint.open(f"{model}@main"), Checkpoint.open(as_hub_id, "main")):
        assert found.revision is None
        assert found.path.resolve() == model.resolve()
    with pytest.raises(CheckpointError, match="has no revision 'v1'"):
        Checkpoint.open(as_hub_id, "v1")


def test_a_folder_with_an_at_sign_is_a_folder(tmp_path):
    folder = write(tmp_path / "model@home", tensors(0))
    assert Checkpoint.open(folder).revision is None


@pytest.mark.parametrize(
    ("header", "data", "length", "reason"),
    [
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234", None, "end at byte"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234", None, "cannot take 4 bytes"),
        ({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234", None, "shape"),
        ({"w": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, b"1234", None, "unknown dtype"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678", None, "begins at byte"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234", 10**9, "header should have"),
        ({"w": 3}, b"", None, "has no dtype, shape and data_offsets"),
    ],
)
def test_damaged_headers_are_refused(tmp_path, header, data, length, reason):
    raw_file(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=f"not a complete safetensors file.*{reason}"):
        Checkpoint.open(tmp_path)


def test_a_cut_file_is_refused(model):
    with open(model / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        Checkpoint.open(model)


@pytest.mark.parametrize("entry", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_an_index_cannot_lead_out_of_the_folder(tmp_path, entry):
    save_file({"w": torch.ones(2)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": entry}}))
    with pytest.raises(CheckpointError, match="lies outside"):
        Checkpoint.open(folder)


def test_links_lead_out_only_within_the_hub_cache(tmp_path):
    repository = tmp_path / "models--a--b"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"w": torch.ones(2)}, blobs / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    assert set(Checkpoint.open(snapshot).specs) == {"w"}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(blobs / "abc")
    with pytest.raises(CheckpointError, match=r"link to .*blobs/abc, outside (.|\n)*cp -rL"):
        Checkpoint.open(folder)


def test_a_tensor_in_two_files_is_refused_with_a_way_out(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for number in (1, 2):
        save_file(
            {"w": torch.ones(2), f"v{number}": torch.ones(1)}, folder / f"model-0000{number}-of-00002.safetensors"
        )
    places = {"w": 1, "v1": 1, "v2": 2}
    index = {"weight_map": {name: f"model-0000{number}-of-00002.safetensors" for name, number in places.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=r"1 tensors are stored twice(.|\n)*w  in model-00001(.|\n)*save_pretrained"
    ):
        Checkpoint.open(folder)


def test_an_index_that_names_wrong_files_is_refused(tmp_path):
    folder = write(tmp_path / "model", tensors(0), shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"1 weights") as caught:
        Checkpoint.open(folder)
    assert first in str(caught.value)
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the weight file model-00001"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, {}),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, {}),
        ({}, {"model.layers.0.mlp.up_proj.qweight": torch.int32}),
        ({}, {"model.layers.0.mlp.up_proj.weight": torch.float8_e4m3fn}),
    ],
)
def test_quantised_checkpoints_are_refused_with_advice(tmp_path, config, names):
    weights = tensors(0) | {name: torch.ones(8, 8).to(dtype) for name, dtype in names.items()}
    folder = write(tmp_path / "model", weights, config={**CONFIG, **config})
    with pytest.raises(CheckpointError, match=r"base .* is quantised(.|\n)*Give the 16-bit or 32-bit checkpoint"):
        Checkpoint.open(folder).check_not_quantised("base")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_plain_checkpoint_is_not_quantised(tmp_path, dtype):
    for folder in family(tmp_path, dtypes=(dtype,) * 3).values():
        Checkpoint.open(folder).check_not_quantised("base")
        assert set(load(folder)) == set(Checkpoint.open(folder).specs)


def both_forms(folder: Path, weights: dict[str, torch.Tensor]) -> list[Path]:
    write(folder / "safe", weights, shards=1)
    (folder / "bin").mkdir()
    torch.save(weights, folder / "bin" / "pytorch_model.bin")
    return [folder / "safe" / "model.safetensors", folder / "bin" / "pytorch_model.bin"]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def restore_its_times(path: Path) -> None:
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"abcd")
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # the clock of the kernel ticks some 250 times a second
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [cut, restore_its_times])
def test_a_file_that_changes_behind_its_header_is_named_and_kills_nobody(tmp_path, change):
    """A mapped file that is cut short kills its reader with SIGBUS; the times of a file can be put back."""
    for path in both_forms(tmp_path, {"weight": torch.randn(2**18)}):
        for fresh in (True, False):
            checkpoint = Checkpoint.open(path.parent)
            if not fresh:
                assert checkpoint.block("weight", 2**18 - 8, 2**18).numel() == 8
            content = path.read_bytes()
            change(path)
            for read in (checkpoint.block, checkpoint.content):
                with pytest.raises(GraftError, match=rf"replaced or written to while .*\n  {path}\n"):
                    read("weight", 2**18 - 8, 2**18)
            path.write_bytes(content)


def test_a_file_that_goes_or_cannot_be_read_is_named(tmp_path, monkeypatch):
    folder = write(tmp_path / "model", {"weight": torch.ones(8)})
    checkpoint = Checkpoint.open(folder)

    def fail(*given):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "preadv", fail)
        with pytest.raises(CheckpointError, match=f"cannot read {folder / 'model.safetensors'}: Input/output error"):
            checkpoint.tensor("weight")
    checkpoint = Checkpoint.open(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*: No such file"):
        checkpoint.tensor("weight")


def test_short_reads_are_continued(tmp_path, monkeypatch):
    weight = torch.randn(1000)
    checkpoint, whole = Checkpoint.open(write(tmp_path / "model", {"weight": weight})), os.preadv
    monkeypatch.setattr(os, "preadv", lambda number, views, at: whole(number, [views[0][:64]], at))
    assert torch.equal(checkpoint.tensor("weight"), weight)


def test_few_files_stay_open(tmp_path):
    weights = {f"weight.{number}": torch.full((3,), float(number)) for number in range(50)}
    checkpoint = Checkpoint.open(write(tmp_path / "model", weights, shards=50))
    before = len(os.listdir("/proc/self/fd"))
    assert all(torch.equal(checkpoint.tensor(name), value) for name, value in weights.items())
    assert len(os.listdir("/proc/self/fd")) - before <= 16
    del checkpoint
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_tensors_of_a_bin_file_are_read_at_their_places(tmp_path):
    shared, path = torch.arange(24.0), tmp_path / "pytorch_model.bin"
    weights = {"part": shared[5:9], "turned": shared.view(4, 6).T, "half": torch.randn(5).bfloat16(),
               "none": torch.empty(0, 3), "one": torch.tensor(2.5, dtype=torch.float64)}  # fmt: skip
    torch.save(weights, path)
    checkpoint = Checkpoint.open(tmp_path)
    assert {name for name, spec in checkpoint.specs.items() if spec.offset is None} == {"turned"}
    for name, value in weights.items():
        found = checkpoint.tensor(name)
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        assert torch.equal(found, value)


def test_a_changed_weight_keeps_more_digits_than_base_has(tmp_path):
    stored = {"half": torch.bfloat16, "single": torch.float32, "double": torch.float64}
    base = Checkpoint.open(write(tmp_path / "base", {name: torch.ones(2, dtype=d) for name, d in stored.items()}))
    changed = Overlay.over(base, base, tmp_path / "changed")
    value = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64)
    changed.put({name: value.clone() for name in (*stored, "new")})
    assert {name: spec.code for name, spec in changed.specs.items()} == {
        "half": "F32", "single": "F64", "double": "F64", "new": "F64",
    }  # fmt: skip
    assert torch.equal(changed.tensor("half"), value.float())
    assert all(torch.equal(changed.tensor(name), value) for name in ("single", "double", "new"))
    assert torch.equal(base.tensor("single"), torch.ones(2))


def test_zeros_are_what_their_headers_say(tmp_path):
    model = Checkpoint.open(write(tmp_path / "model", tensors(0)))
    zeros = Zeros.like(model)
    for name, spec in model.specs.items():
        assert (zeros.specs[name].dtype, zeros.specs[name].shape) == (torch.float32, spec.shape)
        assert zeros.specs[name].nbytes == 4 * spec.numel
        assert torch.equal(zeros.block(name, 1, spec.numel), torch.zeros(spec.numel - 1))


@pytest.mark.parametrize("code", [
    "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL", "C64", "F8_E4M3",
    "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2",
])  # fmt: skip
def test_every_dtype_of_the_format_is_known_with_its_size(tmp_path, code):
    """Its name has the bits of an element; the library itself says which code torch's dtype has."""
    bits = 8 if code == "BOOL" else int(re.search(r"\d+", code).group())
    raw_file(tmp_path / "raw.safetensors", {"w": {"dtype": code, "shape": [8], "data_offsets": [0, bits]}}, bytes(bits))
    assert read_header(tmp_path / "raw.safetensors").specs["w"].code == code
    if bits >= 8:
        dtype = dtype_of(code)
        assert dtype.itemsize * 8 == bits
        save_file({"w": torch.zeros(8, dtype=torch.uint8).to(dtype)}, tmp_path / "saved.safetensors")
        spec = read_header(tmp_path / "saved.safetensors").specs["w"]
        assert (spec.code, spec.itemsize, spec.is_float) == (code, bits // 8, code in ("F64", "F32", "F16", "BF16"))


def test_a_bin_file_with_a_tensor_without_values_is_refused_before_it_is_compared(tmp_path):
    torch.save({"w": torch.empty(2, device="meta"), "v": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin(.|\n)*'w'  is a tensor without values"):
        pickled_specs(tmp_path / "pytorch_model.bin")


def test_a_folder_of_gguf_is_called_that(model):
    (model / "model.safetensors").rename(model / "model-Q4_K_M.gguf")
    with pytest.raises(CheckpointError, match=r"It holds model-Q4_K_M\.gguf: GGUF.*convert it to safetensors first"):
        Checkpoint.open(model)
