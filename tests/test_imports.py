"""Who may import whom (the storeys of the design), held over every file that there is.

Each rule is a function from a package's import statements to the violations it finds. It is tried on small packages made
to break it, and then on `trlora` and `trexport`.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


# --- reading import statements -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """One imported module."""

    importer: str
    target: str
    line: int
    at_import: bool
    """Whether it runs when the importing file is imported: not inside a function, and not for type checkers only."""

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def module_files(package: Path) -> dict[str, Path]:
    """The modules of a package, by dotted name."""
    files = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imports_of(package: Path) -> list[Import]:
    """Every import statement of a package, relative ones resolved; `from a import b` is of `a.b` where that is a module."""
    files = module_files(package)
    found: list[Import] = []
    for importer, path in files.items():
        for node, at_import in statements(ast.parse(path.read_text(encoding="utf-8")), True):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                parent = node.module or ""
                if node.level:
                    anchor = importer.split(".") if path.name == "__init__.py" else importer.split(".")[:-1]
                    anchor = anchor[: len(anchor) - node.level + 1]
                    parent = ".".join([*anchor, *([node.module] if node.module else [])])
                names = [f"{parent}.{alias.name}" for alias in node.names]
                targets = [name if name in files else parent for name in names]
            found += [Import(importer, target, node.lineno, at_import) for target in dict.fromkeys(targets)]
    return found


def statements(node: ast.AST, at_import: bool) -> Iterable[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, at_import
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from statements(child, False)
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            yield from statements(ast.Module(child.body, []), False)
            yield from statements(ast.Module(child.orelse, []), at_import)
        else:
            yield from statements(child, at_import)


def under(module: str, *packages: str) -> bool:
    """Whether a module is one of these or inside one of them."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def part_of(module: str) -> str:
    """The part of its package that a module belongs to: `trlora.ring.cost` → `ring`; the package itself is ``."""
    return module.split(".")[1] if "." in module else ""


# --- rules -------------------------------------------------------------------------------------------------------------

Rule = Callable[[list[Import]], list[Import]]

# From the ground up. A part imports parts of lower storeys only: neither those above it nor its neighbours.
TRLORA_STOREYS = [
    {"errors"},
    {"files", "fields", "tensors", "cayley", "factor", "tucker"},
    {"ring"},
    {"transforms", "residuals", "magnitudes"},
    {"spec", "shorthand"},
    {"layers", "config"},
    {"targets", "parts", "fit"},
    {"inject"},
    {"merge", "adapter", "swap"},
    {"checkpoint"},
    {"training"},
    {""},  # the front door, for users: no part comes in through it
]
TREXPORT_STOREYS = [
    {"", "errors"},
    {"io_spec", "progress", "hashing", "disk", "jsonable", "cores", "cpp_compiler", "cuda_graph"},
    {"manifest", "profile", "formats"},
    {"models"},
    {"graph", "merging", "fit"},
    {"backends"},  # ONNX Runtime's rewrites the graph that it loads
    {"artifact"},
    {"adapter_file", "as_lora", "pristine", "restoring"},
    {"session", "engine", "convert"},
    {"parity", "inspecting", "refit"},
    {"bench", "deploy", "comparing"},
    {"demo"},
    {"cli"},
]
RUNTIMES = {
    "onnxruntime": "trexport.backends.onnxruntime",
    "tensorrt": "trexport.backends.tensorrt",
    "tensorrt_rtx": "trexport.backends.tensorrt_rtx",
    "tritonclient": "trexport.deploy.client",
}
"""Runtime → the one file that may import it."""


def trlora_stands_alone(imports: list[Import]) -> list[Import]:
    """torch, safetensors and the standard library only; never trexport. CUDA's bindings, which come with torch's CUDA
    wheels, and `accelerate` each in the one file that may miss them."""
    late = {"trlora.swap.nvrtc": "cuda", "trlora.training.accelerated": "accelerate"}
    allowed = {"torch", "safetensors", "trlora", *sys.stdlib_module_names}
    return [
        item
        for item in imports
        if item.target.split(".")[0] not in allowed
        and not (under(item.target, late.get(item.importer, "-")) and not item.at_import)
    ]


def not_downward(imports: list[Import], package: str, storeys: list[set[str]]) -> list[Import]:
    """The imports between two parts of a package of which the imported one does not lie lower."""
    storey = {part: number for number, parts in enumerate(storeys) for part in parts}
    return [
        item
        for item in imports
        if under(item.target, package)
        and part_of(item.target) != part_of(item.importer)
        and storey.get(part_of(item.target), len(storeys)) >= storey.get(part_of(item.importer), -1)
    ]


