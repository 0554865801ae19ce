"""Measured differences, gathered from the tests into one file (`python docs/build.py` reads it)."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="live parity needs torch: make parity installs it")
pytest.importorskip("transformers", reason="live parity needs transformers: make parity")


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`measured(case, kind, outputs=…)`: keeps the worst of what the tests saw of a case."""

    def record(case: str, **figures: float | str) -> None:
        if not (folder := os.environ.get("MMJAX_PARITY_RECORDS")):
            return
        path = Path(folder) / f"{case}.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        for name, value in figures.items():
            kept[name] = value if isinstance(value, str) else max(value, kept.get(name, 0.0))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")

    return record
