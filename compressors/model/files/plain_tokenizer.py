"""A tokenizer read by the ``tokenizers`` library alone, where transformers would add nothing of its own.

Importing transformers takes seconds, and plans need no more than tokens. transformers takes ``tokenizer.json`` as it is
where ``tokenizer_config.json`` names its general class and changes nothing; most of its other classes build a tokenizer
of their own from the vocabulary, so for those it must be asked (:mod:`compressors.model.files.tokenizer_files`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressors.model.families.registry import supported_families
from compressors.model.files.json_file import read_json

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

__all__ = ["PlainTokenizer", "plain_tokenizer"]

_GENERAL_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
_KINDS = ("bos_token", "eos_token", "pad_token", "unk_token")
_WITHOUT_EFFECT = frozenset(
    {
        *("backend", "chat_template", "clean_up_tokenization_spaces", "is_local", "local_files_only"),
        *("model_max_length", "name_or_path", "tokenizer_class"),
    }
)
_OTHER_FILES = (
    *("special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt", "tekken.json"),
    *("chat_template.json", "chat_template.jinja", "additional_chat_templates"),
)
_PATCHED_FROM = 100_000  # tokens from which transformers may put another expression into the pre-tokenizer
_AS_TRANSFORMERS_ADDS = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}


@dataclass(frozen=True)
class PlainTokenizer:
    """The part of a transformers tokenizer that plans need, under the same names and with the same results."""

    backend_tokenizer: Tokenizer
    special: Mapping[str, str]  # texts by kind
    chat_template: str | None

    @property
    def bos_token(self) -> str | None:
        """The text of BOS."""
        return self.special.get("bos_token")

    @property
    def bos_token_id(self) -> int | None:
        """The id of BOS, even if the tokenizer does not put it before a text."""
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id of EOS."""
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The id of the padding."""
        return self._id("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        """The id that stands for what has no token."""
        return self._id("unk_token")

    @property
    def sep_token_id(self) -> int | None:
        """The id of a separator, which such tokenizers do not name."""
        return None

    mask_token_id = sep_token_id

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The added tokens by id."""
        return self.backend_tokenizer.get_added_tokens_decoder()

    def get_added_vocab(self) -> dict[str, int]:
        """The ids of the added tokens by text, in the order of the ids."""
        return {token.content: number for number, token in sorted(self.added_tokens_decoder.items())}

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """The text of one id, None if there is no such token; or a list of those of several ids."""
        if isinstance(ids, int):
            return self.backend_tokenizer.id_to_token(ids)
        return [self.backend_tokenizer.id_to_token(number) for number in ids]

    def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = False) -> list[int]:
        """The tokens of a text; ``verbose`` is transformers' and changes nothing."""
        return self.encode_all([text], add_special_tokens=add_special_tokens)[0]

    def encode_all(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, special_as_text: bool = False
    ) -> list[list[int]]:
        """The tokens of several texts."""
        self.backend_tokenizer.encode_special_tokens = special_as_text
        encoded = self.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        self.backend_tokenizer.encode_special_tokens = False
        return [encoding.ids for encoding in encoded]

    def _id(self, kind: str) -> int | None:
        return self.backend_tokenizer.token_to_id(self.special[kind]) if kind in self.special else None


def plain_tokenizer(folder: Path) -> PlainTokenizer | None:
    """Returns the tokenizer of a checkpoint's folder; None where transformers has to make it, or to refuse it.

    Raises:
        InputError: one of the files is not JSON.
    """
    path, config_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not path.is_file() or not config_path.is_file() or any((folder / name).exists() for name in _OTHER_FILES):
        return None
    config, data = read_json(config_path), read_json(path)
    if not _is_taken_as_it_is(folder, config, data):
        return None
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(path))
    except Exception:  # transformers' error has more to say
        return None
    special = {kind: config[kind] for kind in _KINDS if config.get(kind) is not None}
    return PlainTokenizer(backend, special, config.get("chat_template"))


def _is_taken_as_it_is(folder: Path, config: Mapping[str, Any], data: Mapping[str, Any]) -> bool:
    """True if transformers' object for these files is ``tokenizer.json`` and nothing else (``TokenizersBackend``)."""
    special = [config[kind] for kind in _KINDS if config.get(kind) is not None]
    return (
        config.get("tokenizer_class") in _GENERAL_CLASSES
        and {*config} <= {*_KINDS, *_WITHOUT_EFFECT}
        and isinstance(config.get("chat_template"), str | None)
        and _leaves_the_class(folder)
        and _is_usual(data)
        and all(isinstance(token, str) and _is_special(token, data["added_tokens"]) for token in special)
    )


def _leaves_the_class(folder: Path) -> bool:
    """True if transformers takes the class that the files name; for some families it takes another."""
    path = folder / "config.json"
    model_type = read_json(path).get("model_type") if path.is_file() else None
    family = supported_families().get(model_type) if isinstance(model_type, str) else None
    return family is not None and not family.has_own_tokenizer


def _is_usual(data: Mapping[str, Any]) -> bool:
    model, added = data.get("model"), data.get("added_tokens")
    if not isinstance(model, dict) or not isinstance(added, list) or not isinstance(model.get("vocab"), dict):
        return False
    return (
        model.get("type") == "BPE"
        and not model.get("dropout")
        and len(model["vocab"]) + len(added) <= _PATCHED_FROM
        and all(type(number) is int and number < 2 * _PATCHED_FROM for number in model["vocab"].values())
        and data.get("truncation") is data.get("padding") is None
        and data.get("post_processor") is not None
    )


def _is_special(token: str, added: Sequence[Any]) -> bool:
    """True if the file has a special token with the properties that transformers would give it."""
    found = [entry for entry in added if isinstance(entry, dict) and entry.get("content") == token]
    return len(found) == 1 and all(found[0].get(key) is value for key, value in _AS_TRANSFORMERS_ADDS.items())
