"""The plan's command with a stand-in for the TPU compiler.

    python tests/tpu_answers.py FIRST [options of the plan]

The stand-in gives its answers from number FIRST on. Answer 0 is that the step is too large; each
later answer is a faster step than the one before.
"""

import itertools
import runpy
import sys

from qwen3next_jax.plan import hlo, tpu

numbers = itertools.count(int(sys.argv.pop(1)))


def compile_step(config, topology):
    number = next(numbers)
    if number == 0:
        raise tpu.OutOfMemoryError("used 120G of 96G")
    took = hlo.Estimate(10.0 - number, 0.0, 0.0, {}, [], [])
    return tpu.Compiled(seconds=1.0, memory={"temporary": 1e9}, estimate=took, text="")


tpu.compile_step = compile_step
runpy.run_module("qwen3next_jax.plan", run_name="__main__", alter_sys=True)
