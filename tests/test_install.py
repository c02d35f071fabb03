"""What an installation from the sdist, by way of a wheel, brings."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sslkern.backends.cuda import compile, nvrtc

ROOT = Path(__file__).resolve().parent.parent
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, "build_" + sys.argv[1])(sys.argv[2]))"""


def run(*command, cwd: Path, **environment) -> str:
    environment = {name: x for name, x in os.environ.items() if name != "SSLKERN_REQUIRE_NATIVE"} | environment
    out = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stdout + out.stderr
    return out.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setuptools is not installed")
def test_the_cuda_kernels_of_a_wheel(tmp_path):
    """Their sources are in it, and compile where there is a compiler; beside them the annotations."""
    source = tmp_path / "source"
    for name in ("sslkern", "python", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    nothing = {
        "CXX": "/nowhere/c++",
        "PYTHONPATH": "",
    }  # so that the install goes on without the native module, in no time
    sdist = run(sys.executable, "-c", BUILD, "sdist", str(tmp_path), cwd=source, **nothing).splitlines()[-1]
    shutil.unpack_archive(tmp_path / sdist, tmp_path)
    unpacked = tmp_path / sdist.removesuffix(".tar.gz")
    wheel = run(sys.executable, "-c", BUILD, "wheel", str(tmp_path), cwd=unpacked, **nothing).splitlines()[-1]
    with zipfile.ZipFile(tmp_path / wheel) as archive:
        archive.extractall(tmp_path / "site")
    shipped = tmp_path / "site/sslkern/backends/cuda/kernels"
    assert sorted(path.name for path in shipped.iterdir()) == sorted(path.name for path in compile.SOURCES.iterdir())
    for typed in ("sslkern/py.typed", "sslkern/_cpu.pyi", "ssltrain/py.typed"):
        assert (tmp_path / "site" / typed).exists()
    path = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))
    command = sys.executable, "-m", "sslkern.backends.cuda.compile", "--out", str(tmp_path / "out"), "--arch", "90a"
    environment = {"PYTHONPATH": path, "PATH": "", "SSLKERN_CACHE": str(tmp_path / "cache")}
    if nvrtc.find() is not None:
        said = run(*command, cwd=tmp_path / "site", **environment)
        assert str(tmp_path / "cache") in said and len(list((tmp_path / "out").iterdir())) == len(compile.UNITS)
