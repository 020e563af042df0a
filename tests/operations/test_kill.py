"""kill -9 at every step on the disk, with overwrite: a whole result, old or new, after the next run's clean-up."""

from __future__ import annotations

import functools

import pytest
from families import family
from kills import killed_at_every_step

from shadow_trl import extract_delta, graft
from shadow_trl.checkpoints.manifest import read_manifest
from shadow_trl.results.folder import recover


def write_delta(*, base, instruct, tuned, **options):
    extract_delta(base=base, tuned=tuned, **options)


@pytest.mark.parametrize(
    ("work", "kind", "file", "other"),
    [
        pytest.param(graft, "graft", "model.safetensors", {"scale": 0.5}, id="graft"),
        pytest.param(
            *(write_delta, "delta", "delta.safetensors", {"dtype": "float16"}), id="delta", marks=pytest.mark.slow
        ),
    ],
)
def test_kill_leaves_nothing_or_everything(tmp_path, work, kind, file, other):
    work = functools.partial(work, **family(tmp_path / "models"), progress=False)
    old = functools.partial(work, output=tmp_path / "out", overwrite=True, **other)
    new = functools.partial(work, output=tmp_path / "out", overwrite=True)
    old()
    work(output=tmp_path / "new")
    results = [(tmp_path / name / file).read_bytes() for name in ("out", "new")]
    found = []
    for _ in killed_at_every_step(new, tmp_path / "out"):
        recover(tmp_path / "out")
        found.append(results.index((tmp_path / "out" / file).read_bytes()))
        assert read_manifest(tmp_path / "out")["kind"] == kind
        assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "new", "out"]
        if found[-1] == 1:
            old()
    assert len(found) > 10
    assert set(found) == {0, 1}  # the last steps only remove the old result
    assert found == sorted(found)
