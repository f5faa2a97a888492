"""The process that makes one run of a comparison: `python -m bitquest.evaluation.compare_worker RUN_DIR < config.toml`.

It stops, saved, on SIGTERM or SIGINT, and when the process that started it is gone. Exit code 0 whether the run is
finished, stopped or has diverged, which its directory tells; 1, with a message on stderr, if it could not be made.
"""

import os
import sys
import tomllib
from pathlib import Path

from bitquest.evaluation.compare_runs import make_run
from bitquest.training.config import TrainConfig
from bitquest.training.interrupt import stop_on_signals


def main() -> int:
    """Make the run. The configuration is on stdin, so that nothing has to be written before the run begins."""
    config = TrainConfig.from_dict(tomllib.loads(sys.stdin.read()))
    parent = os.getppid()
    with stop_on_signals() as stop:
        try:
            make_run(config, Path(sys.argv[1]), should_stop=lambda: stop() or os.getppid() != parent)
        except ValueError as error:
            sys.stderr.write(f"error: {error}\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
