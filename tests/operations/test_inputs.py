"""What is refused before a graft, on whichever side it stands, and a disk that has no room."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import xxhash
from families import CONFIG, family, load, lora, moved, shapes, write
from safetensors.torch import save_file

from shadow_trl import extract_delta, graft, verify
from shadow_trl.adapters import repoint
from shadow_trl.checkpoints.manifest import Entry, read_manifest, write_manifest
from shadow_trl.errors import AdapterError, CheckpointError, ConfigError, GraftError
from shadow_trl.grafting import stream as stream_module
from shadow_trl.operations.checks import check_graft

WEIGHT = "model.layers.0.mlp.up_proj.weight"
STEM = WEIGHT.removesuffix(".weight")
INT = torch.int32
PACKED = {
    "fp8": ({}, {WEIGHT: torch.zeros(24, 8).to(torch.float8_e4m3fn), f"{STEM}.weight_scale_inv": torch.ones(1, 1)}),
    "gptq": (
        {"bits": 4},
        {
            f"{STEM}.qweight": torch.zeros(1, 24, dtype=INT),
            f"{STEM}.qzeros": torch.zeros(1, 3, dtype=INT),
            f"{STEM}.g_idx": torch.zeros(8, dtype=INT),
        },
    ),
    "awq": (
        {"bits": 4},
        {f"{STEM}.qweight": torch.zeros(8, 3, dtype=INT), f"{STEM}.qzeros": torch.zeros(1, 3, dtype=INT)},
    ),
    "bitsandbytes": (
        {"load_in_4bit": True},
        {
            WEIGHT: torch.zeros(96, 1, dtype=torch.uint8),
            f"{WEIGHT}.absmax": torch.zeros(3),
            f"{WEIGHT}.quant_map": torch.zeros(16),
        },
    ),
}


def packed(folder, source, method, *, told):
    """Copy a checkpoint with one weight packed as `method` does; `told` says whether its config mentions it."""
    settings, tensors = PACKED[method]
    config = {"quantization_config": {"quant_method": method, **settings}}
    weights = {name: value for name, value in load(source).items() if name != WEIGHT}
    written = write(folder, weights, config={**CONFIG, **(config if told else {})})
    save_file({**weights, **tensors}, written / "model.safetensors", metadata={"format": "pt"})
    return written


@pytest.mark.parametrize("method", PACKED)
@pytest.mark.parametrize("role", ["base", "instruct", "tuned"])
@pytest.mark.parametrize("told", [True, False])
def test_quantised_checkpoints_are_refused_on_every_side(tmp_path, method, role, told):
    sides = family(tmp_path)
    sides[role] = packed(tmp_path / "packed", sides[role], method, told=told)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError) as caught:
        graft(**sides, output=tmp_path / "out", progress=False)
    text = str(caught.value)
    assert text.startswith(f"cannot graft: {role} {sides[role]} is quantised")
    assert (f"({method})" in text) is told
    assert "Give the 16-bit or 32-bit checkpoint that it was made from" in text
    if role != "tuned":
        with pytest.raises(CheckpointError, match="is quantised"):
            check_graft(base=sides["base"], instruct=sides["instruct"], output=tmp_path / "out", adapter=False)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("content", [None, "{}"])
def test_an_instruct_without_a_config_is_refused_before_the_work(tmp_path, content):
    sides = family(tmp_path)
    path = Path(sides["instruct"]) / "config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(CheckpointError, match=r"instruct .* has no config\.json(.|\n)*Nothing was written"):
        graft(**sides, output=tmp_path / "out")
    given = {"base": sides["base"], "instruct": sides["instruct"], "output": tmp_path / "out"}
    with pytest.raises(CheckpointError, match="has no config"):
        check_graft(**given, adapter=False)
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_is_told_before_the_work_starts(tmp_path, monkeypatch):
    sides = family(tmp_path)
    elements = sum(torch.Size(shape).numel() for shape in shapes().values())
    before = sorted(tmp_path.iterdir())
    weights = load(sides["tuned"])
    weights[WEIGHT][0, 0] = float("nan")  # which the work would find
    save_file(weights, sides["tuned"] / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    for work in (
        lambda: graft(**sides, output=tmp_path / "out", dtype="float32", progress=False),
        lambda: extract_delta(base=sides["base"], tuned=sides["tuned"], output=tmp_path / "out", progress=False),
    ):
        with pytest.raises(GraftError, match=r"needs [\d,]+ bytes .* has 1,000 free") as caught:
            work()
        needed = int(str(caught.value).split("needs ")[1].split(" bytes")[0].replace(",", ""))
        assert 4 * elements < needed < 4 * elements + 20_000  # fp32, and the small files
        assert sorted(tmp_path.iterdir()) == before


def test_a_disk_that_fills_up_on_the_way_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the full disk: the write fails in the middle."""
    sides = family(tmp_path)
    program = (
        "import json, resource, signal, sys\nfrom shadow_trl.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "sys.exit(main(json.loads(sys.argv[1])))"
    )
    before = sorted(tmp_path.iterdir())
    command = ["graft", *(word for role, folder in sides.items() for word in (f"--{role}", str(folder)))]
    command += ["--output", str(tmp_path / "out")]
    words = [sys.executable, "-c", program, json.dumps(command)]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "is full" in done.stderr
    assert "Nothing was written" in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_a_graft_given_as_tuned_is_refused_by_any_path_of_base(tmp_path, monkeypatch):
    sides = family(tmp_path)
    graft(**sides, output=tmp_path / "grafted")
    monkeypatch.chdir(tmp_path)
    wrong = {**sides, "base": sides["base"].relative_to(tmp_path), "tuned": tmp_path / "grafted"}
    with pytest.raises(ConfigError, match="would be added twice") as found:
        graft(**wrong, output=tmp_path / "out")
    assert str(sides["tuned"]) in str(found.value)
    assert not (tmp_path / "out").exists()
    report = graft(**{**sides, "tuned": sides["instruct"]}, output=tmp_path / "chat")
    assert any("one folder" in warning for warning in report.warnings)


