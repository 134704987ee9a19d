"""Files of weights: what of a partition's weights goes into which, and making each of them once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from movdc.compiler.cache import CompileCache, Entry, key_of
from movdc.compiler.errors import MovdcError
from movdc.compiler.methods import Methods
from movdc.compiler.target import Slot, Target
from movdc.compiler.units import format_bytes
from movdc.compiler.weights import WeightRef


@dataclass(frozen=True)
class WantedFile:
    """A file that a partition reads constants from, and the key of the cache under which it is kept."""

    key: str
    slots: Sequence[Slot]
    refs: Mapping[str, WeightRef]
    template: Entry | None = None  # the program that the weights are written into, where that is how a target has them


def files_of(methods: Methods, slots: Sequence[Slot], template: Entry, target: Target) -> list[WantedFile]:
    """A file for each group of a program's weights, so that variants share those of the checkpoint.

    A target whose programs have their weights inside gets one file, which is the program.
    """
    if target.weights_in_program:
        refs = {weight.name: weight.ref for weight in methods.weights}
        return [WantedFile(_key(slots, refs, target, template), slots, refs, template)] if slots else []
    files = []
    for group in ("weights", "tables"):  # what variants share comes first, and they share what is packed of it, too
        refs = {weight.name: weight.ref for weight in methods.weights if weight.group == group}
        if own := [slot for slot in slots if slot.weight in refs]:
            files.append(WantedFile(_key(own, refs, target), own, refs))
    return files


def make_files(
    files: Iterable[WantedFile], target: Target, cache: CompileCache, jobs: int, done: Callable[[int, int], None]
) -> dict[str, Entry]:
    """The entry of each file's key, from the cache or made now; `done` gets how many there are, and of how many.

    Raises MovdcError, before the first is written, if the disk has no room for what is missing.

    In threads, for next to none of the work is Python: one hashes and writes while another reads.
    """
    wanted = {file.key: file for file in files}
    entries: dict[str, Entry] = {}
    _check_room(wanted.values(), cache)
    done(0, len(wanted))
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for entry in pool.map(lambda file: _make(file, target, cache), wanted.values()):
                entries[entry.key] = entry
                done(len(entries), len(wanted))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return entries


def _check_room(files: Iterable[WantedFile], cache: CompileCache) -> None:
    missing = (file for file in files if cache.get(file.key) is None)
    wanted_bytes = sum(slot.size_bytes for file in missing for slot in file.slots)
    free_bytes = shutil.disk_usage(cache.root).free
    if wanted_bytes > free_bytes:
        raise MovdcError(
            f"{cache.root}: the weights take {format_bytes(wanted_bytes)} more, {format_bytes(free_bytes)} are free; "
            "free some, or give --cache DIR (--no-cache and -o) on another disk"
        )


def _make(file: WantedFile, target: Target, cache: CompileCache) -> Entry:
    if entry := cache.get(file.key):
        return entry
    path = cache.work / file.key
    if file.template is None:
        written = target.write_weights(file.slots, file.refs, path)
    else:
        written = target.fill(file.template.path, file.slots, file.refs, path)
    if _key(file.slots, file.refs, target, file.template) != file.key:
        changed = sorted({ref.source.label for ref in file.refs.values()})
        raise MovdcError(f"the checkpoint {', '.join(changed)} changed while it was read; compile again")
    constants = [constant.model_dump() for constant in written.constants]
    return cache.put(file.key, path, written.sha256, {"constants": constants, "sqnr_db": dict(written.sqnr_db)})


def _key(slots: Sequence[Slot], refs: Mapping[str, WeightRef], target: Target, template: Entry | None = None) -> str:
    kind = ("weights",) if template is None else ("program", template.sha256)
    return key_of(*kind, target.identity, *(f"{slot} = {refs[slot.weight].identity}" for slot in slots))
