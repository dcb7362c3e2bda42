"""The names that `import opencoca` gives: each exists, editors see the same ones, and none is imported too early."""

import ast
import subprocess
import sys
from pathlib import Path

import opencoca


def imports_for_type_checkers() -> dict[str, str]:
    """The module that each name is imported from in the branch that type checkers and editors read."""
    tree = ast.parse(Path(opencoca.__file__).read_text(encoding="utf-8"))
    (branch,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in branch.body if isinstance(node, ast.ImportFrom)]
    return {name.asname or name.name: str(node.module) for node in imports for name in node.names}


def test_all_names_exist() -> None:
    assert sorted(opencoca.__all__) == sorted({*opencoca._MODULES, "__version__"})
    for name in opencoca.__all__:
        assert getattr(opencoca, name) is not None
    assert set(opencoca.__all__) <= set(dir(opencoca))


def test_editors_see_the_same_names_from_the_same_modules() -> None:
    assert imports_for_type_checkers() == opencoca._MODULES


def test_the_package_alone_does_not_import_torch() -> None:
    code = (
        "import sys, opencoca; dir(opencoca); opencoca.GenerationOptions(num_beams=2); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
