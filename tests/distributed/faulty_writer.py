"""``python -m distributed.faulty_writer <arguments of megatron_syne.train>``: training whose background writer is
slow at the checkpoint of ``SLOW_STEP`` and is killed, with its process, half-way through that of ``KILL_STEP``."""

from __future__ import annotations

import os
import signal
import sys
import time


def main() -> int:
    from megatron_syne.errors import run_cli
    from megatron_syne.platform.base import select

    select("cpu")
    from megatron_syne import train
    from megatron_syne.checkpoint import pending

    write = pending.write_bucket

    def faulty(bucket, transforms, stop):
        path, name, (blobs, tensors) = bucket
        if f"iter_{int(os.environ['SLOW_STEP']):07d}" in path:
            time.sleep(1.5)
        if f"iter_{int(os.environ['KILL_STEP']):07d}" in path:
            write((path, name, (blobs, tensors[: len(tensors) // 2])), transforms, stop)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(bucket, transforms, stop)

    pending.write_bucket = faulty
    return run_cli(train.main)


if __name__ == "__main__":
    sys.exit(main())
