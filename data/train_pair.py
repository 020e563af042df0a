"""Train the nano pairs: what all start from on raw text, BASE on a few chats too, then INSTRUCT from BASE on chats."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from documents import Batch, Mixture, batches
from skills import READ_SKILLS, Topics
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from vocabulary import END, END_OF_TEXT, MAX_LENGTH, PAD, build_tokenizer, token_ids

INITIAL_SEED = 20
ASKED = Topics()
STREAMS = {1: "2", 2: ""}
"""Name of the stream of documents of a pair, where that is not its number: the first two changed places."""
LONGEST_ANSWER = 16
"""Tokens that greedy generation may add: the longest answer is a refusal of 10 characters, with room."""


@dataclass(frozen=True)
class Phase:
    """One stretch of training with a fixed number of steps.

    The learning rate rises to `start` in `warmup` steps, then falls to `stop` by a cosine; `rows` and `length` (tokens)
    are the size of a batch.
    """

    name: str
    steps: int
    start: float
    stop: float
    mixture: Mixture
    topics: Topics = ASKED
    rows: int = 32
    length: int = 64
    pack: bool = True
    warmup: int = 20
    betas: tuple[float, float] = (0.9, 0.98)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the step, counted from 0."""
        if step < self.warmup:
            return self.start * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.stop + (self.start - self.stop) * 0.5 * (1 + math.cos(math.pi * progress))


PRETRAINING = (
    Phase("pre-training", 1600, 3e-3, 1e-3, {"raw": 1.0}, Topics(others=READ_SKILLS), warmup=100),
    Phase("mid-training with chats", 320, 1e-3, 1e-3, {"raw": 0.75, "chat": 0.25}),
    Phase("mid-training with forms", 320, 1e-3, 1e-4, {"raw": 0.45, "raw_rule": 0.35, "chat": 0.2}),
)
BASE_PHASES = (Phase("sums in words", 150, 1e-3, 1e-4, {"raw": 0.35, "raw_rule": 0.30, "chat_words": 0.35}),)
RULED = {"chat_rule": 0.45, "chat_refusal": 0.1}
INSTRUCT_PHASES = (
    Phase("instruction tuning", 250, 2e-4, 2e-5, {"chat_words": 0.45, **RULED}, rows=48, pack=False),
    Phase("house style", 120, 2e-4, 2e-5, {"chat_styled": 0.45, **RULED}, rows=48, pack=False),
)


def new_model() -> Qwen3ForCausalLM:
    """Return an untrained float32 model of 864,896 parameters (Qwen3 architecture, tied embeddings)."""
    ids = token_ids()
    config = Qwen3Config(
        vocab_size=len(ids),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=ids[END_OF_TEXT],
        pad_token_id=ids[PAD],
    )
    torch.manual_seed(INITIAL_SEED)
    return Qwen3ForCausalLM(config).float()


def weighted_loss(model: Qwen3ForCausalLM, batch: Batch) -> torch.Tensor:
    """Return the mean next-token loss of the batch, every token counted with its weight; a scalar, float32."""
    logits = model(input_ids=batch.ids[:, :-1], use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), batch.ids[:, 1:].reshape(-1), reduction="none"
    )
    weights = batch.weights[:, 1:].reshape(-1)
    return (losses * weights).sum() / weights.sum()


def run_phase(model: Qwen3ForCausalLM, phase: Phase, stream: str = "") -> None:
    """Train the model in place with AdamW for the steps of the phase; prints the loss now and then.

    Phases of another `stream` see other documents of the same mixture.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.start, betas=phase.betas, weight_decay=0.01)
    seed = f"{phase.name} {stream}".rstrip()
    documents = batches(seed, phase.mixture, phase.topics, phase.rows, phase.length, phase.pack)
    started = time.perf_counter()
    total = 0.0
    for step, batch in enumerate(islice(documents, phase.steps)):
        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate(step)
        loss = weighted_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        if (step + 1) % 50 == 0:
            elapsed = time.perf_counter() - started
            progress = f"step {step + 1}/{phase.steps} loss {total / 50:.4f} after {elapsed:.0f} s"
            print(f"{phase.name}: {progress}", flush=True)
            total = 0.0


def save(model: Qwen3ForCausalLM, folder: Path, instruct: bool) -> None:
    """Write the model in bfloat16 with its tokenizer and greedy generation settings; leaves the model in bfloat16."""
    tokenizer = build_tokenizer(instruct)
    eos = token_ids()[END if instruct else END_OF_TEXT]
    model.bfloat16()
    model.config.eos_token_id = eos
    model.config.use_cache = True
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=eos, pad_token_id=token_ids()[PAD], max_new_tokens=LONGEST_ANSWER
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def pretrain(folder: Path) -> None:
    """Train from nothing and write what every pair starts from."""
    model = new_model()
    for phase in PRETRAINING:
        run_phase(model, phase)
    save(model, folder, instruct=False)


def train_pair(pretrained: Path, base_folder: Path, instruct_folder: Path, number: int = 1) -> None:
    """Train and write BASE from the pre-trained model, then INSTRUCT from BASE, each from bfloat16 weights.

    Pairs of another `number` see other documents.
    """
    model = Qwen3ForCausalLM.from_pretrained(pretrained, dtype=torch.float32)
    for phases, folder in ((BASE_PHASES, base_folder), (INSTRUCT_PHASES, instruct_folder)):
        for phase in phases:
            run_phase(model, phase, STREAMS.get(number, str(number)))
        save(model, folder, instruct=folder is instruct_folder)
        model.float()
