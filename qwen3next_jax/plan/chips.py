"""The chips that a plan knows."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip can do, as published; `ici` is what a ring of collectives was seen to reach."""

    flops: float  # bfloat16 products a second
    hbm: float  # bytes that a program can use
    hbm_bandwidth: float  # bytes a second
    ici_bandwidth: float  # bytes a second of collectives
    clock: float  # cycles a second
    dimensions: int  # of its torus


_GIB = 2**30
CHIPS = {
    "v5p": Chip(459e12, 95.74 * _GIB, 2765e9, 180e9, 1.75e9, 3),
    "v5e": Chip(197e12, 15.75 * _GIB, 819e9, 60e9, 1.5e9, 2),
    "v6e": Chip(918e12, 31.25 * _GIB, 1640e9, 134e9, 1.75e9, 2),
}
