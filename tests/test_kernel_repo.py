"""A kernel repository: its folders, its files, and that nothing in them belongs to the package."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
import sys

import pytest

from tools import kernel_repo
from tools.kernel_repo import CPU, PACKAGE, cuda_backend

CUDA = cuda_backend("13.0", {90, 80, 100})
SOURCES = [*kernel_repo.python_files(), *(kernel_repo.ROOT / "csrc").rglob("*.cpp")]


@pytest.mark.parametrize("backend", [CPU, CUDA], ids=lambda b: b.kind)
def test_a_variant(tmp_path, backend):
    library = tmp_path / "_C.abi3.so"
    library.write_bytes(b"a library")
    variant = kernel_repo.lay_out(tmp_path, backend, "_llmloss_ext_1234", library)
    name = r"torch-stable-abi211-(cpu|cu130)-\w+-\w+"
    assert variant.parent == tmp_path / "build"
    assert re.fullmatch(name, variant.name)[1] == backend.tag
    files = {path.relative_to(variant).as_posix() for path in variant.rglob("*") if path.is_file()}
    assert {"__init__.py", "_C.abi3.so", "metadata.json", "linear/walk.py"} < files
    assert not any(file.startswith(("cli", "__main__")) for file in files)
    said = {}
    exec((variant / "ops" / "namespace.py").read_text(), said)
    assert said["qualified"]("scale_") == "_llmloss_ext_1234::scale_"
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["id"] == "_llmloss_ext_1234"
    assert metadata["digest"]["files"].keys() == files - {"metadata.json"}
    digest = base64.b64encode(hashlib.sha256(b"a library").digest()).decode()
    assert metadata["digest"]["files"]["_C.abi3.so"] == digest
    expected = {"type": "cpu"}
    if backend == CUDA:
        expected = {"type": "cuda", "archs": ["8.0", "9.0", "10.0+PTX"]}
    assert metadata["backend"] == expected


def test_a_layout_replaces_the_one_before(tmp_path):
    library = tmp_path / "_C.abi3.so"
    library.write_bytes(b"")
    variant = kernel_repo.lay_out(tmp_path, CPU, "_a", library)
    (variant / "gone.py").touch()
    assert kernel_repo.lay_out(tmp_path, CPU, "_b", library) == variant
    assert not (variant / "gone.py").exists()


def test_identities():
    """A name that may follow torch.ops., and another for other contents."""
    assert re.fullmatch(r"_llmloss_ext_cpu_[0-9a-f]{12}", kernel_repo.identity(CPU))
    assert kernel_repo.identity(CPU) == kernel_repo.identity(CPU)
    others = (cuda_backend("12.8", {80, 90, 100}), cuda_backend("13.0", {90}))
    assert len({kernel_repo.identity(backend) for backend in (CPU, CUDA, *others)}) == 4


@pytest.mark.parametrize(
    "path", kernel_repo.python_files(), ids=lambda path: path.relative_to(PACKAGE).as_posix()
)
def test_a_module_imports_only_what_a_kernel_may(path):
    """What is imported with it is torch, Python's or relative; nothing is ever the package's."""
    tree = ast.parse(path.read_text())
    assert "llmloss_ext" not in _roots(ast.walk(tree))
    if path.parent.name != "integrations":
        assert _roots(tree.body) <= {"torch", *sys.stdlib_module_names}


def _roots(nodes):
    """The first names of what is imported absolutely."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def test_the_namespace_is_said_once_in_each_language():
    """A name that stood elsewhere would be the installed package's in every kernel repository."""
    pattern = r'ops\.llmloss\b|"llmloss(::\w+)?"|STABLE_TORCH_LIBRARY\w*\('
    said = {path.name for path in SOURCES if re.search(pattern, path.read_text())}
    assert said == {"namespace.py", "library.cpp"}
