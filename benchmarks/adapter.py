"""Time and memory of the dense graft of a LoRA beside PEFT's merge_and_unload and save, whole processes, interleaved.

    python benchmarks/adapter.py                              # a small family, some seconds
    python benchmarks/adapter.py --size 2.5GB --rounds 3      # the figures of docs/adapters.md

The family is that of benchmarks/graft.py (Llama shape, bf16, tied, three shards); the adapters are on all linear
layers, rank 128, random. DoRA is there for the way through PEFT's layers, one module at a time.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parent))

from graft import Contestant, _family, _shown, _warm, chosen  # noqa: E402

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> None:
    """Make the family and the adapters, run the contestants, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="50MB", help="bytes of one checkpoint (default 50MB)")
    parser.add_argument("--rank", type=int, default=128, help="of the adapters (default 128)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contestant (default 3)")
    parser.add_argument("--pause", type=float, default=4.0, help="seconds before each run (default 4)")
    parser.add_argument("--folder", type=Path, help="where the family lies or goes; kept when given")
    parser.add_argument("--only", nargs="+", help="names of contestants to run")
    parser.add_argument("--work", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        WORK[options.work[0]](Path(options.work[1]))
        return
    folder = options.folder or Path(tempfile.mkdtemp(prefix="adapter-benchmark-"))
    try:
        _family(folder, options.size)
        (folder / "rank").write_text(str(options.rank))
        # In a process of its own: a child starts with the peak of its parent.
        subprocess.run([sys.executable, str(HERE), "--work", "adapters", str(folder)], check=True)
        contestants = chosen(_contestants(folder), options.only)
        for number in range(options.rounds):
            for contestant in contestants:
                _warm(folder)
                contestant.run(folder / "output", options.pause)
                print(f"round {number + 1}  {contestant.name:24} {contestant.seconds[-1]:7.2f} s", file=sys.stderr)
        _print(contestants)
    finally:
        shutil.rmtree(folder / "output", ignore_errors=True)
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


def _contestants(folder: Path) -> list[Contestant]:
    python = [sys.executable]
    sides = [f"--{role}={folder / role}" for role in ("base", "instruct")]
    graft = [*python, "-m", "shadow_trl.cli", "graft", *sides, f"--output={folder / 'output'}", "--quiet"]
    return [
        Contestant("graft, LoRA", [*graft, f"--tuned={folder / 'lora'}"]),
        Contestant("graft, LoRA, bare", [*graft, f"--tuned={folder / 'lora'}", "--digest=none", "--stats=off"]),
        Contestant("PEFT merge and save", [*python, str(HERE), "--work", "merge", str(folder)]),
        Contestant("graft, DoRA", [*graft, f"--tuned={folder / 'dora'}"]),
        Contestant("import torch", [*python, "-c", "import torch"]),
    ]


def _print(contestants: list[Contestant]) -> None:
    peft = next((one for one in contestants if one.name.startswith("PEFT")), None)
    print(f"`python benchmarks/adapter.py {shlex.join(_shown())}`\n")
    print("| what | median s | all s | peak RSS MiB | time / PEFT | memory / PEFT |\n|---|---|---|---|---|---|")
    for one in contestants:
        seconds, memory = statistics.median(one.seconds), max(one.memory)
        runs = " ".join(f"{value:.2f}" for value in one.seconds)
        ratios = ["", ""] if peft is None else [
            f"{seconds / statistics.median(peft.seconds):.2f}", f"{memory / max(peft.memory):.2f}"
        ]  # fmt: skip
        print(f"| {one.name} | {seconds:.2f} | {runs} | {memory / 2**20:.0f} | {' | '.join(ratios)} |")


def _make_adapters(folder: Path) -> None:
    rank = int((folder / "rank").read_text())
    for name, dora in (("lora", False), ("dora", True)):
        if not (folder / name / f"{rank}").exists():
            _make_adapter(folder, folder / name, rank, dora)
            (folder / name / f"{rank}").touch()


def _make_adapter(folder: Path, target: Path, rank: int, dora: bool) -> None:
    """Write a random adapter of the family, factors in fp32 as PEFT trains them."""
    import torch
    from safetensors.torch import save_file

    from shadow_trl.checkpoints.checkpoint import Checkpoint

    base = Checkpoint.open(str(folder / "base"))
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, spec in base.specs.items():
        if name.split(".")[-2] in PROJECTIONS:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            rows, columns = spec.shape
            tensors[f"{module}.lora_A.weight"] = torch.empty(rank, columns).normal_(0, 0.02, generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.empty(rows, rank).normal_(0, 1e-3, generator=generator)
            if dora:
                tensors[f"{module}.lora_magnitude_vector"] = torch.linalg.vector_norm(base.tensor(name).float(), dim=1)
    target.mkdir(exist_ok=True)
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "use_dora": dora, "bias": "none",
        "target_modules": list(PROJECTIONS), "base_model_name_or_path": str(folder / "base"),
    }  # fmt: skip
    (target / "adapter_config.json").write_text(json.dumps(settings))


def _merge_by_peft(folder: Path) -> None:
    """Load INSTRUCT, put the adapter on it, merge, save: what a user does without this package."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "instruct", dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, folder / "lora").merge_and_unload().save_pretrained(folder / "output")


WORK = {"adapters": _make_adapters, "merge": _merge_by_peft}

if __name__ == "__main__":
    main()
