"""`make wheel`'s checks find what is wrong with a wheel and with a source distribution."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
import zipfile

import pytest

pytest.importorskip("elftools")

from csrc.cuda.build import ARCHITECTURES
from tools import old_glibc, sdist_check, wheel_check, wheel_try

NAME = "llmloss_ext-0.1.0-cp310-abi3-manylinux_2_28_x86_64.whl"
COMPILER = shutil.which("cc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


def library(folder, source="", *flags):
    """The content of a shared object of a C source."""
    made = folder / "library.so"
    command = [COMPILER, "-shared", "-fPIC", "-xc", "-", "-o", str(made), *flags]
    subprocess.run(command, input=source, text=True, check=True)
    return made.read_bytes()


def kernels(*architectures):
    return json.dumps([{"architecture": name} for name in architectures]).encode()


def wheel_of(folder, name=NAME, without=(), **more):
    """A wheel with every file of the packages and what a build makes, changed as said."""
    files = dict.fromkeys(wheel_check.sources(), b"")
    files["llmloss_ext-0.1.0.dist-info/METADATA"] = b""
    files[wheel_check.LIBRARY] = library(folder)
    files[wheel_check.REPORT_IN_WHEEL] = kernels(*ARCHITECTURES)
    files |= {"llmloss_ext/" + key.replace("__", "."): value for key, value in more.items()}
    path = folder / name
    with zipfile.ZipFile(path, "w") as archive:
        for file in files.keys() - set(without):
            archive.writestr(file, files[file])
    return path


@needs_compiler
def test_a_good_wheel(tmp_path, capsys):
    path = wheel_of(tmp_path)
    assert wheel_check.faults(path) == []
    wheel_check.report(path)
    assert "checked" in capsys.readouterr().out
    alone = wheel_of(tmp_path, without=[wheel_check.REPORT_IN_WHEEL])
    assert wheel_check.faults(alone, with_cuda=False) == []


@needs_compiler
@pytest.mark.parametrize(
    ("tags", "fault"),
    [
        ("cp311-cp311-manylinux_2_28_x86_64", "not for every Python since 3.10"),
        ("cp311-abi3-manylinux_2_28_x86_64", "not for every Python since 3.10"),
        ("cp310-abi3-linux_x86_64", "not for every Linux"),
        ("cp310-abi3-manylinux_2_35_x86_64", "not for every Linux since glibc 2.28"),
        ("cp310-abi3", "Invalid wheel filename"),
    ],
)
def test_a_wrong_name(tmp_path, tags, fault):
    (found,) = wheel_check.faults(wheel_of(tmp_path, f"llmloss_ext-0.1.0-{tags}.whl"))
    assert fault in found


@needs_compiler
def test_a_wheel_that_is_too_large(tmp_path, monkeypatch):
    path = wheel_of(tmp_path)
    monkeypatch.setattr(wheel_check, "LARGEST", path.stat().st_size - 1)
    (found,) = wheel_check.faults(path)
    assert "more than" in found
    with pytest.raises(SystemExit, match="more than"):
        wheel_check.report(path)


@needs_compiler
@pytest.mark.parametrize(
    "file",
    ["llmloss_ext/py.typed", "llmloss_ext/losses/policy.py", "llmloss_train/__init__.py",
     "llmloss_eval/command.py", "llmloss_ext/_C.abi3.so", "llmloss_ext/cuda_kernels.json"],
)  # fmt: skip
def test_a_file_is_missing(tmp_path, file):
    assert wheel_check.faults(wheel_of(tmp_path, without=[file])) == [f"{file} is missing"]


@needs_compiler
def test_a_file_too_many(tmp_path):
    path = wheel_of(tmp_path, gone__py=b"", _C__cpython_311__so=b"")
    found = wheel_check.faults(path)
    assert len(found) == 2
    assert all("does not belong there" in fault for fault in found)
    found = wheel_check.faults(wheel_of(tmp_path), with_cuda=False)
    assert found == ["llmloss_ext/cuda_kernels.json does not belong there"]


@needs_compiler
def test_an_architecture_is_missing(tmp_path):
    path = wheel_of(tmp_path, cuda_kernels__json=kernels(*ARCHITECTURES[:-1]))
    assert wheel_check.faults(path) == [f"no CUDA kernels for sm_{ARCHITECTURES[-1]}"]


@needs_compiler
@pytest.mark.parametrize("kind", ["--enable-new-dtags", "--disable-new-dtags"])
def test_a_path_of_the_build_machine(tmp_path, kind):
    content = library(tmp_path, "", f"-Wl,{kind}", "-Wl,-rpath,/home/builder/torch/lib")
    path = wheel_of(tmp_path, _C__abi3__so=content)
    (found,) = wheel_check.faults(path)
    assert "looks for libraries in /home/builder/torch/lib" in found


@needs_compiler
def test_what_a_library_may_not_ask_for(tmp_path, monkeypatch):
    (tmp_path / "libother.so").write_bytes(library(tmp_path, "int other(void) { return 0; }"))
    source = f"""
        int other(void), PyErr_Occurred(void), puts(const char *);
        const char *built = "{wheel_check.ROOT}/csrc";
        int f(void) {{ return other() + PyErr_Occurred() + puts(""); }}
    """
    content = library(tmp_path, source, f"-L{tmp_path}", "-lother")
    needed = ["llmloss_ext/_C.abi3.so needs libother.so"]
    python = ["llmloss_ext/_C.abi3.so asks Python for PyErr_Occurred"]
    place = [f"llmloss_ext/_C.abi3.so names {wheel_check.ROOT}, where it was built"]
    assert sorted(wheel_check.library_faults(content)) == sorted(needed + python + place)
    monkeypatch.setattr(wheel_check, "NEWEST_GLIBC", (2, 1))
    assert any("needs GLIBC_2." in fault for fault in wheel_check.library_faults(content))


@pytest.mark.parametrize(
    "name", ["libtorch_cpu.so", "libc10.so", "libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2"]
)
def test_a_library_may_need_what_is_there(name):
    assert wheel_check.may_need(name)
    assert not wheel_check.may_need(name.replace("lib", "libcudart-").replace("ld", "ldcu"))


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_library_has_what_an_older_system_lacks(tmp_path):
    source = """
        #include <memory>
        #include <sstream>
        std::string text(const std::stringbuf& of) { return of.str(); }
        std::shared_ptr<int> copied(const std::shared_ptr<int>& from) { return from; }
    """
    made = tmp_path / "library.so"
    command = ["c++", "-std=c++20", "-O0", "-shared", "-fPIC", old_glibc.shim(tmp_path), "-xc++"]
    subprocess.run([*command, "-", "-o", made], input=source, text=True, check=True)
    content = made.read_bytes()
    assert b"GLIBC_2.32" not in content
    assert b"GLIBCXX_3.4.29" not in content


def sdist_of(folder, without="", more=""):
    path = folder / "llmloss_ext-0.1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in sorted({*sdist_check.wanted(), "PKG-INFO", more} - {without, ""}):
            archive.addfile(tarfile.TarInfo(f"llmloss_ext-0.1.0/{name}"), io.BytesIO())
    return path


def test_a_source_distribution(tmp_path):
    assert sdist_check.faults(sdist_of(tmp_path)) == []
    assert {"csrc/core/loss.h", "csrc/cuda/build.py", "setup.py"} < sdist_check.wanted()
    for file in ("csrc/cuda/kernels/tasks.cuh", "csrc/ops/abi.py", "LICENSE"):
        assert sdist_check.faults(sdist_of(tmp_path, without=file)) == [f"{file} is missing"]
    for file in ("llmloss_ext/_C.abi3.so", "llmloss_ext/cuda_kernels.json", "tests/oracle.py"):
        found = sdist_check.faults(sdist_of(tmp_path, more=file))
        assert found == [f"{file} does not belong there"]


def test_a_wheel_is_tried_as_it_was_built(tmp_path):
    with pytest.raises(SystemExit, match="no wheel"):
        wheel_try.newest(tmp_path)
    for age, name in ((9, "old.whl"), (1, "new.whl")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 100 - age))
    assert wheel_try.newest(tmp_path).name == "new.whl"


def test_a_command_that_fails_is_shown():
    with pytest.raises(SystemExit, match=r"exit status 3\nsaid"):
        wheel_try.call(["sh", "-c", "echo said; exit 3"])


@needs_compiler
@pytest.mark.skipif(not old_glibc.is_newer(), reason="this machine's C library is old")
def test_a_library_that_is_linked_for_an_older_glibc(tmp_path):
    pytest.importorskip("ziglang")
    source = "#include <dlfcn.h>\nvoid *f(const char *name) { return dlopen(name, RTLD_NOW); }"
    flags = old_glibc.link_flags(wheel_check.ROOT / "build" / "glibc")
    assert list(wheel_check.library_faults(library(tmp_path, source, "-xnone", *flags))) == []
    too_new = list(wheel_check.library_faults(library(tmp_path, source)))
    assert too_new == ["llmloss_ext/_C.abi3.so needs GLIBC_2.34"]
