"""What the kernels of a compiled GPU program read and write (benchmarks/gpu_traffic.py)."""

import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu_traffic

# A loop of 3 runs: a product, an attention kernel, a fusion that writes a sum into a stack, a cast.
PROGRAM = """\
HloModule step

%sliced (p.0: bf16[3,8], p.1: s32[], p.2: bf16[8]) -> bf16[3,8] {
  %p.0 = bf16[3,8]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %p.2 = bf16[8]{0} parameter(2)
  %one = bf16[1,8]{1,0} dynamic-slice(%p.0, %p.1, %p.1), dynamic_slice_sizes={1,8}
  %flat = bf16[8]{0} bitcast(%one)
  %sum = bf16[8]{0} add(%flat, %p.2)
  %row = bf16[1,8]{1,0} bitcast(%sum)
  ROOT %stack = bf16[3,8]{1,0} dynamic-update-slice(%p.0, %row, %p.1, %p.1)
}

%cast (p.3: bf16[8]) -> f32[8] {
  %p.3 = bf16[8]{0} parameter(0)
  ROOT %wide = f32[8]{0} convert(%p.3)
}

%body (state: (s32[], bf16[3,8], bf16[8], bf16[8,8])) -> (s32[], bf16[3,8], bf16[8], bf16[8,8]) {
  %state = (s32[], bf16[3,8], bf16[8], bf16[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %s = bf16[3,8]{1,0} get-tuple-element(%state), index=1
  %x = bf16[8]{0} get-tuple-element(%state), index=2
  %w = bf16[8,8]{1,0} get-tuple-element(%state), index=3
  %y = bf16[8]{0} custom-call(%x, %w), custom_call_target="__cublas$lt$matmul"
  %a = bf16[8]{0} custom-call(%y), custom_call_target="mosaic_gpu_v2"
  %t = bf16[8]{0} custom-call(%a), custom_call_target="another"
  %n = bf16[3,8]{1,0} fusion(%s, %i, %t), kind=kLoop, calls=%sliced
  %c = f32[8]{0} fusion(%a), kind=kLoop, calls=%cast
  ROOT %next = (s32[], bf16[3,8], bf16[8], bf16[8,8]) tuple(%i, %n, %a, %w)
}

%condition (state.1: (s32[], bf16[3,8], bf16[8], bf16[8,8])) -> pred[] {
  %state.1 = (s32[], bf16[3,8], bf16[8], bf16[8,8]) parameter(0)
  %j = s32[] get-tuple-element(%state.1), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%j, %three), direction=LT
}

ENTRY %main (start: (s32[], bf16[3,8], bf16[8], bf16[8,8])) -> (s32[], bf16[3,8]) {
  %start = (s32[], bf16[3,8], bf16[8], bf16[8,8]) parameter(0)
  ROOT %loop = (s32[], bf16[3,8]) while(%start), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(
    ("kind", "kernels", "size"),
    [
        ("products", 3, 3 * (16 + 128 + 16)),
        ("attention", 3, 3 * (16 + 16)),
        # Another library's kernel; then read are a slice of the stack, the index and the new row,
        # and one row is written. The cast reads all of its operand. The condition's comparison is
        # a kernel too: 4 runs count as 3.
        ("others", 12, 3 * (16 + 16 + 16 + 4 + 16 + 16 + 16 + 32 + 4 + 4 + 1)),
    ],
)
def test_traffic_counts_what_a_loop_reads_and_writes(kind, kernels, size):
    found = {traffic.kind: traffic for traffic in gpu_traffic.count_traffic(PROGRAM)}[kind]
    assert (found.kernels, found.bytes) == (kernels, size)
