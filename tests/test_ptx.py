"""The PTX of kernels/device.h and hopper.h: what has run right on an H100 stays as it ran; what has not is listed, here
and in docs/gpu.md, until it has."""

import re
import subprocess

from .conftest import ROOT, native_build


def product(n: int, of: str, a: str) -> str:
    r = n // 2
    to, d = f"m64n{n}k16.f32.{of}.{of} {{%0..%{r - 1}}}", f"+f d[0..{r - 1}]"
    if a == "shared":
        code = f"setp.ne.b32 p, %{r + 2}, 0; wgmma.mma_async.sync.aligned.{to}, %{r}, %{r + 1}, p, 1, 1, 0, 0;"
        return f"{{ .reg .pred p; {code} }} | {d}, l a, l b, r static_cast<int>(accumulate)"
    registers = ", ".join(f"%{r + i}" for i in range(4))
    code = f"setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.{to}, {{{registers}}}, %{r + 4}, p, 1, 1, 1;"
    return f"{{ .reg .pred p; {code} }} | {d}, r a0, r a1, r a2, r a3, l b"


TO = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
# In kernels that agreed with fp64 there.
HAS_RUN = f"""
setmaxnreg.inc.sync.aligned.u32 %0; | n COUNT
setmaxnreg.dec.sync.aligned.u32 %0; | n COUNT
mov.u32 %0, %%cluster_ctarank; | =r rank
barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; |
ld.shared.v2.f32 {{%0, %1}}, [%2]; | =f a, =f b, r from
stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {{%1, %2, %3, %4}}; | r to, r a, r b, r c, r d
fence.proxy.async.shared::cta; |
mbarrier.init.shared::cta.b64 [%0], %1; | r barrier, r arrivals
fence.mbarrier_init.release.cluster; |
mbarrier.arrive.shared::cta.b64 _, [%0]; | r barrier
{{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; \
mbarrier.arrive.shared::cluster.b64 _, [remote]; }} | r barrier, r rank
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1; | r barrier, r bytes
{{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; \
selp.u32 %0, 1, 0, p; }} | =r ended, r barrier, r parity
prefetch.tensormap [%0]; | l &map
{TO.replace("2d", "1d")} [%0], [%1, {{%3}}], [%2]; | r to, l &map, r barrier, r x
{TO} [%0], [%1, {{%3, %4}}], [%2]; | r to, l &map, r barrier, r x, r y
{TO}.multicast::cluster [%0], [%1, {{%3, %4}}], [%2], %5; | r to, l &map, r barrier, r x, r y, h blocks
cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {{%2, %3}}], [%1]; | l &map, r from, r x, r y
cp.async.bulk.commit_group; |
cp.async.bulk.wait_group.read %0; | n PENDING
cp.async.bulk.wait_group %0; | n PENDING
wgmma.fence.sync.aligned; |
wgmma.commit_group.sync.aligned; |
wgmma.wait_group.sync.aligned %0; | n PENDING
{product(64, "bf16", "shared")}
{product(128, "bf16", "shared")}
{product(256, "bf16", "shared")}
{product(128, "bf16", "registers")}
ex2.approx.ftz.f32 %0, %1; | =f y, f x
cvt.rn.bf16x2.f32 %0, %1, %2; | =r both, f high, f low
"""
HAS_NOT_RUN = f"""
ld.shared.f32 %0, [%1]; | =f x, r from
{product(64, "bf16", "registers")}
{product(256, "bf16", "registers")}
{product(64, "f16", "shared")}
{product(128, "f16", "shared")}
{product(256, "f16", "shared")}
{product(64, "f16", "registers")}
{product(128, "f16", "registers")}
{product(256, "f16", "registers")}
rcp.approx.ftz.f32 %0, %1; | =f y, f x
cvt.rn.f16x2.f32 %0, %1, %2; | =r both, f high, f low
cvt.f32.f16 %0, %1; | =f result, h x.bits
cvt.rn.bf16.f32 %0, %1; | =h result.bits, f x
cvt.rn.f16.f32 %0, %1; | =h result.bits, f x
"""


def statements(header: str) -> set[str]:
    """Each asm of a header, in the form of the lists above."""
    path = ROOT / "sslkern/backends/cuda/kernels" / header
    command = [*native_build().find_compiler(), "-E", "-P", "-x", "c++", "-D__CUDACC_RTC__", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    literals = r'((?:\s*"(?:\\.|[^"\\])*")+)'
    found = re.findall(rf"\basm(?: volatile)?\({literals}(.*?)\)\s*;", text, re.S)
    return {line for line in (shown(*each) for each in found) if line[0] != "|"}  # the empty are for the compiler


def shown(code: str, operands: str) -> str:
    code = " ".join("".join(re.findall(r'"(.*?)"', code)).replace("\\n", " ").split())
    code = re.sub(r"\{%0, (?:%\d+, ){7,}%(\d+)\}", r"{%0..%\1}", code)
    values = [f"{kind} {x}" for kind, x in re.findall(r'"(\+?=?[a-z])"\(((?:[^()]|\([^()]*\))*)\)', operands)]
    places = [re.fullmatch(r"\+f d\[([\d +]+)\]", value) for value in values]
    d = [sum(map(int, place[1].split("+"))) for place in places if place]
    if d:
        assert d == list(range(len(d)))
        values[: len(d)] = [f"+f d[0..{d[-1]}]"]
    return f"{code} | {', '.join(values)}".strip()


def lines(text: str) -> set[str]:
    return set(text.strip().splitlines())


def test_what_has_run_stays_as_it_ran():
    listed = lines(HAS_RUN) | lines(HAS_NOT_RUN)
    own = statements("hopper.h")  # which includes device.h
    assert own - listed == set(), "new: belongs in HAS_NOT_RUN and docs/gpu.md until it ran right on a chip"
    assert listed - own == set(), "is no longer there"
    assert lines(HAS_RUN).isdisjoint(lines(HAS_NOT_RUN))


def test_what_has_not_run_is_told():
    text = (ROOT / "docs/gpu.md").read_text()
    for of in "bf16", "f16":
        for n in 64, 128, 256:
            ran = [product(n, of, a) in lines(HAS_RUN) for a in ("shared", "registers")]
            words = ["ran" if has else "not yet" for has in ran]
            assert f"| `m64n{n}k16.f32.{of}.{of}` | {words[0]} | {words[1]} |" in text
    for line in lines(HAS_NOT_RUN):
        if "wgmma" not in line:
            assert f"`{line.split()[0]}`" in text
