"""Benchmarks run: at the least size, as nothing else notices what breaks them."""

import json
import os
import subprocess
import sys

import pytest
from launched import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("claims.py --contexts=64 --rounds=1 --measure=train", "points"),
        ("decode.py --prompt=16 --new=4 --rounds=1", "ours"),
        (
            "decode.py --prompt=16 --new=4 --rounds=1 --dtype=bfloat16 --vs=transformers",
            "ratio_tokens_per_second",
        ),
        ("train_step.py --forward --batch=1 --seq=64 --steps=1 --vs=transformers", "ratio"),
        ("ops.py --ops=delta_rule,causal_conv --tokens=64 --rounds=1", "ops"),
    ],
)
def test_a_benchmark_ends_with_one_json_object(arguments, told):
    result = subprocess.run(
        [sys.executable, *f"benchmarks/{arguments} --json".split()],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert result.returncode == 0, result.stderr
    assert told in json.loads(result.stdout.splitlines()[-1])
