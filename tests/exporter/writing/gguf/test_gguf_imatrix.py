"""Importance matrices in llama.cpp's formats: our own file as its loader reads it, and files that do not fit."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch

from compressors.calibration.statistics import LayerStatistics
from compressors.model.config.reading import read_spec
from compressors.model.description.roles import Role
from compressors.model.description.spec import ModelSpec
from compressors.model.errors import InputError
from compressors.model.sources.student import ExpertMap
from exporter.writing.gguf.imatrix import read_imatrix, write_imatrix
from exporter.writing.gguf.layout import plan_tensors
from tests.altered import altered

Arrays = dict[str, npt.NDArray[np.float32]]


@pytest.fixture
def spec(fine_folder: Path) -> ModelSpec:
    """Two layers of five experts."""
    return altered(read_spec(fine_folder), n_layers=2).with_experts(5)


def _statistics(spec: ModelSpec) -> list[LayerStatistics]:
    """Random ones; the last expert of each layer saw no token."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for described in spec.layers:
        layer = LayerStatistics.zeros(described)
        layer.n_tokens += 3000
        layer.count_E += torch.randint(1, 900, (spec.n_experts,), generator=generator)
        for squares in layer.input_squares.values():
            squares.add_(torch.rand(squares.shape, generator=generator).double())
        for sums in (layer.gate_up_input_square_ED, layer.down_input_square_EF):
            sums.add_(torch.rand(sums.shape, generator=generator).double().square() * 700)
        for sums in (layer.count_E, layer.gate_up_input_square_ED, layer.down_input_square_EF):
            sums[-1] = 0
        layers.append(layer)
    return layers


def _write(path: Path, tensors: Mapping[str, npt.NDArray[Any]]) -> Path:
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _read(path: Path) -> Arrays:
    return {tensor.name: tensor.data.copy() for tensor in gguf.GGUFReader(path).tensors}


@pytest.fixture
def written(spec: ModelSpec, tmp_path: Path) -> Path:
    """Our statistics in a file."""
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, spec, _statistics(spec), ExpertMap.identity(spec), ["text.txt"])
    return path


def test_the_file_is_what_llama_imatrix_writes(spec: ModelSpec, written: Path) -> None:
    fields = {key: field.contents() for key, field in gguf.GGUFReader(written).fields.items()}
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == ["text.txt"]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (5, 512)  # of 3,000 tokens
    found, layers = _read(written), _statistics(spec)
    assert len(found) == 2 * 7 * spec.n_layers
    for index, layer in enumerate(layers):
        for name in ("attn_q", "attn_k", "attn_v"):
            sums = found[f"blk.{index}.{name}.weight.in_sum2"]
            np.testing.assert_array_equal(sums, layer.input_squares[Role.QUERY].float()[None])
            assert found[f"blk.{index}.{name}.weight.counts"].tolist() == [[3000]]
        np.testing.assert_array_equal(
            found[f"blk.{index}.ffn_down_exps.weight.in_sum2"], layer.down_input_square_EF.float()
        )
        np.testing.assert_array_equal(found[f"blk.{index}.ffn_up_exps.weight.counts"], layer.count_E.float()[:, None])


def test_vectors_are_those_of_llama_quantize(spec: ModelSpec, written: Path) -> None:
    """``load_imatrix`` in tools/quantize/quantize.cpp: sums over counts, ones where there were no tokens."""
    matrix, stored = read_imatrix(written, spec), _read(written)
    matrices = [tensor for tensor in plan_tensors(spec, "F32") if tensor.is_matrix and not tensor.role.is_global]
    assert set(matrix) == {(tensor.role, tensor.layer) for tensor in matrices}
    for tensor in matrices:
        expected = np.ones_like(stored[f"{tensor.name}.in_sum2"])
        for row, count in enumerate(stored[f"{tensor.name}.counts"].ravel()):
            if count > 0:
                expected[row] = stored[f"{tensor.name}.in_sum2"][row] / count
        found = matrix[tensor.role, tensor.layer]
        assert found.shape == (expected.shape if tensor.role.is_expert else expected.shape[1:])
        np.testing.assert_array_equal(found.numpy().reshape(expected.shape), expected)
    assert (matrix[Role.EXPERT_DOWN, 1][-1] == 1).all()


def test_a_student_s_file_has_its_own_numbering(spec: ModelSpec, tmp_path: Path) -> None:
    layers = _statistics(spec)
    student = spec.with_experts(2)
    experts = ExpertMap.keeping(5, [[3, 1], [0, 4]])
    write_imatrix(tmp_path / "student.gguf", student, layers, experts, [])
    down = read_imatrix(tmp_path / "student.gguf", student)[Role.EXPERT_DOWN, 0]
    for row, expert in enumerate((3, 1)):
        sums, count = layers[0].down_input_square_EF[expert].float(), layers[0].count_E[expert].float()
        assert torch.equal(down[row], sums / count)


