"""The numbers of On-device Sora (arXiv 2502.04363): its schedule simulated, then our plan on the same device.

    python benchmarks/paper.py

Seconds of loads and runs are those of benchmarks/paper.toml, one profile for each set of measurements; everything else
is simulated. "off" marks what no profile of the same device can give: there the paper's own figures contradict.
"""

from __future__ import annotations

from dataclasses import replace

from paper_case import (
    BLOCK_BYTES,
    SETTLED,
    USABLE_BYTES,
    Profile,
    pair_fit,
    pass_s,
    passes,
    profiles,
    sequential_s,
    variant_with,
)
from rich.console import Console
from rich.table import Table

from movdc.compiler.bounds import call_bound_s
from movdc.compiler.levels import Level, levels
from movdc.runtime.simulate import Call, Simulator

CLOSE = 0.03
STEPS = 30
MERGED_256, MERGED_192 = 1 / 1.285, 1 / 1.281  # of the FLOPs of a plain step
VAE_CHUNKS, VAE_BATCHES, VAE_PARTS = 4, 17, 9
COLD_S = 38.0  # that the first pass takes more: 67 s instead of 29 in figure 12


Row = tuple[str, float, float, str]  # what, the paper's, ours, what is to be said


def paper_rows() -> list[Row]:
    """Each figure of the paper that a schedule decides, with the one that is simulated from its profile."""
    known = profiles()
    stdit, bare, t5 = known["b2-stdit"], known["b2-stdit-no-overhead"], known["b2-t5"]
    concurrent_s = pass_s(stdit, stdit.rates(), 0)
    dynamic_s = pass_s(stdit, stdit.rates(), stdit.pinned)
    least_overlap = "its per-pass figures sum to 894 s, and 30 x 29 s + the cold start to 908"
    rows = [
        ("B.2 pass, one after the other", 29.0, sequential_s(stdit), ""),
        ("B.2 pass, concurrent (eq. 8)", 23.0, concurrent_s, ""),
        ("B.2 pass, without overhead", 23.0, pass_s(bare, bare.rates(), 0), ""),
        ("B.2 pass, 8 blocks stay (eq. 9)", 22.43, dynamic_s, ""),
        ("B.2 less by dynamic loading, 30 passes", 17.1, STEPS * (concurrent_s - dynamic_s), ""),
        ("B.2 30 passes, one after the other", 1000.0, STEPS * sequential_s(stdit) + COLD_S, least_overlap),
        ("B.2 30 passes, concurrent", 750.0, sequential_s(stdit) + COLD_S + (STEPS - 1) * concurrent_s, ""),
        ("B.2 T5, one after the other", 164.0, sequential_s(t5), ""),
        ("B.2 T5, concurrent", 137.0, _once_s(t5), ""),
        ("table 1 T5", 110.5, sequential_s(t5), "B.2 measures 164 s for the same encoder; table 5 leaves about 50 s"),
        ("table 1 STDiT pass", 35.37, sequential_s(stdit), "B.2 measures 29 s"),
    ]
    wide, small = known["table5-256"], known["table5-192"]
    stays = "with 8 blocks that stay, loads alone would fall by 5.7 s (256) and 5.4 s (192): none seem to"
    rows += [
        ("table 5, 256: pass", 35.62, sequential_s(wide), ""),
        ("table 5, 256: merged", 32.18, sequential_s(wide, MERGED_256), ""),
        ("table 5, 256: concurrent", 31.59, pass_s(wide, wide.rates(), 0), "fitted; " + stays),
        ("table 5, 256: both", 28.41, pass_s(wide, wide.rates(), 0, MERGED_256), ""),
        ("table 5, 192: pass", 24.42, sequential_s(small), ""),
        ("table 5, 192: merged", 23.20, sequential_s(small, MERGED_192), ""),
        ("table 5, 192: concurrent", 18.89, pass_s(small, small.rates(), 0), ""),
        (
            "table 5, 192: both",
            18.34,
            pass_s(small, small.rates(), 0, MERGED_192),
            "loads bound both: merging has no part",
        ),
    ]
    return rows + _step_rows()


