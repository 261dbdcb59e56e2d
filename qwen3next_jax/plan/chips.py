"""The chips that a plan knows, and the topologies that they form."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip's published figures; only `ici_bandwidth` of TPUs is what collectives reached."""

    flops: float  # bfloat16 operations a second
    hbm: float  # bytes of memory that a program can use
    hbm_bandwidth: float  # bytes a second
    ici_bandwidth: float  # bytes a second of collectives; of a GPU, over NVLink
    clock: float  # cycles a second
    dimensions: int  # of the topology: those of a TPU's torus; 1 for GPUs, their number
    network_bandwidth: float = 0.0  # bytes a second from a GPU to those of other hosts

    @property
    def is_gpu(self) -> bool:
        """Whether the chip is a GPU, for which the TPU compiler cannot compile."""
        return self.dimensions == 1


_GIB = 2**30
_BY_DEFAULT = 0.75  # share of a GPU's memory that JAX allocates by default
_GPUS_OF_A_HOST = 8
CHIPS = {
    "v5p": Chip(459e12, 95.74 * _GIB, 2765e9, 180e9, 1.75e9, 3),
    "v5e": Chip(197e12, 15.75 * _GIB, 819e9, 60e9, 1.5e9, 2),
    "v6e": Chip(918e12, 31.25 * _GIB, 1640e9, 134e9, 1.75e9, 2),
    "h100": Chip(989e12, _BY_DEFAULT * 80 * _GIB, 3350e9, 450e9, 1.98e9, 1, 50e9),
    "h200": Chip(989e12, _BY_DEFAULT * 141e9, 4800e9, 450e9, 1.98e9, 1, 50e9),
    "b200": Chip(2250e12, _BY_DEFAULT * 180e9, 7700e9, 900e9, 1.97e9, 1, 50e9),
}
_SIZES = {
    1: ("1", "2", "4", "8", "64", "512"),
    2: ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
}


def known_topologies(kind: str) -> str:
    """Some topologies of a chip, for messages."""
    return ", ".join(f"{kind}:{sizes}" for sizes in _SIZES[CHIPS[kind].dimensions])


def parse_topology(name: str) -> tuple[Chip, int]:
    """The chip, and the number of chips, of a topology such as "v5p:4x4x4" or "h100:8".

    Raises:
      ValueError: the topology is unknown; names some that are known.
    """
    kind, _, sizes = name.partition(":")
    if kind not in CHIPS:
        examples = (f"{kind}:{_SIZES[chip.dimensions][4]}" for kind, chip in CHIPS.items())
        raise ValueError(
            f"The topology {name!r} is of no known chip; give one such as {' or '.join(examples)}"
        )
    chip = CHIPS[kind]
    parts = sizes.split("x")
    if len(parts) != chip.dimensions or not all(p.isdigit() and int(p) > 0 for p in parts):
        counted = "one size" if chip.is_gpu else f"{chip.dimensions} sizes"
        counted += " of at least 1" if "0" in parts else ""
        raise ValueError(
            f"The topology {name!r} should have {counted}; known are {known_topologies(kind)}"
        )
    count = math.prod(map(int, parts))
    if chip.is_gpu and count > _GPUS_OF_A_HOST:
        # A collective over several hosts is limited by the network between them.
        chip = dataclasses.replace(chip, ici_bandwidth=chip.network_bandwidth)
    return chip, count
