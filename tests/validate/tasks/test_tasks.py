"""Tasks of lm-evaluation-harness: our backends' answers against those of the harness's own model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compressors.calibration.splits import load_tokenizer
from compressors.model.errors import InputError
from compressors.model.sources.opening import open_source
from compressors.model.sources.student import Student
from exporter.writing.gguf.writer import write_gguf
from exporter.writing.onnx.writer import write_onnx
from validate.runtimes.backend import TextModel
from validate.runtimes.llama_cpp import LlamaCppBackend
from validate.runtimes.onnx import OnnxRuntimeBackend
from validate.runtimes.torch import TorchBackend
from validate.tasks.tasks import check_tasks, run_tasks

_FIXTURE = Path(__file__).parents[2] / "fixtures" / "tasks"

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:ResourceWarning")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled task, 20 sentences with four words each, with the place of its data."""
    path = tmp_path_factory.mktemp("task") / "last_word.yaml"
    text = (_FIXTURE / "last_word.yaml").read_text(encoding="utf-8")
    path.write_text(text.replace("DATA", str(_FIXTURE)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(toy_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_checkpoint(tmp_path_factory.mktemp("toy"), n_layers=2)


@pytest.fixture(scope="module")
def models(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextModel]:
    student, out = Student.teacher(open_source(folder)), tmp_path_factory.mktemp("files")
    write_gguf(student, "F32", out / "toy.gguf", name="toy", threads=1)
    write_onnx(student, "F32", out / "onnx", threads=1)
    return {
        "torch": TorchBackend(student),
        "llama.cpp": LlamaCppBackend(out / "toy.gguf", kv_type="f32", threads=1),
        "onnxruntime": OnnxRuntimeBackend(out / "onnx", threads=1),
    }


@pytest.fixture(scope="module")
def harness(folder: Path) -> Any:
    """The harness's own model of the same checkpoint."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4, max_length=128)


def _requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def test_accuracy_is_that_of_the_harness_s_own_model(
    task: Path, folder: Path, models: dict[str, TextModel], harness: Any
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)
    expected = simple_evaluate(harness, tasks=[str(task)], task_manager=manager, log_samples=False)
    accuracy = expected["results"]["last_word"]["acc,none"]
    assert 0.25 < accuracy < 1, "a model that guesses shows nothing"
    for model in models.values():
        found = run_tasks(model, load_tokenizer(folder), task.parent, max_length=128)
        assert found["last_word"]["acc"] == accuracy
        assert found["last_word"]["acc_stderr"] == pytest.approx(expected["results"]["last_word"]["acc_stderr,none"])


def test_every_kind_of_request_is_answered_as_by_the_harness_s_own_model(
    folder: Path, models: dict[str, TextModel], harness: Any
) -> None:
    from validate.tasks.lm_eval_adapter import HarnessModel

    pairs = _requests(("In the beginning God created the heaven and the", " earth"), ("", "The"), ("He said ", "yes"))
    texts = _requests(("And the evening and the morning were the first day. " * 20,), ("Short.",))
    prompts = _requests(
        ("In the beginning God created the", {"until": ["."], "max_gen_toks": 12, "do_sample": False}),
        ("The function returns", {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}),
    )
    likelihoods = harness.loglikelihood(pairs, disable_tqdm=True)
    rolling = harness.loglikelihood_rolling(texts, disable_tqdm=True)
    generated = harness.generate_until(prompts, disable_tqdm=True)
    for model in models.values():
        ours = HarnessModel(model, load_tokenizer(folder), 128)
        for found, expected in zip(ours.loglikelihood(pairs, disable_tqdm=True), likelihoods, strict=True):
            assert found == (pytest.approx(expected[0], abs=2e-3), expected[1])
        assert ours.loglikelihood_rolling(texts) == pytest.approx(rolling, rel=1e-4)
        assert ours.generate_until(prompts) == generated


def test_what_cannot_be_run_is_refused_in_one_sentence(
    task: Path, folder: Path, models: dict[str, TextModel], tmp_path: Path
) -> None:
    def run(path: Path) -> None:
        run_tasks(models["onnxruntime"], load_tokenizer(folder), path, max_length=128)

    with pytest.raises(InputError, match=r"--tasks: .*nowhere is no task of lm-evaluation-harness; give a YAML file"):
        run(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is no task"):
        run(tmp_path)
    (tmp_path / "broken.yaml").write_text("task: [unclosed")
    with pytest.raises(InputError, match=r"--tasks: .*broken\.yaml cannot be loaded by lm-evaluation-harness: "):
        run(tmp_path / "broken.yaml")
    text = task.read_text(encoding="utf-8").replace("last_word.jsonl", "missing.jsonl")
    (tmp_path / "missing.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"missing\.yaml cannot be loaded .*missing\.jsonl"):
        run(tmp_path / "missing.yaml")


def test_without_the_extra_it_is_named(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--tasks needs lm-evaluation-harness.*pip install 'moe-export\[tasks\]'"):
        check_tasks(task)


def test_data_sets_leave_nothing_in_the_user_s_cache(
    models: dict[str, TextModel], folder: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    run_tasks(models["llama.cpp"], load_tokenizer(folder), task.parent, max_length=128)
    assert tmp_path / "cache" == datasets.config.HF_DATASETS_CACHE
    assert list(tmp_path.iterdir()) == []
