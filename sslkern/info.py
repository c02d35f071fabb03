"""`python -m sslkern.info [--json]`: what is installed, which backends can run here, and why others cannot."""

import argparse
import json
import platform

import torch

from . import __version__
from .backends import BACKENDS, current


def collect() -> dict:
    """The facts as a dict of strings, numbers, lists and None, ready for JSON."""
    backends = {}
    for name, backend in BACKENDS.items():
        facts = backends[name] = {
            "available": backend.MISSING is None,
            "missing": backend.MISSING,
            "devices": "any",
            "dtypes": "any",
            "primitives": list(backend.PRIMITIVES),
        }
        if backend.DEVICES:
            facts["devices"] = list(backend.DEVICES)
        if backend.DTYPES:
            facts["dtypes"] = [str(dtype).removeprefix("torch.") for dtype in backend.DTYPES]
    native, nvrtc = BACKENDS["cpu"]._cpu, BACKENDS["cuda"].nvrtc.find()
    return {
        "sslkern": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backend": current(),
        "backends": backends,
        "cpu_isa": native.isa() if native else None,
        "cpu_isas": list(native.isas()) if native else [],
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "nvrtc": str(nvrtc) if nvrtc else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sslkern.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    info = collect()
    if parser.parse_args().json:
        print(json.dumps(info, indent=2))
        return
    backends = info.pop("backends")
    for name, value in info.items():
        print(f"{name:<10} {_listed(value) or 'none'}")
    for name, facts in backends.items():
        state = facts["missing"] or f"runs {_listed(facts['primitives'])} on {_listed(facts['devices'])}"
        print(f"{'  ' + name:<10} {state}")


def _listed(value: list[str] | str | int | None) -> str | int | None:
    if isinstance(value, list):
        return ", ".join(value)
    return value


if __name__ == "__main__":
    main()
