"""The ahead-of-time gate: what it reads from assembly, what it lets pass, and two targets compiled for real."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sense_kernels
from sense_kernels.aot.__main__ import main
from sense_kernels.aot.assembly import amd_usage, load_bits, local_bytes, tensor_cores
from sense_kernels.aot.cases import KERNELS
from sense_kernels.aot.gate import Row, failures
from sense_kernels.roofline import MACHINES, MODELS, Work, decode_step_us, match_work, score_work

KERNEL = """
    x = tl.load(hidden + offs_t[:, None] * stride, mask=in_x, other=0.0)
    w = tl.load(
        weight + at_w, mask=in_w, other=0.0
    )
    bias = base
    total += tl.load(partials + at)
""".splitlines()

PTX = """
	.loc	1 2 12                          // _score_kernel.py:2:12
	cp.async.cg.shared.global [ %r32 + 0 ], [ %rd13 + 0 ], 0x10, %r33;
	@%p2 cp.async.ca.shared.global [ %r36 + 0 ], [ %rd15 + 0 ], 0x8, %r37;
	.loc	1 3 12                          // _score_kernel.py:3:12
	@%p1 ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	.loc	1 6 12                          // _score_kernel.py:6:12
	@%p1 ld.global.b32 { %r5 }, [ %rd2 + 0 ];
	.loc	1 7 12                          // _score_kernel.py:7:12
	@%p1 ld.global.cg.v2.b64 { %rd5, %rd6 }, [ %rd2 + 0 ];
	st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };
	wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, 1, 1, 1, 0, 1;
	mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1}, {%r1}, {%r2}, {%f1};
	tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r2, %p1;
	.file	1 "/kernels/_score_kernel.py"
"""

AMD = """
	.file	1 "/kernels" "_score_kernel.py"
	.loc	1 2 12                          ; _score_kernel.py:2:12
	buffer_load_dwordx4 v[0:3], v10, s[8:11], 0 offen
	buffer_load_ushort v4, v10, s[8:11], 0 offen
	.loc	1 3 12 is_stmt 1                ; _score_kernel.py:3:12
	global_load_dwordx2 v[6:7], v[8:9], off
	v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
  - .agpr_count:     4
    .private_segment_fixed_size: 12
    .sgpr_spill_count: 5
    .vgpr_count:     80
    .vgpr_spill_count: 2
"""

SASS = """
        /*5750*/                   STL.64 [R1+0x10], R22 ;         /* 0x0000101601007387 */
        /*5760*/                   STL [R1+0x18], R24 ;            /* 0x0000101601007387 */
        /*c360*/                   LDL.LU.128 R44, [R1] ;          /* 0x00000000012c7983 */
        /*c370*/                   LDL.U8 R48, [R1+0x10] ;         /* 0x0000100001307983 */
        /*c380*/                   LDG.E.128 R4, desc[UR4][R2] ;   /* 0x0000000402047981 */
