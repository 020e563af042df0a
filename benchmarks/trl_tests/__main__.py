"""TRL's own tests of SFT and DPO, run on the Shadow trainers: what passes with TRL's passes, or is listed as refused.

    python benchmarks/trl_tests --checkout ~/trl                      # of the release that is installed; 20 minutes
    python benchmarks/trl_tests --checkout ~/trl --only test_train    # those with this in their name, as pytest -k

The tests are those of the checkout, unchanged. In the process that runs them `trl.SFTTrainer`, `SFTConfig`,
`DPOTrainer` and `DPOConfig` are ours, with an INSTRUCT beside each model; the models and data sets of the hub are small
ones made on the spot. A test that fails and is not in `refusals.json` is run once more, with TRL's own trainer on the
same models: where that fails too, there is nothing to compare. Exit code 1 if a test fails with ours alone, or if one
that is listed passes or fails with another error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path += [str(HERE), str(ROOT / "tests" / "support")]

from verdicts import Outcome, Refusal, verdicts  # noqa: E402

FILES = ("tests/test_sft_trainer.py", "tests/test_dpo_trainer.py")


def main() -> int:
    """Run the tests and print what became of each that did not pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", metavar="DIR", type=Path, required=True, help="of TRL")
    parser.add_argument("--files", metavar="FILE", nargs="+", default=FILES, help="tests in it (default: SFT and DPO)")
    parser.add_argument("--only", metavar="EXPRESSION", help="tests to run, as pytest's -k")
    parser.add_argument("--refusals", metavar="FILE", type=Path, default=HERE / "refusals.json", help="what may fail")
    options = parser.parse_args()
    files = [name for name in options.files if (options.checkout / name).is_file()]
    if not files:
        parser.error(f"{options.checkout} has none of {', '.join(options.files)}")
    refusals = {test: Refusal(**one) for test, one in json.loads(options.refusals.read_text()).items()}
    with tempfile.TemporaryDirectory(prefix="trl-tests-") as folder:
        work = Path(folder)
        _make_stand_ins(work, [options.checkout / name for name in files])
        ours = run("shadow", work, options.checkout, files, only=options.only)
        failed = [test for test, outcome in ours.items() if outcome.failed and test not in refusals]
        theirs = run("trl", work, options.checkout, failed) if failed else {}
    found = verdicts(ours, theirs, refusals)
    print(found.text(trl=version("trl"), checkout=str(options.checkout)))
    return found.exit_code


def _make_stand_ins(work: Path, files: Sequence[Path]) -> None:
    from stand_in_data import write_data
    from stand_in_models import fill_cache

    write_data(work / "data")
    lacking = fill_cache(work / "hub", work / "made", "".join(path.read_text(encoding="utf-8") for path in files))
    for name, reason in lacking.items():
        print(f"no stand-in for {name}: {reason}", file=sys.stderr)


def run(
    trainers: str, work: Path, checkout: Path, words: Sequence[str], *, only: str | None = None
) -> Mapping[str, Outcome]:
    """Run tests of the checkout with the trainers of `shadow` or `trl`, and return what became of each."""
    report = work / f"{trainers}.json"
    paths = [str(HERE), str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path), "TRL_TESTS_OF": trainers,
        "TRL_TESTS_REPORT": str(report), "TRL_TESTS_DATA": str(work / "data"), "HF_HUB_CACHE": str(work / "hub"),
        "HF_DATASETS_CACHE": str(work / "datasets"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-p", "trl_tests_plugin", "-p", "no:cacheprovider", "-q", "--tb=no"]
    command += ["--basetemp", str(work / f"{trainers}-tmp"), *(["-k", only] if only else []), *words]
    subprocess.run(command, cwd=checkout, env=environment, stdout=sys.stderr, check=False)
    if not report.exists():
        raise SystemExit(f"pytest wrote no report of the tests in {checkout}")
    return {test: Outcome(**one) for test, one in json.loads(report.read_text()).items()}


if __name__ == "__main__":
    sys.exit(main())
