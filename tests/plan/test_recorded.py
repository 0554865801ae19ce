"""The page of recorded plans says what the recorded plans say."""

import importlib.util
import json
from pathlib import Path

BUILD = Path(__file__).resolve().parents[2] / "docs" / "plans" / "build.py"


def script():
    spec = importlib.util.spec_from_file_location("plans_build", BUILD)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date():
    module = script()
    assert module.PAGE.read_text() == module.page(), "run python docs/plans/build.py --page"


def test_every_recorded_plan_is_on_the_page():
    module = script()
    recorded = {path.stem for path in BUILD.parent.glob("*.json")}
    assert {plan.name for plan in module.PODS} <= recorded <= {plan.name for plan in module.ALL}
    assert all((BUILD.parent / f"{name}.txt").exists() for name in recorded)


def test_a_row():
    plan = {
        "topology": "v5e:16x16",
        "chips": 256,
        "batch_size": 32_768,
        "hbm_bytes": {"peak": 6 * 2**30, "limit": 15.75 * 2**30},
        "cycles": {"estimate": 480_000_000, "floor": 275_400_000},
        "mfu": {"low": 0.281, "high": 0.489},
        "fits": True,
    }
    module = script()
    planned = module.PODS[0]
    assert module.pod_row(planned, json.loads(json.dumps(plan))) == (
        "| siglip_b16 | v5e:16x16 | 256 | 32,768 | 6.0 of 15.8 | 275 - 480 | 0.28 - 0.49 "
        "| [siglip_b16_v5e_16x16.txt](siglip_b16_v5e_16x16.txt) |\n"
    )
    assert "does not fit" in module.pod_row(planned, plan | {"fits": False})
