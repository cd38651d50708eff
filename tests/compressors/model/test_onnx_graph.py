"""Graphs of others: the place of values is checked before anything is read there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from compressors.model.errors import InputError
from compressors.model.files.onnx_graph import external_place, read_graph


def _weight(**places: str) -> TensorProto:
    weight = TensorProto(name="w\x1b", data_type=TensorProto.FLOAT, dims=[2])
    for key, value in places.items():
        entry = weight.external_data.add()
        entry.key, entry.value = key, value
    return weight


def test_a_place_in_the_folder_of_the_graph(tmp_path: Path) -> None:
    place = external_place(tmp_path / "m.onnx", _weight(location="data/x", offset="64", length="8"))
    assert (place.file, place.offset) == (tmp_path / "data" / "x", 64)
    assert external_place(tmp_path / "m.onnx", _weight(location="x")).offset == 0


@pytest.mark.parametrize("location", ["", "/etc/passwd", "../x", "a/../../x", ".", "x\0", "x\n"])
def test_no_other_place_is_read(tmp_path: Path, location: str) -> None:
    with pytest.raises(InputError, match=r"tensor w\\x1b lies in .*, which is no file in the graph's folder"):
        external_place(tmp_path / "m.onnx", _weight(location=location))


@pytest.mark.parametrize("offset", ["-1", "x", "1e3", "1.0", " 1", "\u0663", "9" * 5000])
def test_an_offset_is_a_number(tmp_path: Path, offset: str) -> None:
    with pytest.raises(InputError, match=r"which is no number; export it again") as raised:
        external_place(tmp_path / "m.onnx", _weight(location="x", offset=offset))
    assert len(str(raised.value)) < 500


def test_a_graph_is_read_and_what_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [], [])
    path.write_bytes(helper.make_model(graph).SerializeToString())
    assert read_graph(path).node[0].op_type == "Identity"
    for data in (b"", b"\xff" * 40, onnx.ModelProto(ir_version=8).SerializeToString()):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"m\.onnx is truncated or no model"):
            read_graph(path)
    with pytest.raises(InputError, match=r"none\.onnx cannot be opened"):
        read_graph(tmp_path / "none.onnx")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dims": [-1]}, r"tensor w has dimensions [-1], which no tensor has"),
        ({"dims": [1] * 100}, r"which no tensor has"),
        ({"dims": [2**62, 4]}, r"has another number of values (3)"),
        ({"dims": [4]}, r"tensor w of shape [4] has another number of values (3)"),
        ({"raw_data": b"xy"}, r"tensor w of shape [3] has another number of values (0.5)"),
        ({"data_type": 99}, r"tensor w is of type number 99, which ONNX does not have"),
        ({"data_type": 0}, r"tensor w is of type number 0, which ONNX does not have"),
    ],
)
def test_a_weight_that_contradicts_itself_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    weight = {"name": "w", "data_type": TensorProto.FLOAT, "dims": [3], "float_data": [1.0, 2.0, 3.0]}
    for values in (weight, weight | changes):
        graph = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [])
        graph.initializer.append(TensorProto(**values))
        path.write_bytes(helper.make_model(graph).SerializeToString())
        if values is weight:
            assert read_graph(path).initializer[0].dims == [3]
    with pytest.raises(InputError) as raised:
        read_graph(path)
    assert said in str(raised.value)


def test_a_weight_beyond_the_end_of_its_file_is_refused(tmp_path: Path) -> None:
    graph = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [], [_weight(location="data")])
    (tmp_path / "m.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    (tmp_path / "data").write_bytes(b"1234567")
    with pytest.raises(InputError, match=r"data is truncated: tensor w\\x1b ends after the file does"):
        read_graph(tmp_path / "m.onnx")
    (tmp_path / "data").write_bytes(b"12345678")
    assert len(read_graph(tmp_path / "m.onnx").initializer) == 1


def test_a_node_without_outputs_is_refused(tmp_path: Path) -> None:
    graph = helper.make_graph([helper.make_node("Identity", ["w"], [])], "g", [], [])
    (tmp_path / "m.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(InputError, match=r"a node of type Identity has no output"):
        read_graph(tmp_path / "m.onnx")