def trlora_builds_upward(imports: list[Import]) -> list[Import]:
    """No part of trlora imports a part above or beside it, or the package's own front door."""
    return not_downward(imports, "trlora", TRLORA_STOREYS)


def the_ring_is_pure(imports: list[Import]) -> list[Import]:
    """The ring knows nothing of trlora but its errors."""
    return [
        item
        for item in imports
        if under(item.importer, "trlora.ring")
        and under(item.target, "trlora")
        and not under(item.target, "trlora.ring", "trlora.errors")
    ]


def members_are_apart(imports: list[Import]) -> list[Import]:
    """Transforms, residuals and magnitudes never import each other, and no member another one."""
    families = ("transforms", "residuals", "magnitudes")
    violations = []
    for item in imports:
        kind, other = part_of(item.importer), part_of(item.target)
        if kind != other and kind in families and other in families:
            violations.append(item)
        elif kind == other and kind in families and item.importer != f"trlora.{kind}":
            violations += [item] if item.target != f"trlora.{kind}.base" else []
    return violations


def only_models_know_diffusers(imports: list[Import]) -> list[Import]:
    return [item for item in imports if under(item.target, "diffusers") and not under(item.importer, "trexport.models")]


def one_file_knows_transformers(imports: list[Import]) -> list[Import]:
    """It is needed for text encoders only, and imported when one is loaded."""
    return [
        item
        for item in imports
        if under(item.target, "transformers") and (item.at_import or item.importer != "trexport.models.text_models")
    ]


def backends_are_apart(imports: list[Import]) -> list[Import]:
    """A backend imports the contract (base.py), the registry (__init__.py), its own parts (aotinductor's are aoti) and what
    both TensorRTs share (trt), never another backend."""
    shared = ("trexport.backends", "trexport.backends.base")
    return [
        item
        for item in imports
        if under(item.importer, "trexport.backends")
        and item.importer not in shared
        and under(item.target, "trexport.backends")
        and item.target not in (*shared, item.importer)
        and not under(item.target, "trexport.backends.trt")
        and not (
            under(item.target, "trexport.backends.aoti")
            and any(under(item.importer, f"trexport.backends.{own}") for own in ("aotinductor", "aoti"))
        )
    ]


def runtimes_are_imported_late(imports: list[Import]) -> list[Import]:
    """A third-party runtime is imported in one file, and inside a function there."""
    return [
        item
        for item in imports
        if under(item.target, *RUNTIMES) and (item.at_import or item.importer != RUNTIMES[item.target.split(".")[0]])
    ]


def trexport_builds_upward(imports: list[Import]) -> list[Import]:
    """No part of trexport imports a part above or beside it."""
    return not_downward(imports, "trexport", TREXPORT_STOREYS)


def no_import_goes_round(imports: list[Import]) -> list[Import]:
    """The statements that run at import make no cycle."""
    modules = {item.importer for item in imports}
    edges: dict[str, list[Import]] = {}
    for item in imports:
        if item.at_import and item.target in modules and not under(item.importer, item.target):
            edges.setdefault(item.importer, []).append(item)
    state: dict[str, int] = {}
    back: list[Import] = []

    def visit(module: str) -> None:
        state[module] = 1
        for item in edges.get(module, []):
            if state.get(item.target) == 1:
                back.append(item)
            elif item.target not in state:
                visit(item.target)
        state[module] = 2

    for module in sorted(modules):
        if module not in state:
            visit(module)
    return back


TRLORA_RULES: list[Rule] = [
    trlora_stands_alone,
    trlora_builds_upward,
    the_ring_is_pure,
    members_are_apart,
    no_import_goes_round,
]
TREXPORT_RULES: list[Rule] = [
    only_models_know_diffusers,
    one_file_knows_transformers,
    backends_are_apart,
    runtimes_are_imported_late,
    trexport_builds_upward,
    no_import_goes_round,
]


# --- the rules on packages made to break them --------------------------------------------------------------------------

