"""docs/add-a-target.md, followed: one file and one line make a target that compiles the example."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import yaml

from movdc.compiler.compile import compile_bundle
from movdc.compiler.device import read_profiles
from movdc.compiler.errors import MovdcError
from movdc.compiler.spec import load_spec
from movdc.compiler.weights import open_checkpoint
from movdc.models.opensora import OpenSora
from movdc.passes.pipeline import default_pipeline, in_phases
from movdc.runtime.bundle import Bundle
from movdc.targets.registry import TARGETS, parse_target

PAGE = Path(__file__).parents[2] / "docs" / "add-a-target.md"
LISTED = "from movdc.targets.registry import TARGETS; TARGETS |= {%s}; from movdc.compiler.cli import main; main()"


class Toy:
    """The target of the page, in a folder of its own, and the command with its line added."""

    def __init__(self, folder: Path) -> None:
        file, line = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
        self.path = folder / "toy.py"
        self.path.write_text(file)
        self.line = line.replace("movdc.targets.toy", "toy").strip()

    def change(self, old: str, new: str) -> None:
        """Edit the file."""
        text = self.path.read_text()
        assert old in text
        self.path.write_text(text.replace(old, new))

    def movdc(self, *arguments: object) -> CompletedProcess[str]:
        """Run `movdc` with the target in it."""
        folder = self.path.parent
        paths = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
        return subprocess.run(
            [sys.executable, "-c", LISTED % self.line, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": paths, "XDG_CACHE_HOME": str(folder / "cache")},
        )

    @contextmanager
    def listed(self) -> Iterator[None]:
        """The line added in this process."""
        sys.modules.pop("toy", None)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(self.path.parent)
            patch.setitem(TARGETS, *ast.literal_eval(f"{{{self.line}}}").popitem())
            yield

    def compile(self, spec: Path, out: Path, note: Callable[[str], None] = lambda what: None) -> None:
        """Compile with it in this process; `note` gets what is being done."""
        spec_file = load_spec(spec)
        with self.listed(), as_file(files("movdc.targets") / "devices.toml") as devices:
            target = parse_target("toy")
            machine = target.machine(read_profiles(devices)["host"], spec_file.spec.memory_budget)
            phases = in_phases(default_pipeline(spec_file.spec.passes, target))
            compile_bundle(
                spec_file,
                out,
                OpenSora(),
                target,
                machine,
                phases,
                dump=None,
                progress=lambda what, done, total: note(what),
                note=lambda name, text: None,
            )


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    """See Toy."""
    return Toy(tmp_path)


def test_the_page_makes_a_target(toy: Toy, shallow: Path, tmp_path: Path) -> None:
    listed = toy.movdc("targets")
    assert "toy: The text of each partition, which people can run." in listed.stdout, listed.stderr
    assert "no int8 products, int8 rows" in listed.stdout
    done = toy.movdc("compile", shallow, "--target", "toy{comment=mine}", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    bundle = Bundle.read(tmp_path / "out")
    assert (bundle.manifest.target, bundle.manifest.spec["target"]) == ("toy", "toy{comment=mine}")
    assert "conv3d-to-conv2d" in bundle.manifest.pipeline
    assert "attention-to-bmm" not in bundle.manifest.pipeline
    encoder = bundle.partitions["text_encoder.plain.0"]
    assert (bundle.root / encoder.program).read_text().startswith("# text_encoder mine\n")
    _assert_holds_the_checkpoint(bundle, shallow)
    assert "text_encoder.plain.0" in toy.movdc("inspect", tmp_path / "out").stdout


def _assert_holds_the_checkpoint(bundle: Bundle, spec: Path) -> None:
    """The token table is where the manifest says that the first constant is."""
    folder = Path(yaml.safe_load(spec.read_text())["text_encoder"]["weights"])
    table = open_checkpoint(folder).refs()["shared.weight"].read().numpy()
    read = bundle.partitions["text_encoder.plain.0"].weights
    ((path, constant),) = [
        (file.path, constant)
        for file in bundle.manifest.weights
        for constant in file.constants
        if file.path in read and constant.key == "weights_0"
    ]
    end = constant.offset_bytes + constant.size_bytes
    data = (bundle.root / path).read_bytes()[constant.offset_bytes : end]
    assert np.array_equal(np.frombuffer(data, np.float32).reshape(table.shape), table)
    assert constant.offset_bytes % 64 == 0


def test_everything_that_it_refuses_is_in_one_table(toy: Toy, shallow: Path, tmp_path: Path) -> None:
    toy.change('    rewrites: ClassVar[tuple[str, ...]] = ("conv3d-to-conv2d",)\n', "")
    toy.change("        return None\n", '        return "nobody divides" if "div" in str(node.target) else None\n')
    done = toy.movdc("compile", shallow, "--target", "toy", "-o", tmp_path / "out")
    assert done.returncode == 2, done.stdout + done.stderr
    rows = [line.split() for line in done.stderr.splitlines()]
    assert any(row[:1] == ["vae_temporal"] and "aten.conv3d.default" in row for row in rows), done.stderr
    assert any("nobody" in row and "divides" in row for row in rows), done.stderr
    sentence = done.stderr.splitlines()[-1]
    assert re.match(r"error: target toy cannot run \d+ of the nodes, which the table names; the first is %", sentence)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "asked", "says"),
    [
        ('("torch",)', '("torch", "no-such")', {}, r"needs no-such, .* with `pip install -c constraints.txt no-such`"),
        ("", "", {"passes": {"quantize-int8": {}}}, r":\d+: passes.quantize-int8: quantize-int8 is not for target toy"),
        (
            "int8_rows=True",
            'int8_products="float"',
            {"passes": {"quantize-int8": {"embeddings": True}}},
            "no rows in int8, which `embeddings` asks for; leave it out",
        ),
    ],
    ids=["no SDK", "no int8", "no int8 rows"],
)
def test_what_it_cannot_do_is_refused_before_anything_is_traced(
    toy: Toy, shallow: Path, tmp_path: Path, old: str, new: str, asked: dict[str, dict[str, object]], says: str
) -> None:
    toy.change(old, new)
    spec = yaml.safe_load(shallow.read_text())
    for key, value in asked.items():
        spec[key] = spec.get(key, {}) | value
    shallow.write_text(yaml.safe_dump(spec))
    done: list[str] = []
    with pytest.raises(MovdcError, match=says):
        toy.compile(shallow, tmp_path / "out", done.append)
    assert not done
    assert not (tmp_path / "out").exists()


def test_an_option_that_it_does_not_have_is_refused(toy: Toy) -> None:
    with toy.listed(), pytest.raises(MovdcError, match="target toy: unknown option 'remark'; its options are comment"):
        parse_target("toy{remark=mine}")


def test_a_target_may_write_the_weights_into_its_programs(toy: Toy, shallow: Path, tmp_path: Path) -> None:
    toy.change("    comment: str", "    weights_in_program: ClassVar[bool] = True\n    comment: str")
    toy.change("    def emit(", FILL + "\n    def emit(")
    toy.compile(shallow, tmp_path / "out")
    bundle = Bundle.read(tmp_path / "out")
    assert not bundle.manifest.weights
    for one in bundle.manifest.partitions:
        text, _, weights = (bundle.root / one.program).read_bytes().partition(b"\n===\n")
        assert text.startswith(b"# " + one.name.split(".")[0].encode())
        assert len(weights) >= one.weight_bytes > 0


FILL = '''
    def fill(self, program, slots, refs, path):
        """The text, then the weights."""
        from movdc.compiler.target import Written

        weights = path.with_suffix(".weights")
        written = self.write_weights(slots, refs, weights)
        with HashedFile(path) as file:
            file.write(program.read_bytes() + b"\\n===\\n" + weights.read_bytes())
        return Written((), file.sha256, written.sqnr_db)
'''
