"""The README's Python blocks run as printed, in order, in one namespace; those marked `fails` must fail."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_code_blocks_do_what_the_readme_says():
    blocks = BLOCK.findall(README.read_text())
    assert any("fails" in mark for mark, _ in blocks), "the README opens with a failing snippet"
    assert any(not mark for mark, _ in blocks)
    namespace: dict[str, object] = {}
    for mark, source in blocks:
        code = compile(source, str(README), "exec")
        if "fails" in mark:
            with pytest.raises(AssertionError, match="not close"):
                exec(code, namespace)
        else:
            exec(code, namespace)


def test_both_commands_are_named():
    text = README.read_text()
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target} is not in the Makefile"
    assert "make report" in text
    assert "make test" in text
