"""What reaches the hub from a trainer: the graft, by the real client, on a hub of this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub_cache import into_cache
from hub_server import HubServer, client
from huggingface_hub import ModelCard, constants
from runs import lora, settings, sft
from safetensors.torch import load
from tiny import make_tokenizer, sft_data
from trl import SFTTrainer

from shadow_trl import ShadowSFTConfig, ShadowSFTTrainer
from shadow_trl.errors import ConfigError, UploadError

TOKEN = "hf_of-the-user"


@pytest.fixture
def hub():
    with HubServer() as server, client(server):
        yield server


def files_of(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != "shadow.json"}


def test_a_run_publishes_its_graft_and_nothing_else(pair, hub, tmp_path):
    seen = {}

    class Watched(ShadowSFTTrainer):
        def _await_push(self):
            super()._await_push()
            seen[self.state.global_step] = dict(hub.files["me/tuned"].get("next", {}))

    changes = {
        "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "graft_every_save": True,
        "eval_strategy": "steps", "eval_steps": 1, "eval_grafted": True,
        "push_to_hub": True, "hub_private_repo": True, "hub_token": TOKEN, "hub_revision": "next",
    }  # fmt: skip
    trainer = Watched(
        str(pair[0]),
        instruct_model=str(pair[1]),
        args=ShadowSFTConfig(**settings(tmp_path / "tuned", **changes)),
        train_dataset=sft_data(),
        eval_dataset=sft_data(),
        peft_config=lora(),
    )
    trainer.dataset_ids = ["own/rows"]
    assert (trainer.hub_model_id, hub.private) == ("me/tuned", {"me/tuned": True})
    trainer.train()
    first, second = "Training in progress, step 1", "Training in progress, step 2"
    assert hub.messages == [first, second, "End of training"]
    ours, grafted = hub.files["me/tuned"]["next"], tmp_path / "tuned" / "grafted"
    assert hub.files["me/tuned"]["main"].keys() == {".gitattributes"}
    assert {name: content for name, content in ours.items() if name not in (".gitattributes", "shadow.json")} == (
        files_of(grafted)
    )
    assert json.loads(ours["shadow.json"])["tuned"]["source"] == "tuned"
    # What was there before the second checkpoint was saved: the graft of the first.
    assert seen[1].keys() == {".gitattributes"}
    assert set(load(seen[2]["model.safetensors"])) == set(load(ours["model.safetensors"]))
    assert seen[2]["model.safetensors"] != ours["model.safetensors"]
    card = ModelCard(ours["README.md"].decode())
    assert card.data.datasets == ["own/rows"]
    losses = [entry["eval_grafted_loss"] for entry in trainer.state.log_history if "eval_grafted_loss" in entry]
    assert f"| eval_grafted_loss | {losses[-1]} |" in card.text
    assert losses[0] != losses[-1]
    for line in ("| trainer | Watched |", "| learning rate | 0.01 |", "| steps | 2 |", "| adapter | LORA of rank 4 |"):
        assert line in card.text
    whole = b"".join([*ours.values(), *seen[2].values()])
    assert TOKEN.encode() not in whole
    assert str(tmp_path).encode() not in whole
    assert str(pair[0].parent).encode() not in whole


def test_the_method_publishes_the_graft(pair, hub, tmp_path):
    """As TRL's scripts call it; the tuned BASE stays here, however often it is saved."""
    trainer = sft(pair, tmp_path / "out", hub_model_id="me/named")
    with pytest.raises(ConfigError, match="there is no graft to publish yet"):
        trainer.push_to_hub()
    trainer.train()
    trainer.save_model()
    assert hub.files == {}
    assert trainer.push_to_hub(dataset_name="own/rows", tags=["mine"], revision="next").oid == hub.commit
    future = trainer.push_to_hub(blocking=False)
    assert future.result().oid == hub.commit
    grafted = files_of(tmp_path / "out" / "grafted")
    for branch in ("main", "next"):
        assert hub.files["me/named"][branch]["model.safetensors"] == grafted["model.safetensors"]
    assert hub.files["me/named"]["main"].keys() == {".gitattributes", "shadow.json", *grafted}
    card = ModelCard(hub.files["me/named"]["next"]["README.md"].decode()).data
    assert (card.datasets, "mine" in card.tags) == (["own/rows"], True)
    with pytest.raises(TypeError, match="finetuned_from"):
        trainer.push_to_hub(finetuned_from="x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hub_strategy": "checkpoint"}, "hub_strategy='checkpoint' would publish checkpoints"),
        ({"hub_strategy": "all_checkpoints"}, "hub_strategy='all_checkpoints' would publish checkpoints"),
        ({"hub_revision": "a" * 40}, "which is a commit"),
        ({"hub_model_id": "a/b/c"}, "is no repository"),
        ({"graft_format": "adapter", "peft_config": lora()}, "the adapter is for the local folder"),
        ({}, "cannot write to the repository out on the hub"),  # offline
    ],
)
def test_what_could_not_be_published_is_refused_before_training(pair, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        sft(pair, tmp_path / "out", push_to_hub=True, **changes)
    assert str(error.value).endswith("Nothing was written.")
    assert not (tmp_path / "out").exists()


def test_a_failed_upload_loses_nothing(pair, hub, tmp_path):
    trainer = sft(pair, tmp_path / "out", push_to_hub=True, hub_strategy="end")
    hub.refuses["/commit/"] = 500
    with pytest.raises(UploadError, match="the upload failed") as failed:
        trainer.train()
    grafted = tmp_path / "out" / "grafted"
    assert str(failed.value).endswith(f"{grafted} is whole. To upload it again:\n  shadow-trl push {grafted} me/out")
    assert (grafted / "model.safetensors").is_file()
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_without_a_graft_publishing_is_that_of_trl(pair, hub, tmp_path):
    def files(trainer_class, config, name):
        trainer = trainer_class(
            str(pair[0]), args=config(**settings(tmp_path / name, push_to_hub=True)), train_dataset=sft_data(),
            processing_class=make_tokenizer(template=True),
        )  # fmt: skip
        trainer.train()
        trainer.push_to_hub(dataset_name="own/rows")
        return hub.files[f"me/{name}"]["main"]

    ours = files(ShadowSFTTrainer, lambda **given: ShadowSFTConfig(**given, graft=False), "ours")
    plain = files(SFTTrainer, ShadowSFTConfig.__mro__[2], "plain")
    assert ours["model.safetensors"] == plain["model.safetensors"]
    assert ours.keys() - plain.keys() == {"shadow.json"}


def test_the_card_of_a_lora_run_names_hub_ids_alone(pair, tmp_path, monkeypatch):
    sft(pair, tmp_path / "local", peft_config=lora()).train()
    text = (tmp_path / "local" / "README.md").read_text()
    assert str(pair[0].parent) not in text
    assert ModelCard(text).data.base_model is None
    assert "base_model:" not in text
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    into_cache(tmp_path / "cache", "own/base", "a" * 40, pair[0], branch="main")
    sft(pair, tmp_path / "hub", model="own/base", peft_config=lora()).train()
    text = (tmp_path / "hub" / "README.md").read_text()
    assert ModelCard(text).data.base_model == "own/base"
    assert "base_model:adapter:own/base" in ModelCard(text).data.tags
    assert str(tmp_path) not in text
