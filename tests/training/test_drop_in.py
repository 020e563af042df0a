"""What a script for TRL's trainers finds here: their arguments, defaults and ways; and what a run says of its end."""

from __future__ import annotations

import dataclasses
import inspect
import json
import pickle
import re
from types import SimpleNamespace

import pytest
import torch
from other_trainers import KINDS, classes
from runs import lora, settings, sft
from tiny import preference_data, sft_data
from transformers import HfArgumentParser
from trl import DPOConfig, SFTConfig

from shadow_trl import ShadowDPOConfig, ShadowDPOTrainer, ShadowSFTConfig, ShadowSFTTrainer
from shadow_trl.errors import ConfigError
from shadow_trl.training.config import ShadowArguments
from shadow_trl.training.loading import slow_precision

EACH = ("SFT", "DPO", *KINDS)
OTHER_DEFAULTS = {"precompute_ref_log_probs": (None, False)}
"""Name -> (our default, TRL's)."""


@dataclasses.dataclass
class MySFTConfig(SFTConfig):
    """A config of a user with a field and a default of its own."""

    beam: int = 3
    learning_rate: float = 7e-6


@pytest.mark.parametrize("kind", EACH)
def test_a_trainer_shows_the_arguments_of_trl_and_two_more(kind):
    (ours, _), (theirs, _) = classes(kind), classes(kind, plain=True)
    trl = list(inspect.signature(theirs).parameters.values())
    shown = list(inspect.signature(ours).parameters.values())
    assert shown[: len(trl)] == trl  # names, order, kinds, defaults, types
    assert [one.name for one in shown[len(trl) :]] == ["instruct_model", "base_model"]
    assert all(one.default is None for one in shown[len(trl) :])


def test_a_trainer_with_a_constructor_of_its_own_shows_that_one():
    class Mine(ShadowSFTTrainer):
        def __init__(self, beam: int, **kwargs):
            super().__init__(**kwargs)

    class Plain(ShadowDPOTrainer):
        pass

    assert list(inspect.signature(Mine).parameters) == ["beam", "kwargs"]
    assert inspect.signature(Plain) == inspect.signature(ShadowDPOTrainer)


@pytest.mark.parametrize("kind", EACH)
def test_a_config_has_the_fields_and_defaults_of_trl(kind):
    (_, ours), (_, theirs) = classes(kind), classes(kind, plain=True)

    def defaults(config):
        return {
            item.name: item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
            for item in dataclasses.fields(config)
        }

    mine, trl = defaults(ours), defaults(theirs)
    added = {item.name for item in dataclasses.fields(ShadowArguments)} | {"ref_policy"}
    assert mine.keys() - trl.keys() <= added
    assert trl.keys() <= mine.keys()
    found = {name: (mine[name], value) for name, value in trl.items() if mine[name] != value}
    assert found == {name: both for name, both in OTHER_DEFAULTS.items() if name in trl}


@pytest.mark.parametrize(("words", "value"), [([], None), (["--precompute_ref_log_probs"], True),
                                              (["--precompute_ref_log_probs", "false"], False)])  # fmt: skip
