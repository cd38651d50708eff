"""Every setting that a family reads is compared with what transformers makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from transformers.utils import logging

from compressors.model.config import config_check
from compressors.model.config.config_check import check_against_transformers
from compressors.model.config.family_settings import FamilySettings
from compressors.model.config.reading import model_settings, read_spec, transformers_config
from compressors.model.config.settings import Settings
from compressors.model.errors import UnsupportedError
from compressors.model.families.registry import supported_families
from tests.families.checkpoints import spell_as_the_hub
from tests.families.rows import COMMON, ROWS, Row

_WITHOUT_A_ROW = {name for name, family in supported_families().items() if family.model_type == name} - {
    name.split()[0] for name in ROWS
}
_OF_ANY_CONFIG = {"per_layer_config"}
"""An attribute that transformers gives to each configuration; in a file it is refused."""
_COMPARED_OTHERWISE = {"rope_parameters", "rope_scaling", "sliding_window", "layer_types"}
"""As angles, and as the window of each layer."""


@pytest.fixture(params=sorted({*ROWS, *_WITHOUT_A_ROW}))
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """The configuration of each family's row in turn, without a model."""
    name = request.param
    row = ROWS.get(name, Row())
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it warns of the row's scaling
    AutoConfig.for_model(name.split()[0], **{**COMMON, **row.sizes}).save_pretrained(tmp_path)
    spell_as_the_hub(tmp_path / "config.json", row)
    yield tmp_path
    logging.set_verbosity(level)


def _settings(path: Path) -> Settings:
    """The settings of a file, after its family has read them."""
    family, settings = model_settings(json.loads(path.read_text()), path)
    assert family.read is not None
    family.read(settings)
    return settings


def _check(path: Path) -> None:
    check_against_transformers(json.loads(path.read_text()), path, read_spec(path.parent))


def test_each_is_compared_or_ignored_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ignored: set[str] = set()
    monkeypatch.setattr(FamilySettings, "ignore", lambda _settings, *keys: ignored.update(keys))
    path = folder / "config.json"
    settings = _settings(path)
    config = transformers_config(json.loads(path.read_text()))
    config.allow_global_per_layer_attribute_access = True  # some have other values in some layers
    of_the_class = {name for name in settings.asked if hasattr(config, name)} - _OF_ANY_CONFIG
    assert of_the_class - settings.values.keys() - ignored <= _COMPARED_OTHERWISE


def test_another_reading_by_transformers_is_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    config = transformers_config(raw)
    config.allow_global_per_layer_attribute_access = True
    names = [name for name in _settings(path).values if hasattr(config, name) and not name.startswith("rope_")]
    assert {name for name in ("hidden_size", "tie_word_embeddings", "hidden_act") if hasattr(config, name)} < {*names}
    _check(path)
    for name in names:
        other = transformers_config(raw)
        other.standardize_rope_params()
        vars(other)[config.attribute_map.get(name, name)] = _another(getattr(config, name))  # unlike its setter
        other.standardize_rope_params = lambda: None
        monkeypatch.setattr(config_check, "transformers_config", lambda _raw, other=other: other)
        with pytest.raises(UnsupportedError) as refused:
            _check(path)
        assert name in str(refused.value) or config.attribute_map.get(name, name) in str(refused.value)


def _another(value: Any) -> Any:
    """Returns another value that a configuration may have."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 2 + 1
    return [*value, *value, "another"] if isinstance(value, list) else "another"
