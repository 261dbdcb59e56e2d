"""Costs read from compiled HLO text: collectives, loops and kernels."""

import pytest

from qwen3next_jax.plan.chips import Chip
from qwen3next_jax.plan.hlo import estimate

CHIP = Chip(flops=1e9, hbm=1e9, hbm_bandwidth=1e9, ici_bandwidth=1e6, clock=1e6, dimensions=2)

# A loop of 3 fusions in a loop of 5, a kernel with an estimate and one without, a reduce-scatter
# over 4 devices, an asynchronous all-gather, whose text lists operand and result, and a gather of a
# million bytes, to which the compiler gives no cycles.
PROGRAM = """HloModule jit_step

%inner_body (p: s32[]) -> s32[] {
  %fusion.1 = f32[8]{0} fusion(%p), kind=kLoop, metadata={op_name="layer_1/mul"}, \
backend_config={"estimated_cycles":"1000"}
}

%inner_condition (p: s32[]) -> pred[] {
  %constant.3 = s32[] constant(3)
}

%outer_body (p: s32[]) -> s32[] {
  %while.2 = s32[] while(%p), condition=%inner_condition, body=%inner_body
}

%outer_condition (p: s32[]) -> pred[] {
  %p = s32[] parameter(0)
}

ENTRY %main (p: s32[]) -> s32[] {
  %while.1 = s32[] while(%p), condition=%outer_condition, body=%outer_body, \
backend_config={"known_trip_count":{"n":"5"}}
  %kernel.1 = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", \
metadata={op_name="good_kernel"}, backend_config={"custom_call_config":{"cost_estimate":\
{"flops":"2000000","transcendentals":"0","bytes_accessed":"500"}}}
  %kernel.2 = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", \
metadata={op_name="silent_kernel"}
  %gather.1 = bf16[500,1000]{1,0} fusion(%p), kind=kCustom, metadata={op_name="layer_7/gather"}
  %reduce-scatter.1 = f32[100]{0} reduce-scatter(%p), replica_groups=[16,4]<=[64], dimensions={0}
  %all-gather-start.1 = (bf16[100]{0}, bf16[300]{0}) all-gather-start(%p), dimensions={0}
}
"""


def test_loops_kernels_and_collectives_add_up():
    found = estimate(PROGRAM, CHIP)
    assert found.fusion_seconds == pytest.approx(3 * 5 * 1000 / CHIP.clock)
    # Half of peak: 2e6 operations at 1e9 a second take 2 ms, taken twice.
    assert found.kernel_seconds == pytest.approx(4e-3)
    assert found.collective_bytes == {"reduce-scatter": 4 * 400, "all-gather": (200 + 600) / 2}
    assert found.collective_seconds == pytest.approx(2000 / CHIP.ici_bandwidth)
    assert found.step_seconds == pytest.approx((0.019, 0.021))
    assert dict(found.dominant) == pytest.approx({"layer_#/mul": 0.015, "good_kernel": 0.004})
    assert found.uncosted == [
        "silent_kernel",
        "layer_#/gather: 0.0 GB written, 0.002 s of memory traffic",
    ]
