"""A pipeline's YAML with another setting."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from movdc.compiler.folders import write_output
from movdc.compiler.spec import SpecFile
from movdc.evaluate.settings import Setting


def write_chosen(path: Path, spec_file: SpecFile, setting: Setting) -> None:
    """Write the pipeline with a setting in place of what it gives up; its folders are relative to the new file."""
    spec = setting.applied(spec_file.spec)
    data = spec.model_dump(mode="json", exclude_unset=True)
    data |= {"sampler": spec.sampler.model_dump(mode="json"), "passes": spec.passes}
    if spec.memory_budget is not None:
        data["memory_budget"] = spec.memory_budget
    for section in ("text_encoder", "denoiser", "vae"):
        for key in ("weights", "tokenizer"):
            folder = spec_file.path.parent / (data[section].get(key) or "")
            if data[section].get(key) and folder.is_dir():
                data[section][key] = os.path.relpath(folder.resolve(), path.parent.resolve())
    text = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=100)
    write_output(path, f"# {spec_file.path.name} with the setting: {setting}\n{text}")
