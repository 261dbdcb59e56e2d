"""Estimates the time of a compiled TPU program from its text.

- Fusions have the compiler's own estimate in cycles, which is multiplied by the trip counts of
  their loops.
- Pallas kernels have operations and bytes instead, if their authors gave a cost estimate. They are
  taken to reach half of either peak, and the slower of the two counts. Kernels without a cost
  estimate are listed: an estimate that leaves work out must not look like one that doesn't.
- Collectives take the bytes of their larger side over the speed of the links.
- Gathers, sorts and copies to another layout have no cycles. They are not in the estimate, but
  listed with the bytes they write and the time that memory traffic takes.

The text does not say whether collectives overlap with computation: the true time lies between the
larger of the two and their sum. Nor does it have the trip counts of loops of dynamic length: they
count once and are listed too.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

from qwen3next_jax.plan.chips import Chip

_WIDTHS = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2,
    "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8,
}  # fmt: skip
_KERNEL_EFFICIENCY = 0.5
_COLLECTIVE = re.compile(
    r"= (\(?[^=]*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|"
    r"ragged-all-to-all)(-start)?\("
)
# Instructions that move data and may have no cycles, except bookkeeping and asynchronous copies.
_MOVES = re.compile(
    r"= (\(.*?\)|\S+) (fusion|gather|scatter|sort|reshape|concatenate|dynamic-update-slice)\("
)
_KERNEL = 'custom_call_target="tpu_custom_call"'


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The estimate of one step on one chip."""

    fusion_seconds: float
    kernel_seconds: float
    collective_seconds: float
    collective_bytes: dict[str, float]  # by kind
    dominant: list[tuple[str, float]]  # names and seconds of the longest operations
    uncosted: list[str]  # operations that are not in the estimate

    @property
    def step_seconds(self) -> tuple[float, float]:
        """With all communication hidden behind computation, and with none."""
        compute = self.fusion_seconds + self.kernel_seconds
        return max(compute, self.collective_seconds), compute + self.collective_seconds


def estimate(text: str, chip: Chip) -> Estimate:
    """Estimates the time of a program.

    Args:
      text: the optimised program, `compiled.as_text()`.
      chip: the chip that it is compiled for.
    """
    computations, entry = _computations(text)
    runs, unknown = _runs(computations, entry)
    fusions: dict[str, float] = defaultdict(float)  # seconds, by label
    kernels: dict[str, float] = defaultdict(float)  # seconds, by label
    sent: dict[str, float] = defaultdict(float)  # bytes, by kind of collective
    moved: dict[str, float] = defaultdict(float)  # bytes written in an unknown time, by label
    uncosted = Counter({f"loop of unknown length: {label}": 1 for label in unknown})
    for name, times in runs.items():
        for line in computations.get(name, ()):
            if cycles := re.search(r'estimated_cycles":"?(\d+)', line):
                fusions[_label(line)] += times * int(cycles[1]) / chip.clock
            elif move := _MOVES.search(line):
                moved[_label(line)] += times * _bytes(move[1])
            if collective := _collective(line):
                kind, size = collective
                sent[kind] += times * size
            if _KERNEL in line:
                seconds = _kernel_seconds(line, chip)
                if seconds is None:
                    uncosted[_label(line)] += times
                else:
                    kernels[_label(line)] += times * seconds
            elif re.search(r'custom_call_target="(InvertDiag|Triangular)', line):
                uncosted["triangular solve"] += times
    fusion_seconds, kernel_seconds = sum(fusions.values(), 0.0), sum(kernels.values(), 0.0)

    def largest_first(values: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
        return sorted(values, key=lambda item: -item[1])

    for label, written in largest_first(moved.items()):
        needed = 2 * written / chip.hbm_bandwidth
        if needed > (fusion_seconds + kernel_seconds) / 1000:
            needs = f"{written / 1e9:.1f} GB written, {needed:.3f} s of memory traffic"
            uncosted[f"{label}: {needs}"] += 1
    return Estimate(
        fusion_seconds=fusion_seconds,
        kernel_seconds=kernel_seconds,
        collective_seconds=sum(sent.values()) / chip.ici_bandwidth,
        collective_bytes=dict(sent),
        dominant=largest_first([*fusions.items(), *kernels.items()])[:12],
        uncosted=[f"{name} ({n} times)" if n > 1 else name for name, n in uncosted.most_common()],
    )


def _kernel_seconds(line: str, chip: Chip) -> float | None:
    """The time of a Pallas kernel by its stated costs; None if it states none."""
    cost = re.search(
        r'"cost_estimate":\{"flops":"(\d+)","transcendentals":"\d+","bytes_accessed":"(\d+)"', line
    )
    if not cost:
        return None
    operations, moved = map(int, cost.groups())
    return max(operations / chip.flops, moved / chip.hbm_bandwidth) / _KERNEL_EFFICIENCY


def _collective(line: str) -> tuple[str, float] | None:
    """The kind of a collective and the bytes of its larger side; None for other instructions."""
    found = _COLLECTIVE.search(line)
    if not found:
        return None
    shapes, kind, starts = found.groups()
    # A reduce-scatter's larger side is its input; an async start lists both sides.
    size = _bytes(shapes) * (_group(line) if kind == "reduce-scatter" else 1)
    return kind, size / (2 if starts else 1)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The instructions of each computation, each on one line, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$", line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}") and not line.startswith("}}"):
            current = None
        elif current is not None:
            if re.match(r"\s+(ROOT )?%?[\w.\-]+ = ", line):
                current.append(line)
            elif current:
                current[-1] += line
    return computations, entry


