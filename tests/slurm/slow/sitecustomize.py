"""On the PYTHONPATH of a job: in its first PTFT_SLOW_STARTS starts an update takes a quarter of a second more."""

import importlib.abc
import os
import sys
import time
from importlib.machinery import PathFinder


class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        spec = PathFinder.find_spec(name, path, target) if name == "ptft_dist.training.schedule" else None
        if spec is not None:
            execute = spec.loader.exec_module

            def slowed(module):
                execute(module)
                real = module.lr_at
                module.lr_at = lambda *given: (time.sleep(0.25), real(*given))[1]

            spec.loader.exec_module = slowed
        return spec


if int(os.environ.get("SLURM_RESTART_COUNT", "0")) < int(os.environ.get("PTFT_SLOW_STARTS", "0")):
    sys.meta_path.insert(0, Slow())