BREAKS: dict[str, tuple[Rule, dict[str, str], list[str]]] = {
    "third party": (
        trlora_stands_alone,
        {
            "trlora/ring/cost.py": "import numpy as np\nimport torch.nn\nimport math",
            "trlora/merge.py": "def f():\n    from diffusers.models import x",
            "trlora/spec.py": "import trexport.errors\nfrom safetensors.torch import save_file",
        },
        ["numpy", "diffusers.models", "trexport.errors"],
    ),
    "upward": (
        trlora_builds_upward,
        {
            "trlora/ring/cost.py": "from trlora.errors import a\nfrom trlora.transforms import b",
            "trlora/layers/linear.py": "from trlora.spec import a\nfrom trlora import inject",
            "trlora/inject.py": "from trlora.layers import a\nfrom .training import b",
            "trlora/spec.py": "from trlora import AdapterSpec",
            "trlora/training/loop.py": "from trlora.merge import a",
            "trlora/merge.py": "from trlora.checkpoint import a\nfrom trlora.targets import b",
            "trlora/targets.py": "def f():\n    from trlora import inject",
            "trlora/unlisted.py": "from trlora.errors import a",
            "trlora/__init__.py": "from trlora.training import a",
            "trlora/errors.py": "if TYPE_CHECKING:\n    from trlora import checkpoint",
            "trlora/checkpoint.py": "",
        },
        [
            "trlora.transforms",
            "trlora.inject",
            "trlora.training",
            "trlora",
            "trlora.checkpoint",  # from merge, its neighbour
            "trlora.inject",
            "trlora.errors",  # a part without a storey may import nothing
            "trlora.checkpoint",
        ],
    ),
    "ring": (
        the_ring_is_pure,
        {
            "trlora/ring/init.py": "from trlora import fields\nfrom trlora.ring import modes\nfrom trlora.errors import b",
            "trlora/ring/modes.py": "from ..files import x",
            "trlora/fields.py": "",
        },
        ["trlora.fields", "trlora.files"],
    ),
    "members": (
        members_are_apart,
        {
            "trlora/transforms/a.py": "from trlora.residuals.base import x\nfrom trlora.transforms.base import y",
            "trlora/transforms/__init__.py": "from trlora.transforms.a import x",
            "trlora/residuals/b.py": "from trlora.residuals.c import x",
            "trlora/residuals/c.py": "def f():\n    import trlora.transforms",
            "trlora/transforms/base.py": "",
        },
        ["trlora.residuals.base", "trlora.residuals.c", "trlora.transforms"],
    ),
    "diffusers": (
        only_models_know_diffusers,
        {
            "trexport/models/unet.py": "from diffusers import A",
            "trexport/graph/export.py": "def f():\n    import diffusers",
            "trexport/models2.py": "import diffusers.models",
        },
        ["diffusers", "diffusers.models"],
    ),
    "transformers": (
        one_file_knows_transformers,
        {
            "trexport/models/text_models.py": "def f():\n    import transformers\nfrom transformers.utils import a",
            "trexport/models/pipeline.py": "def f():\n    from transformers import CLIPTextModel",
        },
        ["transformers", "transformers.utils"],
    ),
    "backends": (
        backends_are_apart,
        {
            "trexport/backends/__init__.py": "from trexport.backends.torch import A",
            "trexport/backends/base.py": "",
            "trexport/backends/torch.py": "from trexport.backends import onnxruntime\nfrom .base import B",
            "trexport/backends/onnxruntime.py": "def f():\n    from .torch import A\nfrom trexport.backends import registry",
        },
        ["trexport.backends.onnxruntime", "trexport.backends.torch"],
    ),
    "runtimes": (
        runtimes_are_imported_late,
        {
            "trexport/backends/onnxruntime.py": "def f():\n    import onnxruntime\nclass A:\n    import onnxruntime.tools",
            "trexport/backends/tensorrt.py": "try:\n    import tensorrt\nexcept ImportError: pass",
            "trexport/bench/run.py": "def f():\n    import tensorrt_rtx",
            "trexport/backends/tensorrt_rtx.py": "if TYPE_CHECKING: import tensorrt_rtx\nasync def f(): import tensorrt_rtx",
            "trexport/backends/torch.py": "def f():\n    import onnxruntime",
            "trexport/deploy/client.py": "def f():\n    import tritonclient.http",
            "trexport/deploy/check.py": "def f():\n    import tritonclient.grpc",
        },
        ["onnxruntime.tools", "tensorrt", "tensorrt_rtx", "onnxruntime", "tritonclient.grpc"],
    ),
    "trexport upward": (
        trexport_builds_upward,
        {
            "trexport/__init__.py": "from trexport.models import b",
            "trexport/errors.py": "def f():\n    from trexport.cli.console import a",
            "trexport/hashing.py": "from trexport import errors",
            "trexport/manifest.py": "from trexport import hashing",
            "trexport/models/base.py": "import trexport.parity.report\nfrom trexport.manifest import x\nfrom . import unet",
            "trexport/models/unet.py": "",
            "trexport/graph/export.py": "from trexport.backends import a\nfrom trexport.models import b",
            "trexport/parity/validate.py": "from trexport.bench import a\nfrom trexport.backends import b",
            "trexport/bench/run.py": "from trexport.parity import a",
            "trexport/demo/run.py": "from ..cli import c\nfrom ..merging import d",
            "trexport/cli/__init__.py": "from trexport import __version__",
        },
        [
            "trexport.models",
            "trexport.cli.console",
            "trexport.parity.report",
            "trexport.backends",
            "trexport.bench",
            "trexport.cli",
        ],
    ),
    "round": (
        no_import_goes_round,
        {
            "p/__init__.py": "from p.a import x",
            "p/a.py": "import p.b",
            "p/b.py": "from p import c",
            "p/c.py": "from .a import x\ndef f():\n    import p.d",
            "p/d.py": "import p.c",
        },
        ["p.a"],
    ),
}