def _runs(computations: dict[str, list[str]], entry: str) -> tuple[Counter[str], list[str]]:
    """How often each computation runs in a step, and the loops of unknown trip count."""
    runs: Counter[str] = Counter()
    unknown: list[str] = []

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for line in computations.get(name, ()):
            if " while(" in line:
                trips = _trips(computations, line)
                if not trips:
                    unknown.append(_label(line))
                visit(_named("body", line)[0], times * (trips or 1))
            elif " conditional(" in line:
                branches = re.search(r"branch_computations=\{([^}]*)\}", line)
                names = branches[1].split(",") if branches else []
                names = names or _named("true_computation", line) + _named(
                    "false_computation", line
                )
                for branch in names:
                    visit(branch.strip().lstrip("%"), times)
            elif " call(" in line:
                for callee in _named("to_apply", line):
                    visit(callee, times)
            elif "async-start" in line or " call-start(" in line:
                for callee in _named("calls", line) + _named("called_computations", line):
                    visit(callee, times)

    visit(entry, 1)
    return runs, unknown


def _trips(computations: dict[str, list[str]], loop: str) -> int:
    """The compiler's trip count of a loop, else the largest constant in its condition, else 0."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop):
        return int(known[1])
    lines = list(computations.get(_named("condition", loop)[0], ()))
    for line in tuple(lines):
        for callee in _named("calls", line):
            lines += computations.get(callee, [])
    return max(
        (int(n) for line in lines for n in re.findall(r"s32\[\][^=]*constant\((\d+)\)", line)),
        default=0,
    )


def _named(key: str, line: str) -> list[str]:
    return re.findall(rf"{key}=\{{?%?([\w.\-]+)", line)


def _bytes(shapes: str) -> int:
    total = 0
    for dtype, sizes in re.findall(r"\b(\w+)\[([\d,]*)\]", shapes):
        size = _WIDTHS.get(dtype, 0)
        for n in filter(None, sizes.split(",")):
            size *= int(n)
        total += size
    return total


def _group(line: str) -> int:
    """Devices in one group of a collective, in any notation of `replica_groups`."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        ways = 1
        for axis in re.findall(r"'([^']+)'", mesh[2]):
            ways *= int(sizes.get(axis, 1))
        return ways
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    return 1


def _label(line: str) -> str:
    """An instruction's origin, with numbers replaced so that layers are counted together."""
    name = re.search(r'op_name="([^"]*)"', line)
    return re.sub(r"\d+", "#", name[1] if name else line.split()[0])
