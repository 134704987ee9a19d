"""Chains of partitions that tests of residency and of the simulator make up."""

from hypothesis import strategies as st

from movdc.compiler.residency import Chain
from movdc.runtime.bundle import Partition, TensorSpec

SLAB_BYTES = 7


def tensor(name: str, items: int = 25) -> TensorSpec:
    """A tensor of so many floats."""
    return TensorSpec(name=name, dtype="f32", shape=(items,))


def partition(
    index: int, held_bytes: int = 1000, workspace_bytes: int = 50, flops: int = 1000, items: int = 25
) -> Partition:
    """The partition at a place of a chain; each reads what the one before makes, the first one "x"."""
    return Partition(
        name=f"s.plain.{index}",
        program="programs/p.pte",
        method="forward",
        weights=(f"weights/{index}.ptd",),
        inputs=(tensor("x") if index == 0 else tensor(f"h{index - 1}", items),),
        outputs=(tensor(f"h{index}", items),),
        weight_bytes=held_bytes,
        held_bytes=held_bytes,
        load_bytes=held_bytes + 100,
        program_bytes=10 + index,
        workspace_bytes=workspace_bytes,
        planned_bytes=3 * (index % 3),
        flops=flops,
    )


def chained(partitions: list[Partition]) -> Chain:
    """Their chain."""
    return Chain.of(partitions, (tensor("x"),), SLAB_BYTES)


def uniform(count: int, held_bytes: int = 1000, flops: int = 1000) -> Chain:
    """Equal partitions."""
    return chained([partition(index, held_bytes, flops=flops) for index in range(count)])


CHAINS = st.lists(
    st.builds(lambda *sizes: sizes, st.integers(1, 3000), st.integers(0, 500), st.integers(0, 5000)),
    min_size=1,
    max_size=6,
).map(lambda sizes: chained([partition(index, *some) for index, some in enumerate(sizes)]))
