"""Time of a step of Shadow-DPO beside plain TRL's, step by step in turns within one process.

    python benchmarks/training_step.py [--rows 320] [--hidden 384] [--layers 8]

Both trainers train a LoRA on the same random BASE and rows with TRL's own reference (`ref_policy="init"`), each in a
thread of its own; a step of one is followed by a step of the other, never two at once. What else goes on in the machine
then meets both alike, which processes one after the other cannot give. Seconds are CPU
seconds of the thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from training import make_inputs
from transformers import TrainerCallback


class Turns(TrainerCallback):
    """Let two trainers take a step each in turn, and time the steps of one of them."""

    def __init__(self, mine: threading.Semaphore, other: threading.Semaphore) -> None:
        self.mine, self.other = mine, other
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the turn."""
        self.mine.acquire()
        self._start = time.thread_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the step and hand over."""
        self.seconds.append(time.thread_time() - self._start)
        self.other.release()


def build(which: str, folder: Path, turns: Turns) -> Any:
    """Build one of the trainers."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from shadow_trl import ShadowDPOConfig, ShadowDPOTrainer

    settings: dict[str, Any] = {
        "output_dir": str(folder / which),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    shared: dict[str, Any] = {
        "model": str(folder / "base"),
        "train_dataset": Dataset.from_json(str(folder / "rows.jsonl"), cache_dir=str(folder / "cache")),
        "peft_config": LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        "callbacks": [turns],
    }
    if which == "shadow":
        # The graft comes after the steps.
        args = ShadowDPOConfig(**settings, ref_policy="init", graft=False)
        return ShadowDPOTrainer(instruct_model=str(folder / "instruct"), args=args, **shared)
    tokenizer = AutoTokenizer.from_pretrained(folder / "instruct")
    return DPOTrainer(args=DPOConfig(**settings), processing_class=tokenizer, **shared)


def main() -> None:
    """Train both and print the ratio of their steps."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for name, default in (("rows", 320), ("hidden", 384), ("layers", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    gates = threading.Semaphore(1), threading.Semaphore(0)
    turns = {"trl": Turns(gates[0], gates[1]), "shadow": Turns(gates[1], gates[0])}
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name), hidden=options.hidden, layers=options.layers, rows=options.rows)
        trainers = [build(which, Path(name), turn) for which, turn in turns.items()]
        threads = [threading.Thread(target=trainer.train) for trainer in trainers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # The first steps allocate.
    plain, shadow = (turns[which].seconds[3:] for which in ("trl", "shadow"))
    ratios = [one / other for one, other in zip(shadow, plain, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        f"{len(ratios)} pairs of steps; CPU s, medians: trl {statistics.median(plain):.4f}, "
        f"shadow {statistics.median(shadow):.4f}"
    )
    print(
        f"step, shadow / trl: median {middle:.3f}, quartiles {low:.3f} and {high:.3f}; "
        f"sum over sum {sum(shadow) / sum(plain):.3f}"
    )


if __name__ == "__main__":
    main()
