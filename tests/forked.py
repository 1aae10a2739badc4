"""``train_net.py`` in a process that is forked, as are those that it starts: nothing is imported again."""

from __future__ import annotations

import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.multiprocessing as mp
from detectron2.engine import defaults
from detectron2.utils.logger import setup_logger

from era.engine import launch


def fork_train_net(args: Sequence, log: Path, prepare: Callable[[], None]) -> int:
    """Start it; both its streams are appended to a file.

    Args:
        prepare: called in that process before the run.

    Returns:
        Its id, for the caller to wait for.
    """
    pid = os.fork()
    if pid > 0:
        return pid
    status = 70
    try:
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        forget_loggers()
        torch.set_num_threads(1)
        mp.start_processes = functools.partial(mp.start_processes, start_method="fork")
        defaults.collect_env_info = lambda: "not of interest here"  # it starts programs
        prepare()
        launch.run_main(lambda: launch.train_net([str(arg) for arg in args]))
    except SystemExit as e:
        status = e.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def forget_loggers() -> None:
    """Nothing is written to the streams of tests that ran before in this process, which are closed."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for logger in loggers:
        if isinstance(logger, logging.Logger):
            logger.handlers.clear()
    setup_logger.cache_clear()
