"""Live comparisons need what `make parity` installs; without it nothing is collected here."""

import importlib.util

if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
    collect_ignore_glob = ["test_*.py"]
