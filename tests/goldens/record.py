"""Record the goldens anew: small models of `transformers`, what they answer, and their gradients.

    python -m tests.goldens.record [NAME …]

needs torch and transformers (`make parity` installs both). A case becomes a folder beside this
file: a Hugging Face folder of a random model, and `case.safetensors` with inputs (`in/…`), outputs
(`out/…`) and the norm of every parameter's gradient (`gradient/…`, names as on disk).
"""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from tests.cases import CASES
from tests.cases.case import Case
from tests.parity import torch_side

HERE = Path(__file__).parent
SEED = 7


def record(case: Case) -> None:
    folder = HERE / case.name
    shutil.rmtree(folder, ignore_errors=True)
    model = torch_side.build(case, SEED)
    model.save_pretrained(folder)
    inputs = case.inputs(np.random.default_rng(SEED))
    outputs = torch_side.outputs(case, model, inputs)
    gradients = torch_side.gradients(outputs, model)
    arrays = {
        **{f"in/{name}": array for name, array in inputs.items()},
        **{f"out/{name}": value.detach().numpy() for name, value in outputs.items()},
        **{f"gradient/{name}": norm for name, norm in _norms(model, gradients).items()},
    }
    save_file({n: np.asarray(a, order="C") for n, a in arrays.items()}, folder / "case.safetensors")


def _norms(model: torch.nn.Module, gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Norms by the names on disk: the gradient is written as if it were weights."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(gradients[name]) if name in gradients else 0 * parameter)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        written = load_file(Path(folder) / "model.safetensors")
    buffers = {name for name, _ in model.named_buffers()}
    return {
        name: np.linalg.norm(array).astype(np.float32)
        for name, array in written.items()
        if name not in buffers
    }


if __name__ == "__main__":
    wanted = sys.argv[1:] or [case.name for case in CASES if case.recorded]
    for case in CASES:
        if case.name in wanted:
            record(case)
            size = sum(file.stat().st_size for file in (HERE / case.name).iterdir())
            print(f"{case.name}: {size / 1024:.0f} KiB")
