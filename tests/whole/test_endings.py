"""An error ends with what is on the disk now, said once by the block that knows it."""

from __future__ import annotations

import pytest
from families import family

from shadow_trl import extract_delta, gap, graft, verify
from shadow_trl.errors import ConfigError, GraftError, InputError, ShadowError, ends_with
from shadow_trl.operations.doctor import doctor


def test_the_innermost_block_is_believed_unless_an_outer_one_knows_more():
    with pytest.raises(ConfigError) as found, ends_with("outer."), ends_with(lambda: "inner."):
        raise ConfigError("no.")
    assert str(found.value) == "no. inner."
    with pytest.raises(GraftError) as replaced, ends_with("TUNED is saved.", instead=True), ends_with("inner."):
        raise GraftError("no.")
    assert str(replaced.value) == "no. TUNED is saved."
    with pytest.raises(KeyError) as other, ends_with("inner."):
        raise KeyError("x")
    assert "inner" not in str(other.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("2 keys are unknown:\n  a\n  b", "2 keys are unknown:\n  a\n  b\nNothing was written."),
        ("invalid choice: 'x'", "invalid choice: 'x'. Nothing was written."),
        ("no.\n  a\nGive b.", "no.\n  a\nGive b. Nothing was written."),
    ],
)
def test_the_ending_is_a_sentence_of_its_own(text, shown):
    with pytest.raises(ConfigError) as found, ends_with("Nothing was written."):
        raise ConfigError(text)
    assert str(found.value) == shown


def test_without_a_block_nothing_is_claimed():
    assert str(InputError("no.")) == "no."


@pytest.mark.parametrize("operation", ["graft", "gap", "extract_delta", "verify", "doctor"])
def test_bad_input_of_what_writes_says_that_nothing_was_written(tmp_path, operation):
    sides, lost, out = family(tmp_path), tmp_path / "lost", tmp_path / "out"
    calls = {
        "graft": lambda: graft(**{**sides, "tuned": lost}, output=out, progress=False),
        "gap": lambda: gap(sides["base"], lost, progress=False),
        "extract_delta": lambda: extract_delta(base=sides["base"], tuned=lost, output=out, progress=False),
        "verify": lambda: verify(lost, progress=False),
        "doctor": lambda: doctor(sides["base"], lost, progress=False),
    }
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ShadowError) as found:
        calls[operation]()
    writes = operation in ("graft", "extract_delta")
    assert str(found.value).endswith("Nothing was written.") == writes
    assert str(found.value).count("written") == writes
    assert sorted(tmp_path.rglob("*")) == before
