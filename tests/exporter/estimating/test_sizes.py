"""Sizes: units are taken literally, errors name the flag, printing shows both units."""

from __future__ import annotations

import pytest

from compressors.model.errors import InputError
from exporter.estimating.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("20GB", 20_000_000_000),
        ("20gb", 20_000_000_000),
        ("18.6GiB", 19_971_597_926),  # 18.6 * 2^30 = 19971597926.4
        (" 1.5 MiB ", 1_572_864),
        (".5 KB", 500),
        ("7.KiB", 7_168),
        ("0.1TB", 100_000_000_000),
        ("1TiB", 1_099_511_627_776),
        ("3B", 3),
        ("1500000", 1_500_000),
    ],
)
def test_sizes_are_exact(text: str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize(
    "text", ["", "GB", "0", "0GB", "0.4B", "-1GB", "nan", "inf", "1e9", "20G", "20 GB free", "1,5GB", "٣GB", "9" * 400]
)
def test_what_is_no_size_is_refused_with_the_flag(text: str) -> None:
    with pytest.raises(InputError, match=r"^--budget: "):
        parse_size(text, "--budget")


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (1, "1 B"),
        (999, "999 B"),
        (1_000, "1.0 KB (1.0 KiB)"),
        (12_345_678, "12.3 MB (11.8 MiB)"),
        (20_000_000_000, "20.0 GB (18.6 GiB)"),
        (999_999_999, "1.0 GB (953.7 MiB)"),
        (5 * 10**15, "5000.0 TB (4547.5 TiB)"),
    ],
)
def test_sizes_are_printed_in_both_units(n_bytes: int, text: str) -> None:
    assert format_size(n_bytes) == text
