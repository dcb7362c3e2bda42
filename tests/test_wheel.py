"""The package as people install it: the wheel, built from the checkout and tried in an environment without it."""

import email
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE", "recipes", "src")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, since a build leaves files beside the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in NEEDED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source)
    build = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(out)!r}))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (built,) = out.iterdir()
    return built


def test_it_holds_the_package_with_models_recipes_and_types(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for recipe in (ROOT / "recipes").glob("*.yaml"):
            assert archive.read(f"opencoca/assets/recipes/{recipe.name}") == recipe.read_bytes()
    package = ROOT / "src" / "opencoca"
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {f"opencoca/{path.relative_to(package).as_posix()}" for path in files} <= names
    assert {name.split("/")[0] for name in names} == {"opencoca", f"opencoca-{PROJECT['version']}.dist-info"}
    licences = {name.rsplit("/", 1)[1] for name in names if "/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}


def test_its_page_leads_to_files_that_exist(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(f"opencoca-{PROJECT['version']}.dist-info/METADATA")
    metadata = email.message_from_bytes(content)
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["Author"] == "The OpenCoCa authors"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    page = metadata.get_payload(decode=True).decode("utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", page)
    repository = PROJECT["urls"]["Repository"]
    own = [target for target in targets if target.startswith(f"{repository}/")]
    assert all(target.startswith("https://") for target in targets)
    assert f"{repository}/raw/main/docs/images/contact_sheet.jpg" in own
    for target in own:
        kind, branch, path = target.removeprefix(f"{repository}/").split("/", 2)
        assert (kind in ("blob", "raw"), branch) == (True, "main")
        assert (ROOT / path.partition("#")[0]).exists(), target


def test_it_works_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """Installed by pip into a new environment, which finds the libraries of this one and not the checkout."""
    venv.create(tmp_path / "bare")
    python = tmp_path / "bare" / "bin" / "python"
    install = ["-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps", str(wheel)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run([sys.executable, *install, "--disable-pip-version-check"], check=True, env=environment)
    (site,) = (tmp_path / "bare" / "lib").glob("python*/site-packages")
    libraries = Path(pytest.__file__).parents[1]
    # A path within a .pth file is searched, but its own .pth files, such as that of an editable install, are not read.
    (site / "libraries.pth").write_text(f"{libraries}\n", encoding="utf-8")

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    assert run(str(python), "-c", "import opencoca; print(opencoca.__file__)").startswith(str(site))
    opencoca = str(tmp_path / "bare" / "bin" / "opencoca")
    assert run(opencoca, "--version") == f"opencoca {PROJECT['version']}\n"
    photo = str(site / "opencoca" / "assets" / "photos" / "cat.jpg")
    (line,) = run(opencoca, "caption", photo).splitlines()
    assert re.fullmatch(rf"{re.escape(photo)}\t[a-z ]+[a-z .]", line)
