from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import family, load, lora, write
from hostile import ends_well
from safetensors.torch import load_file, save_file

from shadow_trl import cli
from shadow_trl.checkpoints.manifest import read_manifest

BF16 = torch.bfloat16


def arguments(sides, output, *more):
    return ["graft", *(f"--{role}={folder}" for role, folder in sides.items()), "--output", str(output), *more]


def fails(capsys, argv, code: int, *texts: str) -> str:
    assert cli.main(argv) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    for text in texts:
        assert text in captured.err
    assert captured.err.count("Error: ") == 1
    assert "Traceback" not in captured.err
    return captured.err


def test_graft_writes_and_tells(tmp_path, capsys):
    sides = family(tmp_path)
    assert cli.main(arguments(sides, tmp_path / "out")) == 0
    captured = capsys.readouterr()
    assert f"{len(load(sides['instruct']))} weights grafted, 0 copied, bfloat16" in captured.out
    assert "sigma" in captured.out
    assert "warning: " in captured.err  # the family has no tokenizer


def test_json_and_quiet(tmp_path, capsys):
    sides = family(tmp_path)
    assert cli.main(arguments(sides, tmp_path / "a", "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["output"] == str(tmp_path / "a")
    assert report["by_kind"]["q_proj"]["weights"] == 2
    assert cli.main(arguments(sides, tmp_path / "b", "--quiet")) == 0
    assert capsys.readouterr().out == ""


def test_every_option_reaches_the_graft(tmp_path):
    sides = family(tmp_path)
    (sides["tuned"] / "chat_template.jinja").write_text("{{ messages }}")
    options = (
        "--scale 0.5 --instruct-scale 0.9 --modules q_proj k_proj --format model --dtype float16 --rounding stochastic "
        "--seed 3 --vocab strict --chat-template trained --max-shard-size 300 --digest none --stats off "
        "--base-dtype bfloat16 --quiet"
    )
    assert cli.main(arguments(sides, tmp_path / "out", *options.split())) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest["options"] == {
        "scale": 0.5, "instruct_scale": 0.9, "modules": ["q_proj", "k_proj"], "dtype": "float16",
        "rounding": "stochastic", "seed": 3, "vocab": "strict", "chat_template": "trained", "untie": False,
        "base_dtype": "bfloat16", "max_shard_size": 300,
    }  # fmt: skip
    assert manifest["tuned"]["digests"] is None
    assert manifest["sigma"] is None
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 5
    assert cli.main(arguments(sides, tmp_path / "out", "--overwrite", "--quiet", "--untie")) == 0


def test_bad_input_is_one_error_with_code_2_and_nothing_written(tmp_path, capsys):
    sides = family(tmp_path / "models")
    (tmp_path / "empty").mkdir()
    weights = load(sides["instruct"])
    weights["model.norm.weight"] = torch.ones(9, dtype=BF16)
    other = write(tmp_path / "other", weights)
    stray = lora(tmp_path / "stray")
    found = load_file(stray / "adapter_model.safetensors")
    save_file({n.replace("model.layers", "h"): v for n, v in found.items()}, stray / "adapter_model.safetensors")
    (tmp_path / "exists").mkdir()
    out = tmp_path / "out"
    before = sorted(tmp_path.rglob("*"))
    for argv, *texts in (
        (arguments({**sides, "base": tmp_path / "nothing"}, out), "there is no folder"),
        (arguments({**sides, "tuned": tmp_path / "empty"}, out), "has no weights"),
        (arguments({**sides, "instruct": other}, out), "model.norm.weight", "(9,)"),
        (arguments({**sides, "tuned": stray}, out), "4 of 4 modules", "Nothing was written"),
        (arguments(sides, tmp_path / "exists"), "exists"),
        (arguments(sides, sides["tuned"]), "exists"),
        (arguments(sides, sides["tuned"], "--overwrite"), "is not a graft"),
        (arguments(sides, sides["base"] / "sub"), "lies in the folder of base"),
        (arguments(sides, out, "--scale", "nan"), "scale must be a finite number"),
        (arguments(sides, out, "--scale", "big"), "--scale: invalid float value"),
        (arguments(sides, out, "--sclae", "1"), "there is no option --sclae (did you mean --scale?)", "graft --help"),
        (arguments(sides, out, "--sca", "1"), "there is no option --sca (did you mean --scale?)"),
        (["graft", "--instrct", "x"], "there is no option --instrct (did you mean --instruct?)"),
        (["graft", "--colour", "x"], "there is no option --colour. See"),
        (arguments(sides, out, "--dtype", "int4"), "--dtype: invalid choice"),
        (["graft", "--instruct", "x"], "the following arguments are required"),
        (["gap", "--base", str(sides["base"])], "instruct is missing"),
        (["gap", "--base", str(tmp_path / "no"), "--instruct", str(sides["base"])], "there is no folder"),
        (["gap", "--base", "a", "--instruct", "b", "--json", str(tmp_path / "no" / "x.json")], "does not exist"),
        (["knit"], "there is no command knit: it is one of graft, gap,"),
        (["grafft", "--base", "x"], "there is no command grafft (did you mean graft?)"),
        (["sftdpo"], "(did you mean sft-dpo?)"),
        ([], "required: COMMAND"),
    ):
        error = fails(capsys, argv, 2, *texts)
        assert ends_well(argv or [""], error), argv
        assert sorted(tmp_path.rglob("*")) == before, argv


def test_a_failure_at_run_time_is_code_1(tmp_path, capsys):
    sides = family(tmp_path / "models")
    weights = load(sides["tuned"])
    weights["model.norm.weight"][0] = float("nan")
    sides["tuned"] = write(tmp_path / "tuned", weights)
    fails(capsys, arguments(sides, tmp_path / "out"), 1, "model.norm.weight", "Nothing was written")
    assert not (tmp_path / "out").exists()


def test_gap_prints_and_writes(tmp_path, capsys):
    sides = family(tmp_path)
    argv = ["gap", "--base", str(sides["base"]), "--instruct", str(sides["instruct"]), "--tuned", str(sides["tuned"])]
    assert cli.main([*argv, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert cli.main([*argv, "--json", str(tmp_path / "gap.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert json.loads((tmp_path / "gap.json").read_text()) == report
    assert lines[1].split() == [
        "overall",
        *(f"{report[key]:.5f}" for key in ("sigma", "delta", "delta_to_gap", "cosine")),
        "1,736",
    ]
    assert any(line.startswith("  model.layers.1 ") for line in lines)
    assert any(line.startswith("  q_proj ") for line in lines)
    assert cli.main([*argv[:5], "--quiet"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("command", [*cli._COMMANDS, *cli._RECIPES])
def test_help_is_a_screen_that_names_the_command_and_has_an_example(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: shadow-trl {command} ")
    assert len(text.splitlines()) <= 75
    assert max(map(len, text.splitlines())) <= 120
    if command != "sft-dpo":
        example = text.split("example:\n")[1].splitlines()[0].split()
        assert example[:2] == ["shadow-trl", command]
        if command in cli._COMMANDS:
            assert cli._parser().parse_args(example[1:]).command == command


def test_gap_draws(tmp_path):
    pytest.importorskip("matplotlib")
    sides = family(tmp_path)
    argv = [
        "gap",
        "--base",
        str(sides["base"]),
        "--instruct",
        str(sides["instruct"]),
        "--plot",
        str(tmp_path / "gap.png"),
    ]
    assert cli.main(argv) == 0
    assert (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_of_an_unknown_format_leaves_nothing_behind(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    sides = family(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    argv = ["gap", "--base", str(sides["base"]), "--instruct", str(sides["instruct"]), "--quiet"]
    more = ["--json", str(tmp_path / "gap.json"), "--plot", str(tmp_path / "gap.xyz")]
    assert fails(capsys, [*argv, *more], 2, "cannot draw").endswith("Nothing was written.\n")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    argv = ["gap", "--base", "a", "--instruct", "b", "--plot", str(tmp_path / "gap.png")]
    fails(capsys, argv, 2, "pip install matplotlib")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "key"), [("sft", "beta"), ("dpo", "packing")])
def test_recipes_get_their_arguments_and_return_their_code(tmp_path, capsys, name, key):
    """Each refuses the other's key, in the configuration that it was given."""
    config = tmp_path / "x.yaml"
    config.write_text(f"{key}: true")
    fails(capsys, [name, "--config", str(config)], 2, str(config), key)


def test_the_installed_command_returns_the_code(tmp_path):
    command = [
        sys.executable,
        "-m",
        "shadow_trl.cli",
        "graft",
        "--base=x/y/z",
        "--instruct=x",
        "--tuned=x",
        "--output=o",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("CheckpointError: ")
    assert list(Path(tmp_path).iterdir()) == []
