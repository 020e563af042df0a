"""Shared set-up of the tests: offline, one thread, caches of their own, and no deprecation warning from our calls."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path

# Before anything imports torch or the hub's client: the suite needs no network, and tiny models are slower on several
# threads than on one.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    TQDM_DISABLE="1",
)

import pytest

# A shell lets what it starts in the background ignore Ctrl-C, which the tests send, and children would ignore it too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Keep what the imports made out of garbage collection: each training collects, and would walk through it all."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what `datasets` caches out of the user's home."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny tied Qwen3 pair (base, instruct) in bf16; read-only."""
    import torch
    from tiny import make_pair

    return make_pair(tmp_path_factory.mktemp("pair"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def fp32_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny tied Qwen3 pair (base, instruct) in fp32."""
    from tiny import make_pair

    return make_pair(tmp_path_factory.mktemp("fp32"))


@pytest.fixture(scope="module")
def full_run(fp32_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of full fine-tuning on `fp32_pair`."""
    from runs import sft

    folder = tmp_path_factory.mktemp("full") / "sft"
    sft(fp32_pair, folder).train()
    return folder


@pytest.fixture(scope="module")
def lora_run(fp32_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a LoRA on `fp32_pair`."""
    from runs import lora, sft

    folder = tmp_path_factory.mktemp("lora") / "sft"
    sft(fp32_pair, folder, peft_config=lora()).train()
    return folder


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes base, instruct and tuned of an architecture, all weights random, once."""
    from architectures import make_family

    root = tmp_path_factory.mktemp("families")
    return lambda name: make_family(root / name, name)
