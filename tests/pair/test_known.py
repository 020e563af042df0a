"""Which BASE an INSTRUCT was made from: the table, and chains of cards in a hub cache."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from families import family, lora
from hub_cache import into_cache
from huggingface_hub import constants
from repository import ROOT

from shadow_trl import cli, graft
from shadow_trl.checkpoints.manifest import read_manifest
from shadow_trl.errors import ConfigError
from shadow_trl.pair.known import find_base, known_pairs, taken_base


@pytest.fixture
def cards(tmp_path, monkeypatch):
    """Return a function that puts models with such heads of their cards into the hub cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def put(**heads: str) -> None:
        for number, (name, head) in enumerate(heads.items()):
            folder = tmp_path / "cards" / name
            folder.mkdir(parents=True)
            (folder / "README.md").write_text(f"---\n{head}\n---\n# A model\n")
            into_cache(tmp_path / "cache", f"own/{name.replace('_', '-')}", f"{number}" * 40, folder, branch="main")

    return put


def test_the_table_is_whole():
    pairs = known_pairs()
    assert len({pair.instruct for pair in pairs}) == len(pairs) > 200
    assert not {pair.instruct for pair in pairs} & {pair.base for pair in pairs}  # no chain within it
    for pair in pairs:
        assert pair.base.count("/") == pair.instruct.count("/") == 1
        assert pair.base.split("/")[0] == pair.instruct.split("/")[0]
        assert bool(pair.licence) == bool(pair.licence_by), pair  # a licence that was read nowhere is a guess
        assert pair.licence_by == "hub" or pair.licence_by.count("/") == bool(pair.licence_by)


def test_the_pairs_of_the_recipes_are_in_the_table():
    import yaml

    for path in (ROOT / "recipes" / "configs").glob("*/sft_full.yaml"):
        values = yaml.safe_load(path.read_text())
        if values["model_name_or_path"].startswith("data/"):
            continue
        assert find_base(values["instruct_model"])[0] == values["model_name_or_path"], path


def test_the_cards_of_a_chain_of_stages(cards):
    cards(
        Mo_Instruct="base_model: own/Mo-DPO", Mo_DPO="base_model:\n- own/Mo-SFT", Mo_SFT="base_model: own/Mo", Mo="a: b"
    )  # fmt: skip
    way = "own/Mo-Instruct from own/Mo-DPO from own/Mo-SFT from own/Mo"
    assert find_base("own/Mo-Instruct") == ("own/Mo", f"by the cards: {way}")
    assert find_base(f"own/Mo-Instruct@{'0' * 40}")[0] == "own/Mo"


def test_a_chain_ends_at_a_known_pair(cards):
    cards(
        More="base_model: Qwen/Qwen3-8B",
        Tuned="base_model: Qwen/Qwen2.5-7B-Instruct",
        Coder_Instruct="base_model: Qwen/Qwen2.5-Coder-7B",
    )
    assert find_base("own/Tuned")[0] == "Qwen/Qwen2.5-7B"
    assert find_base("own/More")[0] == "Qwen/Qwen3-8B-Base"
    assert find_base("own/Coder-Instruct")[0] == "Qwen/Qwen2.5-Coder-7B"  # whose own card names Qwen2.5-7B


@pytest.mark.parametrize(
    ("heads", "text"),
    [
        ({"It": "license: mit"}, "its card names no base_model"),
        ({"It": "base_model: own/B\nbase_model_relation: quantized"}, r"another kind of model \(quantized\)"),
        ({"It": "base_model: own/B\nbase_model_relation: merge"}, r"another kind of model \(merge\)"),
        ({"It": "base_model: own/B\nlibrary_name: peft"}, r"another kind of model \(adapter\)"),
        ({"It": "base_model: [own/B, own/C]"}, r"another kind of model \(merge of own/B, own/C\)"),
        ({"It_AWQ": "base_model: own/B"}, r"another kind of model \(quantized\)"),
        ({"It": "base_model: own/B", "B": "base_model: own/It"}, "its cards lead from own/It to own/B to own/It"),
        ({"It": "base_model: own/M", "M": "base_model: own/B", "B": "a: b"}, "own/M may be it as well"),
        ({"It": "base_model: own/B-Instruct", "B_Instruct": "a: b"}, "ends at a post-trained model"),
        ({"It": "base_model: own/gone"}, "the card of own/gone cannot be read"),
    ],
)  # fmt: skip
def test_what_is_not_clear_is_refused(cards, heads, text):
    cards(**heads)
    with pytest.raises(ConfigError, match=text):
        find_base(f"own/{next(iter(heads)).replace('_', '-')}")


def test_a_folder_is_not_the_model_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "Qwen" / "Qwen3-8B"
    folder.mkdir(parents=True)
    with pytest.raises(ConfigError, match="its card names no base_model"):
        find_base("Qwen/Qwen3-8B")
    (folder / "README.md").write_text("---\nbase_model: google/gemma-3-1b-pt\n---\n")
    assert find_base(folder) == ("google/gemma-3-1b-pt", f"by the cards: {folder} from google/gemma-3-1b-pt")
    assert find_base("Qwen/Qwen3-8B")[0] == "google/gemma-3-1b-pt"


