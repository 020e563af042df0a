"""`vocab="shared"` and `modules` for adapters: the rows and modules that dense full weights take, in every form."""

from __future__ import annotations

import huggingface_hub
import pytest
import torch
from adapter_cases import adapter_delta, adapter_on, weights_of
from families import load
from hub_cache import into_cache
from peft import LoraConfig, TrainableTokensConfig
from runs import LORA, sft
from safetensors.torch import load_file, save_file
from tiny import SPECIAL, make_pair, make_tokenizer
from transformers import AutoModelForCausalLM

from shadow_trl import graft
from shadow_trl.errors import AdapterError, ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
OTHER = 2
"""Id of <|system|>, which BASE calls otherwise."""
ADAPTERS = {
    "LoRA on the head": LoraConfig(**{**LORA, "target_modules": ["lm_head", "q_proj"]}),
    "LoRA on the head, no copy": LoraConfig(**{**LORA, "target_modules": ["lm_head", "q_proj"]}),
    "DoRA on the head": LoraConfig(**{**LORA, "target_modules": ["lm_head", "q_proj"]}, use_dora=True),
    "LoRA on the embedding": LoraConfig(**{**LORA, "target_modules": ["embed_tokens", "q_proj"]}),
    "modules_to_save": LoraConfig(**{**LORA, "target_modules": ["q_proj"]}, modules_to_save=["lm_head"]),
    "token rows": LoraConfig(**{**LORA, "target_modules": ["q_proj"]}, trainable_token_indices=[OTHER, 5]),
    "trainable tokens": TrainableTokensConfig(
        target_modules=["embed_tokens"], token_indices=[OTHER, 5], task_type="CAUSAL_LM"
    ),
}


@pytest.fixture(scope="module")
def renamed(tmp_path_factory):
    """An untied pair that calls the token `OTHER` by two names."""
    pair = make_pair(tmp_path_factory.mktemp("renamed"), tied=False, gap=0.3)
    for file in pair[0].glob("*token*.json"):
        file.write_text(file.read_text().replace(SPECIAL[OTHER], "<|reserved|>"))
    return pair


