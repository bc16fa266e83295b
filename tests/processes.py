"""Running a script in several processes, as torchrun does, and what such a script begins and ends with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist


def launch(script: Path, processes: int, *arguments: str) -> None:
    """Run ``script`` to its end in so many processes; fail with the end of what they printed if one of them fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [*command, str(script), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def run(main: Callable[[], None]) -> None:
    """Run ``main`` in each process that `launch` has started.

    All wait for one another and leave without tearing the interpreter down: a thread of gloo that is still at work then
    aborts the process now and then ("terminate called without an active exception"), and torchrun stops the others.
    """
    dist.init_process_group("gloo")
    main()
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
