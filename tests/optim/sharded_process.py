"""What a script of several processes begins and ends with."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch.distributed as dist


def run(main: Callable[[], None]) -> None:
    """Run ``main`` in each process that torchrun has started.

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
