"""Holds the architecture: imports go left along the one way through the code, or to leaves."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "clex_kernels"
# a module may import from its own layer, from layers before it, and from the leaves.
LAYERS = [
    {"weights"},
    {"frequencies"},
    {"table_cache", "tables"},
    {"kernels"},
    {
        "rotary_checks",
        "rotary",
        "qkv_rotary_checks",
        "qkv_rotary",
        "merging",
        "sharding",
        "sharding_rules",
        "sharded_calls",
        "attention_checks",
        "attention_spans",
        "attention_blocks",
        "attention_cpu",
        "attention_engines",
        "attention",
        "decode_checks",
        "decode",
        "append",
    },
    {"sampling", "packing", "attention_layer", "modules", "training"},
    {"distributed"},
    {"integrations"},
]
LEAVES = {"attention_terms", "autocast", "config", "deterministic", "extension"}
# the oracle stands aside: it may read the settings, and the package may not read it.
ORACLE = "reference"
# the package's face and its command line may import anything, and nothing imports them.
FACES = {"__init__", "__main__"}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def stem(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imported_stems(path: Path) -> set[str]:
    """First components, below the package, of everything a file imports, at any depth of the file."""
    package = ("clex_kernels", *path.parts[:-1])
    found = []
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = [*base, *(node.module.split(".") if node.module else [])]
            found += [[*module, alias.name] for alias in node.names]
    return {name[1] if len(name) > 1 else "__init__" for name in found if name[0] == "clex_kernels"}


def allowed(path: Path) -> set[str]:
    name = stem(path)
    if name in FACES:
        return set().union(*LAYERS) | LEAVES | {"__init__"}
    if name in LEAVES:
        return {"_C"}
    if name == ORACLE:
        return {"config"}
    (place,) = (n for n, layer in enumerate(LAYERS) if name in layer)
    return set().union(*LAYERS[: place + 1]) | LEAVES


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_left(path):
    assert imported_stems(path) <= allowed(path)


def test_imports_are_seen_wherever_they_stand():
    assert "tables" in imported_stems(Path("modules.py"))
    assert imported_stems(Path("extension.py")) == {"_C"}
    assert imported_stems(Path("reference.py")) == {"config"}


def test_only_the_bindings_see_torch():
    sources = [path for path in (ROOT / "csrc").iterdir() if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert [path.name for path in sources if "#include <torch" in path.read_text()] == ["bindings.h"]
    included = {path.stem.split("_")[0] for path in sources if '#include "bindings.h"' in path.read_text()}
    assert included == {"bindings"}
