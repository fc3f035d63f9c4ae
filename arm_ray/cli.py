"""`arm-ray`: the command line. It parses, calls, and turns errors into exit codes.

Exit codes: 0 success, 1 an error that the message explains, 2 a wrong command line,
130 interrupted (run the same command again to go on).
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import arm_ray
from arm_ray.config import load_merge_config
from arm_ray.errors import ArmRayError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes overrides before an option only; take those after it as well.
    unknown = [text for text in rest if text.startswith("-") or "=" not in text]
    if unknown or not hasattr(options, "overrides"):
        parser.parse_args(arguments)
    options.overrides += rest
    # `ray job stop` and schedulers send SIGTERM: leave through the same clean-up as Ctrl-C.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return int(options.run(options))
    except ArmRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected 1 or more")
    return value


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="arm-ray", description="Merge a training run's checkpoints without training, on Ray."
    )
    parser.add_argument("--version", action="version", version=arm_ray.__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    merge = commands.add_parser(
        "merge", help="merge checkpoints, or go on with a merge", description=_merge.__doc__
    )
    merge.add_argument("config", metavar="CONFIG.yaml")
    merge.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="take precedence over the file"
    )
    merge.add_argument("--address", help="Ray cluster to join; default: RAY_ADDRESS, else local")
    merge.add_argument(
        "--stop-after",
        type=_positive,
        metavar="N",
        help="halt after iteration N; run again to go on",
    )
    merge.set_defaults(run=_merge)
    plan = commands.add_parser(
        "plan", help="memory, disk, work and time of a merge", description=_plan.__doc__
    )
    plan.add_argument("config", metavar="CONFIG.yaml")
    plan.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="take precedence over the file"
    )
    plan.add_argument("--gpus", type=_positive, metavar="N", help="GPUs in all; default: enough")
    plan.add_argument(
        "--gpu-memory", type=float, metavar="GB", help="of one GPU; default: the device's"
    )
    plan.add_argument("--nodes", type=_positive, default=1, metavar="M", help="default: 1")
    plan.add_argument(
        "--device",
        metavar="NAME",
        help="h100-80gb, a100-80gb, h200, cpu, or this-cpu (measured); "
        "default: h100-80gb with --gpus, else cpu",
    )
    plan.add_argument(
        "--tokens-per-sample",
        type=_positive,
        metavar="N",
        help="default: calibration.max_length, the most there can be",
    )
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=_plan)
    return parser


def _merge(options: argparse.Namespace) -> int:
    """Merge checkpoints as the YAML file says, or go on with the run in its output directory."""
    config = load_merge_config(options.config, options.overrides)
    # Heavy imports come after validation, so that a typing error is reported at once.
    from arm_ray.runtime.merge import merge

    merge(config, address=options.address, stop_after=options.stop_after)
    return 0


def _plan(options: argparse.Namespace) -> int:
    """Say what a merge will need, from its configuration and headers; starts and reads nothing.

    The exit code is 1 where it does not fit.
    """
    config = load_merge_config(options.config, options.overrides)
    from arm_ray.planning.cluster import make_cluster
    from arm_ray.planning.plan import make_plan
    from arm_ray.planning.render import render

    cluster = make_cluster(
        config.runtime,
        gpus=options.gpus,
        gpu_memory_gb=options.gpu_memory,
        nodes=options.nodes,
        device=options.device,
    )
    plan = make_plan(config, cluster, options.tokens_per_sample)
    print(json.dumps(plan.to_dict(), indent=2) if options.json else render(plan), end="")
    if options.json:
        print()
    return 0 if plan.fits else 1


if __name__ == "__main__":
    sys.exit(main())
