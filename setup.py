"""Builds the native module `sslkern._cpu`; everything else stands in pyproject.toml.

The module is optional: where it cannot be compiled the install goes on and sslkern runs on its reference backend,
unless SSLKERN_REQUIRE_NATIVE=1 makes the failure fatal.
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
        try:
            from native_build import build_module

            # Not setuptools' own build directory, which an editable install throws away: rebuilds stay cheap.
            module = ROOT / "build" / sys.implementation.cache_tag / "_cpu.so"
            build_module(module)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(module, target)
        except Exception as error:
            if os.environ.get("SSLKERN_REQUIRE_NATIVE") == "1":
                raise SystemExit(f"sslkern: the native module could not be built: {error}") from error
            print(f"sslkern: installing without the native module, which could not be built: {error}", file=sys.stderr)


setup(
    ext_modules=[Extension("sslkern._cpu", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
