"""The chat template of a result: INSTRUCT's, with a word where TUNED was trained with another, or that other one."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from families import family, lora
from runs import lora as lora_settings
from runs import settings
from tiny import make_tokenizer, sft_data
from transformers import AutoTokenizer

from shadow_trl import ShadowSFTConfig, ShadowSFTTrainer, extract_delta, graft, verify
from shadow_trl.checkpoints.manifest import read_manifest
from shadow_trl.errors import CheckpointError, ConfigError, PairMismatchError
from shadow_trl.pair.trained_templates import template_rows

THEIRS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}\n{% endfor %}"
MINE = "{% for m in messages %}{{ m['role'] + ' -> ' + m['content'] }}\n{% endfor %}"
TOOLS = "{{ tools }}{{ messages }}"


def jinja(folder: Path, text: str, **named: str) -> None:
    (folder / "chat_template.jinja").write_text(text)
    for name, other in named.items():
        (folder / "additional_chat_templates").mkdir(exist_ok=True)
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(other)


def in_config(folder: Path, value: object, file: str = "tokenizer_config.json") -> None:
    content = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    (folder / file).write_text(json.dumps({**content, "chat_template": value}))


PLACES = {
    "jinja": jinja,
    "tokenizer_config": in_config,
    "list": lambda folder, text: in_config(folder, [{"name": "default", "template": text}]),
    "chat_template.json": lambda folder, text: in_config(folder, text, "chat_template.json"),
    "processor_config": lambda folder, text: in_config(folder, text, "processor_config.json"),
}


@pytest.fixture
def sides(tmp_path) -> dict[str, Path]:
    """A family, each with a tokenizer that has no template."""
    found = family(tmp_path)
    for folder in found.values():
        make_tokenizer(template=False).save_pretrained(folder)
    return found


def run(sides, output: Path, **options):
    return graft(**sides, output=output, progress=False, **options)


def small_files(folder: Path) -> dict[str, bytes]:
    names = (path for path in folder.rglob("*") if path.is_file() and path.suffix in (".json", ".jinja"))
    ours = ("shadow.json", "config.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in names if path.name not in ours}


@pytest.mark.parametrize("trained", PLACES)
def test_another_template_is_named_and_instructs_is_shipped(sides, tmp_path, trained):
    jinja(sides["instruct"], THEIRS)
    PLACES[trained](sides["tuned"], MINE)
    report = run(sides, tmp_path / "out")
    (warning,) = [text for text in report.warnings if "template" in text]
    assert f"the chat template of {sides['tuned']} is not the one that the result has" in warning
    place = MINE.index("->") - 2  # of the quotation mark
    assert f"character {place + 1}\n    tuned     {MINE[place + 1 : place + 61]!r}" in warning
    assert "--chat-template trained" in warning
    assert small_files(tmp_path / "out") == small_files(sides["instruct"])
    assert read_manifest(tmp_path / "out")["chat_template"] == "instruct"
    assert "What was trained has another chat template" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("theirs", PLACES)
def test_the_trained_template_is_the_only_one_in_the_result(sides, tmp_path, theirs):
    PLACES[theirs](sides["instruct"], THEIRS)
    in_config(sides["tuned"], [{"name": "default", "template": MINE}])
    report = run(sides, tmp_path / "out", chat_template="trained")
    assert not [text for text in report.warnings if "template" in text]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == MINE
    assert "': '" not in "".join(text.decode() for text in small_files(tmp_path / "out").values())
    assert read_manifest(tmp_path / "out")["chat_template"] == "trained"
    assert "the chat template is the one that the base model was trained with" in (
        (tmp_path / "out" / "README.md").read_text()
    )
    assert verify(tmp_path / "out", progress=False).same


def test_named_templates_are_shipped_as_they_were_trained_with(sides, tmp_path):
    jinja(sides["instruct"], THEIRS, rag="{{ documents }}")
    in_config(sides["tuned"], [{"name": "default", "template": THEIRS}, {"name": "tool_use", "template": TOOLS}])
    (warning,) = [text for text in run(sides, tmp_path / "one").warnings if "template" in text]
    assert "template 'tool_use'" in warning
    assert "no such template" in warning
    run(sides, tmp_path / "two", chat_template="trained")
    found = AutoTokenizer.from_pretrained(tmp_path / "two").chat_template
    assert found == {"default": THEIRS, "tool_use": TOOLS}


def test_verify_knows_whose_template_it_is(sides, tmp_path):
    jinja(sides["instruct"], THEIRS)
    jinja(sides["tuned"], MINE)
    run(sides, tmp_path / "out", chat_template="trained")
    jinja(sides["instruct"], THEIRS + "!")  # no file of the result
    assert verify(tmp_path / "out", progress=False).same
    jinja(sides["tuned"], MINE + "!")
    found = verify(tmp_path / "out", progress=False)
    assert (found.files, found.digests) == (["chat_template.jinja  changed"], ["tuned: chat_template.jinja"])
    jinja(sides["tuned"], MINE)
    jinja(tmp_path / "out", THEIRS)
    assert verify(tmp_path / "out", progress=False).files == ["chat_template.jinja  changed"]


def same_but_for_line_ends(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes((THEIRS + "\n").replace("\n", "\r\n").encode())


def weights_alone(folder: Path) -> None:
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            path.unlink()


@pytest.mark.parametrize("change", [same_but_for_line_ends, weights_alone, lambda folder: None])
def test_nothing_is_said_of_the_same_template_or_of_an_unknown_one(sides, tmp_path, change):
    jinja(sides["instruct"], THEIRS)
    change(sides["tuned"])
    assert not [text for text in run(sides, tmp_path / "out").warnings if "template" in text]
    assert "chat_template" not in read_manifest(tmp_path / "out")
    assert "Tokenizer, chat template and generation config are" in (tmp_path / "out" / "README.md").read_text()


def test_what_jinja_renders_differently_is_another_template():
    assert template_rows({"default": "a\n\n"}, {"default": "a\n"})
    assert template_rows({"default": " a"}, {"default": "a"})
    assert template_rows({"default": "ab"}, {"default": "abc"}) == [
        "template 'default', from character 2\n    tuned     ''\n    instruct  'c'"
    ]
    assert not template_rows({}, {"default": "a"})


def test_a_trained_template_that_is_not_known_is_refused_before_any_work(sides, tmp_path):
    jinja(sides["instruct"], THEIRS)
    with pytest.raises(ConfigError, match=r"no chat template.*\n?.*save the template as chat_template\.jinja in that"):
        run(sides, tmp_path / "out", chat_template="trained")
    other = shutil.copytree(sides["tuned"], tmp_path / "other")
    jinja(sides["tuned"], MINE)
    several = {**sides, "tuned": [f"{sides['tuned']}:0.5", f"{other}:0.5"]}
    jinja(other, THEIRS)
    with pytest.raises(ConfigError, match="2 of the tuned models were trained with different templates"):
        run(several, tmp_path / "out", chat_template="trained")
    in_config(sides["tuned"], [{"name": "../../escape", "template": MINE}])
    (sides["tuned"] / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="a name that no file can have"):
        run(sides, tmp_path / "out", chat_template="trained")
    assert not (tmp_path / "out").exists()


def test_a_sum_of_models_with_one_template_has_it(sides, tmp_path):
    jinja(sides["instruct"], THEIRS)
    jinja(sides["tuned"], MINE)
    other = shutil.copytree(sides["tuned"], tmp_path / "other")
    several = {**sides, "tuned": [f"{sides['tuned']}:0.5", f"{other}:0.5"]}
    assert len([text for text in run(several, tmp_path / "one").warnings if "template" in text]) == 2
    run(several, tmp_path / "two", chat_template="trained")
    assert AutoTokenizer.from_pretrained(tmp_path / "two").chat_template == MINE
    assert verify(tmp_path / "two", progress=False).same


@pytest.mark.parametrize("form", ["adapter", "model"])
def test_a_lora_has_the_template_in_its_folder(sides, tmp_path, form):
    jinja(sides["instruct"], THEIRS)
    adapter = lora(tmp_path / "adapter", base_model_name_or_path=str(sides["base"]))
    jinja(adapter, MINE)
    options = {"instruct": sides["instruct"], "tuned": adapter, "format": form, "progress": False}
    warnings = graft(**options, output=tmp_path / "one").warnings
    assert len([text for text in warnings if "chat template" in text]) == 1
    report = graft(**options, output=tmp_path / "two", chat_template="trained")
    assert report.form == form
    assert AutoTokenizer.from_pretrained(tmp_path / "two").chat_template == MINE
    assert verify(tmp_path / "two", progress=False).same


def test_a_delta_keeps_the_template_of_its_training(sides, tmp_path):
    jinja(sides["instruct"], THEIRS)
    options = {"base": sides["base"], "tuned": sides["tuned"], "progress": False}
    extract_delta(**options, output=tmp_path / "unknown")
    jinja(sides["tuned"], MINE)
    assert not extract_delta(**options, output=tmp_path / "delta").warnings
    given = {"instruct": sides["instruct"], "progress": False}
    (warning,) = [
        text
        for text in graft(delta=tmp_path / "delta", output=tmp_path / "one", **given).warnings
        if "chat template" in text
    ]
    assert str(tmp_path / "delta") in warning
    graft(delta=tmp_path / "delta", output=tmp_path / "two", chat_template="trained", **given)
    assert AutoTokenizer.from_pretrained(tmp_path / "two").chat_template == MINE
    assert verify(tmp_path / "two", progress=False).same
    assert not [
        text
        for text in graft(delta=tmp_path / "unknown", output=tmp_path / "three", **given).warnings
        if "template" in text
    ]
    with pytest.raises(ConfigError, match="no chat template"):
        graft(delta=tmp_path / "unknown", output=tmp_path / "four", chat_template="trained", **given)


def trainer(pair, folder: Path, *, rows=None, **changes) -> ShadowSFTTrainer:
    extra = {name: changes.pop(name) for name in ("processing_class", "peft_config") if name in changes}
    return ShadowSFTTrainer(
        model=str(pair[0]),
        instruct_model=str(pair[1]),
        args=ShadowSFTConfig(**settings(folder, **{"max_steps": 1, "pair_check": "headers", **changes})),
        train_dataset=sft_data(4) if rows is None else rows,
        **extra,
    )


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_a_run_ships_the_template_it_was_given(pair, tmp_path, with_lora):
    """INSTRUCT has none: the file in `chat_template_path` is what the conversations need."""
    instruct = shutil.copytree(pair[1], tmp_path / "instruct")
    (instruct / "chat_template.jinja").unlink()
    (tmp_path / "mine.jinja").write_text(MINE)
    options = {"peft_config": lora_settings()} if with_lora else {}
    with pytest.raises(PairMismatchError, match="no chat template"):
        trainer((pair[0], instruct), tmp_path / "out", **options)
    options["chat_template_path"] = str(tmp_path / "mine.jinja")
    run = trainer((pair[0], instruct), tmp_path / "out", graft_chat_template="trained", **options)
    run.train()
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "grafted").chat_template == MINE
    assert not [text for text in run.graft_report.warnings if "template" in text]
    assert verify(tmp_path / "out" / "grafted", progress=False).same


def test_a_run_is_told_of_another_template_before_its_first_step(pair, tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    tokenizer.chat_template = MINE
    with caplog.at_level(logging.WARNING):
        trainer(pair, tmp_path / "out", processing_class=tokenizer)
    (record,) = [record.message for record in caplog.records if "chat template" in record.message]
    assert "the chat template of the model in training is not the one that the result has" in record
    assert "graft_chat_template: trained" in record
    rows = Dataset.from_list([{"text": "1+1=2"}] * 4)
    with pytest.raises(ConfigError, match="the model in training has no chat template"):
        trainer(pair, tmp_path / "out", rows=rows, processing_class=make_tokenizer(template=False),
                graft_chat_template="trained")  # fmt: skip


def test_a_next_stage_is_told_of_another_template_than_the_run_before(full_run, tmp_path, caplog):
    """It takes INSTRUCT's tokenizer, and not that of the folder that it starts from."""
    before = shutil.copytree(full_run, tmp_path / "before")
    options = {"args": ShadowSFTConfig(**settings(tmp_path / "out")), "train_dataset": sft_data(4)}
    ShadowSFTTrainer(model=str(before), **options)
    assert "another chat template" not in caplog.text
    jinja(before, MINE)
    ShadowSFTTrainer(model=str(before), **options)
    assert f"{before} was trained with another chat template than this run" in caplog.text
    assert "template 'default', from character" in caplog.text
    assert re.findall(r"^ +(before|now) ", caplog.text, re.MULTILINE) == ["before", "now"]
