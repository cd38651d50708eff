"""A tokenizer read by the ``tokenizers`` library alone, where transformers would add nothing of its own.

Importing transformers takes seconds, and plans need no more than tokens. Where its tokenizer would be another than
``tokenizer.json`` says, it must be asked (:mod:`compressors.model.files.tokenizer_files`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressors.model.files.json_file import read_json
from compressors.model.files.unchanged_tokenizer import SPECIAL_KINDS, has_other_files, is_taken_as_it_is

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

__all__ = ["PlainTokenizer", "plain_tokenizer"]


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
    if not path.is_file() or not config_path.is_file():
        return None
    config = read_json(config_path)
    if has_other_files(folder, config) or not is_taken_as_it_is(folder, config, read_json(path)):
        return None
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(path))
    except Exception:  # transformers' error has more to say
        return None
    special = {kind: config[kind] for kind in SPECIAL_KINDS if config.get(kind) is not None}
    return PlainTokenizer(backend, special, config.get("chat_template"))
