"""The package: folders that must not become packages, dependencies that point one way, and what a wheel holds."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {  # what each part may import of the others
    "kernels": {"seqmodels.kernels"},
    "seqmodels": {"seqmodels"},
    "tasks/genomics": {"seqmodels", "seqmodels.tasks.genomics"},
    "tasks/audio": {"seqmodels", "seqmodels.tasks.audio"},
    "tasks/synthetic": {"seqmodels", "seqmodels.tasks.synthetic"},
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_no_init_file_makes_kernels_tasks_or_tests_a_package():
    forbidden = [ROOT / "kernels", ROOT / "tasks", *(p for p in (ROOT / "tests").rglob("*") if p.is_dir())]
    assert not [folder for folder in [*forbidden, ROOT / "tests"] if (folder / "__init__.py").exists()]


@pytest.mark.parametrize("part", ALLOWED)
def test_dependencies_point_one_way(part):
    files = [p for p in (ROOT / part).rglob("*.py") if "__pycache__" not in p.parts]
    if part == "seqmodels":
        files = [p for p in files if not {"kernels", "tasks"} & set(p.relative_to(ROOT / part).parts)]
    assert files
    for path in files:
        for name in imported(path):
            top = name.split(".")[0]
            assert top not in ("kernels", "tasks"), f"{path} imports {name}"
            if top != "seqmodels":
                continue
            tasks = name.startswith("seqmodels.tasks")
            inside = [a for a in ALLOWED[part] if name == a or name.startswith(a + ".")]
            assert inside, f"{path} imports {name}"
            assert not tasks or any(a.startswith("seqmodels.tasks") for a in inside), f"{path} imports {name}"


def test_kernels_import_nothing_but_torch_triton_numba_and_numpy():
    for path in (ROOT / "kernels").glob("*.py"):
        outside = {name.split(".")[0] for name in imported(path)} - {"seqmodels"} - set(sys.stdlib_module_names)
        assert outside <= {"torch", "triton", "numba", "numpy"}, path


def test_transformers_imports_its_mamba_from_the_repository_root():
    code = "import transformers; from transformers import Mamba2Model; import seqmodels.kernels.ssd; print('fine')"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr


@pytest.mark.parametrize(
    ("given", "wanted"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_wait_briefly_before_they_sleep_unless_told_otherwise(given, wanted):
    own = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import os, seqmodels; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", code], env=own | given, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == wanted


def test_importing_the_package_does_not_import_what_only_training_needs():
    code = (
        "import sys, seqmodels; print(sorted({'lightning', 'polars', 'torchaudio', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_wheel_holds_the_parts_in_their_places_and_the_shipped_models(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"seqmodels"}
    for part in (
        "kernels/ssd.py",
        "tasks/genomics/classify.py",
        "tasks/audio/generate.py",
        "tasks/synthetic/recall.py",
        "cli.py",
    ):
        assert f"seqmodels/{part}" in names
    for model in ("enterobacteria", "spoken-digits"):
        for file in ("config.json", "model.safetensors", "README.md"):
            assert f"seqmodels/checkpoints/{model}/{file}" in names
