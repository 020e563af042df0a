"""Every PEFT type with a weight delta, trained some steps on a tiny pair; for the tests and `docs/adapters.md`.

The true delta is taken from the trained model itself: cast to float64, merged by PEFT, less BASE. No file is read for
it and no code of ours is run.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapter_starts as starts
import peft
import torch
from families import load
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from releases import has
from safetensors.torch import load_file, save_file
from tiny import make_pair
from transformers import AutoModelForCausalLM

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SQUARE = ["q_proj", "o_proj"]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        name: as in the table.
        config: makes the PEFT config.
        form: whether an exact adapter form on INSTRUCT exists.
        keep_start: whether the adapter is saved before training too, as our trainers do.
        untied_only: whether the row needs a head of its own.
        rate: learning rate. A delta much smaller than its weights cannot be stored beside them in fp32.
        wrap: puts the adapter on a model.
        tied_only: whether the row needs a head that shares the embedding's weight.
        from_start: whether training starts from other weights than BASE's, so that the delta is measured from those.
        loads: whether PEFT can load the adapter alone, without a GPU.
        needs: package that PEFT needs for it and does not depend on.
        since: release of PEFT that brought it.
    """

    name: str
    config: Callable[[], Any]
    form: bool
    keep_start: bool = False
    untied_only: bool = False
    rate: float = 3e-2
    wrap: Callable[[Any, Any], Any] = peft.get_peft_model
    tied_only: bool = False
    from_start: bool = False
    loads: bool = True
    needs: str | None = None
    since: str = "0.19"

    def require(self) -> None:
        """Skip the test where PEFT is too old for it, or needs a package that is not there."""
        import pytest  # the benchmark has these cases too

        if not has("peft", self.since):
            pytest.skip(f"{self.name} came with PEFT {self.since}")
        if self.needs is not None:
            pytest.importorskip(self.needs, reason=f"PEFT needs {self.needs} for {self.name}")

    def models(self) -> list[tuple[str, bool]]:
        """Return the models of the row, as in `MODELS`."""
        return [(kind, tied) for kind, tied in MODELS if not (self.untied_only if tied else self.tied_only)]


