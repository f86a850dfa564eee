"""A light core: what `import vmcr2` brings along, and what is said where an extra is missing."""

import os
import subprocess
import sys

import pytest

import vmcr2

HEAVY = ["sklearn", "scipy", "pandas", "torchvision", "matplotlib", "rich", "tyro", "cattrs", "PIL"]


def run(program, *, missing=()):
    """Runs a program in which some packages cannot be imported."""
    block = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {list(missing)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""
    return subprocess.run([sys.executable, "-c", block + program], capture_output=True, text=True, check=False)


def test_training_imports_no_compiler():
    """torch._dynamo takes seconds to import, and nothing here needs it unless something has been compiled."""
    done = run("""
import sys, torch, vmcr2
loss, rows = vmcr2.VMCR2Loss(2, 4), torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
batch = rows, torch.arange(8) % 2
loss.latch_from(lambda inputs: inputs, [batch])
loss(rows.requires_grad_(), batch[1]).backward()
print("torch._dynamo" in sys.modules)
""")
    assert done.stdout == "False\n", done.stderr


def test_importing_the_core_imports_no_extra():
    done = run("import torch\nbefore = set(sys.modules)\nimport vmcr2\nprint(*sorted(set(sys.modules) - before))")
    assert done.returncode == 0, done.stderr
    brought = {name.split(".")[0] for name in done.stdout.split()}
    assert "vmcr2" in brought
    assert not brought & set(HEAVY)
    assert not [name for name in done.stdout.split() if name.startswith("vmcr2.lab")]


def test_the_core_trains_without_any_extra():
    program = """
import torch, vmcr2
z = torch.nn.functional.normalize(torch.randn(20, 6), dim=1).requires_grad_()
for loss in (vmcr2.VMCR2Loss(3, 6), vmcr2.MCR2Loss(3)):
    loss(z, torch.arange(20) % 3).backward()
print(vmcr2.coding_rate(z).item() > 0)
"""
    done = run(program, missing=HEAVY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"]


def test_import_star_and_inspect_work_without_extras():
    program = """
import inspect, vmcr2
from vmcr2 import *
inspect.getmembers(vmcr2)
print(VMCR2Loss.__name__, len(vmcr2.__all__))
"""
    done = run(program, missing=[*HEAVY, "filelock"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["VMCR2Loss", str(len(vmcr2.__all__) - 4)]


def test_only_the_commands_openmp_threads_spin_briefly_unless_told_otherwise():
    cases = [
        (["/usr/bin/vmcr2"], [], None, "1000"),
        (["/usr/bin/vmcr2"], [], "7", "7"),
        (["train.py"], ["python", "train.py"], None, None),
        (["-m"], ["python", "-um", "vmcr2"], None, "1000"),
        (["-m"], ["python", "-mvmcr2"], None, "1000"),
        (["-m"], ["python", "-m", "train"], None, None),
        ([], [], None, None),  # as an embedded interpreter may have it
    ]
    program = f"""
import os, sys
for sys.argv, sys.orig_argv, given, expected in {cases!r}:
    os.environ.pop("GOMP_SPINCOUNT", None)
    os.environ |= {{}} if given is None else {{"GOMP_SPINCOUNT": given}}
    sys.modules.pop("vmcr2", None)
    import vmcr2
    assert os.environ.get("GOMP_SPINCOUNT") == expected, (sys.argv, sys.orig_argv)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_python_m_vmcr2_is_the_command(tmp_path):
    said = "import atexit, os; atexit.register(lambda: print(os.environ.get('GOMP_SPINCOUNT')))"
    (tmp_path / "sitecustomize.py").write_text(said)
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-m", "vmcr2", "recipes"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert "omniglot100" in done.stdout
    assert done.stdout.splitlines()[-1] == "1000"


def test_an_estimator_names_the_extra_that_is_missing():
    program = """
import vmcr2
for name in ("NearestSubspaceClassifier", "CodingRateClassifier", "CodingRateTransformer"):
    try:
        getattr(vmcr2, name)
    except ModuleNotFoundError as error:
        print(error)
"""
    said = run(program, missing=["sklearn"]).stdout.splitlines()
    assert len(said) == 3
    assert all("pip install 'vmcr2[sklearn]'" in line for line in said)


@pytest.mark.parametrize("missing", ["tyro", "rich"])
def test_the_command_names_the_extra_that_is_missing(missing):
    program = "import runpy\nsys.argv = ['vmcr2', 'recipes']\nrunpy.run_module('vmcr2', run_name='__main__')"
    done = run(program, missing=[missing])
    assert done.returncode == 1, done.stderr
    assert f"the command needs {missing}, which is missing: pip install 'vmcr2[lab]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_all_public_names_exist():
    for name in vmcr2.__all__:
        assert getattr(vmcr2, name) is not None
        assert name in dir(vmcr2)
    with pytest.raises(AttributeError, match="no attribute 'NoSuchName'"):
        vmcr2.NoSuchName  # noqa: B018
