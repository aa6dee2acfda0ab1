"""One process of a team that trains, with a folder of its own; ``test_ddp.py`` starts several.

``python tests/train_in_processes.py CACHE RUN CONFIG [FAULT]`` resumes RUN where there is something to resume, and prints a
checksum of the weights that this process ends with. FAULT is where process 1 (``fetch``) or the main one (``begin``) raises
an error of the machine's, before which it prints the time.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from tiny import SILENT

from data_cache.reader import CacheStore
from liverseg.training import train as trainer
from liverseg.training.checkpoint import content_checksum
from liverseg.training.config import load_config
from liverseg.training.stream import Volumes


def fail(*_: Any, **__: Any) -> Any:
    print(f"failed at {time.time()}", flush=True)
    raise OSError("the disk is gone")


def main(cache: str, run: str, config: str, fault: str = "") -> None:
    if (fault, os.environ["RANK"]) == ("fetch", "1"):
        Volumes.fetch = fail  # type: ignore[method-assign]
    if fault == "begin":
        trainer._beginning = fail
    settings, store = load_config(Path(config)), CacheStore.open(Path(cache))
    state = trainer.train(store, Path(run), settings, resume=True, watcher=SILENT)
    print(f"weights {content_checksum(state.network.state_dict())}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
