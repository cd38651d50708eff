"""The comparison with llama.cpp's converter: what it excuses, and checkpoints with layers that both leave out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks.export.tensors import differing_tensors
from benchmarks.peers.llama_converter import Compared, add_mtp
from compressors.model.sources.hugging_face.checkpoint import Checkpoint
from tests.families.checkpoints import write_model
from tests.families.rows import ROWS


def test_only_differences_with_a_reason_are_excused() -> None:
    compared = Compared("x", n_tensors=2, differing=(), n_equal_keys=1, keys={}, left_out=())
    assert compared.agrees
    assert replace(compared, keys={"general.quantized_by": "ours alone"}).agrees
    assert not replace(compared, keys={"general.quantized_by": "the converter's alone"}).agrees
    assert not replace(compared, keys={"ARCH.rope.freq_base": "another value"}).agrees
    assert not replace(compared, differing=("blk.0.attn_q.weight",)).agrees


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe", "exaone_moe", "qwen3_next"])
def test_a_layer_is_added_that_the_family_reads_past(fine_folder: Path, tmp_path: Path, family: str) -> None:
    write_model(family, ROWS[family], tmp_path / "x", fine_folder)
    n_tensors = len(Checkpoint(tmp_path / "x").headers)
    add_mtp(tmp_path / "x")
    changed = Checkpoint(tmp_path / "x")
    assert len(changed.headers) > n_tensors + 20
    assert list(changed.parts_read_past) == ["layers for predicting several tokens at once (MTP)"]


def test_bytes_are_compared(tmp_path: Path) -> None:
    """A zero of the other sign is another tensor."""
    for name, zero in (("one", 0.0), ("other", -0.0)):
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        writer.add_tensor("same", np.ones(4, np.float32))
        writer.add_tensor("signed", np.full(4, zero, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert differing_tensors(tmp_path / "one", tmp_path / "other") == (["signed"], 2)
