"""The check of a result agrees with transformers: what it lets pass loads, what does not load it refuses."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file
from tiny import make_pair
from transformers import AutoModelForCausalLM

from shadow_trl import graft
from shadow_trl.errors import GraftError
from shadow_trl.results.check import check_result

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"


def edited(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def index(change):
    return lambda folder: edited(folder / INDEX, change)


def config(**changes):
    return lambda folder: edited(folder / "config.json", lambda content: content.update(changes))


def cut(folder):
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1])


def garbled(folder):
    raw = bytearray((folder / SHARD).read_bytes())
    raw[8] = ord("x")
    (folder / SHARD).write_bytes(raw)


def whole_number_in_header(folder):
    raw = (folder / SHARD).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.dumps({**json.loads(raw[8 : 8 + length]), "__metadata__": {"format": 1}}).encode()
    (folder / SHARD).write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


def one_file(folder):
    weights = {}
    for path in folder.glob("*.safetensors"):
        weights |= load_file(path)
        path.unlink()
    (folder / INDEX).unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def without(name):
    return lambda folder: (folder / name).unlink()


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    root = tmp_path_factory.mktemp("check")
    base, instruct = make_pair(root)
    graft(base=base, instruct=instruct, tuned=base, output=root / "out", max_shard_size="20KB", progress=False)
    for path in (root / "out").glob("*.safetensors"):
        name = re.sub(r"of-\d+", "of-00002", path.name)
        assert name == path.name  # two files
    return root / "out", instruct


GOOD = {
    "as written": lambda folder: None,
    "one file": one_file,
    "named weights": config(transformers_weights=INDEX),
    "code on the hub": config(auto_map={"AutoConfig": "org/name--configuration_x.X"}),
}
BROKEN = {
    "no metadata": index(lambda found: found.pop("metadata")),
    "metadata null": index(lambda found: found.update(metadata=None)),
    "metadata is a list": index(lambda found: found.update(metadata=[])),
    "no weight_map": index(lambda found: found.pop("weight_map")),
    "a file that is not there": index(lambda found: found["weight_map"].update(x="model-9.safetensors")),
    "index is no JSON": text(INDEX, "{"),
    "no shard": without(SHARD),
    "no index": without(INDEX),
    "cut short": cut,
    "header is no JSON": garbled,
    "header metadata is no text": whole_number_in_header,
    "no config": without("config.json"),
    "config is no JSON": text("config.json", '{"model_type": "qwen3",'),
    "named weights that are not there": config(transformers_weights="other.safetensors"),
    "named code that is not there": config(model_type="x", auto_map={"AutoConfig": "configuration_x.X"}),
}
# transformers does not look at these; a loader that does would be misled.
STRICTER = {
    "another size": index(lambda found: found["metadata"].update(total_size=1)),
    "a weight that the index lacks": index(lambda found: found["weight_map"].pop("model.norm.weight")),
    "a weight in another file": index(lambda found: found.update(weight_map=dict.fromkeys(found["weight_map"], SHARD))),
    "a tokenizer file is gone": without("tokenizer_config.json"),
}  # fmt: skip


def loads(folder):
    try:
        found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)[1]
    except Exception:
        return False
    return not found["missing_keys"]


def passes(folder, instruct):
    try:
        check_result(folder, folder, instruct.glob("*token*"), instruct)
    except GraftError:
        return False
    return True


@pytest.mark.parametrize("case", [*GOOD, *BROKEN])
def test_the_check_agrees_with_transformers(tmp_path, sharded, case):
    folder, instruct = tmp_path / "out", sharded[1]
    shutil.copytree(sharded[0], folder)
    {**GOOD, **BROKEN}[case](folder)
    assert passes(folder, instruct) == loads(folder) == (case in GOOD)


@pytest.mark.parametrize("case", STRICTER)
def test_what_misleads_other_loaders_is_refused_too(tmp_path, sharded, case):
    folder, instruct = tmp_path / "out", sharded[1]
    shutil.copytree(sharded[0], folder)
    STRICTER[case](folder)
    assert not passes(folder, instruct)


@pytest.mark.parametrize(
    "metadata", [{}, {"metadata": {}}, {"metadata": None}, {"metadata": {"total_size": 7, "n": 1}}]
)
def test_a_graft_on_an_index_without_sizes_has_them_and_loads(tmp_path, sharded, metadata):
    instruct = tmp_path / "instruct"
    shutil.copytree(sharded[1], instruct)
    weights = load_file(instruct / "model.safetensors")
    (instruct / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((list(weights)[::2], list(weights)[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, instruct / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (instruct / INDEX).write_text(json.dumps({**metadata, "weight_map": weight_map}))
    base = sharded[1].parent / "base"
    graft(base=base, instruct=instruct, tuned=base, output=tmp_path / "out", progress=False)
    written = json.loads((tmp_path / "out" / INDEX).read_text())
    kept = metadata.get("metadata") or {}
    assert written["metadata"] == {**kept, "total_size": sum(value.nbytes for value in weights.values())}
    assert written["weight_map"] == weight_map
    assert loads(tmp_path / "out")


def test_a_result_that_would_not_load_is_not_put_in_place(tmp_path, sharded):
    instruct = tmp_path / "instruct"
    shutil.copytree(sharded[1], instruct)
    config(auto_map={"AutoModelForCausalLM": "modeling_x.X"})(instruct)
    base = sharded[1].parent / "base"
    with pytest.raises(GraftError, match=r"would not load.\n  modeling_x.py  missing.*\n.*Nothing was written\.$"):
        graft(base=base, instruct=instruct, tuned=base, output=tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["instruct"]
