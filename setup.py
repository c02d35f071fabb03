"""Builds the native modules `sslkern._cpu` and `sslkern._cuda`; everything else stands in pyproject.toml.

Both are optional: where one cannot be compiled the install goes on, and sslkern runs on its other backends. With
SSLKERN_REQUIRE_NATIVE=1 what does not compile is an error. SSLKERN_CUDA says whether to build the CUDA module: "auto"
(where there is an nvcc), "0" (no), or "1" (yes: without it the install fails).
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

REQUIRED = os.environ.get("SSLKERN_REQUIRE_NATIVE") == "1"
CUDA = os.environ.get("SSLKERN_CUDA") or "auto"
if CUDA not in ("0", "1", "auto"):
    raise SystemExit(f"sslkern: SSLKERN_CUDA must be 0, 1 or auto, not {CUDA!r}")


class BuildNative(build_ext):
    def build_extension(self, ext):
        name = ext.name.rpartition(".")[2]
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)  # an old module must not pass for the result of a failed build
        # Not setuptools' own build directory, which an editable install throws away: rebuilds stay cheap.
        module = ROOT / "build" / sys.implementation.cache_tag / f"{name}.so"
        try:
            if self.build_native(name, module):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(module, target)
        except Exception as error:
            message = f"sslkern: the native module {ext.name} could not be built: {error}"
            if REQUIRED or (name == "_cuda" and CUDA == "1"):
                raise SystemExit(message) from error
            print(f"{message}; installing without it", file=sys.stderr)

    def build_native(self, name: str, module: Path) -> bool:
        """False: not here."""
        if name == "_cuda" and CUDA == "0":
            print("sslkern: no CUDA module, as SSLKERN_CUDA=0", file=sys.stderr)
            return False
        from native_build import build_cuda_module, build_module, find_nvcc

        if name == "_cpu":
            build_module(module)
            return True
        nvcc = find_nvcc()
        if nvcc is None and CUDA == "1":
            raise RuntimeError("SSLKERN_CUDA=1 but there is no nvcc; set CUDA_HOME to a CUDA toolkit")
        if nvcc is None:
            print("sslkern: no CUDA module, as there is no nvcc; CUDA_HOME may name a CUDA toolkit", file=sys.stderr)
            return False
        build_cuda_module(module, nvcc)
        return True


setup(
    ext_modules=[Extension(name, sources=[], optional=True) for name in ("sslkern._cpu", "sslkern._cuda")],
    cmdclass={"build_ext": BuildNative},
)
