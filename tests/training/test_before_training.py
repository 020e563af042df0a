"""What would be refused after the last step is refused before the first, or works."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.utils import merge_fsdp_weights
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from runs import settings
from safetensors.torch import load_file, save_file
from shards import write_shards
from tiny import make_pair, make_tokenizer, sft_data
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from shadow_trl import ShadowSFTConfig, ShadowSFTTrainer, extract_delta, graft
from shadow_trl.errors import AdapterError, ConfigError, InputError, OutputExistsError, PairMismatchError
from shadow_trl.training.preflight import is_conversational

pytestmark = pytest.mark.filterwarnings("ignore")


def trainer(pair, folder: Path, *, model=None, peft=None, tokenizer=None, **changes) -> ShadowSFTTrainer:
    return ShadowSFTTrainer(
        model=str(pair[0]) if model is None else model,
        instruct_model=str(pair[1]),
        args=ShadowSFTConfig(**settings(folder, **changes)),
        train_dataset=sft_data(8),
        peft_config=peft,
        processing_class=tokenizer,
    )


def test_token_rows_of_a_tied_head_are_refused(tmp_path):
    """Training would end in its first step: TRL reads the bias of a head that has none."""
    pair = make_pair(tmp_path / "pair")
    with pytest.raises(AdapterError, match=r"TrainableTokensWrapper(.|\n)*Nothing was written"):
        trainer(pair, tmp_path / "out", peft=lora(trainable_token_indices=[3]))
    assert [path.name for path in tmp_path.iterdir()] == ["pair"]


def lora(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **changes})


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    return make_pair(tmp_path, tied=False)


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory) -> tuple[Path, Path]:
    """A pair of whole models of which AutoModelForCausalLM loads the language part."""
    folder = tmp_path_factory.mktemp("multimodal")
    config = Qwen3_5Config(
        text_config={
            **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8},
            **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8},
            **{"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
            **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None},
            "rope_parameters": {
                **{"rope_type": "default", "rope_theta": 1e4},
                **{"mrope_section": [1, 0, 0], "partial_rotary_factor": 0.25},
            },
        },
        vision_config={
            **{"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4},
            **{"out_hidden_size": 16, "num_position_embeddings": 16, "spatial_merge_size": 2},
        },
        **{"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63},
    )
    torch.manual_seed(1)
    model = Qwen3_5ForConditionalGeneration(config)
    for name in ("base", "instruct"):
        model.save_pretrained(folder / name)
        make_tokenizer(template=name == "instruct").save_pretrained(folder / name)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.02 * (weight.abs().mean() + 1e-3) * torch.randn_like(weight))
    return folder / "base", folder / "instruct"


def assert_delta(pair, output: Path, before: dict, after: dict, *, prefix: str) -> None:
    """INSTRUCT plus what changed in memory, in float64, under the names on disk; all other weights are INSTRUCT's."""
    instruct, grafted = (load_file(folder / "model.safetensors") for folder in (pair[1], output))
    assert grafted.keys() == instruct.keys()
    learnt = {name.replace("model.", prefix, 1): after[name].double() - before[name].double() for name in before}
    assert len(learnt.keys() & instruct.keys()) == len(learnt)
    assert any(delta.abs().max() > 1e-4 for delta in learnt.values())
    for name, value in instruct.items():
        wanted = value.double() + learnt[name] if name in learnt else value.double()
        torch.testing.assert_close(grafted[name].double(), wanted, rtol=0, atol=2e-7)


