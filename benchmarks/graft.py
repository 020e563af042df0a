"""Time and memory of a graft beside other ways to the same result, whole processes, interleaved.

    python benchmarks/graft.py                                     # a small family, some seconds
    python benchmarks/graft.py --size 2.5GB --rounds 3             # the family of docs/benchmarks.md
    python benchmarks/graft.py --size 2.5GB --mergekit-python ../mergekit/bin/python

Makes three bf16 checkpoints of Llama shape (BASE, INSTRUCT, TUNED; tied, three shards), runs every contestant in a
process of its own, in turn, deletes what it wrote and pauses before the next: freed pages make the next write look
four times faster. Prints medians, ratios and the peak of resident memory as a Markdown table. A graft ends with its
result on the disk; apply_diff and mergekit leave theirs in the page cache, so `+ fsync` stands beside the first.
`write 1, O_DIRECT` and `import torch` are what no tool that writes a result and uses torch can go below together.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve()
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
FULL = {"bytes": 2.472e9, "hidden": 2048, "rows": 128256}


@dataclass
class Contestant:
    """One way to do the work: its name, its command, and the seconds and bytes of each run.

    `needs` is a folder that the command reads, and the command that makes it once.
    """

    name: str
    command: list[str]
    needs: tuple[Path, list[str]] | None = None
    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def run(self, output: Path, pause: float) -> None:
        """Delete the last output, wait, run once."""
        shutil.rmtree(output, ignore_errors=True)
        output.unlink(missing_ok=True)
        time.sleep(pause)
        with tempfile.TemporaryFile() as log:
            start = time.perf_counter()
            process = subprocess.Popen(self.command, stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
            self.seconds.append(time.perf_counter() - start)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                log.seek(0)
                raise SystemExit(f"{self.name} failed:\n{log.read().decode(errors='replace')[-3000:]}")
        self.memory.append(usage.ru_maxrss * 1024)


def main() -> None:
    """Make the family, run the contestants, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="50MB", help="bytes of one checkpoint (default 50MB)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contestant (default 3)")
    parser.add_argument("--pause", type=float, default=4.0, help="seconds before each run (default 4)")
    parser.add_argument(
        "--folder", type=Path, help="where the family lies or goes; kept when given (default: temporary)"
    )
    parser.add_argument("--mergekit-python", help="python of an environment with mergekit")
    parser.add_argument("--only", nargs="+", help="names of contestants to run")
    parser.add_argument("--cold", action="store_true", help="drop the page cache before each run (needs root)")
    parser.add_argument("--work", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        WORK[options.work[0]](Path(options.work[1]))
        return
    folder = options.folder or Path(tempfile.mkdtemp(prefix="graft-benchmark-"))
    try:
        _family(folder, options.size)
        contestants = chosen(_contestants(folder, options.mergekit_python), options.only)
        for folder_needed, command in filter(None, (contestant.needs for contestant in contestants)):
            if not folder_needed.exists():
                subprocess.run(command, check=True)
        for number in range(options.rounds):
            for contestant in contestants:
                if options.cold:
                    os.sync()
                    Path("/proc/sys/vm/drop_caches").write_text("3")
                else:
                    _warm(folder)
                contestant.run(folder / "output", options.pause)
                print(f"round {number + 1}  {contestant.name:32} {contestant.seconds[-1]:7.2f} s", file=sys.stderr)
        _print(contestants, options)
    finally:
        shutil.rmtree(folder / "output", ignore_errors=True)
        (folder / "output").unlink(missing_ok=True)
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


def chosen(contestants: list[Contestant], names: list[str] | None) -> list[Contestant]:
    """Return the contestants of these names, all when there are none; SystemExit names those that nobody has."""
    known = [contestant.name for contestant in contestants]
    if unknown := sorted(set(names or ()) - set(known)):
        raise SystemExit(f"--only: no contestant is called {unknown}. There are {known}.")
    return [contestant for contestant in contestants if not names or contestant.name in names]


def _contestants(folder: Path, mergekit: str | None) -> list[Contestant]:
    python = [sys.executable]
    cli = [*python, "-m", "shadow_trl.cli"]
    sides = [f"--{role}={folder / role}" for role in ("base", "instruct", "tuned")]
    graft = [*cli, "graft", *sides, "--output", str(folder / "output"), "--quiet"]
    worker = [*python, str(HERE), "--work"]
    read = " ".join(shlex.quote(str(folder / role)) + "/*.safetensors" for role in ("base", "instruct", "tuned"))
    sync = f"sync {shlex.quote(str(folder / 'output'))}/*"
    one = f"cp -r {shlex.quote(str(folder / 'instruct'))} {shlex.quote(str(folder / 'output'))} && {sync}"
    copy = f"cat {read} > /dev/null && {one}"
    two = " ".join(shlex.quote(str(folder / role)) + "/*.safetensors" for role in ("base", "instruct"))
    grafted, delta = folder / "grafted", folder / "delta"
    make_graft = [*cli, "graft", *sides, f"--output={grafted}", "--quiet"]
    make_delta = [*cli, "delta", sides[0], sides[2], f"--output={delta}", "--quiet"]
    apply_delta = [*cli, "graft", f"--delta={delta}", sides[1], f"--output={folder / 'output'}", "--quiet"]
    direct = f"dd if=/dev/zero of={shlex.quote(str(folder / 'output'))} bs=4M oflag=direct conv=fsync"
    size = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
    found = [
        Contestant("graft, bare", [*graft, "--digest", "none", "--stats", "off"]),
        Contestant("graft, stats", [*graft, "--digest", "none"]),
        Contestant("graft, defaults", graft),
        Contestant("apply_diff", [*worker, "apply_diff", str(folder)]),
        Contestant("apply_diff + fsync", ["sh", "-c", f"{shlex.join([*worker, 'apply_diff', str(folder)])} && {sync}"]),
        Contestant("read 3 + copy 1 + fsync", ["sh", "-c", copy]),
        Contestant("copy 1 + fsync", ["sh", "-c", one]),
        Contestant("write 1, O_DIRECT + fsync", ["sh", "-c", f"{direct} count={-(-size // 2**22)}"]),
        Contestant("gap", [*cli, "gap", *sides[:2], "--quiet"]),
        Contestant("read 2", ["sh", "-c", f"cat {two} > /dev/null"]),
        Contestant("import torch", [*python, "-c", "import torch"]),
        Contestant("delta", [*make_delta[:-2], f"--output={folder / 'output'}", "--quiet"]),
        Contestant("graft --delta", apply_delta, (delta, make_delta)),
        Contestant("verify", [*cli, "verify", str(grafted), *sides, "--quiet"], (grafted, make_graft)),
    ]
    if mergekit:
        recipe = {
            "merge_method": "task_arithmetic",
            "base_model": str(folder / "base"),
            "models": [
                {"model": str(folder / "instruct"), "parameters": {"weight": 1.0}},
                {"model": str(folder / "tuned"), "parameters": {"weight": 1.0}},
            ],
            "dtype": "bfloat16",
        }
        (folder / "mergekit.yaml").write_text(json.dumps(recipe))
        program = str(Path(mergekit).parent / "mergekit-yaml")
        found.insert(5, Contestant("mergekit", [program, str(folder / "mergekit.yaml"), str(folder / "output")]))
    return found


def _print(contestants: list[Contestant], options: argparse.Namespace) -> None:
    by_name = {contestant.name: statistics.median(contestant.seconds) for contestant in contestants}
    print(f"`python benchmarks/graft.py {shlex.join(_shown())}`\n")
    print("| what | median s | all s | peak RSS MiB | / apply_diff | / mergekit | / read 3 + copy 1 | / read 2 |")
    print("|---|---|---|---|---|---|---|---|")
    for contestant in contestants:
        median = by_name[contestant.name]
        rivals = ("apply_diff", "mergekit", "read 3 + copy 1 + fsync", "read 2")
        ratios = [f"{median / by_name[rival]:.2f}" if rival in by_name else "" for rival in rivals]
        runs = " ".join(f"{value:.2f}" for value in contestant.seconds)
        peak = max(contestant.memory) / 2**20
        print(f"| {contestant.name} | {median:.2f} | {runs} | {peak:.0f} | {' | '.join(ratios)} |")


def _shown() -> list[str]:
    # The command without the machine's paths.
    arguments, shown = iter(sys.argv[1:]), []
    for argument in arguments:
        if argument in ("--folder", "--mergekit-python"):
            next(arguments, None)
        else:
            shown.append(argument)
    return shown


def _family(folder: Path, size: str) -> None:
    wanted = next(float(size[: -len(unit)]) * factor for unit, factor in UNITS.items() if size.upper().endswith(unit))
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / "size"
    if stamp.is_file() and stamp.read_text() == str(wanted):
        return
    stamp.write_text(str(wanted))
    subprocess.run([sys.executable, str(HERE), "--work", "family", str(folder)], check=True)


def _warm(folder: Path) -> None:
    for role in ("base", "instruct", "tuned"):
        for path in (folder / role).glob("*.safetensors"):
            with open(path, "rb") as file:
                while file.read(2**24):
                    pass


def _make_family(folder: Path) -> None:
    """Write three checkpoints of about the size in `folder/size`, with real names and shapes and random weights."""
    import torch
    from safetensors.torch import save_file

    ratio = math.sqrt(float((folder / "size").read_text()) / FULL["bytes"])
    hidden = max(256, round(FULL["hidden"] * ratio / 256) * 256)
    rows = max(256, round(FULL["rows"] * ratio / 64) * 64)
    shapes = {"model.embed_tokens.weight": (rows, hidden)}
    for layer in range(16):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{side}_proj.weight": (hidden, hidden) for side in "qo"}
        shapes |= {f"{name}.self_attn.{side}_proj.weight": (hidden // 4, hidden) for side in "kv"}
        shapes |= {f"{name}.mlp.{side}_proj.weight": (4 * hidden, hidden) for side in ("gate", "up")}
        shapes |= {f"{name}.mlp.down_proj.weight": (hidden, 4 * hidden)}
        shapes |= {f"{name}.{side}_layernorm.weight": (hidden,) for side in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "vocab_size": rows,
        "intermediate_size": 4 * hidden, "num_hidden_layers": 16, "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256, "head_dim": 64, "tie_word_embeddings": True, "dtype": "bfloat16",
    }  # fmt: skip
    names = list(shapes)
    shards = [names[:60], names[60:110], names[110:]]
    files = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...], std: float) -> torch.Tensor:
        return torch.empty(shape).normal_(0, std, generator=generator)

    for role in ("base", "instruct", "tuned"):
        (folder / role).mkdir(exist_ok=True)
        (folder / role / "config.json").write_text(json.dumps(config, indent=2))
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {
            "metadata": {"total_size": sum(2 * math.prod(shape) for shape in shapes.values())},
            "weight_map": weight_map,
        }
        (folder / role / "model.safetensors.index.json").write_text(json.dumps(index))
    for file, shard in zip(files, shards, strict=True):
        tensors: dict[str, dict[str, torch.Tensor]] = {"base": {}, "instruct": {}, "tuned": {}}
        for name in shard:
            base = random(shapes[name], 0.02)
            tensors["base"][name] = base.bfloat16()
            tensors["instruct"][name] = (base + random(shapes[name], 1e-3)).bfloat16()
            tensors["tuned"][name] = (base + random(shapes[name], 3e-4)).bfloat16()
        for role, found in tensors.items():
            save_file(found, folder / role / file, metadata={"format": "pt"})


def _apply_diff(folder: Path) -> None:
    """Do what the official apply_diff.py does: three models in memory, bf16 differences of the linear layers, saved."""
    import torch
    from transformers import AutoModelForCausalLM

    def load(role: str) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder / role, dtype=torch.bfloat16)

    base, tuned, instruct = load("base").state_dict(), load("tuned").state_dict(), load("instruct")
    linear = tuple(f"{side}_proj" for side in ("q", "k", "v", "o", "gate", "up", "down"))
    with torch.no_grad():
        for name, weight in instruct.state_dict().items():
            if any(side in name for side in linear):
                weight.copy_(weight + (tuned[name] - base[name]))
    instruct.save_pretrained(folder / "output")


WORK = {"family": _make_family, "apply_diff": _apply_diff}

if __name__ == "__main__":
    main()
