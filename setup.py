"""Builds the native module `sslkern._cpu`; everything else stands in pyproject.toml.

It is optional: where it cannot be compiled the install goes on, and sslkern runs on its other backends. With
SSLKERN_REQUIRE_NATIVE=1 that is an error. The CUDA kernels are not built here: their sources are files of the package,
which sslkern/backends/cuda/compile.py compiles when they are needed.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))


class BuildNative(build_ext):
    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)  # an old module must not pass for the result of a failed build
        # Not setuptools' own build directory, which an editable install throws away: rebuilds stay cheap.
        module = ROOT / "build" / sys.implementation.cache_tag / "_cpu.so"
        try:
            from native_build import build_module

            build_module(module)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(module, target)
        except Exception as error:
            message = f"sslkern: the native module {ext.name} could not be built: {error}"
            if os.environ.get("SSLKERN_REQUIRE_NATIVE") == "1":
                raise SystemExit(message) from error
            print(f"{message}; installing without it", file=sys.stderr)


setup(
    ext_modules=[Extension("sslkern._cpu", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
