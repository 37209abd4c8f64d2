"""On the PYTHONPATH of a job: in its first PTFT_SLOW_STARTS starts an update takes a quarter of a second more."""

import importlib.abc
import os
import sys
import time
from importlib.machinery import PathFinder

TRAINER = "ptft_dist.training.trainer"


class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        spec = PathFinder.find_spec(name, path, target) if name == TRAINER else None
        if spec is not None:
            execute = spec.loader.exec_module

            def slowed(module):
                execute(module)
                slow_down(module)

            spec.loader.exec_module = slowed
        return spec


def slow_down(trainer):
    real = trainer.lr_at
    trainer.lr_at = lambda *given: (time.sleep(0.25), real(*given))[1]


if int(os.environ.get("SLURM_RESTART_COUNT", "0")) < int(os.environ.get("PTFT_SLOW_STARTS", "0")):
    if TRAINER in sys.modules:  # forked from a process that has imported it
        slow_down(sys.modules[TRAINER])
    else:
        sys.meta_path.insert(0, Slow())
