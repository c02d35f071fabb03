"""Compile csrc/ with ninja, incrementally and in parallel.

setup.py calls it for the module `sslkern._cpu`; run as a script it builds the stand-alone C++ tests under sanitizers
and runs them:

    python csrc/native_build.py address,undefined
    python csrc/native_build.py thread

With `brief` after that fewer instruction sets and numbers of threads are tested, as .ci/run does.

`csrc/cpu/kernels/*.cpp` are compiled once per instruction set with -DSSLKERN_ISA=<name>, all other sources once with
the compiler's baseline flags and one -DSSLKERN_HAS_<NAME> for each instruction set that was built. For tests the C++
compiler also compiles the CUDA kernels, on top of tests/cuda_emulation.
"""

import fcntl
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from ninja import ninja_syntax

ROOT = Path(__file__).resolve().parent.parent

# Not -ffast-math: NaN and infinities must stay what they are.
FLAGS = ["-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC's own AVX-512 header trips over these
FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", f"-I{ROOT / 'csrc'}"]
RELEASE_FLAGS = ["-O3", "-DNDEBUG"]

AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
AVX512_BF16_FLAGS = [*AVX512_FLAGS, "-mavx512bf16"]
X86_ISAS = {"avx2": AVX2_FLAGS, "avx512": AVX512_FLAGS, "avx512_bf16": AVX512_BF16_FLAGS}
X86_ISAS["amx"] = [*AVX512_BF16_FLAGS, "-mamx-tile", "-mamx-bf16"]


def find_compiler() -> list[str]:
    """The C++ compiler, as the start of a command line: $CXX, else what built this Python, else `c++`."""
    for candidate in [os.environ["CXX"]] if "CXX" in os.environ else [sysconfig.get_config_var("CXX"), "c++"]:
        if candidate and shutil.which(shlex.split(candidate)[0]):
            return shlex.split(candidate)
    raise RuntimeError("no C++ compiler found; install g++ or clang++, or name one in the environment variable CXX")


def accepts(compiler: list[str], flags: list[str]) -> bool:
    command = [*compiler, *flags, "-Werror", "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(command, input=b"int main() {}", capture_output=True).returncode == 0


def supported_isas(compiler: list[str]) -> dict[str, list[str]]:
    """Flags by the name of each instruction set to compile the kernels for; the baseline comes first."""
    isas = {"baseline": []}
    if platform.machine() in ("x86_64", "AMD64"):
        isas |= {name: flags for name, flags in X86_ISAS.items() if accepts(compiler, flags)}
        for name in X86_ISAS.keys() - isas.keys():
            print(f"sslkern: left out the {name} kernels, unknown to {shlex.join(compiler)}", file=sys.stderr)
    return isas


def make(output: Path, command: str, edges: list, link_flags=()) -> None:
    """Compile the edges (source, variant, flags) with a command, and link them into `output`."""
    objects_dir = output.parent / f"{output.stem}.objects"
    objects_dir.mkdir(parents=True, exist_ok=True)
    with (objects_dir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be building the same
        with (objects_dir / "build.ninja").open("w") as file:
            ninja = ninja_syntax.Writer(file)
            compile_one = f"{command} $flags -MMD -MF $out.d -c $in -o $out"
            ninja.rule("compile", compile_one, "compile $out", "$out.d", deps="gcc")
            ninja.rule("link", f"{command} $in -o $out $flags", "link $out")
            objects = []
            for source, variant, flags in edges:
                objects.append(f"{variant}/{source.relative_to(ROOT).with_suffix('.o')}")
                ninja.build(objects[-1], "compile", str(source), variables={"flags": shlex.join(flags)})
            # The linker keeps the first copy of an inline function: those compiled for the baseline run everywhere.
            ninja.build(str(output), "link", objects, variables={"flags": shlex.join(link_flags)})
        if subprocess.run([sys.executable, "-m", "ninja", "-C", str(objects_dir)]).returncode != 0:
            raise RuntimeError("csrc did not compile; the compiler's messages stand above")


def build(output: Path, sources: list[Path], flags: list[str], isas: dict, *, source_flags=(), link_flags=()) -> None:
    """Compile `sources` (with `source_flags`) and csrc/cpu for `isas`, all with `flags`, and link `output`."""
    has_isas = [f"-DSSLKERN_HAS_{isa.upper()}" for isa in isas]
    edges = [(source, "once", [*has_isas, *source_flags]) for source in sources]
    edges += [(source, "once", has_isas) for source in sorted(ROOT.glob("csrc/cpu/*.cpp"))]
    kernels = sorted(ROOT.glob("csrc/cpu/kernels/*.cpp"))
    edges += [(k, isa, [f"-DSSLKERN_ISA={isa}", *isas[isa]]) for isa in isas for k in kernels]
    command = f"{shlex.join(find_compiler())} {shlex.join([*FLAGS, *flags])}"
    make(output, command, edges, link_flags)


def python_includes() -> list[str]:
    import pybind11

    return [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]


def build_module(output: Path) -> None:
    """Compile the Python module `sslkern._cpu` into `output`."""
    isas = supported_isas(find_compiler())
    openmp = ["-fopenmp"] if accepts(find_compiler(), ["-fopenmp"]) else []
    link_flags = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    bindings = sorted(ROOT.glob("csrc/bindings/*.cpp"))
    build(output, bindings, RELEASE_FLAGS + openmp, isas, source_flags=python_includes(), link_flags=link_flags)


def build_emulated_cuda(output: Path, kernels: dict[str, list[str]]) -> None:
    """Compile a library that stands in for NVIDIA's driver in tests. Its kernels run on the CPU, slowly, and stop at a
    load that is not aligned, as they would on a GPU, at a shift or an integer that overflows.

    kernels: for each file of sslkern/backends/cuda/kernels what it is to be compiled for, as `push<bf16, float>`.
    """
    sanitizer = ["-fsanitize=undefined", "-fno-sanitize-recover=all", "-fno-sanitize=vptr"]
    includes = [f"-I{ROOT / folder}" for folder in ("sslkern/backends/cuda/kernels", "tests/cuda_emulation")]
    command = shlex.join([*find_compiler(), *FLAGS, "-O2", "-Wno-psabi", "-DSSLKERN_EMULATED", *includes, *sanitizer])
    edges = [
        (source, "once", ["-O3", "-fno-sanitize=all"]) for source in sorted(ROOT.glob("tests/cuda_emulation/*.cpp"))
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    for name, instances in kernels.items():
        source = output.parent / f"{name}.cpp"
        edges.append((source, "once", []))
        lines = [f'#include "{name}.cu"', "namespace sslkern::cuda {"]
        for number, instance in enumerate(instances):
            lines.append(f'static const emulation::Register<{instance}> instance_{number}("{instance}");')
        text = "\n".join([*lines, "}", ""])
        if not source.exists() or source.read_text() != text:  # ninja goes by the time
            temporary = source.with_suffix(f".{os.getpid()}")
            temporary.write_text(text)
            temporary.replace(source)
    make(output, command, edges, ["-shared"])


def run_sanitized_tests(sanitizers: str, *brief: str) -> None:
    """Compile and run tests/cpp/*.cpp under e.g. "address,undefined" or "thread", all of it or "brief"."""
    output = ROOT / "build" / f"cpptest-{sanitizers.replace(',', '-')}"
    # Without OpenMP the kernels use std::thread, which ThreadSanitizer understands (libgomp it does not).
    flags = ["-O1", "-g1", "-fno-omit-frame-pointer", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    isas = supported_isas(find_compiler())
    if "avx512_bf16" in isas:
        isas.pop("avx512")  # the same code but for bf16
        isas["amx_emulated"] = [*isas["avx512_bf16"], "-DSSLKERN_EMULATE_AMX"]  # few machines have tiles
    isas.pop("amx", None)
    if brief and "avx512_bf16" in isas:
        isas.pop("avx2")  # between vectors of 4 floats and of 16
    if sanitizers == "thread":
        isas = {"baseline": isas["baseline"]}  # threads share the work in one way for all
    build(output, sorted(ROOT.glob("tests/cpp/*.cpp")), flags, isas)
    subprocess.run([str(output), "in turn", *brief], check=True)


if __name__ == "__main__":
    run_sanitized_tests(*sys.argv[1:])
