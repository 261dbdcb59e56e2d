"""Topologies are parsed, and unknown chips refused with those that are known."""

import pytest

from qwen3next_jax.plan.chips import CHIPS, parse_topology


def test_topologies_are_read_and_unknown_ones_name_known_ones():
    assert parse_topology("v5p:4x4x4") == (CHIPS["v5p"], 64)
    assert parse_topology("v6e:16x16") == (CHIPS["v6e"], 256)
    assert parse_topology("h100:8") == (CHIPS["h100"], 8)
    with pytest.raises(ValueError, match=r"give one such as v5p:4x4x4 or .* or h100:64"):
        parse_topology("v5q:4x4x4")
    with pytest.raises(ValueError, match="should have 3 sizes of at least 1; known are v5p:"):
        parse_topology("v5p:0x4x4")
    with pytest.raises(ValueError, match="should have 2 sizes; known are v6e:2x2"):
        parse_topology("v6e:4x4x4")
    with pytest.raises(ValueError, match="should have one size; known are h200:1, h200:2"):
        parse_topology("h200:8x8")


def test_collectives_over_several_hosts_of_gpus_are_as_fast_as_the_network():
    chip, count = parse_topology("h200:64")
    assert count == 64
    assert chip.ici_bandwidth == CHIPS["h200"].network_bandwidth < CHIPS["h200"].ici_bandwidth
    assert chip.is_gpu
    assert not parse_topology("v5p:4x4x4")[0].is_gpu
