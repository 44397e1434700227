"""A library that is missing, and one that is there and broken: one line each, with a cure that works."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from bundles import Made

from tc_deploy import libraries
from tc_deploy.doctor import gather_facts
from tc_deploy.errors import BackendError
from tc_deploy.libraries import EXTRA_BY_MODULE, imported, install_command

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
WHEEL = sorted((ROOT / "tc_deploy").rglob("*.py"))


def test_the_extras_that_it_names_bring_the_libraries() -> None:
    for module, extra in EXTRA_BY_MODULE.items():
        distribution = "scikit-learn" if module == "sklearn" else module.replace("_", "-")
        # As package indexes compare names: case, dots, dashes and underscores do not matter.
        assert any(requirement.replace("_", "-").startswith(distribution) for requirement in EXTRAS[extra])


@pytest.mark.parametrize("extra", ["compile", "cpu", "cuda", "openvino", "report", "text"])
def test_the_command_names_what_the_project_requires(extra: str) -> None:
    words = [f"'{requirement}'" for requirement in EXTRAS[extra]]
    assert sorted(install_command(extra).split()) == sorted(["pip", "install", *words])


def test_tensorrt_needs_an_index() -> None:
    assert " --extra-index-url https://" in install_command("tensorrt")


def test_one_of_several_that_an_extra_brings() -> None:
    assert install_command("openvino", "ml-dtypes") == "pip install 'ml-dtypes>=0.5'"


def test_a_clone_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(libraries.importlib.metadata, "requires", missing)
    assert install_command("report") == "pip install '.[report]' (in the clone)"


def broken(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, body: str) -> None:
    """Let a module be found whose own lines fail."""
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text(body, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)


CAUSES = {
    "raise OSError('libcudnn.so.9: cannot open shared object file')": "OSError: libcudnn.so.9: cannot open",
    "raise ImportError('libtbb.so.12: no such file')": "ImportError: libtbb.so.12: no such file",
    "import a_module_that_it_wants": "ModuleNotFoundError: No module named 'a_module_that_it_wants'",
    "import sys\nsys.nothing": "AttributeError: module 'sys' has no attribute 'nothing'",
}


@pytest.mark.parametrize("body", CAUSES)
@pytest.mark.parametrize("module", ["openvino", "tokenizers"])
def test_a_library_that_is_broken_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, body: str
) -> None:
    broken(tmp_path, monkeypatch, module, body)
    with pytest.raises(BackendError) as caught:
        imported(module)
    message = str(caught.value)
    assert message.startswith(f"{module} is installed but does not load: {CAUSES[body]}")
    assert "not installed" not in message


@pytest.mark.parametrize("body", ["raise OSError(24, 'Too many open files')", "raise MemoryError"])
def test_a_library_that_lacks_what_it_needs_is_not_to_be_installed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    broken(tmp_path, monkeypatch, "openvino", body)
    with pytest.raises(BackendError, match=r"give the process more memory and files \(ulimit -v, -n\)$"):
        imported("openvino")


def test_the_doctor_tells_broken_from_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(tmp_path, monkeypatch, "openvino", "raise OSError('libtbb.so.12: no such file')")
    assert gather_facts().openvino_error == (
        "openvino is installed but does not load: OSError: libtbb.so.12: no such file"
    )


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("openvino", ("validate", "BUNDLE", "--backend", "onnxruntime", "--against", "openvino")),
        ("onnxruntime", ("generate", "BUNDLE", "--class-label", "1", "-o", "x.npy")),
        ("torch", ("build", "BUNDLE", "--backend", "torch")),
        ("torch", ("calibrate", "MODEL", "-o", "plan", "--steps", "4")),
        ("diffusers", ("calibrate", "MODEL", "-o", "plan", "--steps", "4")),
        ("jinja2", ("report", "BUNDLE", "-o", "report.html")),
    ],
)
def test_every_command_says_so(mixed: Made, tmp_path: Path, module: str, words: tuple[str, ...]) -> None:
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text("raise OSError('libgone.so: no such file')", encoding="utf-8")
    given = [{"BUNDLE": str(mixed.bundle), "MODEL": str(mixed.model)}.get(word, word) for word in words]
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from tc_deploy.cli import main; main()"
    answer = subprocess.run(
        [sys.executable, "-c", program, "-q", *given], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert answer.returncode == BackendError.exit_code
    (line,) = answer.stderr.splitlines()
    assert f"{module} is installed but does not load: OSError: libgone.so: no such file; install it again: " in line
    assert sorted(path.name for path in tmp_path.iterdir()) == [module]


@pytest.mark.parametrize("way", ["tc_deploy.libraries:imported('openvino')", "tc_deploy.doctor:_try_openvino()"])
def test_openvino_forks_no_child_to_report_its_use(way: str) -> None:
    """Its import starts a process that sends what it counts over the network."""
    module, _, call = way.partition(":")
    program = (
        "import os, sys, time\n"
        "forks = []\n"
        "os.register_at_fork(before=lambda: forks.append(1))\n"
        f"import {module} as module\n"
        f"module.{call}\n"
        "time.sleep(0.5)\n"
        "sys.exit(len(forks))\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=120).returncode == 0
