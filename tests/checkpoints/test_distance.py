"""The sums of a gap: against float64, by hand, and whatever the blocks and threads."""

from __future__ import annotations

import os
import threading
import warnings

import pytest
import torch
from families import write

from shadow_trl.checkpoints.checkpoint import Checkpoint, Place
from shadow_trl.checkpoints.distance import measure_gap
from shadow_trl.runtime.threads import run_threads

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def sums(root, base: torch.Tensor, instruct: torch.Tensor):
    sides = [Checkpoint.open(write(root / role, {"w": w})) for role, w in (("base", base), ("instruct", instruct))]
    read = []
    found = measure_gap([("w", *(Place(side, "w") for side in sides))], read.append)["w"]
    assert sum(read) == base.nbytes + instruct.nbytes
    return found


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP16, FP16), (FP32, FP32), (FP64, FP64), (BF16, FP32), (FP64, BF16)])
def test_sums_are_those_of_float64(tmp_path, dtypes):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(301, 7, generator=generator, dtype=FP64)
    instruct = (base + 0.1 * torch.randn(301, 7, generator=generator, dtype=FP64)).to(dtypes[1])
    base = base.to(dtypes[0])
    found = sums(tmp_path, base, instruct)
    assert found.gap == pytest.approx(float((base.double() - instruct.double()).abs().sum()), rel=1e-6)
    assert found.size == pytest.approx(float(base.double().abs().sum() + instruct.double().abs().sum()), rel=1e-6)
    assert found.elements == 2107
    assert found.finite


@pytest.mark.parametrize("dtypes", [(BF16, FP32, BF16), (FP64, FP32, BF16), (FP32, FP32, FP32)])
def test_the_angle_is_that_of_float64(tmp_path, dtypes):
    """Over more than one block; training went three parts the way of INSTRUCT and four across it."""
    generator = torch.Generator().manual_seed(1)
    base, gap, across = (torch.randn(600_000, generator=generator, dtype=FP64) for _ in range(3))
    sides = [base.to(dtypes[0]), (base + 0.03 * gap + 0.04 * across).to(dtypes[1]), (base + 0.1 * gap).to(dtypes[2])]
    places = [Place(Checkpoint.open(write(tmp_path / str(at), {"w": side})), "w") for at, side in enumerate(sides)]
    read = []
    found = measure_gap([("w", *places)], read.append)["w"]
    start, end, instruct = (side.double() for side in sides)
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(end - start, instruct - start, dim=0)), rel=1e-5)
    assert found.cosine == pytest.approx(0.6, abs=0.02)
    assert found.delta_norm == pytest.approx(float((end - start).norm()), rel=1e-5)
    assert found.gap == pytest.approx(float((end - start).abs().sum()), rel=1e-6)
    assert sum(read) == sum(side.nbytes for side in sides)
    plain = measure_gap([("w", *places[:2])])["w"]
    assert (plain.gap, plain.size) == pytest.approx((found.gap, found.size), rel=1e-12)  # added up in another order
    assert plain.cosine is None


def test_an_angle_beyond_fp32_is_made_in_fp64(tmp_path):
    big = torch.full((4,), 3e30)
    places = [Place(Checkpoint.open(write(tmp_path / str(n), {"w": n * big})), "w") for n in range(3)]
    found = measure_gap([("w", *places)])["w"]
    assert found.cosine == pytest.approx(1.0)
    assert found.finite


def test_halves_by_hand(tmp_path):
    found = sums(tmp_path, torch.tensor([1.0, -2.0, 0.0], dtype=BF16), torch.tensor([2.0, -4.0, -0.0], dtype=BF16))
    assert (found.gap, found.size) == (3.0, 9.0)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_sums_beyond_fp32_are_made_in_fp64(tmp_path, dtype):
    big = torch.full((4,), 3e38, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sums(tmp_path, big, -big)
    assert found.gap == found.size == pytest.approx(24e38, rel=1e-2)
    assert found.finite


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_values_that_are_not_finite_are_noticed(tmp_path, value):
    base = torch.ones(5, dtype=BF16)
    base[3] = value
    assert not sums(tmp_path, base, torch.ones(5, dtype=BF16)).finite


def test_threads_do_not_change_the_sums(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(5_000_001, generator=generator).bfloat16() for _ in range(2)]  # three chunks of four blocks
    found = []
    for cores in (1, 2, 3):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, cores=cores: set(range(cores)))
        found.append(sums(tmp_path / str(cores), *sides))
    assert found[0] == found[1] == found[2]
    assert found[0].gap == pytest.approx(float((sides[0].double() - sides[1].double()).abs().sum()), rel=1e-6)


def test_a_thread_that_cannot_start_is_the_error(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})  # three threads
    start = threading.Thread.start

    def start_all_but_one(thread):
        if thread.name == "graft-1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_all_but_one)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        run_threads(range(3), lambda: lambda chunk: None)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_bin_file_gives_the_same_sums(tmp_path, dtype):
    sides = [torch.randn(50, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (1, 2)]
    wanted = sums(tmp_path, *sides)
    for role, weight in zip(("base", "instruct"), sides, strict=True):
        (tmp_path / role / "model.safetensors").unlink()
        torch.save({"w": weight}, tmp_path / role / "pytorch_model.bin")
    pair = [Place(Checkpoint.open(tmp_path / role), "w") for role in ("base", "instruct")]
    assert measure_gap([("w", *pair)])["w"] == wanted
