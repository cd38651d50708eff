"""Tokenizers of tiktoken's kind: a file with a line for each token, its bytes and its rank, and code beside it.

tiktoken merges the pair whose union has the lowest rank. A list of all pairs that make a token, in the order of the
tokens, says the same to every other program.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compressors.model.errors import InputError
from compressors.model.files.raw_file import RawFile
from compressors.model.files.vocabularies.splitting_code import SplittingCode, read_splitting_code
from compressors.model.names import shown

__all__ = ["find_ranks", "tiktoken_tokenizer"]

_LARGEST = 64_000_000  # bytes; files of 250,000 tokens have about 4 million
_FIRST_LINE = 400  # bytes
_PRINTABLE = (*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1))
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_PLAIN = {**dict.fromkeys(_FLAGS, False), "special": True}
_MOST_SPECIAL = 100_000
_SPECIAL_TOKENS = {  # of classes whose code numbers them behind the others, where tokenizer_config.json does not
    "HYTokenizer": (
        ("<|endoftext|>", "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>"),
        tuple(f"<|extra_{number}|>" for number in range(205)),
    )
}


def find_ranks(folder: Path) -> Path | None:
    """Finds the file of tokens and ranks in a checkpoint's folder; None if there is none."""
    candidates = [folder / "tiktoken.model", *sorted(folder.glob("*.tiktoken")), folder / "tokenizer.model"]
    return next((path for path in candidates if path.is_file() and _begins_with_a_rank(path)), None)


def _begins_with_a_rank(path: Path) -> bool:
    try:
        return _token_and_rank(RawFile(path).start(_FIRST_LINE).split(b"\n", 1)[0]) is not None
    except InputError:
        return False


def _token_and_rank(line: bytes) -> tuple[bytes, int] | None:
    token, _, rank = line.strip().partition(b" ")
    try:
        return base64.b64decode(token, validate=True), int(rank)
    except (binascii.Error, ValueError):
        return None


def tiktoken_tokenizer(path: Path, code: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the contents of ``tokenizer.json``.

    Args:
        path: the file of tokens and ranks.
        code: the module and class of the tokenizer, as ``tokenizer_config.json`` names it.
        settings: the contents of ``tokenizer_config.json``.

    Raises:
        InputError: the file is damaged; the code is missing or does not say how text is cut; or nothing says which
            numbers the special tokens have.
    """
    ranks = _read_ranks(path)
    module, _, class_name = code.rpartition("--")[2].rpartition(".")
    if not module.isidentifier():
        raise InputError(
            f"{path.parent / 'tokenizer_config.json'}: auto_map names {shown(code)}, which is no class in a file of "
            "this folder; download it again"
        )
    source = path.parent / f"{module}.py"
    if not source.is_file():
        raise InputError(
            f"{path}: how it cuts text into words stands in {source.name}, which is missing: download it too (it is "
            "read, and never run)"
        )
    facts = read_splitting_code(source)
    split = {"type": "Split", "pattern": {"Regex": facts.expression}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    names = {token: _as_letters(token) for token in ranks}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(path, len(ranks), class_name, facts, settings),
        "normalizer": {"type": "NFC"} if facts.composes else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {names[token]: rank for token, rank in ranks.items()},
            "merges": [[names[left], names[right]] for left, right in _merges(ranks)],
        },
    }


def _read_ranks(path: Path) -> dict[bytes, int]:
    """The ranks of all tokens, in their order."""
    file = RawFile(path)
    if file.size > _LARGEST:
        raise InputError(f"{path} has {file.size:,} bytes, too many for a vocabulary: download it again")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.start(_LARGEST).splitlines(), 1):
        if not line.strip():
            continue
        read = _token_and_rank(line)
        if read is None or read[0] in ranks or read[1] < 0:
            raise InputError(f"{path}, line {number}: it does not hold one more token and its rank; download it again")
        ranks[read[0]] = read[1]
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise InputError(f"{path}: its {len(ranks):,} ranks are not those from 0 on, each once; download it again")
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise InputError(f"{path}: it has no token for the byte {missing:#04x}; download it again")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """All pairs of tokens that make a token, in the order of the tokens that they make."""
    for token in ranks:
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        yield from sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _letters() -> Mapping[int, str]:
    """The letter that stands for each byte in byte-level vocabularies: GPT-2's alphabet."""
    others = [byte for byte in range(256) if byte not in _PRINTABLE]
    return {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + place) for place, byte in enumerate(others)}


_LETTERS = _letters()


def _as_letters(token: bytes) -> str:
    return "".join(_LETTERS[byte] for byte in token)


def _added_tokens(
    path: Path, n_ranks: int, class_name: str, facts: SplittingCode, settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The entries of special tokens, without a gap in their numbers: the library would number them anew."""
    named = _named_tokens(path, settings) or _known_tokens(path, n_ranks, class_name, facts)
    if min(named) < n_ranks or max(named) > n_ranks + _MOST_SPECIAL:
        raise InputError(
            f"{path} has {n_ranks:,} tokens, and tokenizer_config.json numbers its special tokens from {min(named):,} "
            f"to {max(named):,}: they do not belong together"
        )
    numbers = range(n_ranks, max(named) + 1)
    return [
        _PLAIN | {"id": number, "content": f"<|reserved_token_{number}|>"} | named.get(number, {}) for number in numbers
    ]


def _named_tokens(path: Path, settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The special tokens of ``tokenizer_config.json`` by their numbers; empty if it names none."""
    named = settings.get("added_tokens_decoder") or {}
    try:
        return {
            int(number): {key: entry[key] for key in ("content", *_FLAGS) if key in entry}
            for number, entry in named.items()
        }
    except (AttributeError, TypeError, ValueError):
        place = path.parent / "tokenizer_config.json"
        raise InputError(
            f"{place}: added_tokens_decoder must hold tokens by their numbers; download it again"
        ) from None


def _known_tokens(path: Path, n_ranks: int, class_name: str, facts: SplittingCode) -> dict[int, dict[str, Any]]:
    """The special tokens as a known class numbers them."""
    first, others = _SPECIAL_TOKENS.get(class_name, ((), ()))
    if not first or not facts.texts.issuperset(first):
        raise InputError(
            f"{path}: neither tokenizer_config.json (added_tokens_decoder) nor known code says which numbers the "
            f"special tokens of {class_name} have; make a tokenizer.json with that code where you trust it"
        )
    return {n_ranks + place: {"content": text} for place, text in enumerate((*first, *others))}