def test_a_graft_is_what_more_training_of_its_instruct_starts_from(tmp_path):
    sides = family(tmp_path)
    graft(**sides, output=tmp_path / "grafted")
    graft(base=sides["instruct"], instruct=sides["instruct"], tuned=tmp_path / "grafted", output=tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "grafted/model.safetensors").read_bytes()


# --- TUNED and the BASE that it says it was trained on -------------------------------------------------------------


def told(warnings) -> list[str]:
    return [text for text in warnings if "trained on another base" in text]


def test_a_run_of_another_base_is_told_by_the_digests(tmp_path):
    sides = family(tmp_path)
    write_manifest(sides["tuned"], {"kind": "run", "base": Entry(str(sides["base"])).recorded()})
    moved_away = sides["base"].rename(tmp_path / "moved")
    other = write(tmp_path / "other", moved(load(moved_away), 9, 1e-3))
    same = graft(**{**sides, "base": moved_away}, output=tmp_path / "a", progress=False)
    assert told(same.warnings) == []
    wrong = graft(**{**sides, "base": other}, output=tmp_path / "b", progress=False)
    assert [str(sides["base"]) in text and str(other) in text for text in told(wrong.warnings)] == [True]
    assert "with other weights" in told(wrong.warnings)[0]
    delta = extract_delta(base=other, tuned=sides["tuned"], output=tmp_path / "c", progress=False)
    assert len(told(delta.warnings)) == len(delta.warnings) == 1


def test_an_adapter_of_another_base_is_told_by_its_name(tmp_path):
    sides = family(tmp_path)
    other = write(tmp_path / "other", moved(load(sides["base"]), 9, 1e-3))
    adapter = lora(tmp_path / "lora", base_model_name_or_path=str(sides["base"]))
    options = {"instruct": sides["instruct"], "tuned": adapter, "format": "model", "progress": False}
    for number, base in enumerate((None, sides["base"], sides["base"] / ".." / "base")):
        assert told(graft(base=base, **options, output=tmp_path / f"same{number}").warnings) == []
    assert "by its name" in told(graft(base=other, **options, output=tmp_path / "b").warnings)[0]


def test_grafting_onto_the_base_itself_is_told(tmp_path):
    sides = family(tmp_path)
    adapter = lora(tmp_path / "lora", base_model_name_or_path=str(sides["base"]))
    report = graft(instruct=sides["base"], tuned=adapter, output=tmp_path / "a", format="model", progress=False)
    assert any("base and instruct are one folder" in text for text in report.warnings)


def test_auto_says_why_it_wrote_dense_weights(tmp_path):
    sides = family(tmp_path)
    adapter = lora(tmp_path / "lora", base_model_name_or_path=str(sides["base"]))
    report = graft(instruct=sides["instruct"], tuned=adapter, output=tmp_path / "auto", progress=False)
    assert f"dense because instruct {sides['instruct']} is a local folder" in report.text()
    asked = graft(instruct=sides["instruct"], tuned=adapter, output=tmp_path / "b", format="model", progress=False)
    assert "dense because" not in asked.text()


