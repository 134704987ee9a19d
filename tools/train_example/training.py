"""One phase of training: AdamW with an average of the weights, stopped and resumed at any step.

What a step draws depends on the seed, the phase and the step alone, so a run that was stopped goes on as if it had
not been. The learning rate warms up, and falls by a cosine over the phase.
"""

from __future__ import annotations

import math
import os
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

Losses = dict[str, Tensor]  # what a step minimises is "loss"; the others are shown beside it
REPORT_S, SAVE_S = 10.0, 60.0
LAST_RATE = 0.01  # of the first one
STEADY = 0.999  # of the average, once there are enough steps


class StoppedError(Exception):
    """The user stopped the training; everything up to the last step is saved."""


@dataclass(frozen=True)
class Schedule:
    """How long a phase is and how it learns."""

    steps: int
    rate: float
    warm_up_steps: int
    seconds: float = math.inf  # ends the phase where the steps are not done by then

    def progress(self, step: int, elapsed_s: float) -> float:
        """From 0 to 1, by steps or seconds, whichever is further."""
        return min(1.0, max(step / self.steps, elapsed_s / self.seconds))

    def rate_at(self, step: int, progress: float) -> float:
        """Learning rate of a step."""
        falling = LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * progress)) / 2
        return self.rate * falling * min(1.0, (step + 1) / self.warm_up_steps)


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Signals to stop that came since, Ctrl-C and the polite kill, instead of an exception in the middle of a step."""
    came: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_whole(path: Path, content: Any) -> None:
    """torch.save to a temporary sibling that is renamed, so that a stop leaves the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    torch.save(content, partial)
    os.replace(partial, path)


def train(
    name: str,
    model: nn.Module,
    losses: Callable[[torch.Generator], Losses],
    schedule: Schedule,
    folder: Path,
    seed: int,
) -> None:
    """Train the parameters of `model` that ask for it, and leave their average in it; `losses` runs one step forward.

    The state lies in `folder`; a phase that is done there is only read.
    """
    device = next(model.parameters()).device
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    others = [parameter for parameter in parameters if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
        lr=schedule.rate,
        betas=(0.9, 0.99),
        fused=device.type == "cuda",
    )
    averages = [parameter.detach().clone() for parameter in parameters]
    path, step, elapsed_s = folder / f"{name}.pt", 0, 0.0
    if path.is_file():
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        if state["done"]:
            print(f"{name}: done before, {state['step']} steps in {state['elapsed_s']:.0f} s", flush=True)
            return
        optimizer.load_state_dict(state["optimizer"])
        averages, step, elapsed_s = state["averages"], state["step"], state["elapsed_s"]

    def save(done: bool) -> None:
        if done:
            for parameter, average in zip(parameters, averages, strict=True):
                parameter.data.copy_(average)
        content = {"model": model.state_dict(), "step": step, "elapsed_s": elapsed_s, "done": done}
        unfinished = {} if done else {"optimizer": optimizer.state_dict(), "averages": averages}
        write_whole(path, content | unfinished)

    generator = torch.Generator(device)
    start = reported = saved = time.monotonic()
    begun_s, shown, shown_steps = elapsed_s, {}, 0
    with stop_requests() as stops:
        while (progress := schedule.progress(step, elapsed_s)) < 1:
            generator.manual_seed((seed << 40) + (zlib.crc32(name.encode()) % 2**16 << 24) + step)
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate_at(step, progress)
            made = losses(generator)
            optimizer.zero_grad(set_to_none=True)
            made["loss"].backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - min(STEADY, (1 + step) / (10 + step)))
            step += 1
            for key, value in made.items():
                shown[key] = shown.get(key, 0) + value.detach()
            shown_steps += 1
            now = time.monotonic()
            elapsed_s = begun_s + now - start
            if now - reported >= REPORT_S or schedule.progress(step, elapsed_s) == 1 or stops:
                values = "  ".join(f"{key} {float(value) / shown_steps:.4f}" for key, value in shown.items())
                rate = shown_steps / (now - reported)
                percent = 100 * schedule.progress(step, elapsed_s)
                print(
                    f"{name}: step {step}, {percent:.0f} %, {elapsed_s:.0f} s, {rate:.1f} a second  {values}",
                    flush=True,
                )
                reported, shown, shown_steps = now, {}, 0
            if now - saved >= SAVE_S or stops:
                save(done=False)
                saved = time.monotonic()
            if stops:
                raise StoppedError(f"{name} stopped at step {step}; the same command goes on from there")
    save(done=True)