@pytest.mark.parametrize(("rule", "files", "targets"), BREAKS.values(), ids=BREAKS)
def test_the_rule_sees_what_breaks_it(rule: Rule, files: dict[str, str], targets: list[str], tmp_path: Path) -> None:
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    found = rule(imports_of(tmp_path / next(iter(files)).split("/")[0]))
    assert sorted(item.target for item in found) == sorted(targets)


def test_every_rule_is_tried() -> None:
    assert {rule for rule, _, _ in BREAKS.values()} == {*TRLORA_RULES, *TREXPORT_RULES}


# --- the rules on the packages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", TRLORA_RULES)
def test_trlora_keeps_the_rule(rule: Rule) -> None:
    assert [str(item) for item in rule(imports_of(ROOT / "trlora"))] == []


@pytest.mark.parametrize("rule", TREXPORT_RULES)
def test_trexport_keeps_the_rule(rule: Rule) -> None:
    assert [str(item) for item in rule(imports_of(ROOT / "trexport"))] == []


@pytest.mark.parametrize(("package", "storeys"), [("trlora", TRLORA_STOREYS), ("trexport", TREXPORT_STOREYS)])
def test_every_part_has_one_storey(package: str, storeys: list[set[str]]) -> None:
    assert {part_of(module) for module in module_files(ROOT / package)} == set().union(*storeys)
    assert len(set().union(*storeys)) == sum(map(len, storeys))


def test_the_imports_of_both_packages_are_seen() -> None:
    """The reader finds what is known to be there, so that no rule holds for want of input."""
    trlora = {(item.importer, item.target) for item in imports_of(ROOT / "trlora")}
    assert {
        ("trlora.transforms.tensor_ring", "trlora.ring"),
        ("trlora.checkpoint", "safetensors.torch"),
        ("trlora.training.parameters", "trlora.inject"),
    } <= trlora
    trexport = {(item.importer, item.target) for item in imports_of(ROOT / "trexport")}
    assert ("trexport.models.architectures.base", "diffusers") in trexport
    assert ("trexport.backends.onnxruntime", "onnxruntime") in trexport


# --- what is loaded ----------------------------------------------------------------------------------------------------


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after running `code`."""
    report = "import json, sys; print('\\n' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, cwd=ROOT, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_trlora_loads_torch_and_safetensors_only() -> None:
    loaded = loaded_by("import trlora, trlora.training")
    assert {"trlora", "torch", "safetensors"} <= loaded
    heavy = {"diffusers", "transformers", "peft", "accelerate", "onnx", "onnxscript", "click", "rich", "trexport"}
    assert loaded & (heavy | set(RUNTIMES)) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["merge", "--help"]], ids=" ".join)
def test_help_is_shown_without_loading_torch(arguments: list[str]) -> None:
    loaded = loaded_by(
        f"import sys\nfrom trexport.cli import main\nsys.argv = {['trexport', *arguments]!r}\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code"
    )
    assert {"trexport", "click"} <= loaded
    assert loaded & {"torch", "diffusers", "transformers", "onnx", "numpy", "rich", "trlora", *RUNTIMES} == set()
