"""Models beside the policy are loaded as it is, from their own revision, and run no code of a repository unasked."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import get_peft_model
from runs import lora, settings
from transformers import AutoModelForCausalLM

from shadow_trl import ShadowSFTConfig
from shadow_trl.checkpoints.manifest import Entry
from shadow_trl.training.loading import Loading, load_adapter

COMMIT = "a" * 40


@pytest.mark.parametrize("trust", [False, True])
def test_the_arguments_are_those_of_the_policy_with_another_revision(tmp_path, monkeypatch, trust):
    seen = []
    monkeypatch.setattr("trl.trainer.utils.create_model_from_path", lambda *given, **how: seen.append((*given, how)))
    args = ShadowSFTConfig(**settings(tmp_path, model_init_kwargs={"dtype": "bfloat16", "revision": "old"}))
    args.trust_remote_code = trust
    how = {"dtype": "bfloat16", "trust_remote_code": trust}
    Loading(args).load(Entry("own/base", COMMIT))
    Loading(args, quantization_config="four bits", kwargs={"dtype": torch.float16}).load(Entry("folder"))
    args.model_init_kwargs["trust_remote_code"] = False
    Loading(args).load(Entry("own/base", COMMIT))
    args.model_init_kwargs = None
    Loading(args).load(Entry("folder"))
    assert seen == [
        ("own/base", {**how, "revision": COMMIT}),
        ("folder", {**how, "dtype": torch.float16, "revision": None, "quantization_config": "four bits"}),
        ("own/base", {**how, "revision": COMMIT, "trust_remote_code": False}),
        ("folder", {"dtype": "float32", "revision": None, "trust_remote_code": trust}),
    ]


@pytest.mark.parametrize(
    ("asked", "stored", "wanted"),
    [
        ({}, None, "float32"),
        ({"dtype": "bfloat16"}, None, "bfloat16"),
        ({"dtype": "auto"}, torch.float16, torch.float16),
        ({"dtype": None}, torch.float16, torch.float16),
        ({"dtype": "auto"}, None, "float32"),
    ],
)
def test_the_dtype_of_a_model_that_is_not_loaded_yet(tmp_path, monkeypatch, asked, stored, wanted):
    seen = []

    def read(*given, **how):
        seen.append((*given, how))
        return SimpleNamespace(dtype=stored)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", read)
    args = ShadowSFTConfig(**settings(tmp_path, model_init_kwargs=asked))
    assert Loading(args).like(Entry("own/base", COMMIT)).kwargs == {"dtype": wanted}
    read_it = asked.get("dtype", "") in ("auto", None)
    assert seen == [("own/base", {"revision": COMMIT, "trust_remote_code": False})] * read_it


@pytest.mark.parametrize(("shared", "expected"), [(False, torch.float32), (True, torch.bfloat16)])
def test_an_adapter_is_in_fp32_but_on_weights_that_zero3_shares_out(pair, tmp_path, shared, expected):
    """There TRL makes a new one in the dtype of the model: ZeRO-3 gathers weights of two dtypes in one buffer."""

    def model():
        return AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.bfloat16)

    get_peft_model(model(), lora()).save_pretrained(tmp_path)
    below = model()
    if shared:
        for parameter in below.parameters():
            parameter.ds_id = 0
    adapted = load_adapter(str(tmp_path), below, trainable=True)
    assert {parameter.dtype for parameter in adapted.parameters() if parameter.requires_grad} == {expected}