"""

PASSES = Row(
    name="score few rows bf16 D4096 H64",
    kernel="score",
    variant="few rows",
    target="sm_90",
    dtype="bf16",
    D=4096,
    H=64,
    T=32,
    operands="bf16",
    registers=80,
    shared_bytes=65536,
    shared_limit=232448,
    tensor_core=("wgmma.m64n64k16.bf16",),
    vector_bits=128,
    stream_bits={"hidden": 128, "weight": 128},
)


def _source(path: str, line: int) -> str:
    assert path == "/kernels/_score_kernel.py"
    return KERNEL[line - 1] if line <= len(KERNEL) else ""


def test_every_kernel_has_cases_of_different_names() -> None:
    launchers = {name.removesuffix("_triton") for name in sense_kernels.__all__ if name.endswith("_triton")}
    assert set(KERNELS) == launchers
    names = [case.name for cases in KERNELS.values() for case in cases()]
    assert len(names) == len(set(names))


def test_loads_are_told_apart_by_the_tensor_they_read() -> None:
    assert load_bits(PTX, _source) == {"hidden": (64, 128), "weight": (128, 128), "": (32, 32), "partials": (128, 128)}
    assert load_bits(AMD, _source) == {"hidden": (16, 128), "weight": (64, 64)}


def test_tensor_core_instructions_are_found_by_shape_and_operands() -> None:
    assert tensor_cores(PTX) == ("mma.sync.m16n8k8.tf32", "tcgen05.mma.kind::f16", "wgmma.m64n16k16.bf16")
    assert tensor_cores(AMD) == ("v_mfma_f32_16x16x16_bf16",)


def test_spills_are_counted_in_bytes() -> None:
    assert local_bytes(SASS) == (12, 17)
    assert amd_usage(AMD) == (80, 12, 12, 5)
    with pytest.raises(ValueError, match="vgpr_spill_count"):
        amd_usage(AMD.replace("vgpr_spill_count", "vgpr_spills"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"spills": 24}, "spills 24 bytes"),
        ({"shared_bytes": 232449}, "232449 bytes of shared memory, sm_90 has 232448"),
        ({"tensor_memory_columns": 513}, "513 columns of tensor memory"),
        ({"tensor_core": ()}, "no tensor-core product of bf16 operands, found none"),
        ({"tensor_core": ("mma.sync.m16n8k8.tf32",)}, "no tensor-core product of bf16 operands, found mma.sync"),
        ({"dtype": "fp32", "operands": "fp32"}, "no tensor-core product of fp32 operands"),
        ({"target": "gfx942", "dtype": "fp32", "operands": "fp32", "tensor_core": ()}, "no tensor-core product"),
        ({"dtype": "fp16", "operands": "fp16"}, "no tensor-core product of fp16 operands"),
        ({"stream_bits": {"hidden": 128, "weight": 64}}, "weight is loaded 64 bits at a time"),
        ({"stream_bits": {"hidden": 0, "weight": 128}}, "no load of hidden found"),
        ({"error": "PTXASError: out of memory"}, "does not compile: PTXASError"),
    ],
)
def test_the_gate_names_what_is_wrong(change: dict[str, Any], reason: str) -> None:
    (found,) = failures(replace(PASSES, **change))
    assert reason in found


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"shared_bytes": 232448},
        {"target": "sm_100", "tensor_core": ("tcgen05.mma.kind::f16",)},
        {"dtype": "fp32", "operands": "fp32", "tensor_core": ("wgmma.m64n64k8.tf32",)},
        {"target": "gfx942", "dtype": "fp32", "operands": "fp32", "tensor_core": ("v_mfma_f32_16x16x4_f32",)},
        {"D": 128, "tensor_core": ()},
        {"target": "gfx942", "scalar_spills": 3},
        {"operands": None, "tensor_core": ()},
    ],
)
def test_the_gate_lets_pass_what_is_right_or_exempt(change: dict[str, Any]) -> None:
    assert failures(replace(PASSES, **change)) == []


def test_every_reason_is_given() -> None:
    assert (
        len(failures(replace(PASSES, spills=8, tensor_core=(), shared_bytes=1 << 20, stream_bits={"hidden": 32}))) == 4
    )


def test_work_is_counted_from_the_shapes() -> None:
    work = score_work(32, 4096, 60, "bf16", "cuda", residual=True)
    assert work.bytes == 2 * 32 * 4096 * 2 + 4096 * 64 * 4 + 4 * 60 + 4 * 32 * 60
    assert work.half == 2 * 2 * 32 * 4096 * 64
    assert score_work(32, 4096, 60, "fp32", "cuda").single == 3 * 2 * 32 * 4096 * 64
    assert score_work(32, 4096, 60, "fp32", "hip").single == 2 * 32 * 4096 * 64
    assert match_work(8, 64, 1000, "bf16", "int8").bytes == 1000 * (64 + 4) + 8 * (2 * 64 + 12)


def test_a_floor_is_the_slower_of_memory_and_compute() -> None:
    machine = MACHINES["sm_90"]
    assert Work(3_350_000).floor_us(machine) == pytest.approx(1.0)
    assert Work(3_350_000, half=1_978_800_000).floor_us(machine) == pytest.approx(2.0)
    small, large = MODELS
    assert decode_step_us(small, 1, machine) == decode_step_us(small, 32, machine) == pytest.approx(4794, rel=1e-3)
    assert decode_step_us(small, 1024, machine) == pytest.approx(2 * 8.03e9 * 1024 / 989.4e6)
    assert decode_step_us(large, 1, machine) / decode_step_us(small, 1, machine) == pytest.approx(70.6 / 8.03)


def _python(tmp_path: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run Python as on a machine where nobody has set ``TRITON_INTERPRET``."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)


def test_small_variants_pass_on_two_targets(tmp_path: Path) -> None:
    kernels = ("score few rows bf16 D576 H16", "score many rows fp32 D576 H16", "patch_rows dots fp16 D576 H16")
    arguments = [
        *("--target", "sm_80", "--target", "gfx942", "--workers", "1"),
        *(f"--kernel={name}" for name in kernels),
    ]
    done = _python(tmp_path, "-m", "sense_kernels.aot", "--json", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["failed"] == []
    rows = {(row["name"], row["target"]): row for row in report["kernels"]}
    assert set(rows) == {(name, target) for name in kernels for target in ("sm_80", "gfx942")}
    for row in rows.values():
        assert row["registers"] > 0
        assert row["spills"] == 0
        assert 0 < row["shared_bytes"] <= row["shared_limit"]
        assert min(row["stream_bits"].values()) >= row["vector_bits"] == 128
        assert row["bytes"] > 0
        assert row["flops"] > 0
        assert min(row["roofline_us"].values()) > 0
    assert rows[kernels[0], "sm_80"]["tensor_core"] == ["mma.sync.m16n8k16.bf16"]
    assert rows[kernels[0], "gfx942"]["tensor_core"][0].endswith("bf16")
    assert list(rows[kernels[0], "gfx942"]["roofline_us"]) == ["MI300X"]


def test_the_table_has_a_cell_under_every_heading(tmp_path: Path) -> None:
    name = "patch_rows dots fp16 D576 H16"
    done = _python(tmp_path, "-m", "sense_kernels.aot", "--target", "gfx942", "--workers", "1", f"--kernel={name}")
    assert done.returncode == 0, done.stdout + done.stderr
    headings, cells = (
        [cell.strip() for cell in line.replace("┃", "│").split("│")] for line in _lines(done.stdout, name)
    )
    row = dict(zip(headings, cells, strict=True))
    assert row["variant"] == name
    assert row["spills"] == row["scalar"] == "0"
    assert row["load bits"] == "128"


def _lines(text: str, name: str) -> tuple[str, str]:
    """Return the line of the headings and that of a variant."""
    found = [line for line in text.splitlines() if "variant" in line or name in line]
    return found[0], found[1]


UNALIGNED = """
from dataclasses import replace
from sense_kernels import score_triton
from sense_kernels.aot.case import empty
from sense_kernels.aot.cases import KERNELS
from sense_kernels.aot.gate import row_of
from sense_kernels.aot.specialise import compile_specialisation, specialisations

def launch(first):
    hidden, weight = empty(33 * 576, dtype="bf16")[first : first + 32 * 576].view(32, 576), empty(576, 16, dtype="bf16")
    no_mlp = empty(0, 0), empty(0)
    score_triton(hidden, weight, empty(16), *no_mlp, 1e-6, empty(32, 16), None, weight)

case = next(KERNELS["score"]())
for first in (0, 8, 1):
    (found,) = specialisations(lambda: launch(first), "sm_80")
    print(row_of(case, "sm_80", compile_specialisation(found, "sm_80")).failures)
"""


def test_a_pointer_off_16_bytes_would_be_noticed(tmp_path: Path) -> None:
    done = _python(tmp_path, "-c", UNALIGNED)
    assert done.stdout.splitlines() == ["[]", "[]", "['hidden is loaded 16 bits at a time']"], done.stderr


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sense_kernels.aot.__main__.INTERPRETED", True)
    assert main(["--json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "TRITON_INTERPRET is set" in printed.err
