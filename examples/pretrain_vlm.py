"""Train a vision-language model: one script for a laptop's CPU and for many GPUs.

Examples:
    deepspeed --num_accelerators 2 examples/pretrain_vlm.py --config RUN.yaml
    torchrun --nproc-per-node 4 examples/pretrain_vlm.py --config RUN.yaml parallel.tensor=2
    python examples/pretrain_vlm.py --config RUN.yaml train.steps=100

SIGTERM and SIGUSR1 to any rank make all of them save and stop before the next step. Exit code: 0
finished, 85 saved and to be started again, 2 wrong settings, 3 another launch has taken the output
folder over, 70 a hang, 1 other errors.
"""

import argparse
import os
import sys
import time

from ghostvis_mega.checkpoint.lock import in_use
from ghostvis_mega.train.preflight import load_checked
from ghostvis_mega.train.signals import EXIT_REQUEUE, StopRequest
from ghostvis_mega.utils.errors import ConfigError, FolderTakenError, GhostVisError
from ghostvis_mega.utils.imports import many_imports
from ghostvis_mega.utils.logging import setup_logging
from ghostvis_mega.utils.secrets import hide

EXIT_FOLDER_TAKEN = 3
"""Exit code of a run that stops because a later launch saves in its folder. Not to be started
again: it would take the folder back."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", help="section.key=value, stronger than the file")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    # From here on, also while torch is imported, a request to stop is kept for the first step.
    stop = StopRequest.on_signals()
    setup_logging(rank=int(os.environ.get("RANK", "0")))
    started = float(os.environ.get("GHOSTVIS_DEMO_STARTED", time.time()))
    try:
        # Settings are checked before torch is even imported: a wrong one is reported in seconds.
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        run = load_checked(arguments.config, arguments.overrides, world_size=world_size)
        if problem := in_use(run.log.output):
            raise ConfigError([problem])
        with many_imports():
            from ghostvis_mega.session import Training, local_device, open_world

        with open_world(run, device=local_device(run)) as world:
            Training(run, world, started=started, stop=stop).execute()
    except ConfigError as error:
        # All ranks of a node find the same problems; one report is enough.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(hide(str(error)), file=sys.stderr)
        return 2
    except GhostVisError as error:
        print(f"rank {os.environ.get('RANK', '0')}: {hide(str(error))}", file=sys.stderr)
        return EXIT_FOLDER_TAKEN if isinstance(error, FolderTakenError) else 1
    return EXIT_REQUEUE if stop.agreed else 0


if __name__ == "__main__":
    sys.exit(main())
