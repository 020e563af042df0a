"""Bad input, made by code: over 300 cases that must each be refused with one clear error and nothing written.

A case is `(name, make, expected)`: `make(folder)` writes its files below `folder` and returns the words of a command
line; `expected` is part of the message. `sides` are sound folders that the cases only read or copy.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from families import lora, moved, tensors, write

TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "added_tokens": [
        {
            "id": 3,
            "content": "<|user|>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ],
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "c": 2}, "unk_token": "a"},
}
TEMPLATE = "{% for message in messages %}<|user|>{{ message['content'] }}{% endfor %}"


def ends_well(argv: list[str], said: str) -> bool:
    """Whether the refusal of a command that writes says that nothing was written; others have nothing to say of it."""
    told = said.endswith("Nothing was written.\n")
    return told == (argv[0] in ("graft", "delta", "compare", "sft", "dpo", "sft-dpo"))


class Case(NamedTuple):
    """One bad input.

    Args:
        name: what is bad about it.
        make: writes it below an empty folder and returns the words of the command line.
        expected: part of the message, beside "Error: " and the ending (see `ends_well`).
    """

    name: str
    make: Callable[[Path], list[str]]
    expected: str


class Sound:
    """A sound BASE, INSTRUCT, TUNED, adapter, delta and graft, made once below `root` and copied from there."""

    def __init__(self, root: Path) -> None:
        from shadow_trl import extract_delta, graft

        self.root = root
        base = tensors(0)
        for role, weights in (("base", base), ("instruct", moved(base, 1, 1e-3)), ("tuned", moved(base, 2, 1e-2))):
            folder = write(root / role, weights)
            (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
            (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|user|>"}))
        (root / "instruct/chat_template.jinja").write_text(TEMPLATE)
        lora(root / "adapter", base_model_name_or_path=str(root / "base"))
        sides = {role: root / role for role in ("base", "instruct", "tuned")}
        graft(**sides, output=root / "graft", progress=False)
        extract_delta(base=sides["base"], tuned=sides["tuned"], output=root / "delta", progress=False)

    def argv(self, folder: Path, changed: str = "", command: str = "graft") -> list[str]:
        """Return a command line that is sound but for the side `changed`, a copy of which is in `folder`."""
        if changed and not (folder / changed).exists():
            shutil.copytree(self.root / changed, folder / changed)
        at = {
            role: str((folder if role == changed else self.root) / role)
            for role in ("base", "instruct", "tuned", "adapter", "delta", "graft")
        }
        if changed == "graft":
            return ["verify", at["graft"]]
        if changed == "delta":
            return ["graft", "--delta", at["delta"], "--instruct", at["instruct"], "--output", str(folder / "out")]
        tuned = at["adapter" if changed == "adapter" else "tuned"]
        words = ["--base", at["base"], "--tuned", tuned]
        if command == "gap":
            return ["gap", "--instruct", at["instruct"], *words]
        if command == "delta":
            return ["delta", *words, "--output", str(folder / "out")]
        return ["graft", "--instruct", at["instruct"], *words, "--output", str(folder / "out")]


def cases(sound: Sound) -> list[Case]:
    """Return every case, in a fixed order."""
    import hostile_files

    found = [*hostile_files.cases(sound), *_paths(sound), *_links(sound), *_templates(sound), *_patterns(sound)]
    assert len({case.name for case in found}) == len(found)
    return found


def written(sound: Sound, side: str, file: str, content: Any, command: str = "graft") -> Callable[[Path], list[str]]:
    """Return what writes `content`, bytes, text or JSON, as a file of a copy of a side."""

    def make(folder: Path) -> list[str]:
        argv = sound.argv(folder, side, command)
        path = folder / side / file
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return argv

    return make


def edited(sound: Sound, side: str, file: str, at: str, value: Any) -> Callable[[Path], list[str]]:
    """Return what sets, in a copy of a side, the value at a dotted place of a JSON file; `...` removes it."""

    def make(folder: Path) -> list[str]:
        argv = sound.argv(folder, side)
        path = folder / side / file
        content = json.loads(path.read_text()) if path.is_file() else {}
        section, *keys = content, *at.split("/")
        for key in keys[:-1]:
            section = section[int(key) if isinstance(section, list) else key]
        if value is ...:
            del section[keys[-1]]
        else:
            section[keys[-1]] = value
        path.write_text(json.dumps(content))
        return argv

    return make


def _paths(sound: Sound) -> Iterator[Case]:
    """Yield names of models and outputs that nothing can have, or that are nothing of the kind."""
    names = {
        "": "empty",
        "a\0b": "NUL",
        "x" * 300: "too long",
        "/".join(["y" * 200] * 30): "too long",
        "~nobody-of-this-name": "user",
        "\udcff": "UTF-8",
        "/": "no weights",
        "/dev/null": "no folder",
        "/nowhere": "no folder",
        "..": "",
        "a b": "no folder",
        "owner/name/more": "no folder",
        "owner/na..me": "no folder",
        "@main": "",
        "owner/x@../..": "revision",
    }
    for name, expected in names.items():
        for role in ("base", "instruct", "tuned"):

            def make(folder: Path, name: str = name, role: str = role) -> list[str]:
                argv = sound.argv(folder)
                argv[argv.index(f"--{role}") + 1] = name
                return argv

            yield Case(f"path: {role} {name[:30]!r} ({len(name)})", make, expected)
        yield Case(f"path: verify {name[:30]!r} ({len(name)})", lambda folder, name=name: ["verify", name], expected)
    outputs = {
        "": "empty",
        "a\0b": "NUL",
        "x" * 300: "too long",
        "x" * 250: "more than",
        "\udcff": "UTF-8",
        "/": "exists",
        "/dev/null": "exists",
        "/dev/null/out": "Not a directory",
        ".": "exists",
    }
    for name, expected in outputs.items():
        for command in ("graft", "delta"):

            def make_output(folder: Path, name: str = name, command: str = command) -> list[str]:
                argv = sound.argv(folder, command=command)
                argv[argv.index("--output") + 1] = name
                return argv

            yield Case(f"path: output of {command} {name[:30]!r} ({len(name)})", make_output, expected)


def _links(sound: Sound) -> Iterator[Case]:
    """Yield links that lead nowhere, in circles, or out of the folder."""
    targets = {"itself": "{name}", "nothing": "nothing", "outside": "{outside}", "a device": "/dev/zero"}
    files = {
        "base": ["config.json", "model.safetensors"],
        "instruct": ["tokenizer_config.json", "chat_template.jinja"],
        "adapter": ["adapter_config.json", "adapter_model.safetensors"],
        "graft": ["shadow.json"],
    }
    for side, names in files.items():
        for name in names:
            for kind, target in targets.items():
                if (kind in ("outside", "a device")) and not name.endswith(".safetensors"):
                    continue

                def make(folder: Path, side: str = side, name: str = name, target: str = target) -> list[str]:
                    argv = sound.argv(folder, side)
                    (folder / side / name).rename(folder / "outside")
                    os.symlink(target.format(name=name, outside=folder / "outside"), folder / side / name)
                    return argv

                yield Case(f"link: {name} of {side} to {kind}", make, "" if kind == "a device" else name)

    def circle(folder: Path) -> list[str]:
        argv = sound.argv(folder)
        os.symlink("circle", folder / "circle")
        argv[argv.index("--base") + 1] = str(folder / "circle")
        return argv

    yield Case("link: base is a link to itself", circle, "cannot look for")


def _templates(sound: Sound) -> Iterator[Case]:
    """Yield chat templates that would take for ever, or all memory."""
    loops = "".join(f"{{% for {name} in range(90000) %}}" for name in "abcd") + "x" + "{% endfor %}" * 4
    bombs = {
        "loops": loops,
        "product": "{{ 'a' * 10**10 }}",
        "list": "{{ [0] * 10**10 }}",
        "format": "{{ '%1000000000d' % 1 }}",
        "wide": "{{ 'a'.center(10**10) }}",
        "filter": "{{ 'a'|center(10**10) }}",
        "doubling": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "lipsum": "{{ lipsum(n=100000000) }}",
        "format method": "{{ '{:1000000000}'.format(1) }}",
        "much text": "{% for a in range(90000) %}" + "x" * 100 + "{% endfor %}",
    }
    for name, text in bombs.items():
        yield Case(f"template: {name}", written(sound, "instruct", "chat_template.jinja", text), "chat template")


def _patterns(sound: Sound) -> Iterator[Case]:
    """Yield regular expressions that are none, or that would take for ever."""
    for pattern in ("(", "(.+)+x", "[", "*", "(" * 5000):
        for key in ("rank_pattern", "alpha_pattern")[: 1 if "x" in pattern else 2]:
            make = edited(sound, "adapter", "adapter_config.json", key, {pattern: 2})
            yield Case(f"pattern: {key} {pattern[:9]} ({len(pattern)})", make, key)
    for pattern in ("((.*)*)*!", "(?:.|.)*!"):
        yield Case(
            f"pattern: modules {pattern}", edited(sound, "graft", "shadow.json", "options/modules", pattern), "modules"
        )
    for value in ("(", "(.+)+x", "["):
        config = {"target_modules": value, "use_dora": True}

        def make(folder: Path, config: dict[str, Any] = config) -> list[str]:
            argv = sound.argv(folder, "adapter")
            path = folder / "adapter/adapter_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
            return argv

        yield Case(f"pattern: target_modules {value}", make, "")