def _lora(*, inner: tuple[str, str] | None = None, **options: Any) -> Callable[[], Any]:
    """Return what makes the config; `inner` is an option and the name of the config in PEFT that it takes."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **options}
    return lambda: peft.LoraConfig(**settings, **({inner[0]: getattr(peft, inner[1])()} if inner else {}))


def _other(name: str, targets: list[str] | None = LINEAR, **options: Any) -> Callable[[], Any]:
    settings = {"task_type": "CAUSAL_LM", **({"target_modules": targets} if targets else {}), **options}
    return lambda: getattr(peft, f"{name}Config")(**settings)


CASES = [
    Case("LoRA", _lora(), True),
    Case("LoRA, rank and alpha patterns", _lora(rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 3}),
         True),
    Case("LoRA, rsLoRA", _lora(use_rslora=True), True),
    Case("LoRA, layers to transform", _lora(layers_to_transform=[1], layers_pattern="layers"), True),
    Case("LoRA, exclude_modules", _lora(target_modules="all-linear", exclude_modules=["k_proj"]), True),
    Case("LoRA, orthogonal", _lora(init_lora_weights="orthogonal"), True),
    Case("LoRA, gaussian", _lora(init_lora_weights="gaussian"), True),
    Case("LoRA, target_parameters", _lora(target_parameters=["mlp.gate_proj.weight"], target_modules=["q_proj"]), True),
    Case("LoRA, modules_to_save norm", _lora(target_modules=["q_proj"], modules_to_save=["input_layernorm"]), True),
    Case("LoRA, modules_to_save lm_head", _lora(target_modules=["q_proj"], modules_to_save=["lm_head"]), True,
         untied_only=True),
    Case("LoRA, trainable tokens", _lora(target_modules=["q_proj"], trainable_token_indices=[2, 5, 7]), True),
    Case("LoRA, bias all", _lora(bias="all"), True),
    Case("LoRA, bias lora_only", _lora(bias="lora_only"), True, since="0.21"),
    Case("LoRA, on embeddings", _lora(target_modules=["embed_tokens", "q_proj"]), True, untied_only=True),
    Case("LoRA, on the head", _lora(target_modules=["lm_head", "q_proj"]), True, untied_only=True),
    Case("LoRA, PiSSA", _lora(init_lora_weights="pissa"), True, keep_start=True),
    Case("LoRA, PiSSA niter", _lora(init_lora_weights="pissa_niter_4"), True, keep_start=True),
    Case("LoRA, OLoRA", _lora(init_lora_weights="olora"), True, keep_start=True),
    Case("LoRA, EVA", _lora(init_lora_weights="eva"), True, wrap=starts.eva),
    Case("LoRA, MiCA", _lora(init_lora_weights="mica"), True, since="0.20"),
    Case("LoRA, not zero at first", _lora(init_lora_weights=False), True),
    Case("LoRA, CorDA", _lora(init_lora_weights="corda"), True, keep_start=True, wrap=starts.corda, loads=False,
         needs="attr"),
    Case("LoRA, LoRA-GA", _lora(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig(scale="weight_svd")),
         True, keep_start=True, wrap=starts.lora_ga),
    Case("LoRA, LoftQ", _lora(init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4)), True,
         keep_start=True, wrap=starts.loftq, from_start=True, loads=False, needs="scipy"),
    Case("LoRA, tied, on embeddings", _lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True), True,
         tied_only=True),
    Case("LoRA, tied, modules_to_save embeddings",
         _lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True), True,
         tied_only=True),
    Case("LoRA, tied, trainable tokens",
         _lora(target_modules=["q_proj"], trainable_token_indices=[2, 5, 7], ensure_weight_tying=True), True,
         tied_only=True),
    Case("LoRA, PiSSA, start not saved", _lora(init_lora_weights="pissa"), False),
    Case("LoRA, OLoRA, start not saved", _lora(init_lora_weights="olora"), False),
    Case("LoRA, lora_bias", _lora(lora_bias=True, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]), False),
    Case("LoRA, KaSA", _lora(inner=("kasa_config", "KasaConfig")), False, since="0.21"),
    Case("LoRA, MonteCLoRA", _lora(inner=("monteclora_config", "MontecloraConfig")), False, since="0.20"),
    Case("LoRA, BD-LoRA",
         _lora(use_bdlora=peft.BdLoraConfig(target_modules_bd_a=["o_proj"], nblocks=2, match_strict=False)), False),
    Case("LoRA, VeLoRA", _lora(inner=("velora_config", "VeloraConfig")), True, since="0.20"),
    Case("DoRA", _lora(use_dora=True), False),
    Case("AdaLoRA", _other("AdaLora", init_r=4, target_r=2, total_step=20, tinit=2, tfinal=2), True),
    Case("LoHa", _other("LoHa", r=4), True),
    Case("LoKr", _other("LoKr", r=4), True),
    Case("VeRA", _other("Vera", SQUARE, r=4), True),
    Case("PVeRA", _other("Pvera", SQUARE, r=4), True),
    Case("VB-LoRA", _other("VBLoRA", SQUARE, r=2, num_vectors=8, vector_length=8, topk=2), True),
    Case("RandLoRA", _other("RandLora", r=4), True),
    Case("Uni-LoRA", _other("UniLora", r=2, theta_d_length=32), True, rate=1.0, since="0.20"),
    Case("TinyLoRA", _other("TinyLora", r=2, u=4), False),
    Case("FRoD", _other("Frod", SQUARE), False, since="0.20"),
    Case("FourierFT", _other("FourierFT", n_frequency=32), True),
    Case("WaveFT", _other("WaveFT", n_frequency=32), True),
    Case("C3A", _other("C3A", block_size=8), True),
    Case("GraLoRA", _other("Gralora", r=4, gralora_k=2), True),
    Case("DeLoRA", _other("Delora", r=4), True),
    Case("SHiRA", _other("Shira", r=2, random_seed=1), True),
    Case("MiSS", _other("Miss", r=4), True),
    Case("MiSS, bat", _other("Miss", r=4, init_weights="bat"), False),
    Case("AdaMSS", _other("Adamss", SQUARE, r=8, num_subspaces=2), False, needs="sklearn"),
    Case("DEFT", _other("Deft", r=4), False, since="0.20"),
    Case("GLoRA", _other("Glora", r=4), False, since="0.20"),
    Case("HiRA", _other("Hira", r=4), False, since="0.20"),
    Case("HRA", _other("HRA", r=4), False),
    Case("IA3", _other("IA3", ["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]), False),
    Case("OFT", _other("OFT", oft_block_size=4, r=0), False),
    Case("BOFT", _other("BOFT", boft_block_size=4), False),
    Case("OSF", _other("OSF", SQUARE, effective_rank=8), False),
    Case("Peanut", _other("Peanut", SQUARE, r=4), False),
    Case("PSOFT", _other("Psoft", r=4), False),
    Case("RoAd", _other("Road", group_size=8), False),
    Case("SuperTuning", _other("Supertuning"), False, since="0.21"),
    Case("BEFT", _other("Beft", ["v_proj"]), True, since="0.20"),
    Case("LN tuning", _other("LNTuning", ["input_layernorm", "norm"]), True),
    Case("Trainable tokens", _other("TrainableTokens", ["embed_tokens"], token_indices=[2, 5]), True),
]  # fmt: skip

MODELS = [("llama", False), ("llama", True), ("qwen3", False), ("qwen3", True)]
"""Kind of model, and whether head and embedding are one weight."""


def case(name: str) -> Case:
    return next(item for item in CASES if item.name == name)


@dataclass
class Trained:
    """A trained case: its folders, and the true delta by the names of the model in memory, float64."""

    base: Path
    instruct: Path
    adapter: Path
    delta: dict[str, torch.Tensor]


def train(case: Case, folder: Path, *, kind: str = "llama", tied: bool = False, steps: int = 6) -> Trained:
    """Train the adapter of a case on a fresh pair of models below `folder`."""
    base, instruct = make_pair(folder / "pair", kind=kind, tied=tied, gap=0.3, attention_bias=True)
    for seed, side in enumerate((base, instruct)):
        _fill_biases(side / "model.safetensors", seed)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        below = AutoModelForCausalLM.from_pretrained(base)
        before = {name: value.detach().double().clone() for name, value in weights_of(below).items()}
        model = case.wrap(below, case.config())
        if case.from_start:
            before = merged_weights(copy.deepcopy(model))
        if case.keep_start:
            model.save_pretrained(folder / "adapter" / "shadow" / "start")
        _steps(model, steps, case.rate)
        model.save_pretrained(folder / "adapter")
    after = merged_weights(model)
    delta = {name: after[name] - value for name, value in before.items() if name in after}
    assert any(bool(value.any()) for value in delta.values()), "the training changed nothing"
    return Trained(base, instruct, folder / "adapter", delta)


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return every weight by its name, a shared one under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False))


def merged_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights that PEFT makes of a model and its adapter in float64; the model is used up.

    A weight that two adapted layers share is given to each of them: PEFT would add both deltas to it, though in the
    model that was trained each layer has its own alone.
    """
    model = model.eval().double()
    seen = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module.get_base_layer(), "weight"):
            layer = module.get_base_layer()
            if id(layer.weight) in seen:
                layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
            seen.add(id(layer.weight))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload()
    return {name: value.detach() for name, value in weights_of(merged).items()}


