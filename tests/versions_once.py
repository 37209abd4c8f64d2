"""Imported first by the server that forks the tests' processes: each package's version is read once.

It is read from a file with the package's whole description, and a start asks for a dozen versions.
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata

gc.disable()  # nothing of the imports that follow is garbage; preloaded.py enables it again

importlib.metadata.version = functools.cache(importlib.metadata.version)
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)
