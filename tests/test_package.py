"""Rules for the repository as a whole."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import compressors
import exporter
import validate
from compressors.model import errors

_REPOSITORY = Path(__file__).parent.parent
_MODULES = sorted(
    ".".join(file.relative_to(_REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
    for package in (compressors, exporter, validate)
    for file in Path(str(package.__file__)).parent.rglob("*.py")
)


def test_every_requirement_has_a_tested_version() -> None:
    project = tomllib.loads((_REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = (_REPOSITORY / "constraints.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    tested = {_normal(name): version for name, version in tested.items()}
    extras = project["optional-dependencies"]
    for text in (*project["dependencies"], *extras["cpu"], *extras["dev"]):
        requirement = Requirement(text)
        assert tested[_normal(requirement.name)] in requirement.specifier, text


def test_importing_has_no_side_effects() -> None:
    """Importing every module of ours changes nothing beyond what the libraries it imports change by themselves.

    The one exception: libraries are told not to report to their makers.
    """
    script = """
import importlib, logging, os, sys, warnings
import torch, transformers, click, gguf, rich, yaml, jinja2, psutil, llama_cpp, onnx, onnxruntime, huggingface_hub
import optimum.commands.optimum_cli, transformers.models.auto, tokenizers, safetensors.torch
import scipy.cluster.hierarchy, scipy.optimize, transformers.modeling_utils, lm_eval.evaluator

def state():
    return (
        dict(os.environ), os.getcwd(), list(sys.path), list(logging.root.handlers), logging.root.level,
        list(warnings.filters), torch.get_default_dtype(), torch.get_num_threads(),
    )

before = state()
from compressors.model.quiet_libraries import VARIABLES
before = (before[0] | VARIABLES, *before[1:])
for name in sys.argv[1:]:
    importlib.import_module(name)
    after = state()
    assert after == before, (name, [pair for pair in zip(before, after) if pair[0] != pair[1]])
"""
    modules = [name for name in _MODULES if not name.endswith("__main__")]
    done = subprocess.run([sys.executable, "-c", script, *modules], cwd=_REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("module", _MODULES)
def test_a_module_is_short_and_says_what_it_is_for(module: str) -> None:
    path = _REPOSITORY / module.replace(".", "/")
    text = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    assert text.startswith('"""')
    assert len(text.splitlines()) < 400


def test_every_error_is_public_and_has_an_exit_code() -> None:
    assert set(errors.__all__) == {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)
    }
    codes = {name: getattr(errors, name).exit_code for name in errors.__all__}
    assert codes == {"MoeExportError": 1, "InputError": 2, "UnsupportedError": 2, "BudgetError": 3}


def test_a_message_for_people_is_one_line_that_can_be_printed() -> None:
    message = str(
        errors.InputError("x.gguf: tensor a\x1b[31m\u202eb is wrong\r\n  in line 3;\n\ndownload it\ud800 again")
    )
    assert message == r"x.gguf: tensor a\x1b[31m\u202eb is wrong in line 3; download it\ud800 again"
    long = str(errors.UnsupportedError("x.gguf: " + "y" * 5000 + "; download it again"))
    assert len(long) == 1000
    assert long.startswith("x.gguf: yyy")
    assert long.endswith("yyy; download it again")
    assert str(errors.InputError("x.gguf: é — 文 is wrong")) == "x.gguf: é — 文 is wrong"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
