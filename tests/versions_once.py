"""Imported by the server that forks the tests' processes: each package's version is read once.

It is read from a file with the package's whole description, and a start asks for a dozen versions.
"""

from __future__ import annotations

import functools
import importlib.metadata

importlib.metadata.version = functools.cache(importlib.metadata.version)
