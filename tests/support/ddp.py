"""One process of a DPO run under plain data parallelism; called in each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig
from tiny import preference_data
from transformers import TrainerCallback

from shadow_trl import ShadowDPOConfig, ShadowDPOTrainer


class BlockTheOutput(TrainerCallback):
    """Put a folder where the graft will be written, after every check before training has passed."""

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            (Path(args.output_dir) / "grafted").mkdir()
            (Path(args.output_dir) / "grafted" / "result.txt").write_text("somebody's")


def watch_the_temporary_folder(seen: list[Path]) -> None:
    """Note the folder that the graft of the start is loaded from on this rank; it must be whole there."""
    from shadow_trl.training import reference

    original = reference.load_reference

    def load(source, **how):
        assert (Path(source.source) / "model.safetensors").is_file()
        seen.append(Path(source.source))
        return original(source, **how)

    reference.load_reference = load


def watch_the_shares(seen: list[int]) -> None:
    """Note over how many processes each graft of this rank is shared out."""
    from shadow_trl.grafting import stream

    original = stream.in_workers

    def share(work, items, progress):
        seen.append(len(items))
        return original(work, items, progress)

    stream.in_workers = share


def run(rank: int, base: str, instruct: str, output: str, mode: str) -> dict[str, Any]:
    """Train and graft; return the reference values of a second stage, and the figure of the graft after a full one."""
    seen: list[Path] = []
    shares: list[int] = []
    watch_the_temporary_folder(seen)
    watch_the_shares(shares)
    trainer = ShadowDPOTrainer(
        model=base,
        instruct_model=instruct,
        args=ShadowDPOConfig(
            output_dir=output,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            ref_policy="grafted" if mode == "second stage" else "instruct",
            eval_grafted=mode == "full",
            per_device_eval_batch_size=2,
        ),
        train_dataset=preference_data(),
        eval_dataset=preference_data(4),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if mode == "lora" else None,
        callbacks=[BlockTheOutput()] if mode == "blocked" else None,
    )
    # A run that fell back to one process would pass every other check.
    assert trainer.accelerator.num_processes == 2
    assert trainer.accelerator.process_index == rank
    assert str(trainer.accelerator.distributed_type) == "DistributedType.MULTI_CPU"
    found: dict[str, Any] = {}
    if mode == "second stage":
        assert [path.parent.parent for path in seen] == [Path(output)]
        assert not list(Path(output).glob(".*"))
        found["values"] = trainer.train_dataset["ref_chosen_logps"][:]
    trainer.train()
    assert trainer.graft_report.output == Path(output) / "grafted"
    if mode == "full":
        found["figure"] = trainer.evaluate()["eval_grafted_loss"]
    return {**found, "shares": shares}
