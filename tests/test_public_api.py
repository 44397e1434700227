"""What users may rely on, pinned; a change here is a change for them."""

import subprocess
import sys

import tc_deploy


def test_public_names() -> None:
    assert tc_deploy.__all__ == ["Pipeline", "Result", "Step", "__version__", "load"]
    assert dir(tc_deploy) == sorted(tc_deploy.__all__)


def test_load_is_the_runtime_s() -> None:
    from tc_deploy.runtime.pipeline import load

    assert tc_deploy.load is load


def test_import_is_light() -> None:
    heavy = ("diffusers", "numpy", "onnxruntime", "tc_deploy.runtime", "torch")
    program = f"import sys, tc_deploy; sys.exit(', '.join(set({heavy}) & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", program], check=True)