def _once_s(profile: Profile) -> float:
    """A stage that runs once: the first load hides behind nothing."""
    row = levels(profile.chain(), profile.machine(), "once", 1)[-1].row
    return passes(profile.chain(), profile.rates(), row, 1)[0]


def _step_rows() -> list[Row]:
    """Tables 7 and 8, where steps alone are counted: one figure of each from the others."""
    fixed_s, step_s = pair_fit([(270, 262.03), (159, 165.15)])
    rest_s, plain_s = pair_fit([(50, 2434.64), (26, 1325.08)])
    merged_s = (1644.94 - rest_s - 25 * plain_s) / 25
    h100_s = 1653 / 50
    h100_merged_s = (1073 - 25 * h100_s) / 25
    small_fixed_s, small_step_s = pair_fit([(270, 48.88), (159, 30.54)])
    return [
        ("table 7 Pyramidal Flow, 640x384 from 1280x768", 30.54, 48.88 * (fixed_s + 159 * step_s) / 262.03, ""),
        ("table 7 fixed part in steps, 640x384", fixed_s / step_s, small_fixed_s / small_step_s, "not the steps alone"),
        ("table 7 HunyuanVideo, both", 952.34, rest_s + 13 * (plain_s + merged_s), "26 evaluations, 13 merged"),
        ("table 8 LPL (25/50)", 863.0, 26 * h100_s, ""),
        ("table 8 TDTM (12/25) + LPL", 585.0, 12 * h100_merged_s + 14 * h100_s, ""),
    ]


def our_rows() -> list[tuple[str, str, str, str, str, str]]:
    """Our plan on the same devices: what, the paper's way, ours, both bounds, by what."""
    rows = []
    for name in ("b2-stdit", "b2-stdit-no-overhead", "table5-256", "table5-192"):
        profile = profiles()[name]
        best = _best(profile)
        bounds_s = lanes_s(profile, best), call_bound_s(profile.chain(), profile.rates(), USABLE_BYTES)
        theirs_s = pass_s(profile, profile.rates(), profile.pinned)
        shown = (f"{bound_s:.2f} s ({abs(best.call_s / bound_s - 1):.1%} above)" for bound_s in bounds_s)
        why = f"{len(best.row.pinned)} of {profile.blocks} stay, {best.row.prefetch} ahead"
        rows.append((f"{name}: settled pass", f"{theirs_s:.2f} s", f"{best.call_s:.2f} s", *shown, why))
    return rows + [(what, theirs, ours, "", "", why) for what, theirs, ours, why in _other_rows()]


def lanes_s(profile: Profile, level: Level) -> float:
    """max(loads of what does not stay, runs) of a settled pass: the lanes as if neither slowed the other."""
    loads_s = (profile.blocks - len(level.row.pinned)) * profile.load_s
    return max(loads_s, profile.blocks * profile.run_s)


def near_lanes(profile: Profile) -> Level:
    """The level of least memory whose pass is within CLOSE of max(loads, runs)."""
    found = levels(profile.chain(), profile.machine(), "per_step", STEPS)
    return next(one for one in found if one.call_s <= (1 + CLOSE) * lanes_s(profile, one))


def contention_note() -> str:
    """Why no plan for B.2 is within CLOSE of max(loads, runs) in the paper's memory."""
    profile = profiles()["b2-stdit"]
    best, near = _best(profile), near_lanes(profile)
    assert isinstance(profile.overhead_s, float)
    loaded = profile.blocks - len(best.row.pinned)
    lost_s = loaded * profile.overhead_s / profile.blocks
    return (
        f"B.2: {profile.blocks} loads take {profile.overhead_s:.1f} s from the runs beside them (the paper's alpha). "
        f"Of the {loaded} that are left that is {lost_s:.2f} s in any order, on top of {lanes_s(profile, best):.2f} s. "
        f"Within {CLOSE:.0%} of max(loads, runs) {len(near.row.pinned)} blocks have to stay, which takes "
        f"{near.row.needs_bytes / 1e9:.2f} GB; there are {USABLE_BYTES / 1e9:.1f} GB."
    )


