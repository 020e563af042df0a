"""Bad files for `hostile`: JSON that is none or has values of the wrong kind, headers, indices, pickles."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hostile import TOKENIZER, Case, Sound, edited, written

DEEP = "[" * 100_000 + "]" * 100_000


def cases(sound: Sound) -> Iterator[Case]:
    """Yield all of them."""
    for kind in (_texts, _values, _headers, _indices, _pickles):
        yield from kind(sound)


def _texts(sound: Sound) -> Iterator[Case]:
    """Yield files that are no JSON objects at all."""
    files = {
        "base": ["config.json"],
        "instruct": [
            "config.json",
            "generation_config.json",
            "tokenizer_config.json",
            "added_tokens.json",
            "preprocessor_config.json",
            "special_tokens_map.json",
        ],
        "tuned": ["config.json", "shadow.json"],
        "adapter": ["adapter_config.json", "shadow.json"],
        "delta": ["shadow.json", "base_config.json"],
        "graft": ["shadow.json", "config.json"],
    }
    texts = {
        "empty": ("", "cannot read"),
        "cut": ('{"a": [1, ', "cannot read"),
        "deep": (DEEP, "nested too deeply"),
        "deep objects": ('{"a":' * 200 + "1" + "}" * 200, "levels deep"),
        "nan": ('{"a": NaN}', "NaN"),
        "bom": (b"\xef\xbb\xbf{}", "BOM"),
        "utf-16": ('{"a": 1}'.encode("utf-16"), "cannot read"),
        "latin-1": (b'{"a": "\xe9"}', "cannot read"),
        "surrogate": ('{"a": "\\ud800"}', "surrogate"),
        "huge number": ('{"a": ' + "9" * 5000 + "}", "cannot read"),
        "bytes": (bytes(range(256)), "cannot read"),
        "list": ("[1]", ""),
        "text": ('"x"', ""),
        "null": ("null", ""),
    }
    for side, names in files.items():
        for file in names:
            for kind, (text, expected) in texts.items():
                yield Case(f"{file} of {side}: {kind}", written(sound, side, file, text), expected or file)


def _values(sound: Sound) -> Iterator[Case]:
    """Yield JSON objects with a value of the wrong kind."""
    wrong: dict[tuple[str, str], dict[str, list[Any]]] = {
        ("adapter", "adapter_config.json"): {
            "peft_type": [3, None, ["LORA"], ...],
            "r": ["2", 2.5, -1, True, 2**64, [2]],
            "bias": [1, {}],
            "lora_alpha": ["four", None, [4], True, {}],
            "rank_pattern": ["q_proj", [1], {"q_proj": "2"}, {"q_proj": -1}],
            "alpha_pattern": [{"q_proj": None}, {"q_proj": "x"}, 3],
            "base_model_name_or_path": [3, ["base"], "a\0b", {}],
            "revision": [1, {}],
            "use_rslora": ["yes", 1],
            "fan_in_fan_out": ["no", 0.5],
            "init_lora_weights": [3, [], {}],
            "target_modules": [3, [1], {"a": 1}],
            "modules_to_save": [{"a": 1}, [None]],
            "trainable_token_indices": [["1"], [-1], {"embed_tokens": 3}, {"embed_tokens": [2.5]}, [2**70], "1"],
            "layers_to_transform": ["1", [-1], {}],
        },
        ("instruct", "config.json"): {
            "model_type": [3, ["llama"]],
            "architectures": ["LlamaForCausalLM", [3], {}],
            "vocab_size": ["20", -1, 2.5, [20]],
            "text_config": [[1], "x", {"vocab_size": "x"}],
            "tie_word_embeddings": ["yes", 1],
            "rope_scaling": ["x", [1]],
            "rope_parameters": ["x", [1]],
            "eos_token_id": ["1", [1, "2"], 2.5, 2**64, {}],
            "pad_token_id": ["x"],
        },
        ("instruct", "generation_config.json"): {"eos_token_id": ["1", {}, True], "bos_token_id": [[None]]},
        ("instruct", "tokenizer_config.json"): {
            "added_tokens_decoder": [[1], {"x": {"content": "a"}}, {"-1": {"content": "a"}}, {"1": 3}, {"9" * 30: "a"}],
            "eos_token": [3, ["a"], True],
            "additional_special_tokens": ["x", [3], {"a": "b"}],
            "extra_special_tokens": ["x", 3],
            "chat_template": [3, ["x"], True],
        },
        ("instruct", "added_tokens.json"): {"<|x|>": ["1", -1, None, 2.5]},
        ("graft", "shadow.json"): {
            "kind": [3, ["graft"], "soup", ...],
            "format": ["1", 99, -1, 1.5, None],
            "options": [3, [], None, ...],
            "form": [3, "soup", ...],
            "base": [3, "base", {}, {"source": 3}, {"source": ""}, {"source": "a\0b"}],
            "instruct/source": [3, "", None, "~nobody-of-this-name", "x" * 300],
            "tuned": [[1], {"source": "x", "revision": 3}],
            "tuned/digests": [
                3,
                ["a"],
                {"model.safetensors": 3},
                {"../../etc/passwd": "sha256:0"},
                {"/etc/passwd": "sha256:0"},
                {"a\0b": "sha256:0"},
                {"model.safetensors": "md4:0"},
            ],
            "tuned/folder": ["yes", 1],
            "tuned_weights": ["x", ["1"], 3, [1.0, 2.0]],
            "options/scale": ["x", None, [], True, 10**400],
            "options/untie": ["no"],
            "loaded_in": [["int3"]],
            "options/modules": [3, "(", ["("], [3]],
            "options/seed": ["x", 1.5],
            "options/dtype": ["int4", 3],
            "options/max_shard_size": ["x", []],
        },
        ("delta", "shadow.json"): {
            "form": [3, ...],
            "base": [None, 3, ...],
            "without_delta": [3, [3]],
            "tuned": [3, {}],
            "base/digests": [3, {"../x": "sha256:0"}],
        },
    }
    elsewhere = {
        "~nobody-of-this-name": "cannot look for",
        "x" * 300: "cannot look for",
        str([1.0, 2.0]): "each with --tuned T:WEIGHT",
        str({"model.safetensors": "md4:0"}): "unknown kind",
    }
    for (side, file), keys in wrong.items():
        for key, values in keys.items():
            for value in values:
                shown = "missing" if value is ... else json.dumps(value)[:40]
                says = elsewhere.get(str(value), key.split("/")[-1])
                yield Case(f"{file} of {side}: {key} = {shown}", edited(sound, side, file, key, value), says)
    for number, (at, value) in enumerate(
        {
            "added_tokens/0/id": "3",
            "added_tokens/0/content": 3,
            "added_tokens/0": 3,
            "model/vocab/a": "x",
            "model/vocab/b": -1,
            "model/vocab/c": 2.5,
            "model": 3,
            "model/vocab": [3],
            "added_tokens": {"a": 1},
        }.items()
    ):

        def make(folder: Path, at: str = at, value: Any = value) -> list[str]:
            argv = sound.argv(folder, "instruct")
            content = json.loads(json.dumps(TOKENIZER))
            section, *keys = content, *at.split("/")
            for key in keys[:-1]:
                section = section[int(key) if isinstance(section, list) else key]
            section[int(keys[-1]) if isinstance(section, list) else keys[-1]] = value
            (folder / "instruct/tokenizer.json").write_text(json.dumps(content))
            return argv

        yield Case(f"tokenizer.json {number}: {at} = {value}", make, "token")


def _header(content: Any, data: bytes = b"", length: int | None = None, encoding: str = "utf-8") -> bytes:
    text = (
        content
        if isinstance(content, bytes)
        else (content if isinstance(content, str) else json.dumps(content)).encode(encoding)
    )
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _headers(sound: Sound) -> Iterator[Case]:
    """Yield weight files that are no safetensors files."""
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    files = {
        "empty": b"",
        "seven bytes": b"1234567",
        "no header": b"\0" * 8,
        "length too large": _header({"w": one}, b"1234", 2**40),
        "length of 2^63": _header({"w": one}, b"1234", 2**63),
        "cut": _header({"w": one}, b"123"),
        "more than it says": _header({"w": one}, b"12345"),
        "no json": _header("{", b""),
        "a list": _header([], b""),
        "bom": _header(b"\xef\xbb\xbf" + json.dumps({"w": one}).encode(), b"1234"),
        "utf-16": _header({"w": one}, b"1234", encoding="utf-16-le"),
        "utf-32": _header({"w": one}, b"1234", encoding="utf-32-le"),
        "deep": _header(DEEP),
        "nan": _header('{"w": NaN}'),
        "name twice": _header(f'{{"w": {json.dumps(one)}, "w": {json.dumps(one)}}}', b"1234"),
        "surrogate": _header('{"\\ud800": ' + json.dumps(one) + "}", b"1234"),
        "leading space": _header(" " + json.dumps({"w": one}), b"1234"),
        "metadata a list": _header({"__metadata__": [1], "w": one}, b"1234"),
        "metadata a text": _header({"__metadata__": "", "w": one}, b"1234"),
        "metadata a number": _header({"__metadata__": {"a": 1}, "w": one}, b"1234"),
    }
    changes: dict[str, list[Any]] = {
        "dtype": [3, None, ["F32"], "X9", "f32", {}, ...],
        "shape": [3, None, "1", {"a": 1}, [-1], [1.0], [True], ["1"], [2**63], [2**40, 2**40, 0], [[1]], ...],
        "data_offsets": [3, None, [0], [0, 4, 4], ["0", "4"], [4, 0], [0, 2**63], [-4, 0], [0.0, 4.0], {}, [4, 8], ...],
    }
    for key, values in changes.items():
        for value in values:
            entry = {**one, key: value} if value is not ... else {name: one[name] for name in one if name != key}
            files[f"{key} = {'missing' if value is ... else json.dumps(value)}"] = _header({"w": entry}, b"1234")
    files |= {f"entry {json.dumps(entry)}": _header({"w": entry}) for entry in (3, None, "x", [], {}, True)}
    for number, (name, data) in enumerate(files.items()):
        side = ("base", "instruct", "tuned")[number % 3]
        command = ("graft", "gap", "delta")[number % 3] if side != "instruct" else ("graft", "gap")[number // 3 % 2]
        yield Case(f"header: {name}", written(sound, side, "model.safetensors", data, command), "safetensors")


def _indices(sound: Sound) -> Iterator[Case]:
    """Yield indices that name no files, or files elsewhere."""
    indices = {
        "no map": {},
        "a list": [],
        "map a list": {"weight_map": [1]},
        "map of numbers": {"weight_map": {"w": 1}},
        "map null": {"weight_map": None},
        "metadata a list": {"metadata": [1], "weight_map": {"w": "model.safetensors"}},
        "key twice": '{"weight_map": {"w": "a", "w": "b"}}',
        "map empty": {"weight_map": {}},
        **{
            f"file {name!r}": {"weight_map": {"w": name}}
            for name in (
                "../x.safetensors",
                "/etc/passwd",
                "a/b.safetensors",
                "..",
                ".",
                "",
                "a\0b",
                "a\\b",
                "x" * 300,
                "\ud800",
                "missing.safetensors",
                "config.json",
                "model.safetensors.index.json",
            )
        },
    }
    for name, content in indices.items():

        def make(folder: Path, content: Any = content) -> list[str]:
            argv = sound.argv(folder, "tuned")
            (folder / "tuned/model.safetensors").unlink()
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / "tuned/model.safetensors.index.json").write_text(text)
            return argv

        yield Case(f"index: {name}", make, "")


class _Calls:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def _pickles(sound: Sound) -> Iterator[Case]:
    """Yield .bin files that are no dictionaries of plain tensors."""
    one = torch.ones(2)
    contents: dict[str, Any] = {
        "list": [one],
        "tensor": one,
        "number": 3,
        "empty": {},
        "integer keys": {0: one},
        "values": {"w": 3},
        "nested": {"model": {"w": one}},
        "none": {"w": None},
        "sparse": {"w": torch.eye(3).to_sparse()},
        "sparse csr": {"w": torch.eye(3).to_sparse_csr()},
        "expanded": {"w": torch.ones(1).expand(2**31)},
        "expanded rows": {"w": torch.ones(1, 8).expand(2**28, 8)},
        "overlapping": {f"w{number}": torch.ones(512).as_strided((256, 256), (1, 1)) for number in range(64)},
        "meta": {"w": torch.empty(2**40, device="meta")},
        "complex": {"w": torch.ones(2, dtype=torch.complex128)},
        "quantised": {"w": torch.quantize_per_tensor(one, 0.1, 0, torch.qint8)},
        "surrogate": {"\ud800": one},
    }
    for name, content in contents.items():

        def make(folder: Path, content: Any = content) -> list[str]:
            argv = sound.argv(folder, "tuned")
            (folder / "tuned/model.safetensors").unlink()
            torch.save(content, folder / "tuned/pytorch_model.bin")
            return argv

        yield Case(f"bin: {name}", make, "pytorch_model.bin" if name != "empty" else "without a tensor")
    raw = {
        "empty file": b"",
        "text": b"hello",
        "code": pickle.dumps({"w": _Calls()}),
        "zip": b"PK\x03\x04" + bytes(100),
        "cut pickle": pickle.dumps({"w": 1})[:-3],
    }
    for name, data in raw.items():

        def write_raw(folder: Path, data: bytes = data) -> list[str]:
            argv = sound.argv(folder, "tuned")
            (folder / "tuned/model.safetensors").unlink()
            (folder / "tuned/pytorch_model.bin").write_bytes(data)
            return argv

        yield Case(f"bin: {name}", write_raw, "pytorch_model.bin")