def with_more_tokens(pair, folder):
    """Copy INSTRUCT with two tokens more, which its template uses, and a row for each."""
    model = AutoModelForCausalLM.from_pretrained(pair[1])
    model.resize_token_embeddings(51, mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer = make_tokenizer(template=True)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def saved(pair, folder, kind):
    """Save an adapter of random values; "no copy": without the copy of the head that PEFT saves beside it."""
    found = adapter_on(pair, folder, ADAPTERS[kind])
    if kind.endswith("no copy"):
        path = folder / "adapter_model.safetensors"
        save_file({name: value for name, value in load_file(path).items() if "base_layer" not in name}, path)
    return found


def expected(instruct, model, before, rows, scale=1.0):
    """Return INSTRUCT + scale * (merged - BASE), in float64 by PEFT's merge, `rows` alone of what has a row a token."""
    merged = weights_of(model.double().merge_and_unload())
    found = {name: value.double() for name, value in load(instruct).items()}
    for name, value in found.items():
        some = torch.tensor(rows) if name in (HEAD, EMBEDDING) else slice(None)
        value[some] += scale * (merged[name].detach()[some] - before[name][some])
    return found


def assert_grafted(output, instruct, wanted, rows):
    """Other rows are INSTRUCT's bits, the rest is right to fp32."""
    first = load(instruct)
    for name, value in load(output).items():
        assert float((value.double() - wanted[name]).norm()) <= 1e-6 * float(wanted[name].norm()), name
        if name in (HEAD, EMBEDDING):
            others = [row for row in range(len(value)) if row not in rows]
            assert torch.equal(value[others], first[name][others]), name


@pytest.mark.parametrize("kind", ADAPTERS)
def test_dense_leaves_the_rows_of_other_tokens(kind, renamed, tmp_path):
    model, before = saved(renamed, tmp_path / "adapter", kind)
    sides = {"base": renamed[0], "instruct": renamed[1], "tuned": tmp_path / "adapter", "vocab": "shared"}
    rows = [row for row in range(49) if row != OTHER]
    report = graft(**sides, output=tmp_path / "out", format="model", scale=0.5, progress=False)
    assert_grafted(tmp_path / "out", renamed[1], expected(renamed[1], model, before, rows, 0.5), rows)
    assert any("48 rows grafted" in warning for warning in report.warnings)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_adapter_form_is_refused_where_it_would_move_the_rows_of_other_tokens(kind, renamed, tmp_path, monkeypatch):
    saved(renamed, tmp_path / "adapter", kind)
    sides = {"base": renamed[0], "tuned": tmp_path / "adapter", "vocab": "shared", "progress": False}
    for form in ({"format": "adapter"}, {"rank": 4}):
        with pytest.raises(AdapterError, match=r"token rows that vocab='shared' leaves(.|\n)*format='model'"):
            graft(**sides, instruct=renamed[1], output=tmp_path / "out", **form)
    into_cache(tmp_path / "cache", "someone/model", "1" * 40, renamed[1], branch="main")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    report = graft(**sides, instruct="someone/model", output=tmp_path / "out")
    assert report.form == "model"
    assert any("vocab='shared'" in reason for reason in report.dense_because)


def test_an_adapter_of_shared_rows_alone_keeps_its_form(renamed, tmp_path):
    """On an INSTRUCT with two rows more, too."""
    grown = with_more_tokens(renamed, tmp_path / "grown")
    settings = {**LORA, "target_modules": ["q_proj"], "trainable_token_indices": [5, 7]}
    model, before = adapter_on(renamed, tmp_path / "adapter", LoraConfig(**settings))
    merged = weights_of(model.double().merge_and_unload())
    for instruct in (renamed[1], grown):
        output = tmp_path / f"form-{instruct.name}"
        graft(base=renamed[0], instruct=instruct, tuned=tmp_path / "adapter", output=output, format="adapter",
              vocab="shared", progress=False)  # fmt: skip
        for name, found in adapter_delta(instruct, output).items():
            wanted = merged[name].detach() - before[name]
            assert float((found[: len(wanted)] - wanted).norm()) <= 1e-6 * (1 + float(wanted.norm())), name
            assert not found[len(wanted) :].any(), name


@pytest.mark.parametrize("kind", ["LoRA on the head", "LoRA on the head, no copy", "modules_to_save", "token rows"])
def test_an_instruct_that_uses_tokens_of_its_own_receives_the_shared_rows(kind, renamed, tmp_path):
    """For an adapter and for the full checkpoint that PEFT merges of it."""
    instruct = with_more_tokens(renamed, tmp_path / "grown")
    model, before = saved(renamed, tmp_path / "adapter", kind)
    rows = [row for row in range(49) if row != OTHER]
    wanted = expected(instruct, model, before, rows)
    model.base_model.model.float().save_pretrained(tmp_path / "merged")
    for tuned in ("adapter", "merged"):
        graft(base=renamed[0], instruct=instruct, tuned=tmp_path / tuned, output=tmp_path / f"{tuned}-out",
              vocab="shared", progress=False)  # fmt: skip
        assert_grafted(tmp_path / f"{tuned}-out", instruct, wanted, rows)


def test_instruct_scale_leaves_the_rows_of_other_tokens(renamed, tmp_path):
    model, before = saved(renamed, tmp_path / "adapter", "LoRA on the head, no copy")
    graft(base=renamed[0], instruct=renamed[1], tuned=tmp_path / "adapter", output=tmp_path / "out", vocab="shared",
          instruct_scale=0.5, progress=False)  # fmt: skip
    rows = [row for row in range(49) if row != OTHER]
    merged, first = weights_of(model.double().merge_and_unload()), load(renamed[1])
    wanted = {name: merged[name].detach() + 0.5 * (value.double() - before[name]) for name, value in first.items()}
    for name in (HEAD, EMBEDDING):
        wanted[name][OTHER] = first[name][OTHER].double()
    assert_grafted(tmp_path / "out", renamed[1], wanted, rows)


@pytest.mark.parametrize(
    ("config", "modules", "reason"),
    [
        (ADAPTERS["modules_to_save"], "all", "lm_head.weight"),
        (LoraConfig(**LORA), "q_proj", "modules leaves out a part"),
        (LoraConfig(**LORA, init_lora_weights="pissa"), "q_proj", "modules leaves out a part"),
    ],
)
def test_training_refuses_the_form_before_its_first_step(config, modules, reason, renamed, tmp_path):
    with pytest.raises(AdapterError, match=rf"{reason}(.|\n)*Nothing was written"):
        sft(renamed, tmp_path / "out", peft_config=config, graft_format="adapter", graft_vocab="shared",
            graft_modules=modules)  # fmt: skip
    assert not list((tmp_path / "out").rglob("*"))


def test_training_keeps_the_form_where_it_can(renamed, tmp_path):
    config = LoraConfig(**{**LORA, "target_modules": ["q_proj"], "init_lora_weights": "pissa"})
    trainer = sft(renamed, tmp_path / "out", peft_config=config, graft_format="adapter", graft_vocab="shared",
                  graft_modules="linear")  # fmt: skip
    trainer.train()
    assert trainer.graft_report.form == "adapter"


def test_an_expression_that_matches_nothing_is_refused_in_the_adapter_form(tied_pair, tmp_path):
    adapter_on(tied_pair, tmp_path / "adapter", LoraConfig(**{**LORA, "target_modules": ["q_proj"]}))
    with pytest.raises(ConfigError, match=r"1 of 2 expressions of modules match(.|\n)*k_porj"):
        graft(base=tied_pair[0], instruct=tied_pair[1], tuned=tmp_path / "adapter", output=tmp_path / "out",
              format="adapter", modules=["q_proj", "k_porj"], progress=False)  # fmt: skip
