"""What a run needs, from 0.6 to 235 billion weights: GPUs, memory, disk, time of the graft. Prints docs/scale.md.

    python benchmarks/scale.py > docs/scale.md

Nothing is trained. The weights are counted by transformers, those of an adapter by PEFT, on models of the published
shapes without values (device `meta`). Rows, ranks and dtypes are those of `recipes/configs/`; the time of a graft comes
from the rates that docs/benchmarks.md gives. The page's text, with the formulae, is scale_page.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from shadow_trl.runtime.needs import GPU, USED, Needs, Shape, gigabytes

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "benchmarks" / "scale_page.md"
PER_MACHINE = 8
"""GPUs of a machine."""
GLOBAL_BATCH = {("sft", "full"): 32, ("sft", "lora"): 32, ("dpo", "full"): 128, ("dpo", "lora"): 32}
"""Rows of a step in the recipes."""


@dataclass(frozen=True)
class Model:
    """A pair by its names, and the published shape of both.

    Attributes:
        base, instruct: on the hub.
        kind: `model_type` of transformers.
        shape: of its config.json, as far as it decides the number of weights.
        recipe: folder in recipes/configs whose settings are used.
    """

    name: str
    base: str
    instruct: str
    kind: str
    shape: dict[str, Any]
    recipe: str

    @cached_property
    def weights(self) -> int:
        """Weights of the whole model; a tied head counts once."""
        return _count(self.build(self.shape["num_hidden_layers"]))

    @cached_property
    def block(self) -> int:
        """Weights of one layer."""
        return _count(self.build(1).model.layers[0])

    @cached_property
    def sizes(self) -> Shape:
        """What the arithmetic takes."""
        shape = self.shape
        inner = shape.get("moe_intermediate_size", shape["intermediate_size"]) * shape.get("num_experts_per_tok", 1)
        heads = (shape["num_attention_heads"] + shape["num_key_value_heads"]) * shape["head_dim"]
        return Shape(self.weights, self.block, shape["num_hidden_layers"], shape["hidden_size"], inner, heads)

    def adapter(self, rank: int) -> int:
        """Weights of a LoRA on all linear layers; the layers are alike."""
        import torch
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        with torch.device("meta"):
            model = get_peft_model(self.build(1), config)
        return self.shape["num_hidden_layers"] * sum(p.numel() for p in model.parameters() if p.requires_grad)

    def build(self, layers: int) -> Any:
        """Return the model with so many layers and without values."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(self.kind, **{**self.shape, "num_hidden_layers": layers})
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _qwen(hidden: int, inner: int, layers: int, heads: int, groups: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 151936, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": 128, **more,
    }  # fmt: skip


