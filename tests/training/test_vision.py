"""Vision data: plain TRL's weights, a graft that loads with its processor, resumption with every weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interrupts import InterruptAfter, Interrupted, files_of
from runs import lora, saved_files, settings
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from shadow_trl import ShadowDPOConfig, ShadowDPOTrainer, ShadowSFTConfig, ShadowSFTTrainer

pytest.importorskip("PIL", reason="vision data needs Pillow")

from vision import make_vision_pair, picture_rows

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def vision_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_vision_pair(tmp_path_factory.mktemp("vision"))


def shadow(pair, folder: Path, kind: str, *, peft: bool = False, callbacks=None, **changes):
    trainer, config = {"sft": (ShadowSFTTrainer, ShadowSFTConfig), "dpo": (ShadowDPOTrainer, ShadowDPOConfig)}[kind]
    return trainer(
        model=str(pair[0]),
        instruct_model=str(pair[1]),
        args=config(**settings(folder, max_length=None, **changes)),
        train_dataset=picture_rows(kind),
        peft_config=lora() if peft else None,
        callbacks=callbacks,
    )


@pytest.mark.parametrize(
    ("kind", "policy", "peft"),
    [
        ("dpo", "instruct", False),
        pytest.param("dpo", "init", True, marks=pytest.mark.slow),
        pytest.param("dpo", "instruct", True, marks=pytest.mark.slow),
        pytest.param("sft", None, False, marks=pytest.mark.slow),
        pytest.param("sft", None, True, marks=pytest.mark.slow),
    ],
)
def test_trains_what_plain_trl_trains_and_grafts(vision_pair, tmp_path, kind, policy, peft):
    shared = {
        "model": str(vision_pair[0]),
        "train_dataset": picture_rows(kind),
        "processing_class": AutoProcessor.from_pretrained(vision_pair[1]),
        "peft_config": lora() if peft else None,
    }
    plain_settings = settings(tmp_path / "plain", max_length=None)
    if kind == "sft":
        plain = SFTTrainer(args=SFTConfig(**plain_settings), **shared)
    else:
        reference = AutoModelForImageTextToText.from_pretrained(vision_pair[1], dtype=torch.float32)
        reference = reference if policy == "instruct" else None
        plain = DPOTrainer(args=DPOConfig(**plain_settings), ref_model=reference, **shared)
    plain.train()
    plain.save_model()
    trainer = shadow(
        vision_pair, tmp_path / "shadow", kind, peft=peft, **({"ref_policy": policy} if kind == "dpo" else {})
    )
    trainer.train()
    expected = saved_files(tmp_path / "plain")
    assert expected
    assert saved_files(tmp_path / "shadow") == expected
    folder = tmp_path / "shadow" / "grafted"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert processor.chat_template == shared["processing_class"].chat_template
    if not peft:
        base, instruct, tuned = (
            {name: tensor.double() for name, tensor in load_file(place / "model.safetensors").items()}
            for place in (*vision_pair, tmp_path / "shadow")
        )
        grafted = load_file(folder / "model.safetensors")
        for name, tensor in grafted.items():
            torch.testing.assert_close(
                tensor.double(), instruct[name] + (tuned[name] - base[name]), rtol=1e-6, atol=1e-8
            )
        assert any("vision" in name for name in grafted)
    assert model.num_parameters() > 0


def test_a_reference_for_pictures_stays_and_says_so(vision_pair, tmp_path, caplog):
    trainer = shadow(vision_pair, tmp_path, "dpo", ref_policy="instruct", graft=False)
    assert trainer.ref_model is not None
    assert trainer.args.precompute_ref_log_probs is False
    assert "stays in memory" in caplog.text


@pytest.mark.slow
def test_resumes_with_every_weight(vision_pair, tmp_path):
    """On the disk this model has other names than in memory, and transformers' own resume skips those weights."""
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    shadow(vision_pair, tmp_path / "whole", "dpo", **saving).train()
    with pytest.raises(Interrupted):
        shadow(vision_pair, tmp_path / "cut", "dpo", callbacks=[InterruptAfter(2)], **saving).train()
    shadow(vision_pair, tmp_path / "cut", "dpo", **saving).train(resume_from_checkpoint=True)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
    assert files_of(tmp_path / "cut" / "grafted") == files_of(tmp_path / "whole" / "grafted")


@pytest.mark.slow
def test_eval_grafted_shows_instruct_before_training(vision_pair, tmp_path):
    """An untrained LoRA on INSTRUCT is INSTRUCT: the loss of plain TRL's SFT on it."""
    shared = {"max_length": None, "per_device_eval_batch_size": 8}
    trainer = ShadowSFTTrainer(
        model=str(vision_pair[0]),
        instruct_model=str(vision_pair[1]),
        args=ShadowSFTConfig(**settings(tmp_path, eval_grafted=True, graft=False, **shared)),
        train_dataset=picture_rows("sft"),
        eval_dataset=picture_rows("sft", 4),
        peft_config=lora(),
    )
    found = trainer.evaluate()
    plain = SFTTrainer(
        model=str(vision_pair[1]),
        args=SFTConfig(**settings(tmp_path / "plain", **shared)),
        train_dataset=picture_rows("sft"),
        eval_dataset=picture_rows("sft", 4),
        processing_class=AutoProcessor.from_pretrained(vision_pair[1]),
    ).evaluate()
    assert found["eval_grafted_loss"] == pytest.approx(plain["eval_loss"], abs=1e-5)
    assert found["eval_grafted_loss"] != pytest.approx(found["eval_loss"], abs=1e-5)
