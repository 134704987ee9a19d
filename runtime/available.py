"""How much memory the system has left for this process."""

from __future__ import annotations

from pathlib import Path

_UNKNOWN_BYTES = 1 << 62  # where the system does not say


def available_bytes() -> int:
    """What can be taken without swapping, within the limits of the control groups that this process is in."""
    least_bytes = _UNKNOWN_BYTES
    for line in _lines(Path("/proc/meminfo")):
        key, value, *_ = line.split()
        if key == "MemAvailable:":
            least_bytes = int(value) * 1024
    for line in _lines(Path("/proc/self/cgroup")):  # ID:CONTROLLERS:PATH
        _, controllers, group = line.split(":", 2)
        if controllers == "memory":
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            least_bytes = min(least_bytes, _groups_leave(Path("/sys/fs/cgroup/memory"), group, *names))
        elif not controllers:
            names = ("memory.max", "memory.current", "")
            least_bytes = min(least_bytes, _groups_leave(Path("/sys/fs/cgroup"), group, *names))
    return least_bytes


def _groups_leave(mount: Path, group: str, limit: str, usage: str, prefix: str) -> int:
    """What is left in a group and in those above it, each of which may limit it: the page cache can be dropped."""
    folder = mount / group.strip("/")
    least_bytes = _UNKNOWN_BYTES
    for one in (folder, *folder.parents):
        limits, uses = _lines(one / limit), _lines(one / usage)
        if limits and uses and limits[0].isdigit():
            stat = dict(line.split() for line in _lines(one / "memory.stat"))
            cache_bytes = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            firm_bytes = max(int(uses[0]) - cache_bytes, 0)
            least_bytes = min(least_bytes, max(int(limits[0]) - firm_bytes, 0))
        if one == mount:
            break
    return least_bytes


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