def test_the_flag_of_trl_is_a_flag_here(tmp_path, words, value):
    parser = HfArgumentParser(ShadowDPOConfig)
    (config,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", "true", *words])
    assert config.precompute_ref_log_probs is value


def test_a_config_of_a_user_keeps_its_fields(tmp_path):
    config = ShadowSFTConfig.upgrade(MySFTConfig(output_dir=str(tmp_path), use_cpu=True, beam=5))
    assert (type(config), config.beam, config.learning_rate) == (ShadowSFTConfig, 5, 7e-6)
    assert pickle.loads(pickle.dumps(config)).beam == 5
    with pytest.raises(ConfigError, match=r"DPOConfig has arguments that ShadowSFTConfig lacks: .*beta"):
        ShadowSFTConfig.upgrade(DPOConfig(output_dir=str(tmp_path), use_cpu=True))


def test_a_config_serves_another_run(pair, tmp_path):
    """`trainer.args` is a copy, for TRL reads in it what is decided for one run."""
    args = ShadowDPOConfig(**settings(tmp_path / "out", ref_policy="instruct"))
    before = args.to_dict()
    decided = []
    for data in (preference_data(), preference_data().to_iterable_dataset()):
        made = ShadowDPOTrainer(model=str(pair[0]), instruct_model=str(pair[1]), args=args, train_dataset=data)
        decided.append(made.args.precompute_ref_log_probs)
    assert decided == [True, False]
    assert args.to_dict() == before


def test_the_revision_that_scripts_of_trl_set_means_nothing_of_a_folder(pair, tmp_path):
    trainer = sft(pair, tmp_path / "main", model_init_kwargs={"revision": "main"})
    assert (trainer.origins.policy.source, trainer.origins.policy.revision) == (str(pair[0]), None)


def test_graft_false_refuses_nothing_of_the_graft_alone(pair, tmp_path):
    """A template from a folder resizes the embeddings: no graft fits then, and TRL's training does."""
    options = {"chat_template_path": str(pair[1])}
    with pytest.raises(ConfigError, match="would resize the embeddings"):
        ShadowSFTTrainer(
            model=str(pair[0]), instruct_model=str(pair[1]), train_dataset=sft_data(),
            args=ShadowSFTConfig(**settings(tmp_path / "one", **options)),
        )  # fmt: skip
    ShadowSFTTrainer(
        model=str(pair[0]), train_dataset=sft_data(),
        args=ShadowSFTConfig(**settings(tmp_path / "two", graft=False, **options)),
    )  # fmt: skip


def test_the_end_of_a_run_says_where_all_is(pair, tmp_path, capsys, caplog):
    trainer = sft(pair, tmp_path, peft_config=lora(), graft_dtype="bfloat16", graft_rounding="nearest",
                  learning_rate=1e-6)  # fmt: skip
    trainer.train()
    said = capsys.readouterr().out
    for words in (
        f"BASE as it was trained is in {tmp_path}. Its graft:",
        f"model in {tmp_path}/grafted",
        "dense because dtype is set",
        "of the delta arrives in bfloat16. Serve in bfloat16.",
        f"The same as an adapter for instruct: {tmp_path}/grafted/adapter",
        f'Load it with  AutoModelForCausalLM.from_pretrained("{tmp_path}/grafted")',
    ):
        assert words in said
    (warning,) = [line for line in caplog.messages if "rounded to nearest keeps" in line]
    assert f"--tuned {tmp_path} --dtype float32 --output {tmp_path}/grafted-float32" in warning
    # The next stage takes the dtype over, and a choice of its own wins.
    again = {"train_dataset": preference_data(), "model": str(tmp_path)}
    for changes, dtype in (({}, "bfloat16"), ({"graft_dtype": "float32"}, "float32")):
        args = ShadowDPOConfig(**settings(tmp_path / f"two-{dtype}", **changes))
        second = ShadowDPOTrainer(args=args, **again)
        assert second.args.graft_dtype == dtype
        assert args.graft_dtype == changes.get("graft_dtype", "auto")  # the user's own is left alone


@pytest.mark.parametrize(
    ("recorded", "changes", "taken"),
    [
        ({"format": "adapter", "dtype": "auto"}, {}, ("auto", "auto")),  # a full model has no adapter form
        ({"format": "model", "dtype": "float32"}, {}, ("model", "float32")),
        ({"format": "model", "dtype": "float32"}, {"graft_rounding": "stochastic"}, ("model", "auto")),
        (None, {}, ("auto", "auto")),
    ],
)
def test_a_stage_takes_over_what_it_can(tmp_path, recorded, changes, taken):
    from shadow_trl.training.loading import Loading
    from shadow_trl.training.origins import Entry, Origins, Start

    (tmp_path / "shadow.json").write_text(json.dumps({"kind": "run", "options": recorded}))
    config = ShadowSFTConfig(output_dir=str(tmp_path / "out"), use_cpu=True, **changes)
    origins = Origins(Entry(str(tmp_path)), Entry("base"), Entry("instruct"))
    start = Start(str(tmp_path), origins, Loading(config, None), None, False)
    start.take_over(config)
    assert (config.graft_format, config.graft_dtype) == taken


@pytest.mark.parametrize(
    ("mixed", "weights", "supported", "words"),
    [
        ("bf16", "float32", (), "no instructions for bfloat16.*Pass bf16=False"),
        ("no", "bfloat16", (), "no instructions for bfloat16.*Pass the model in float32"),
        ("fp16", "float32", ("_is_avx512_bf16_supported",), "no instructions for float16"),
        ("bf16", "float32", ("_is_avx512_bf16_supported",), None),
        ("bf16", "float32", ("_is_amx_tile_supported",), None),
        ("no", "float32", (), None),
    ],
)
def test_slow_16_bits_have_one_line_of_notice(monkeypatch, mixed, weights, supported, words):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in supported)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    accelerator = SimpleNamespace(mixed_precision=mixed, device=torch.device("cpu"))
    model = torch.nn.Linear(2, 2, dtype=getattr(torch, weights))
    found = slow_precision(accelerator, model)
    assert len(found) == (words is not None)
    assert words is None or re.search(words, found[0])
    accelerator.device = torch.device("cuda")
    assert slow_precision(accelerator, model) == []