def adapter_delta(model: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Return what loading an adapter on a model with PEFT adds to its weights, merged in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        below = AutoModelForCausalLM.from_pretrained(model)
        before = {name: value.detach().double().clone() for name, value in weights_of(below).items()}
        after = merged_weights(peft.PeftModel.from_pretrained(below, adapter))
    return {name: after[name] - value for name, value in before.items() if name in after}


def dense_delta(output: Path, trained: Trained) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return (what a dense graft added to INSTRUCT's weights on disk, the true delta of these weights)."""
    before, after = load(trained.instruct), load(output)
    found = {name: value.double() - before[name].double() for name, value in after.items()}
    # A head that is not on disk is the embedding.
    for name, value in trained.delta.items():
        assert name in found or torch.equal(value, trained.delta["model.embed_tokens.weight"])
    return found, {name: value for name, value in trained.delta.items() if name in found}


def error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Return |found - wanted| / |wanted| over all weights together."""
    assert wanted.keys() <= found.keys(), sorted(wanted.keys() - found.keys())
    off = sum(float((found[name].double() - value).square().sum()) for name, value in wanted.items())
    return (off / sum(float(value.square().sum()) for value in wanted.values())) ** 0.5


def _fill_biases(path: Path, seed: int) -> None:
    """Give the biases, which start at zero, values that differ on the two sides."""
    torch.manual_seed(seed)
    weights = load_file(path)
    for name, value in weights.items():
        if name.endswith(".bias"):
            weights[name] = 0.1 * torch.randn_like(value)
    save_file(weights, path, metadata={"format": "pt"})


def _steps(model: torch.nn.Module, steps: int, rate: float) -> None:
    model.train()
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=rate)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        ids = torch.randint(2, 49, (4, 12), generator=generator)
        ids[:, ::3] = torch.tensor([2, 5, 7, 9])[:, None]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


def product(adapter: Path, name: str, factor: float) -> torch.Tensor:
    """Return factor * B A of the module of a weight, in float64; a zero where the adapter has none."""
    found = load_file(adapter / "adapter_model.safetensors")
    module = f"base_model.model.{name.removesuffix('.weight')}"
    key = f"{module}.lora_B.weight"
    return factor * found[key].double() @ found[f"{module}.lora_A.weight"].double() if key in found else torch.zeros(())


def adapter_on(pair: tuple[Path, Path], folder: Path, config: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Save an adapter of random values on BASE; return the model in memory and BASE's weights, float64."""
    torch.manual_seed(0)
    below = AutoModelForCausalLM.from_pretrained(pair[0])
    before = {name: value.detach().double().clone() for name, value in below.named_parameters(remove_duplicate=False)}
    model = get_peft_model(below, config)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn_like(value))
    model.save_pretrained(folder)
    return model, before
