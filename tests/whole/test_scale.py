"""docs/scale.md: that it is what its script prints, and that the script counts right."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from types import ModuleType

import pytest
from accelerate.commands.launch import _validate_launch_command
from releases import needs
from repository import ROOT
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from shadow_trl.recipes.launch_options import launch_parser, split_words
from shadow_trl.recipes.options import parse

OF_EXPERTS = needs("peft", "0.21", "older ones do not know all-linear of experts")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks/scale.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "scale", module)
        spec.loader.exec_module(module)
    return module


@OF_EXPERTS
def test_the_page_is_what_the_script_prints(script):
    assert (ROOT / "docs/scale.md").read_text(encoding="utf-8") == script.page()


def by_hand(*, rows, h, inner, layers, q, kv, width, experts=0, tied=False, norms=False):
    """Weights of a model: attention and norms, one MLP or the experts with their router, embeddings and head."""
    attention = h * width * (q + 2 * kv) + q * width * h + 2 * h + (2 * width if norms else 0)
    mlp = experts * 3 * h * inner + h * experts if experts else 3 * h * inner
    return layers * (attention + mlp) + rows * h * (1 if tied else 2) + h


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0.6B", by_hand(rows=151936, h=1024, inner=3072, layers=28, q=16, kv=8, width=128, tied=True,
                         norms=True)),
        ("70B", by_hand(rows=128256, h=8192, inner=28672, layers=80, q=64, kv=8, width=128)),
        ("235B-A22B", by_hand(rows=151936, h=4096, inner=1536, layers=94, q=64, kv=4, width=128, experts=128,
                              norms=True)),
    ],
)  # fmt: skip
def test_the_weights_of_a_model_are_counted(script, name, expected):
    model = next(one for one in script.MODELS if one.name == name)
    assert model.weights == expected


def test_a_row_by_hand(script):
    """Llama-3.1-8B, DPO: 8,030,261,248 weights, of which 2 x 128256 x 4096 + 4096 are outside 32 layers."""
    weights, outside = 8_030_261_248, 2 * 128256 * 4096 + 4096
    block = (weights - outside) // 32
    model = next(one for one in script.MODELS if one.name == "8B")
    full, lora = script.Run(model, "dpo", "full"), script.Run(model, "dpo", "lora")
    # fp32 weights and gradients, two moments; in bf16 the weights outside and of two layers, gradients of one.
    assert full.state(4) == 16 * weights / 4
    assert full.gathered(4, trains=True) == 2 * (outside + 2 * block) + 2 * (outside + block)
    # 2 x 1024 tokens; 8 key and 32 query heads of width 128.
    assert full.activations() == 2048 * (2 * 4096 * 32 + 16 * 4096 + 4 * 40 * 128 + 8 * 14336)
    # On the machine the policy and its reference in fp32, as loaded: TUNED in fp32 is less.
    assert full.host == 2 * 4 * weights
    # Not two: 64.2 GB of state and 5.5 GB gathered leave less than a fifth of 80 GB.
    assert full.gpus == 4
    # Rank 16 on q, k, v, o, gate, up, down: the sum of both sides of each.
    sides = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    assert lora.trained == 32 * 16 * sides
    assert lora.state(1) == 2 * weights + 16 * lora.trained
    assert sum(full.disk().values()) == (2 + 2 + 4 + 12 + 2) * weights
    # Measured: 8.81 s, of which 1.82 to start, for 3 x 2.5 GB read and 2.5 written; here 2 + 2 + 4 + 2 bytes a weight.
    per_gigabyte, moved = (8.81 - 1.82) / 10, 10 * weights / 1e9
    assert full.seconds == pytest.approx(1.82 + per_gigabyte * moved)


@OF_EXPERTS
def test_every_command_asks_for_these_gpus_and_the_rows_of_the_recipe(script, monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = {("sft", "full"): 32, ("sft", "lora"): 32, ("dpo", "full"): 128, ("dpo", "lora"): 32}
    runs = [script.Run(model, trainer, form) for model in script.MODELS for trainer, form in rows]
    for run in runs:
        program, trainer, *words = shlex.split(run.command.replace("\\\n", " ").replace("_rank N", "_rank 0"))
        launch, own = split_words(words)
        options = parse(trainer, [*own, "--use_cpu", "true", "--bf16", "false"])  # where there are no GPUs
        assert (program, trainer) == ("shadow-trl", run.trainer)
        assert run.model.base.split("/")[-1] in options.model.model_name_or_path
        assert options.training.instruct_model == run.model.instruct
        processes = 1
        if launch:
            resolved = resolve_accelerate_config_argument(launch)
            args, *_ = _validate_launch_command(launch_parser().parse_args([*resolved, "script.py"]))
            assert (args.use_fsdp, args.fsdp_version, args.fsdp_cpu_ram_efficient_loading) == (True, 2, True)
            assert args.num_processes == run.gpus <= 8 * (args.num_machines or 1)
            processes = args.num_processes
        settings = options.training
        step = processes * settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        assert step == max(processes, rows[run.trainer, run.form])
        assert processes == run.gpus
