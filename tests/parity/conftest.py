"""Live comparisons need what `make parity` installs."""

import pytest

pytest.importorskip("torch", reason="live parity needs torch: make parity installs it")
pytest.importorskip("transformers", reason="live parity needs transformers: make parity")
