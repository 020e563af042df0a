"""An option of the graft is declared once: the signature, the command line, the trainers' configs and the manifest."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

import pytest
from families import family

from shadow_trl import ShadowDPOConfig, ShadowSFTConfig, cli, graft
from shadow_trl.checkpoints.manifest import read_manifest
from shadow_trl.errors import ConfigError
from shadow_trl.grafting.options import GraftOptions, declared

MODELS = {"base", "instruct", "tuned", "delta", "output", "progress", "find_base"}
ARGUMENTS = {
    "scale": "graft_scale", "instruct_scale": "instruct_scale", "modules": "graft_modules", "format": "graft_format",
    "dtype": "graft_dtype", "rounding": "graft_rounding", "seed": "graft_seed", "vocab": "graft_vocab",
    "chat_template": "graft_chat_template", "overwrite": "graft_overwrite",
}  # fmt: skip
WRONG: dict[str, Any] = {
    "scale": "much", "instruct_scale": True, "modules": "(", "format": "gguf", "dtype": "int8", "rounding": "up",
    "seed": 1.5, "vocab": "any", "chat_template": "base", "max_shard_size": "5 apples", "digest": "md5",
    "base_dtype": "int8", "rank": 0,
}  # fmt: skip


def test_the_signature_of_graft_is_that_of_its_options():
    parameters = inspect.signature(graft).parameters
    found = {name: parameter.default for name, parameter in parameters.items() if name not in MODELS}
    assert found == {item.name: item.default for item in fields(GraftOptions)}
    assert parameters.keys() - found.keys() == MODELS


@pytest.mark.parametrize("name", WRONG)
def test_each_option_of_graft_is_checked_under_its_own_name(tmp_path, name):
    with pytest.raises(ConfigError, match=rf"^{name}\b.*{WRONG[name]!r}".replace("(", r"\(")):
        graft(**family(tmp_path), output=tmp_path / "out", progress=False, **{name: WRONG[name]})
    assert not (tmp_path / "out").exists()


def test_what_the_command_line_leaves_out_has_the_defaults_of_graft():
    parsed = vars(cli._parser().parse_args(["graft", "--instruct", "i", "--tuned", "t", "--output", "o"]))
    assert {name: parsed[name] for name in declared()} == {item.name: item.default for item in fields(GraftOptions)}


def test_the_command_line_has_the_choices_that_are_checked(capsys):
    with pytest.raises(SystemExit):
        cli.main(["graft", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, option in declared().items():
        assert f"--{name.replace('_', '-')} " in text
        assert option.help in text
        if option.choices:
            assert f"--{name.replace('_', '-')} {{{','.join(option.choices)}}}" in text


@pytest.mark.parametrize("config", [ShadowSFTConfig, ShadowDPOConfig])
def test_the_trainers_have_the_defaults_and_choices_of_graft(config):
    own, options = {item.name: item for item in fields(config)}, {item.name: item for item in fields(GraftOptions)}
    assert {name: option.argument for name, option in declared().items() if option.argument} == ARGUMENTS
    for name, argument in ARGUMENTS.items():
        given = own[argument].default if own[argument].default is not MISSING else own[argument].default_factory()
        assert given == options[name].default
        assert own[argument].metadata.get("choices") == declared()[name].choices
        assert argument in get_type_hints(config)


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if name in WRONG])
def test_the_trainers_check_each_option_under_the_name_it_has_there(tmp_path, name):
    with pytest.raises(ConfigError, match=rf"^{ARGUMENTS[name]}\b"):
        ShadowSFTConfig(output_dir=str(tmp_path), use_cpu=True, **{ARGUMENTS[name]: WRONG[name]})


def test_the_trainers_hand_each_option_to_the_graft(tmp_path):
    other = {
        "scale": 0.5, "instruct_scale": 0.9, "modules": ["q_proj", "norm"], "format": "model", "dtype": "float16",
        "rounding": "stochastic", "seed": 3, "vocab": "shared", "chat_template": "trained",
        "overwrite": True,
    }  # fmt: skip
    given = {ARGUMENTS[name]: value for name, value in other.items()}
    assert ShadowDPOConfig(output_dir=str(tmp_path), use_cpu=True, **given).graft_options() == other


@pytest.mark.parametrize("empty", ["", [], None])
def test_modules_that_select_nothing_are_refused(empty):
    with pytest.raises(ConfigError, match=r"^modules is an empty list or text"):
        GraftOptions(modules=empty)


def test_a_list_of_one_expression_is_that_expression():
    assert GraftOptions(modules=["linear"]).modules == "linear"
    assert GraftOptions(modules=["all"]).patterns() is None
    assert GraftOptions(modules=["q_proj", "all"]).modules == ["q_proj", "all"]


def test_the_manifest_has_what_changes_the_numbers(tmp_path):
    graft(**family(tmp_path), output=tmp_path / "out", progress=False)
    assert read_manifest(tmp_path / "out")["options"] == {
        "scale": 1.0, "instruct_scale": 1.0, "modules": "all", "dtype": "auto", "rounding": "nearest", "seed": 0,
        "vocab": "strict", "chat_template": "instruct", "untie": False, "base_dtype": None, "max_shard_size": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("scale", 10**400, "scale must be a finite number"),
        ("untie", "no", "untie must be true or false, got 'no'"),
        ("modules", "(" * 5000 + ")" * 5000, "is not a regular expression"),
        ("modules", "a{99999999999}", "is not a regular expression"),
    ],
)
def test_values_that_a_manifest_or_a_caller_can_have_are_refused(name: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        GraftOptions(**{name: value})
