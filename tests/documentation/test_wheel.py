"""The built wheel, in an environment of its own, outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def call(*command: str | Path, cwd: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=clean, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fresh, but for the dependencies: those it sees where they are (a .pth file there is not followed)."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python")
    call(*pip, "install", "--quiet", "--no-deps", "--ignore-installed", wheel, cwd=folder)
    return folder


def test_the_wheel_holds_package_and_configurations_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    shipped = {name.removeprefix("lightning_prune/") for name in names if name.endswith(".yaml")}
    assert len(tops) == 2
    assert "lightning_prune/py.typed" in names
    templates = ROOT / "lightning_prune" / "reporting" / "pages" / "templates"
    assert {f"lightning_prune/reporting/pages/templates/{path.name}" for path in templates.iterdir()} <= set(
        names
    )
    assert shipped == {path.relative_to(ROOT).as_posix() for path in (ROOT / "conf").rglob("*.yaml")}


def test_the_command_shows_its_help_and_its_groups(environment: Path, tmp_path: Path) -> None:
    command = environment / "bin" / "lightning-prune"
    assert "  compare       one table" in call(command, "--help", cwd=tmp_path)
    text = call(command, "train", "--help", cwd=tmp_path)
    listed = next(line for line in text.splitlines() if line.startswith("prune/criterion: "))
    criteria = ROOT / "conf" / "prune" / "criterion"
    assert set(listed.removeprefix("prune/criterion: ").split(", ")) == {
        p.stem for p in criteria.glob("*.yaml")
    }
    assert "lightning-prune -m prune.criterion.omega=0,0.5,1" in text


def test_the_module_composes_from_the_installed_configurations(environment: Path, tmp_path: Path) -> None:
    python = environment / "bin" / "python"
    found = call(python, "-c", "import lightning_prune.cli.main as cli; print(cli.conf_dir())", cwd=tmp_path)
    assert Path(found.strip()).is_relative_to(environment)
    text = call(python, "-m", "lightning_prune", "--cfg", "job", "prune=l2", "trainer=fast_dev", cwd=tmp_path)
    assert "_target_: lightning_prune.criteria.L2" in text
    assert "max_epochs: 2" in text
