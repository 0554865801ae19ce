"""What comparisons measured, kept for the documents."""

import json
import os
from pathlib import Path


def keep(case: str, against: str, **differences: float) -> None:
    """Keep the worst that tests saw of a case: `keep("clip", against="CLIPModel", outputs=3e-7)`.

    Only where MMJAX_PARITY_RECORDS names a folder; `python docs/build.py --parity=FOLDER` reads it.
    """
    if not (folder := os.environ.get("MMJAX_PARITY_RECORDS")):
        return
    path = Path(folder) / f"{case}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    worst = {name: max(float(x), kept.get(name, 0.0)) for name, x in differences.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**kept, "against": against, **worst}, indent=1) + "\n")
