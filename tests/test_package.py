"""What is built and installed is the package, and importing it costs little."""

import re
import subprocess
import sys
import warnings
import zipfile

import pytest
from conftest import ROOT, image, make_pipeline

import agentsd


def python(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    python("-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT))
    assert [path.name for path in folder.glob("*.tar.gz")] == [f"agentsd-{agentsd.__version__}.tar.gz"]
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "agentsd").rglob("*.py")} | {"agentsd/py.typed"}
    assert {name for name in names if ".dist-info/" not in name} == modules
    assert wheel.name == f"agentsd-{agentsd.__version__}-py3-none-any.whl"
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert "agentsd = agentsd.cli:main" in zipfile.ZipFile(wheel).read(entry_points).decode()


def test_the_wheel_works_without_the_repository(wheel, tmp_path):
    python("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), str(wheel))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import agentsd; print(agentsd.__file__)\n"
    code += "from agentsd.cli import main; sys.exit(main(['compare']))"
    command = [sys.executable, "-I", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.stdout.startswith(str(tmp_path))
    assert result.returncode == 2 and "the demo model comes with the repository" in result.stderr


def test_five_dependencies(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra" not in line]
    names = {re.match(r"Requires-Dist: ([a-z]+)", line).group(1) for line in required}
    assert names == {"torch", "diffusers", "transformers", "accelerate", "safetensors"}


def test_importing_it_loads_nothing_that_diffusers_pipelines_do_not_and_warns_of_nothing():
    """Import time itself is measured by `python -X importtime -c "import agentsd"`; what is loaded decides it."""
    code = "import sys, warnings; from diffusers import StableDiffusionPipeline; known = set(sys.modules)\n"
    code += "with warnings.catch_warnings(record=True) as said:\n"
    code += "    warnings.simplefilter('always'); import agentsd\n"
    code += "print({m.split('.')[0] for m in set(sys.modules) - known}, [str(w.message) for w in said])"
    assert python("-c", code) == "{'agentsd'} []\n"


@pytest.mark.parametrize("preset", [None, *agentsd.PRESETS])
def test_a_plain_image_warns_of_nothing(preset):
    """Neither `apply_patch`, nor the image, the report and the removal."""
    pipe = make_pipeline()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        agentsd.apply_patch(pipe, preset=preset)
        image(pipe, steps=10)
        print(agentsd.report(pipe))
        agentsd.remove_patch(pipe)
    assert [str(w.message) for w in said if "agentsd" in f"{w.message} {w.filename.removeprefix(str(ROOT))}"] == []


def test_the_version_is_the_same_everywhere():
    assert f"version: {agentsd.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {agentsd.__version__}" in (ROOT / "CHANGELOG.md").read_text()