def _other_rows() -> list[tuple[str, str, str, str]]:
    rows = []
    profile = profiles()["b2-stdit"]
    chain, rates, best = profile.chain(), profile.rates(), _best(profile)
    seconds = passes(chain, rates, best.row, STEPS)
    theirs_s = sequential_s(profile) + (STEPS - 1) * pass_s(profile, rates, profile.pinned)
    rows.append(("b2-stdit: first pass", f"{sequential_s(profile):.2f} s", f"{seconds[0]:.2f} s", "overlapped too"))
    rows.append(("b2-stdit: 30 passes", f"{theirs_s:.0f} s", f"{sum(seconds):.0f} s", "without the cold start"))
    # The same 8 blocks: what spreading them and loading across passes bring.
    names = tuple(f"blocks.plain.{index * 28 // 8}" for index in range(8))
    slow = replace(profile, load_s=1.5, overhead_s=0.0)  # where loads bound a pass
    first = passes(slow.chain(), slow.rates(), best.row.model_copy(update={"pinned": names}), SETTLED)[-2]
    theirs_s = pass_s(slow, slow.rates(), 8)
    rows.append(("loads of 1.5 s, 8 stay", f"{theirs_s:.2f} s", f"{first:.2f} s", "spread, loaded across passes"))
    once_s = _once_s(profiles()["b2-t5"])
    rows.append(("b2-t5", "137 s", f"{once_s:.1f} s", "its loads; a prompt that was seen before costs none"))
    loads = vae_loads()
    theirs = VAE_PARTS * (VAE_CHUNKS + VAE_BATCHES)
    rows.append(("loads of the VAE", str(theirs), str(loads), "parts stay from chunk to chunk"))
    rows.append(("weights of both variants", "9.0 GiB", "4.5 GiB", "one file for both (docs/bundle.md)"))
    return rows


def _best(profile: Profile) -> Level:
    """The level that the paper's memory allows."""
    machine = profile.machine()
    found = levels(profile.chain(), machine, "per_step", STEPS)
    return [one for one in found if one.row.needs_bytes <= machine.budget_bytes][-1]


def vae_loads() -> int:
    """Loads of the decoder's 9 + 9 parts, 0.86 GB in all, by our plan in the paper's memory."""
    count = 0
    for calls, size_bytes in ((VAE_CHUNKS, 661 * 10**6), (VAE_BATCHES, 198 * 10**6)):
        profile = Profile(VAE_PARTS, 0.3, 0.3, 0.0, 0, "")
        chain = profile.chain(size_bytes // VAE_PARTS)
        machine = profile.machine()
        row = [
            one.row for one in levels(chain, machine, "per_chunk", calls) if one.row.needs_bytes <= machine.budget_bytes
        ]
        simulator = Simulator({one.name: one for one in chain.partitions}, 0, machine.rates, row[-1].needs_bytes)
        variant = variant_with(chain, row[-1])
        simulator.run([Call("vae", variant, again=index + 1 < calls) for index in range(calls)])
        count += sum(one.what == "load" for one in simulator.events)
    return count


def main() -> None:
    """Print both tables."""
    console = Console(width=170)
    table = Table(title=f"the paper's figures, and its schedule simulated; blocks of {BLOCK_BYTES / 1e6:.0f} MB")
    for column in ("figure", "paper", "simulated", "difference", ""):
        table.add_column(column, justify="left" if column in ("figure", "") else "right")
    for what, theirs, ours, note in paper_rows():
        off = ours / theirs - 1
        table.add_row(
            what,
            f"{theirs:.2f}",
            f"{ours:.2f}",
            f"{round(off, 3) + 0.0:+.1%}{'' if abs(off) <= CLOSE else ' off'}",
            note,
        )
    console.print(table)
    table = Table(title="our plan in 3.3 GB on the same device")
    for column in ("", "paper's way", "ours", "max(loads, runs)", "bound with contention", "by what"):
        table.add_column(column, justify="left" if column in ("", "by what") else "right")
    for row in our_rows():
        table.add_row(*row)
    console.print(table)
    console.print(contention_note(), highlight=False)
    for name, profile in profiles().items():
        console.print(f"{name}: {profile.source}", highlight=False)


if __name__ == "__main__":
    main()
