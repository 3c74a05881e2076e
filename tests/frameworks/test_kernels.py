"""Hugging Face's kernels: the losses loaded from a kernel repository.

Nothing here imports llmloss_ext with the module: one test runs it where that is not installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("kernels")

from kernels import get_kernel, get_local_kernel  # noqa: F401 (the first for ALONE)
from kernels.backends import CPU, CUDA
from kernels.variants import Version, _resolve_variant_for_system, parse_variant

REPOSITORY = Path(__file__).parents[2] / "build" / "kernel-repo"


@pytest.fixture(scope="module")
def repository():
    """What `make kernel-repo` has made of these sources."""
    from tools import kernel_repo

    variant = REPOSITORY / "build" / kernel_repo.variant_name(kernel_repo.CPU)
    metadata = variant / "metadata.json"
    wanted = kernel_repo.identity(kernel_repo.CPU)
    if not metadata.exists() or json.loads(metadata.read_text())["id"] != wanted:
        pytest.skip(f"no {wanted} in {variant}: make kernel-repo")
    return REPOSITORY


def check(losses):
    """The values and gradients of three functions of a loaded package are torch's."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.double, requires_grad=True)

    logits, hidden, weight = random(40, 131), random(40, 16), random(131, 16)
    target = torch.randint(131, (40,), generator=generator)
    target[::7] = -100
    stats = losses.token_stats(logits, target.clamp(min=0), extra=("entropy",))
    log_probs = logits.log_softmax(1)
    pairs = [
        (losses.cross_entropy(logits, target), F.cross_entropy(logits, target)),
        (
            losses.linear_cross_entropy(hidden, weight, target, chunk_tokens=16),
            F.cross_entropy(hidden @ weight.t(), target),
        ),
        (stats.log_prob, log_probs[range(40), target.clamp(min=0)]),
        (stats.entropy, -(log_probs.exp() * log_probs).sum(1)),
    ]
    for ours, reference in pairs:
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
        inputs = (logits, hidden, weight)
        gradients = [
            torch.autograd.grad(x.sum(), inputs, allow_unused=True, retain_graph=True)
            for x in (ours, reference)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


ALONE = """
import sys
sys.modules["llmloss_ext"] = None  # importing it raises
from test_kernels import check, get_kernel, torch
kernel = get_kernel("someone/llmloss-ext", version=0, backend="cpu")
check(kernel)
assert not hasattr(torch.ops.llmloss, "cross_entropy")
print(kernel.__name__, kernel.cross_entropy.__module__)
"""


def test_where_the_package_is_not_installed(repository):
    here = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent),
        "LOCAL_KERNELS": f"someone/llmloss-ext={repository}",
    }
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, env=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, module = done.stdout.split()
    assert name.startswith("_llmloss_ext_cpu_")
    assert module == f"{name}.functional"


def test_beside_the_installed_package(repository):
    """Two libraries and two sets of operators, each with the other's results, bit by bit."""
    import llmloss_ext

    kernel = get_local_kernel(repository, backend="cpu")
    assert kernel.__name__ == kernel.ops.namespace.NAMESPACE
    assert kernel.ops.LIBRARY.is_relative_to(repository)
    logits = torch.randn(9, 70)
    target = torch.randint(70, (9,))
    losses, operators = {}, {}
    for package in (llmloss_ext, kernel):
        check(package)
        with torch.profiler.profile() as profile:
            losses[package] = package.cross_entropy(logits, target)
        operators[package] = {e.key for e in profile.key_averages() if "::cross_entropy" in e.key}
    assert torch.equal(*losses.values())
    assert operators[llmloss_ext] == {"llmloss::cross_entropy"}
    assert operators[kernel] == {f"{kernel.__name__}::cross_entropy"}


def test_compiled_beside_the_installed_package(repository):
    """Both sets have the fake kernels and derivatives that a compiler needs."""
    import llmloss_ext

    packages = (get_local_kernel(repository, backend="cpu"), llmloss_ext)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(hidden, weight, target):
        logits = hidden @ weight.t()
        return sum(
            package.cross_entropy(logits, target)
            + package.linear_cross_entropy(hidden, weight, target)
            for package in packages
        )

    hidden, weight = torch.randn(12, 8, requires_grad=True), torch.randn(70, 8, requires_grad=True)
    target = torch.randint(70, (12,))
    reference = 4 * F.cross_entropy(hidden @ weight.t(), target)
    ours = loss(hidden, weight, target)
    torch.testing.assert_close(ours, reference)
    for x in (hidden, weight):
        expected = torch.autograd.grad(reference, x, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(ours, x, retain_graph=True), expected)


def test_digest(repository):
    """`kernels` finds in the files what metadata.json says of them."""
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    for variant in (repository / "build").iterdir():
        metadata = Metadata.read_from_file(variant / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))


@pytest.mark.parametrize(
    ("backend", "chosen"),
    [(CPU(), "cpu"), (CUDA(Version("13.1")), "cu130"), (CUDA(Version("12.8")), None)],
)
def test_the_variant_that_is_chosen(backend, chosen):
    from tools import kernel_repo

    here = [kernel_repo.CPU, kernel_repo.cuda_backend("13.0", {80, 90, 100})]
    names = {b.tag: kernel_repo.variant_name(b) for b in here}
    variants = [parse_variant(name) for name in names.values()]
    major, minor = torch.__version__.split(".")[:2]
    applicable, _ = _resolve_variant_for_system(
        variants, backend, variants[0].arch.platform, variants[0].arch.os,
        torch_version=Version(f"{major}.{minor}"), torch_cxx11_abi=True, tvm_ffi_version=None,
    )  # fmt: skip
    assert [v.variant_str for v in applicable] == ([names[chosen]] if chosen else [])
