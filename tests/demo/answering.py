"""A worker whose commands are small: each writes, waits or ends as its arguments say. Started by test_stages.py."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from megatron_gil.demo.stages import serve
from megatron_gil.training.run.signals import EXIT_STOPPED, StopSignal


def main(arguments: list[str], stop: StopSignal) -> int:
    act, product = arguments[0], Path(arguments[1])
    print(f"{act} {product.name}", flush=True)
    if act == "fail":
        return 3
    if act == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "wait":
        product.with_suffix(".began").touch()
        while not stop.wanted:
            time.sleep(0.01)
        product.with_suffix(".saved").touch()
        return EXIT_STOPPED
    product.write_text(f"{os.getpid()} {time.monotonic()}")
    return 0


if __name__ == "__main__":
    sys.exit(serve(main))