def _llama(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    shape = _qwen(hidden, inner, layers, heads, 8, tie_word_embeddings=False)
    return {**shape, "vocab_size": 128256}


EXPERTS = {"moe_intermediate_size": 1536, "num_experts": 128, "num_experts_per_tok": 8, "tie_word_embeddings": False}
MODELS = [
    Model("0.6B", "Qwen/Qwen3-0.6B-Base", "Qwen/Qwen3-0.6B", "qwen3",
          _qwen(1024, 3072, 28, 16, 8, tie_word_embeddings=True), "qwen3-0.6b"),
    Model("4B", "Qwen/Qwen3-4B-Base", "Qwen/Qwen3-4B", "qwen3",
          _qwen(2560, 9728, 36, 32, 8, tie_word_embeddings=True), "qwen3-4b"),
    Model("8B", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", "llama",
          _llama(4096, 14336, 32, 32), "llama-3.1-8b"),
    Model("70B", "meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.1-70B-Instruct", "llama",
          _llama(8192, 28672, 80, 64), "llama-3.1-8b"),
    Model("235B-A22B", "BASE", "Qwen/Qwen3-235B-A22B", "qwen3_moe",
          _qwen(4096, 12288, 94, 64, 4, **EXPERTS), "llama-3.1-8b"),
]  # fmt: skip


class Run(Needs):
    """One model, trained in one way as its recipe says.

    Args:
        model: the pair.
        trainer: `sft` or `dpo`.
        form: `full` or `lora`.
    """

    model: Model
    trainer: str
    form: str
    settings: dict[str, Any]

    def __init__(self, model: Model, trainer: str, form: str) -> None:
        path = ROOT / "recipes" / "configs" / model.recipe / f"{trainer}_{form}.yaml"
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        is_full, size = form == "full", {"float32": 4, "bfloat16": 2}[settings["dtype"]]
        trained = model.weights if is_full else model.adapter(settings["lora_r"])
        tokens = settings["max_length"] * (2 if trainer == "dpo" else 1)
        super().__init__(model.sizes, trained, is_full, size, tokens, has_reference=trainer == "dpo")
        vars(self).update(model=model, trainer=trainer, form=form, settings=settings)

    @cached_property
    def gpus(self) -> int:
        """The smallest power of two that leaves enough of each GPU free."""
        found = self.gpus_of(GPU)
        assert found is not None
        return found

    @property
    def seconds(self) -> float:
        """Time of the graft: what is read of the three models (of an adapter: that alone) and written."""
        start, rate = rates()
        disk = self.disk()
        read = disk["TUNED"] + (disk["BASE"] + disk["INSTRUCT"] if self.form == "full" else 0)
        return start + (read + disk["graft"]) * rate

    @property
    def command(self) -> str:
        """What starts it, on each machine."""
        words = [
            f"shadow-trl {self.trainer} --config recipes/configs/{self.model.recipe}/{self.trainer}_{self.form}.yaml"
        ]
        if self.settings["model_name_or_path"] != self.model.base:
            words.append(f"--model_name_or_path {self.model.base} --instruct_model {self.model.instruct}")
        accumulated = max(1, GLOBAL_BATCH[self.trainer, self.form] // self.gpus)
        words.append(f"--per_device_train_batch_size 1 --gradient_accumulation_steps {accumulated}")
        if 1 < self.gpus <= PER_MACHINE:
            words.append(f"--accelerate_config fsdp2 --num_processes {self.gpus}")
        elif self.gpus > PER_MACHINE:
            words.append(
                "--accelerate_config recipes/accelerate/fsdp2_4x8.yaml --machine_rank N --main_process_ip HOST"
            )
            if self.gpus != 4 * PER_MACHINE:
                words.append(f"--num_machines {self.gpus // PER_MACHINE} --num_processes {self.gpus}")
        return " \\\n    ".join(words)


def rates() -> tuple[float, float]:
    """Return what docs/benchmarks.md measured: seconds of the start, and seconds a byte read or written, cold."""
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    warm, cold = page.split("## With a cold page cache")
    start = float(re.search(r"\| import torch \| ([\d.]+) \|", warm)[1])  # type: ignore[index]
    size = float(re.search(r"--size ([\d.]+)GB", cold)[1]) * 1e9  # type: ignore[index]
    graft = float(re.search(r"\| graft, defaults \| ([\d.]+) \|", cold)[1])  # type: ignore[index]
    return start, (graft - start) / (4 * size)  # three checkpoints are read, one is written


def duration(seconds: float) -> str:
    """Return seconds or minutes."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def form_of(name: str) -> str:
    """Return how the page writes a form of training."""
    return {"lora": "LoRA"}.get(name, name)


def row(run: Run, numbers: list[float]) -> str:
    """Return the cells that say which run it is, and sizes."""
    named = [run.model.name, f"{run.trainer.upper()}, {form_of(run.form)}"]
    return " | ".join([*named, *map(gigabytes, numbers)])


def on_gpus(run: Run) -> str:
    """Return a row of the table of GPUs."""
    parts = [run.state(run.gpus), run.gathered(run.gpus, trains=True), run.activations()]
    reference = [run.reference(run.gpus)] if run.trainer == "dpo" else []
    cells = row(run, [*parts, sum(parts), *reference])
    return f"| {cells} |{'' if reference else '  |'} {run.gpus} |"


def on_machines(run: Run) -> str:
    """Return a row of the table of machines and disks."""
    disk = run.disk()
    sizes = [run.host, disk["TUNED"], disk["checkpoint"], disk["graft"], sum(disk.values())]
    return f"| {row(run, sizes)} | {duration(run.seconds)} |"


def page() -> str:
    """Return the page."""
    runs = [Run(model, trainer, form) for model in MODELS for trainer in ("sft", "dpo") for form in ("full", "lora")]
    start, rate = rates()
    commands = "\n\n".join(
        f"### {model.name}\n\n```bash\n" + "\n".join(run.command for run in runs if run.model is model) + "\n```"
        for model in MODELS
    )
    return PAGE.read_text(encoding="utf-8").format(
        free=1 - USED,
        gpus="\n".join(map(on_gpus, runs)),
        machines="\n".join(map(on_machines, runs)),
        counts="\n".join(f"| {model.name} | {model.instruct} | {model.weights:,} |" for model in MODELS),
        start=start,
        rate=rate * 1e9,
        experts=f"{MODELS[-1].adapter(128) / 1e9:.0f} billion",
        batches=", ".join(
            f"{count} in {trainer.upper()} ({form_of(form)})" for (trainer, form), count in GLOBAL_BATCH.items()
        ),
        commands=commands,
    )


if __name__ == "__main__":
    print(page(), end="")
