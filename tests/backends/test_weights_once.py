"""One copy of the weights for all graphs of a bundle in resident memory, with the numbers of a copy for each."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from bundles import Made, run_cli
from tolerances import tolerance

import tc_deploy
from tc_deploy.backends.build import build_target
from tc_deploy.backends.compiled_at_load import SHARED_FROM_MIB, are_shared
from tc_deploy.bundle import MANIFEST
from tc_deploy.manifest import WEIGHTS

LAYERS, WIDTH, GRAPHS = 8, 1536, 3
FACTORS = tuple(1.5 * 2.0**number for number in range(-LAYERS // 2, LAYERS - LAYERS // 2))
"""What each product multiplies by; its weights are that / WIDTH, a power of two. All differ: ONNX Runtime keeps equal
matrices once."""
WEIGHTS_MIB = LAYERS * WIDTH * WIDTH * 4 / 2**20
PROGRAM = '''
import json, sys
from pathlib import Path
import numpy as np
from tc_deploy.backends import registry
from tc_deploy.backends.base import BufferSpec

def resident_mib():
    """Memory of its own and pages of the weights file; those of libraries depend on who else has them open."""
    found_kib, of_weights = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            of_weights = line.endswith(sys.argv[6])
        elif name == "Anonymous:" or (name == "Pss:" and of_weights):
            found_kib += int(rest.split()[0])
    return found_kib / 1024

device = registry.backend(sys.argv[1]).open({"threads": 1, "weights": sys.argv[2]})
before_mib = resident_mib()
found, bound = [], []
for number in range(int(sys.argv[4])):
    x, y = device.buffers(2 * [BufferSpec(dtype=np.dtype("float32"), shape=(8, int(sys.argv[5])))])
    x.write(np.full((8, int(sys.argv[5])), number + 1, np.float32))
    bound.append(device.load(Path(sys.argv[3]) / f"{number}.onnx").bind({"x": x}, {"y": y}))
    bound[-1].run()
    found.append(float(y.read()[0, 0]))
print(json.dumps({"y": found, "resident_mib": resident_mib() - before_mib}))
'''


def write_graphs(folder: Path) -> None:
    """Graphs of a few matrix products each, all by the matrices of one weights file; every sum is exact in fp32."""
    size = WIDTH * WIDTH * 4
    np.repeat(np.float32(FACTORS) / WIDTH, WIDTH * WIDTH).tofile(folder / WEIGHTS)
    for number in range(GRAPHS):
        matrices = [
            ir.Value(
                name=f"w{layer}",
                const_value=ir.ExternalTensor(
                    WEIGHTS,
                    layer * size,
                    size,
                    ir.DataType.FLOAT,
                    shape=ir.Shape([WIDTH, WIDTH]),
                    name=f"w{layer}",
                    base_dir=folder,
                ),
                shape=ir.Shape([WIDTH, WIDTH]),
                type=ir.TensorType(ir.DataType.FLOAT),
            )
            for layer in range(LAYERS)
        ]
        x = value = ir.Value(name="x", shape=ir.Shape([8, WIDTH]), type=ir.TensorType(ir.DataType.FLOAT))
        nodes = []
        for matrix in matrices:
            nodes.append(ir.node("MatMul", [value, matrix]))
            (value,) = nodes[-1].outputs
        value.name, value.shape, value.type = "y", ir.Shape([8, WIDTH]), ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph([x], [value], nodes=nodes, initializers=matrices, opset_imports={"": 20})
        ir.save(ir.Model(graph, ir_version=10), folder / f"{number}.onnx")


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's memory where Linux shows it")
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_shared_weights_are_resident_once(tmp_path: Path, backend: str) -> None:
    write_graphs(tmp_path)
    resident_mib = {}
    for mode in ("shared", "packed"):
        words = [sys.executable, "-c", PROGRAM, backend, mode, str(tmp_path), str(GRAPHS), str(WIDTH), WEIGHTS]
        answer = subprocess.run(words, capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stderr
        found = json.loads(answer.stdout)
        assert found["y"] == [math.prod(FACTORS) * (number + 1) for number in range(GRAPHS)]
        resident_mib[mode] = found["resident_mib"]
    # One copy, or one for each graph.
    assert resident_mib["shared"] < 1.5 * WEIGHTS_MIB
    assert resident_mib["packed"] > 2.5 * WEIGHTS_MIB


def test_large_weights_are_shared_unless_said_otherwise(tmp_path: Path) -> None:
    file, graph, one_graph = (tmp_path / name for name in (WEIGHTS, "full.onnx", "steps.onnx"))
    assert not are_shared(None, graph)
    for size, expected in ((SHARED_FROM_MIB * 2**20 - 1, False), (SHARED_FROM_MIB * 2**20, True)):
        with file.open("wb") as made:
            made.truncate(size)
        assert are_shared(None, graph) is expected
        # Where one graph holds all variants, there is but one copy.
        assert not are_shared(None, one_graph)
        for path in (graph, one_graph):
            assert are_shared("shared", path)
            assert not are_shared("packed", path)


@pytest.mark.parametrize(("backend", "chosen"), [("onnxruntime", {"provider": "cpu"}), ("openvino", {"device": "cpu"})])
def test_shared_and_packed_weights_make_the_same_pictures(
    mixed: Made, tmp_path: Path, backend: str, chosen: dict[str, str]
) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    made = []
    for mode in ("shared", "packed"):
        assert run_cli("build", bundle, "--backend", backend, "--threads", 1, "--weights", mode).code == 0
        options = json.loads((bundle / backend / MANIFEST).read_text(encoding="utf-8"))["options"]
        assert options == chosen | {"threads": 1, "weights": mode}
        with tc_deploy.load(bundle, backend, batch_size=2) as pipeline:
            made.append(pipeline(class_labels=[3, 9, 0], seed=11).latents)
    error = np.abs(made[0] - made[1]).max() / np.abs(made[0]).max()
    assert error <= tolerance(backend, "fp32", "trajectory_max_rel")


def test_a_loaded_pipeline_keeps_the_mapping_it_reads(mixed: Made, tmp_path: Path) -> None:
    # The file may go, as when a bundle is built again; what was loaded must not.
    bundle = mixed.copy(tmp_path / "bundle")
    for backend in ("onnxruntime", "openvino"):
        build_target(bundle, backend, {"threads": 1, "weights": "shared"})
        with tc_deploy.load(bundle, backend) as pipeline:
            before = pipeline(class_labels=[1]).latents
            moved = bundle.rename(tmp_path / "moved")
            assert np.array_equal(pipeline(class_labels=[1]).latents, before)
            moved.rename(bundle)