def test_the_missing_base_of_an_adapter_is_told_with_a_way_out(tmp_path):
    sides = family(tmp_path)
    adapter = lora(tmp_path / "lora", base_model_name_or_path="/gone/base")
    with pytest.raises(CheckpointError, match=r"names /gone/base as the model that it was trained on(.|\n)*--base B"):
        graft(instruct=sides["instruct"], tuned=adapter, output=tmp_path / "a", progress=False)
    assert not (tmp_path / "a").exists()


def replace(path: Path, content: bytes) -> None:
    path.with_name("new").write_bytes(content)
    path.with_name("new").replace(path)


@pytest.mark.parametrize("change", [replace, Path.write_bytes], ids=["replaced", "rewritten"])
@pytest.mark.parametrize(
    ("role", "name"),
    [("base", "model.safetensors"), ("instruct", "model.safetensors"), ("tuned", "model.safetensors"),
     ("instruct", "generation_config.json")],
)  # fmt: skip
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch, role, name, change):
    sides = family(tmp_path, generation_config_DOT_json="{}")
    path = sides[role] / name

    def late(*arguments, **options):
        found = stream(*arguments, **options)
        change(path, path.read_bytes())
        return found

    stream = stream_module.stream
    monkeypatch.setattr(stream_module, "stream", late)
    for digest in ("sha256", "none"):
        with pytest.raises(GraftError, match=rf"1 input files were replaced or written to .*\n *{path}\n"):
            graft(**sides, output=tmp_path / "out", digest=digest, progress=False)
        assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    graft(**sides, output=tmp_path / "out", progress=False)


def test_a_file_that_changes_after_its_header_was_read_is_an_error_of_a_delta_and_of_an_adapter(tmp_path, monkeypatch):
    sides = family(tmp_path)
    adapter = lora(tmp_path / "lora", base_model_name_or_path=str(sides["base"]))

    def change_before(module, name, path):
        def late(*arguments, **options):
            replace(path, path.read_bytes())
            return real(*arguments, **options)

        real = getattr(module, name)
        monkeypatch.setattr(module, name, late)

    change_before(stream_module, "stream", sides["tuned"] / "model.safetensors")
    with pytest.raises(GraftError, match="1 input files were replaced"):
        extract_delta(base=sides["base"], tuned=sides["tuned"], output=tmp_path / "delta", progress=False)
    change_before(repoint, "write_adapter", adapter / "adapter_model.safetensors")
    with pytest.raises(GraftError, match="1 input files were replaced"):
        graft(instruct=sides["instruct"], tuned=adapter, output=tmp_path / "out", format="adapter", progress=False)


@pytest.mark.parametrize(
    ("digest", "hashed", "said"),
    [("sha256", hashlib.sha256, "by SHA-256: any change"), ("xxh3", xxhash.xxh3_128, "by XXH3: a change by accident"),
     ("none", None, "no digests")],
)  # fmt: skip
def test_a_digest_names_its_kind_and_verify_says_what_it_finds(tmp_path, digest, hashed, said):
    sides = family(tmp_path)
    graft(**sides, output=tmp_path / "out", digest=digest, progress=False)
    content = (sides["tuned"] / "model.safetensors").read_bytes()
    wanted = hashed and {"model.safetensors": f"{digest}:{hashed(content).hexdigest()}"}
    assert read_manifest(tmp_path / "out")["tuned"]["digests"] == wanted
    report = verify(tmp_path / "out", progress=False)
    assert report.same
    assert said in report.text()
    # The same numbers in another file, which the weights do not show.
    tensors = load(sides["tuned"])
    save_file(tensors, sides["tuned"] / "model.safetensors", metadata={"format": "pt", "note": "other"})
    assert verify(tmp_path / "out", progress=False).digests == (["tuned: model.safetensors"] if hashed else [])


def test_an_adapter_in_the_place_of_a_model_is_named_by_its_role(tmp_path):
    sides, adapter = family(tmp_path), lora(tmp_path / "adapter")
    for role in ("base", "instruct"):
        with pytest.raises(AdapterError, match=rf"^{role} {adapter} is an adapter, not a model\. Merge it first"):
            graft(**{**sides, role: adapter}, output=tmp_path / "out", progress=False)