def test_nothing_is_taken_that_was_not_confirmed(caplog):
    with pytest.raises(ConfigError, match="was made from Qwen/Qwen3-8B-Base, by the table") as error:
        taken_base("Qwen/Qwen3-8B", confirmed=False, missing="base")
    assert "find_base=True" in str(error.value)
    with pytest.raises(ConfigError, match=r"base is missing\. Name it, or pass find_base=True"):
        taken_base("own/unknown", confirmed=False, missing="base")
    with pytest.raises(ConfigError, match="no INSTRUCT is named"):
        taken_base(None, confirmed=True, missing="base")
    assert taken_base("Qwen/Qwen3-8B", confirmed=True, missing="base") == "Qwen/Qwen3-8B-Base"
    assert "BASE is Qwen/Qwen3-8B-Base, by the table of known pairs." in caplog.text


def test_the_command(capsys, cards):
    assert cli.main(["pairs", "qwen3-0.6b"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["base", "instruct", "licence", "licence_by", "listed_by"]
    assert row.split() == [
        *("Qwen/Qwen3-0.6B-Base", "Qwen/Qwen3-0.6B", "apache-2.0", "QwenLM/Qwen3", "LLaMA-Factory", "ms-swift")
    ]
    assert cli.main(["pairs", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert len(listed) == len(known_pairs())
    assert {row["licence"] for row in listed} > {"not checked", "gemma"}
    cards(It="base_model: own/B", B="a: b")
    assert cli.main(["pairs", "own/It"]) == 0
    captured = capsys.readouterr()
    assert "BASE of own/It is own/B, by the cards: own/It from own/B." in captured.err
    assert captured.out.splitlines()[1].split()[:2] == ["own/B", "own/It"]
    assert cli.main(["pairs", "nothing"]) == 2
    assert "no known pair has 'nothing' in a name. Or give an INSTRUCT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("gema-3", "google/gemma-3-4b-it"),
        ("qwen3-06b", "Qwen/Qwen3-0.6B"),
        ("Llama 3.2", "meta-llama/Llama-3.2-1B-Instruct"),
        ("mistal", "mistralai/Mistral-7B-Instruct-v0.1"),
        ("smol-lm2", "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
    ],
)
def test_a_filter_without_a_pair_is_answered_with_names_like_it(capsys, given, meant):
    assert cli.main(["pairs", given]) == 2
    said = capsys.readouterr()
    listed = said.err.partition("Names like it: ")[2].partition(". Or give")[0].split(", ")
    assert meant in listed
    assert len(listed) <= 5
    assert cli.main(["pairs", listed[0]]) == 0


def test_the_command_of_a_warning_runs_where_base_was_looked_up(cards, tmp_path):
    sides = family(tmp_path, delta=1e-5, dtypes=(torch.bfloat16, torch.bfloat16, torch.float32))
    cards(It="base_model: own/B")
    for number, role in enumerate(("base", "instruct")):
        name = {"base": "B", "instruct": "It"}[role]
        head = "license: mit" if role == "base" else "base_model: own/B"
        (sides[role] / "README.md").write_text(f"---\n{head}\n---\n")
        into_cache(tmp_path / "cache", f"own/{name}", str(number + 5) * 40, sides[role], branch="main")
    given = {"instruct": "own/It", "tuned": sides["tuned"], "find_base": True, "progress": False}
    warnings = graft(**given, output=tmp_path / "out", rounding="nearest").warnings
    (warning,) = [text for text in warnings if "Without a loss" in text]
    words = shlex.split(warning.splitlines()[1])
    assert words[0] == "shadow-trl"
    assert cli.main([*words[1:], "--quiet"]) == 0
    assert read_manifest(tmp_path / "out-float32")["base"]["source"] == "own/B"


def test_a_graft_takes_it(cards, tmp_path, capsys):
    sides = family(tmp_path)
    (sides["instruct"] / "README.md").write_text("---\nbase_model: own/b\n---\n")
    into_cache(tmp_path / "cache", "own/b", "a" * 40, sides["base"], branch="main")
    words = ["graft", f"--instruct={sides['instruct']}", f"--tuned={sides['tuned']}", f"--output={tmp_path / 'out'}"]
    assert cli.main([*words, "--quiet"]) == 2
    assert "base is missing. Name it, or pass find_base=True (--find-base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (sides["base"] / "README.md").write_text("---\nlicense: mit\n---\n")
    into_cache(tmp_path / "cache", "own/b", "b" * 40, sides["base"], branch="main")
    assert cli.main([*words, "--quiet", "--find-base"]) == 0
    assert read_manifest(tmp_path / "out")["base"]["source"] == "own/b"
    adapter = lora(tmp_path / "lora", base_model_name_or_path=str(sides["base"]))
    words = [*words[:2], f"--tuned={adapter}", f"--output={tmp_path / 'adapter'}", "--quiet", "--find-base"]
    assert cli.main(words) == 0  # which names BASE itself
    assert Path(read_manifest(tmp_path / "adapter")["base"]["source"]) == sides["base"]