@pytest.mark.parametrize("kind", ["full", "lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_the_text_class_of_a_multimodal_base_is_grafted_onto_the_language_part(multimodal, tmp_path, kind):
    model = AutoModelForCausalLM.from_pretrained(multimodal[0], dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    peft = {"full": None, "lora": lora(), "dora": lora(use_dora=True)}[kind]
    run = trainer(multimodal, tmp_path / "run", model=model, peft=peft, tokenizer=make_tokenizer(template=True))
    run.train()
    after = (run.model if peft is None else run.model.merge_and_unload()).state_dict()
    assert_delta(multimodal, tmp_path / "run" / "grafted", before, after, prefix="model.language_model.")
    sides = {"base": multimodal[0], "instruct": multimodal[1], "tuned": tmp_path / "run", "progress": False}
    graft(**sides, output=tmp_path / "again")
    assert_delta(multimodal, tmp_path / "again", before, after, prefix="model.language_model.")
    if kind == "full":
        assert "21 weights of instruct are copied" in run.graft_report.warnings[0]
        extract_delta(base=multimodal[0], tuned=tmp_path / "run", output=tmp_path / "delta", progress=False)
        graft(instruct=multimodal[1], delta=tmp_path / "delta", output=tmp_path / "third", progress=False)
        assert_delta(multimodal, tmp_path / "third", before, after, prefix="model.language_model.")


def test_stored_buffers_that_the_model_does_not_have_stay_instructs(pair, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.cos_cached"
    for number, folder in enumerate(pair):
        weights = load_file(folder / "model.safetensors")
        weights[name] = torch.full((4, 8), float(number))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    run = trainer(pair, tmp_path / "run")
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.train()
    assert_delta(pair, tmp_path / "run" / "grafted", before, run.model.state_dict(), prefix="model.")
    assert name in run.graft_report.warnings[0]
    extract_delta(base=pair[0], tuned=tmp_path / "run", output=tmp_path / "delta", progress=False)
    graft(instruct=pair[1], delta=tmp_path / "delta", output=tmp_path / "third", progress=False)
    assert_delta(pair, tmp_path / "third", before, run.model.state_dict(), prefix="model.")


def other_ids() -> PreTrainedTokenizerFast:
    state = make_tokenizer(template=True)
    content = state.backend_tokenizer.to_str().replace('"a":5', '"a":-1').replace('"b":6', '"b":5')
    inner = Tokenizer.from_str(content.replace('"a":-1', '"a":6'))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|end|>", chat_template=state.chat_template
    )


def grown(folder: Path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(51, mean_resizing=False)
    return model


def with_head(folder: Path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.v_head = torch.nn.Linear(16, 1)
    return model


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("other ids", "token 'b'\n    tuned     id 5\n    instruct  id 6"),
        ("grown lora", r"lm_head\.weight: \(49, 16\) in .*, \(51, 16\) in memory"),
        ("head", r"v_head\.weight\n    tuned only"),
        ("frozen head", r"v_head\.weight\n    tuned only"),
    ],
)
def test_what_cannot_be_grafted_is_refused_before_the_first_step(pair, tmp_path, what, message):
    given: dict = {}
    if what == "other ids":
        given["tokenizer"] = other_ids()
    elif what == "grown lora":
        given.update(model=grown(pair[0]), peft=lora(), graft_vocab="shared")
    else:
        given.update(model=with_head(pair[0]), base_model=str(pair[0]))
        given["model"].v_head.requires_grad_(what == "head")
    with pytest.raises(InputError, match=message):
        trainer(pair, tmp_path / "run", **given)
    assert not list((tmp_path / "run").glob("*"))  # transformers makes the folder


def test_a_head_beside_a_lora_is_not_saved_and_does_not_stand_in_the_way(pair, tmp_path):
    run = trainer(pair, tmp_path / "run", model=get_peft_model(with_head(pair[0]), lora()))
    run.train()
    assert run.graft_report.form == "model"


@pytest.mark.parametrize("peft", [None, lora(modules_to_save=["lm_head"])], ids=["full", "head"])
def test_a_head_of_its_own_is_refused_for_a_tied_instruct(pair, tmp_path, peft):
    instruct = make_pair(tmp_path / "tied", tied=True)[1]
    with pytest.raises(PairMismatchError, match="the embedding of INSTRUCT is its head too"):
        trainer((pair[0], instruct), tmp_path / "run", peft=peft)
    trainer((pair[0], instruct), tmp_path / "run", peft=lora()).train()  # trains neither of them


def test_changed_settings_of_the_model_are_named_before_training(pair, tmp_path, caplog):
    run = trainer(pair, tmp_path / "run", model_init_kwargs={"hidden_act": "gelu", "dtype": "float32"})
    assert "hidden_act\n    tuned     gelu\n    instruct  silu" in caplog.text
    assert run.state.global_step == 0


def test_an_adapter_that_holds_a_grown_embedding_grafts_what_its_merged_model_does(pair, tmp_path):
    torch.manual_seed(5)
    model = get_peft_model(grown(pair[0]), lora(init_lora_weights=False))
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.01)
    model.save_pretrained(tmp_path / "adapter")
    after = {
        name: value[:49] if value.shape[0] == 51 else value
        for name, value in model.merge_and_unload().state_dict().items()
    }
    sides = {"base": pair[0], "instruct": pair[1], "tuned": tmp_path / "adapter", "progress": False}
    with pytest.raises(PairMismatchError, match="--vocab shared"):
        graft(**sides, output=tmp_path / "out")
    graft(**sides, output=tmp_path / "out", vocab="shared")
    before = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32).state_dict()
    assert_delta(pair, tmp_path / "out", before, after, prefix="model.")


def test_a_result_that_is_there_since_is_refused_before_the_first_step(pair, tmp_path):
    run = trainer(pair, tmp_path / "run")
    (tmp_path / "run" / "grafted").mkdir(parents=True)
    with pytest.raises(OutputExistsError, match=r"grafted exists(.|\n)*Nothing was written"):
        run.train()
    assert run.state.global_step == 0
    assert not list((tmp_path / "run" / "grafted").iterdir())


def test_instruct_needs_no_template_beside_a_processing_class_that_has_one(pair, tmp_path):
    (pair[1] / "chat_template.jinja").unlink()
    with pytest.raises(PairMismatchError, match="instruct has no chat template, but the training data are conv"):
        trainer(pair, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert trainer(pair, tmp_path / "run", tokenizer=make_tokenizer(template=True))


def test_models_are_named_not_passed_as_objects(pair, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(pair[1])
    with pytest.raises(ConfigError, match=r"instruct_model is a Qwen3ForCausalLM; .* instruct_model\.save_pretrained"):
        ShadowSFTTrainer(str(pair[0]), instruct_model=loaded, args=ShadowSFTConfig(**settings(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    for given, meant in (("instruct", "instruct_model"), ("base", "base_model"), ("train_data", "train_dataset")):
        with pytest.raises(TypeError, match=f"no argument '{given}'. Did you mean '{meant}'"):
            ShadowSFTTrainer(str(pair[0]), **{given: str(pair[1])})


def test_the_branch_main_of_a_folder_is_the_folder(pair, tmp_path):
    """TRL's own scripts pass `revision` with every model."""
    made = trainer(pair, tmp_path / "out", model_init_kwargs={"revision": "main"}, max_steps=1)
    assert made.origins.policy.revision is None


def test_conversations_are_told_from_text():
    assert is_conversational(None) is False
    assert is_conversational(Dataset.from_dict({"text": ["a"]})) is False
    assert is_conversational(Dataset.from_dict({"messages": [[{"role": "user", "content": "a"}]]})) is True


@pytest.mark.parametrize("data", [DatasetDict({"train": sft_data(4)}), "rows", 3])
def test_what_is_no_data_set_is_refused_in_the_words_of_trl(pair, tmp_path, data):
    with pytest.raises(TypeError, match="must be a `Dataset` or `IterableDataset`"):
        ShadowSFTTrainer(
            model=str(pair[0]), instruct_model=str(pair[1]), train_dataset=data,
            args=ShadowSFTConfig(**settings(tmp_path / "out")),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_config_is_named_after_its_model(pair, tmp_path, monkeypatch):
    """As TRL's are."""
    monkeypatch.chdir(tmp_path)

    class OnCpu(ShadowSFTConfig):
        def __init__(self, folder):
            super().__init__(folder, use_cpu=True, bf16=False, report_to="none")

    monkeypatch.setattr(ShadowSFTTrainer, "config_class", OnCpu)
    for model in (str(pair[0]), AutoModelForCausalLM.from_pretrained(pair[0])):
        made = ShadowSFTTrainer(model, instruct_model=str(pair[1]), train_dataset=sft_data(4))
        assert made.args.output_dir == f"{pair[0].name}-Shadow-SFT"


@pytest.mark.parametrize("inside", ["", "pytorch_model_fsdp_0"])
def test_a_model_in_shards_is_refused_with_the_command_that_merges_it(pair, tmp_path, inside):
    saved = tmp_path / "a run/checkpoint-1"
    write_shards(saved / inside, load_file(pair[0] / "model.safetensors"))
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pair[0] / file, saved)
    with pytest.raises(ConfigError, match="cannot be loaded for training") as error:
        trainer(pair, tmp_path / "out", model=str(saved))
    command = shlex.split(next(line for line in str(error.value).splitlines() if line.startswith("  ")))
    assert command == ["accelerate", "merge-weights", str(saved / inside), "OUT"]
    merge_fsdp_weights(command[2], str(tmp_path / "OUT"))
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(saved / file, tmp_path / "OUT")
    trainer(pair, tmp_path / "out", model=str(tmp_path / "OUT"))
