"""Faults of a node, put into every Python that Slurm starts there: the node's TaskProlog puts this folder on its path.

LONGHAUL_TEST_FAULT is one of: full_disk; crash (before the first step); hang:STEP; slow:SECONDS (every step).
"""

import importlib.abc
import importlib.machinery
import os
import shutil
import sys
import time

KIND, _, VALUE = os.environ.get("LONGHAUL_TEST_FAULT", "").partition(":")


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls `change` with the module `name` once it has been imported."""

    def __init__(self, name, change):
        self.name, self.change = name, change

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.change(module)

        spec.loader.exec_module = exec_module
        return spec


def at_every_step(action):
    def change(module):
        original = module.Engine.train_step

        def train_step(self, batches, *, step, **options):
            action(step)
            return original(self, batches, step=step, **options)

        module.Engine.train_step = train_step

    sys.meta_path.insert(0, AfterImport("train.engine.engine", change))


def fail(step):
    raise RuntimeError("the device fell off the bus")


def hang(step):
    if step == int(VALUE):
        time.sleep(3600)


if KIND == "full_disk":
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 10**9, 0)
elif KIND == "crash":
    at_every_step(fail)
elif KIND == "hang":
    at_every_step(hang)
elif KIND == "slow":
    at_every_step(lambda step: time.sleep(float(VALUE)))