def test_a_head_that_the_file_has_is_used(spec: ModelSpec, written: Path, tmp_path: Path) -> None:
    untied = replace(spec, tied_embeddings=False)
    assert (Role.HEAD, None) not in read_imatrix(written, untied)
    head = {"output.weight.in_sum2": np.full((1, 256), 6, np.float32)}
    head["output.weight.counts"] = np.full((1, 1), 4, np.float32)
    matrix = read_imatrix(_write(tmp_path / "head.gguf", _read(written) | head), untied)
    assert torch.equal(matrix[Role.HEAD, None], torch.full((256,), 1.5))


def _to_dat(path: Path, stored: Arrays, n_chunks: int) -> Path:
    """The older format (``save_imatrix_legacy`` in ``tools/imatrix/imatrix.cpp``)."""
    names = [name.removesuffix(".counts") for name in stored if name.endswith(".counts")]
    data = struct.pack("<i", len(names))
    for name in names:
        sums, counts = stored[f"{name}.in_sum2"], stored[f"{name}.counts"]
        values = np.where(counts > 0, sums / np.maximum(counts, 1), 1).astype(np.float32) * np.float32(n_chunks)
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", n_chunks, values.size)
        data += values.tobytes()
    data += struct.pack("<i", n_chunks) + struct.pack("<i", 4) + b"text"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("n_chunks", [0, 1, 4])
def test_the_older_format_is_read(spec: ModelSpec, written: Path, tmp_path: Path, n_chunks: int) -> None:
    stored = _read(written)
    path = _to_dat(tmp_path / "imatrix.dat", stored, n_chunks)
    expected = read_imatrix(written, spec)
    for key, values in read_imatrix(path, spec).items():
        assert torch.equal(values, expected[key] if n_chunks else torch.zeros_like(values)), key


@pytest.mark.parametrize("length", [0, 3, 40, 5000])
def test_a_file_that_is_cut_off_is_refused(spec: ModelSpec, written: Path, tmp_path: Path, length: int) -> None:
    dat = _to_dat(tmp_path / "x.dat", _read(written), 2)
    for path in (written, dat):
        cut = tmp_path / "cut"
        cut.write_bytes(path.read_bytes()[:length])
        with pytest.raises(InputError, match=r"cut.* (is cut off|is truncated)"):
            read_imatrix(cut, spec)


def test_what_does_not_fit_is_refused_by_name(spec: ModelSpec, written: Path, tmp_path: Path) -> None:
    stored = _read(written)
    down = "blk.1.ffn_down_exps.weight"

    def refused(path: Path, said: str, model: ModelSpec = spec) -> None:
        with pytest.raises(InputError, match=said):
            read_imatrix(path, model)

    def changed(**changes: npt.NDArray[np.float32]) -> Path:
        names = {"sums": f"{down}.in_sum2", "counts": f"{down}.counts"}
        return _write(tmp_path / "changed.gguf", stored | {names[key]: value for key, value in changes.items()})

    refused(written, r"has 1280 values for 5 matrices about blk\.0\.ffn_gate_exps.*needs 1536", spec.with_experts(6))
    refused(written, r"nothing about blk\.2\.attn_q\.weight", altered(spec, n_layers=3))
    refused(written, r"has blk\.1\.\w+\.weight, but the model has 1 layers", altered(spec, n_layers=1))
    refused(changed(sums=stored[f"{down}.in_sum2"][:, :64].copy()), r"has 320 values .* about blk\.1\.ffn_down_exps")
    refused(changed(counts=np.ones((3, 1), np.float32)), r"640 values for 3 matrices about blk\.1\.ffn_down_exps")
    refused(changed(sums=np.full((5, 128), np.nan, np.float32)), r"about blk\.1\.ffn_down_exps.* holds NaN")
    refused(changed(sums=np.full((5, 128), -1, np.float32)), r"about blk\.1\.ffn_down_exps.* or a negative value")
    refused(changed(counts=np.ones((5, 1), np.float16)), r"sums and counts of blk\.1\.ffn_down_exps.* not both")
    missing = {name: values for name, values in stored.items() if name != f"{down}.counts"}
    refused(_write(tmp_path / "missing.gguf", missing), r"sums and counts of blk\.1\.ffn_down_exps.* not both")
    refused(_write(tmp_path / "model.gguf", {"token_embd.weight": np.ones((2, 2), np.float32)}), "not an importance")
    refused(tmp_path / "nowhere.gguf", r"nowhere\.gguf cannot be opened")
