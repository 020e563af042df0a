"""`shadow-trl sft|dpo|sft-dpo`: the recipe in this process, or in the processes that its launch options ask for.

The options are TRL's: a config of accelerate by file or by name, and those of `accelerate launch`, which does the work.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command
from accelerate.utils import is_deepspeed_available, patch_environment, prepare_simple_launcher_cmd_env
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from ..errors import ConfigError, ends_with
from .help import is_asked
from .launch_options import LAUNCHED, launch_parser, split_keys, split_words
from .options import Options, parse, take_flag, take_option
from .pipeline import main_sft_dpo
from .pipeline_options import read_plan
from .run import main_dpo, main_sft, prepare
from .yaml_files import read_yaml

_MAINS: dict[str, Callable[[Sequence[str]], int]] = {"sft": main_sft, "dpo": main_dpo, "sft-dpo": main_sft_dpo}

_ENGINES = "--multi_gpu, or --accelerate_config multi_gpu, fsdp2, zero2 or zero3"


def main(name: str, argv: Sequence[str]) -> int:
    """Run a recipe, here or in processes that are launched for it, and return the exit code.

    Args:
        name: "sft", "dpo" or "sft-dpo".
        argv: options of the recipe and of the launcher, in any order; the YAML file may have both too.

    Raises:
        ConfigError: options of either are not usable, or more processes are asked for than there would be; none was
            launched.
    """
    if LAUNCHED in os.environ or is_asked(argv):
        return _MAINS[name](argv)
    with ends_with("Nothing was written."):
        words, own = _read(argv)
        if words and "LOCAL_RANK" in os.environ:
            raise ConfigError(f"another launcher started this process already: leave {words[0]} out, or start without.")
        args = _checked(name, words, own) if words else None
    if args is None:
        return _MAINS[name](own)
    os.environ[LAUNCHED] = "1"
    if not _launches_several(args):
        # In the place of this process: signals reach the recipe, and its exit code is the command's.
        command, environment = prepare_simple_launcher_cmd_env(args)
        sys.stdout.flush()
        os.execvpe(command[0], command, environment)
    return _ended(lambda: launch_command(_parsed(name, words, own)))


def _read(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words for the launcher, those of the command line after those of the YAML file, and the others."""
    given, own = split_words(argv)
    config, _ = take_option("config", own)
    keys = split_keys(read_yaml(Path(config)), Path(config))[0] if config is not None else {}
    from_file = [word for key, words in keys.items() if f"--{key}" not in given for word in words]
    return [*from_file, *given], own


def _parsed(name: str, words: Sequence[str], own: Sequence[str]) -> argparse.Namespace:
    if "--accelerate_config" in words and "--config_file" in words:
        raise ConfigError("accelerate_config and config_file are the same; give one of them.")
    try:
        resolved = resolve_accelerate_config_argument(list(words))
    except ValueError as reason:
        raise ConfigError(str(reason)) from reason
    return launch_parser().parse_args([*resolved, "--module", "shadow_trl.cli", name, *own])


def _checked(name: str, words: Sequence[str], own: Sequence[str]) -> Any:
    """Return the options of the launcher with its defaults; they and those of the recipe are usable."""
    try:
        args, defaults, _ = _validate_launch_command(_parsed(name, words, own))
    except (ValueError, TypeError, KeyError, OSError, yaml.YAMLError) as reason:
        if isinstance(reason, ConfigError):
            raise
        raise ConfigError(f"accelerate launch rejects these options: {reason}") from reason
    if args.use_deepspeed and not is_deepspeed_available():
        raise ConfigError("DeepSpeed is not installed: pip install deepspeed.")
    cpu = bool(args.cpu or getattr(args, "use_cpu", False))
    # As the processes will find it.
    found = {LAUNCHED: "1", "ACCELERATE_MIXED_PRECISION": args.mixed_precision, "ACCELERATE_USE_CPU": cpu}
    with patch_environment(**found):
        options = _own_options(name, own)
        on_cpu = cpu or all(one.training.use_cpu for one in options)
        alone = "--num_processes" not in words and defaults is not None
        asked = 1 if alone and str(defaults.distributed_type).endswith(".NO") else args.num_processes
        # First: without accelerators no other option helps.
        _check_machines(args)
        _check_processes(args, asked=asked, on_cpu=on_cpu)
        for one in options:
            prepare(one)
    return args


def _own_options(name: str, own: Sequence[str]) -> list[Options]:
    """Read the options of the recipe, as each process will do again."""
    _, words = take_flag("json", own)
    plan = read_plan(words) if name == "sft-dpo" else None
    return [plan.options[stage] for stage in plan.stages] if plan is not None else [parse(name, words)]


def _launches_several(args: Any) -> bool:
    """Whether accelerate starts as many processes as it is told; else it starts one and does not say so."""
    engines = (args.use_deepspeed, args.use_fsdp, args.use_megatron_lm, args.multi_gpu, args.tpu)
    return (any(engines) and not args.cpu) or args.mpirun_hostfile is not None


def _check_machines(args: Any) -> None:
    machines, rank = args.num_machines or 1, args.machine_rank
    if machines == 1:
        return
    if args.num_processes % machines:
        raise ConfigError(f"num_processes is {args.num_processes}, that of all machines; {machines} do not divide it.")
    if rank is None or not 0 <= int(rank) < machines:
        raise ConfigError(
            f"machine_rank is {rank}; on each of the {machines} machines it is another of 0 to {machines - 1}."
        )
    if args.main_process_ip is None:
        raise ConfigError(f"{machines} machines need main_process_ip and main_process_port, those of machine 0.")


def _check_processes(args: Any, *, asked: int, on_cpu: bool) -> None:
    """Hold the processes that are asked for against those that would run, and against the accelerators here."""
    if args.num_processes < 1 and _launches_several(args):
        raise ConfigError(f"num_processes is {args.num_processes}; it must be at least 1.")
    if not _launches_several(args):
        if asked > 1:
            raise ConfigError(f"{asked} processes are asked for, and accelerate would start one. Add {_ENGINES}.")
        return
    here = args.num_processes // (args.num_machines or 1)
    found = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    named = [one for one in str(args.gpu_ids or "all").split(",") if one]
    usable = found if named == ["all"] else min(found, len(named))
    if here > usable and not on_cpu:
        # Without any, a config still asks for the processes that its file names.
        pass_fewer = f"Pass --num_processes {usable * (args.num_machines or 1)}"
        fewer = pass_fewer if usable else "Leave the launch options out"
        raise ConfigError(
            f"{here} processes are asked for on this machine, which has {usable} accelerators for them. {fewer}, or "
            "pass --use_cpu to train on the CPU."
        )


def _ended(launch: Callable[[], None]) -> int:
    """Return the exit code of launched processes: that of the first that failed, which has said why."""
    try:
        launch()
    except ChildFailedError as failed:
        code: int = failed.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    except SignalException as caught:
        return 128 + int(caught.sigval)
    except subprocess.CalledProcessError as failed:
        return failed.returncode if failed.returncode > 0 else 128 - failed.returncode
    return 0
