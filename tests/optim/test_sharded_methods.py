"""Options that the laws of sharded training leave at their defaults, in three processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_methods_on_sharded_matrices_give_what_they_give_on_whole_ones():
    script = Path(__file__).with_name("sharded_methods_run.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", str(script)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
