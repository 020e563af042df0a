"""Shadow-DPO beside plain TRL: time of a step, time of a run, memory of training, share of the graft.

    python benchmarks/training.py [--rounds 3] [--hidden 384] [--layers 8] [--rows 48] [--records FILE]

Every arm is a process of its own; the arms take turns within a round. The model is random, the data are random
characters: neither changes the cost. With `--records`, the rounds of several calls are kept in a file and shown
together. Arms:

    trl          TRL's DPOTrainer with LoRA; its reference is the policy with the adapter off
    trl+ref      the same with INSTRUCT as an explicit reference, held in memory
    shadow       ShadowDPOTrainer(ref_policy="instruct"): reference computed before training and released; grafts
    shadow-init  ShadowDPOTrainer(ref_policy="init"), for the cost of a step alone
    shadow-eval  shadow-init with an evaluation of 32 rows, eval_grafted=True: for the cost of that beside the plain one

Seconds of a step and of a run are given twice: CPU seconds of the process, which has one thread (what others do on the
machine matters little), and wall-clock seconds, which include waiting for the disk.

Memory is the peak of the resident set between the first and the last step, Linux only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ARMS = ("trl", "trl+ref", "shadow", "shadow-init", "shadow-eval")


def make_inputs(folder: Path, *, hidden: int, layers: int, rows: int) -> None:
    """Write a random BASE, an INSTRUCT beside it, and preference rows below `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "nano-instruct")
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=hidden // 8,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name in ("base", "instruct"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * parameter.abs().mean() * torch.randn_like(parameter))
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for row in range(rows):
            question = {"role": "user", "content": f"{row * 7919 % 1000:03d}+{row * 104729 % 1000:03d}="}
            answers = {
                name: [{"role": "assistant", "content": str(row * step % 9973)}]
                for name, step in (("chosen", 31), ("rejected", 37))
            }
            file.write(json.dumps({"prompt": [question], **answers}) + "\n")


def peak_resident() -> float:
    """Return the peak of the resident set since it was last reset, in MiB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmHWM; this benchmark needs Linux")


def run_arm(arm: str, folder: Path) -> dict[str, float]:
    """Train one arm in this process; return seconds and MiB."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from shadow_trl import ShadowDPOConfig, ShadowDPOTrainer

    torch.set_num_threads(1)
    times: list[tuple[float, float]] = []
    memory: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
            times.append(now())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times.append(now())

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            memory.append(peak_resident())

    settings: dict[str, Any] = {
        "output_dir": str(folder / f"out-{arm}"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-4,
    }
    shared: dict[str, Any] = {
        "model": str(folder / "base"),
        "train_dataset": Dataset.from_json(str(folder / "rows.jsonl"), cache_dir=tempfile.mkdtemp(dir=folder)),
        "peft_config": LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        "callbacks": [Clock()],
    }
    start = now()
    if arm.startswith("shadow"):
        policy = "instruct" if arm == "shadow" else "init"
        args = ShadowDPOConfig(**settings, ref_policy=policy, graft=arm == "shadow", eval_grafted=arm == "shadow-eval")
        trainer: Any = ShadowDPOTrainer(instruct_model=str(folder / "instruct"), args=args, **shared)
    else:
        reference = AutoModelForCausalLM.from_pretrained(folder / "instruct") if arm == "trl+ref" else None
        tokenizer = AutoTokenizer.from_pretrained(folder / "instruct")
        args = DPOConfig(**settings)
        trainer = DPOTrainer(ref_model=reference, processing_class=tokenizer, args=args, **shared)
    trainer.train()
    trained = now()
    if arm != "shadow":
        trainer.save_model()
    end = now()
    found: dict[str, float] = {"memory": memory[0]}
    for place, clock in enumerate(("cpu", "wall")):
        steps = [after[place] - before[place] for before, after in itertools.pairwise(times[1:])]
        found[f"step {clock}"] = statistics.median(steps)
        found[f"run {clock}"] = end[place] - start[place]
        found[f"end {clock}"] = trained[place] - times[-1][place]
    if arm == "shadow-eval":
        found |= time_evaluations(trainer, shared["train_dataset"].select(range(32)))
    return found


def now() -> tuple[float, float]:
    """Return CPU seconds of this process and wall-clock seconds."""
    return time.process_time(), time.perf_counter()


def time_evaluations(trainer: Any, rows: Any) -> dict[str, float]:
    """Return the CPU seconds of an evaluation with and without `eval_grafted`, medians of 3 in turns."""
    found: dict[str, list[float]] = {"plain": [], "grafted": []}
    for _ in range(3):
        for name, times in found.items():
            trainer.args.eval_grafted = name == "grafted"
            start = time.process_time()
            trainer.evaluate(rows)
            times.append(time.process_time() - start)
    return {f"evaluation {name}": statistics.median(times) for name, times in found.items()}


def main() -> None:
    """Run the rounds and print a table of medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--records", type=Path, help="file that keeps the rounds of several calls")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(run_arm(options.arm, options.folder)))
        return
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    if options.records and options.records.exists():
        found = json.loads(options.records.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, hidden=options.hidden, layers=options.layers, rows=options.rows)
        for _ in range(options.rounds):
            for arm in ARMS:
                command = [sys.executable, __file__, "--arm", arm, "--folder", name]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                found[arm].append(json.loads(output.splitlines()[-1]))
                shutil.rmtree(folder / f"out-{arm}")
            if options.records:
                options.records.write_text(json.dumps(found), encoding="utf-8")
    show(found, f"python benchmarks/training.py {' '.join(sys.argv[1:])}")


def show(found: dict[str, list[dict[str, float]]], command: str) -> None:
    """Print medians and extremes of each arm, and the ratios within a round."""

    def cell(values: list[float], digits: int) -> str:
        return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    print(f"medians (smallest to largest) of {len(found['trl'])} rounds; {command}\n")
    columns = {"step cpu": 3, "step wall": 3, "run cpu": 1, "run wall": 1, "memory": 0, "end cpu": 2, "end wall": 2}
    print(
        "| arm | step, CPU s | step, wall s | run, CPU s | run, wall s | peak MiB in training | end of training, CPU s "
        "| wall s |\n|---|---|---|---|---|---|---|---|"
    )
    for arm, rounds in found.items():
        cells = [cell([one[key] for one in rounds], digits) for key, digits in columns.items()]
        print(f"| {arm} | {' | '.join(cells)} |")
    print()
    for key, over, under in (
        ("step cpu", "shadow-init", "trl"),
        ("step wall", "shadow-init", "trl"),
        ("step cpu", "shadow", "trl+ref"),
        ("memory", "shadow", "trl"),
        ("memory", "trl+ref", "trl"),
        ("run cpu", "shadow", "trl+ref"),
        ("run wall", "shadow", "trl+ref"),
    ):
        ratios = [one[key] / other[key] for one, other in zip(found[over], found[under], strict=True)]
        print(f"{key}, {over} / {under}: {cell(ratios, 3)}")
    for clock in ("cpu", "wall"):
        share = [one[f"end {clock}"] / one[f"run {clock}"] for one in found["shadow"]]
        print(f"save and graft, share of the shadow run ({clock}): {cell(share, 3)}")
    times = [one["evaluation grafted"] / one["evaluation plain"] for one in found["shadow-eval"]]
    print(f"evaluation with eval_grafted / without: {cell(times, 2)}")


if __name__ == "__main__":
    main()
