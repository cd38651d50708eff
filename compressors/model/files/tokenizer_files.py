"""The one place that loads a tokenizer: as ``AutoTokenizer`` does, with nothing downloaded and no foreign code run."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from compressors.model.errors import InputError
from compressors.model.files.json_file import read_json
from compressors.model.files.plain_tokenizer import PlainTokenizer, plain_tokenizer
from compressors.model.files.unchanged_tokenizer import MOST_TOKENS
from compressors.model.files.vocabularies.made_files import MADE_OF, made_tokenizer_files, named_code
from compressors.model.names import shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "TOKENIZER_FILES",
    "copy_tokenizer_files",
    "files_state",
    "load_tokenizer",
    "open_tokenizer",
    "read_tokenizer_json",
    "tokens_of",
]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""The files that ``AutoTokenizer`` may read, beside ``config.json`` and the folder ``additional_chat_templates``."""

_TEMPLATES = "additional_chat_templates"
_EMPTY_MODEL = {"type": "BPE", "vocab": {}, "merges": []}


def files_state(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Returns name, time of modification and size of every file that the tokenizer and its special tokens depend on.

    A result of reading them stays valid while this stays the same.
    """
    names = (*TOKENIZER_FILES, "config.json", "generation_config.json")
    further = (path for pattern in (f"{_TEMPLATES}/*", *MADE_OF) for path in sorted(folder.glob(pattern)))
    paths = [*(folder / name for name in names), *further]
    return tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in paths if path.is_file())


def open_tokenizer(folder: Path) -> PlainTokenizer | PreTrainedTokenizerFast:
    """Returns a checkpoint's tokenizer for plans, without transformers where that would change nothing.

    Raises:
        InputError: as :func:`load_tokenizer`.
    """
    return _plain_tokenizer(folder, files_state(folder)) or load_tokenizer(folder)


@functools.lru_cache(maxsize=1)
def _plain_tokenizer(folder: Path, state: object) -> PlainTokenizer | None:
    plain = plain_tokenizer(folder)
    return None if plain is None or not plain.encode("a", add_special_tokens=False) else plain


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Returns a checkpoint's tokenizer, as transformers loads it; it is remembered while its files do not change.

    Raises:
        InputError: there is no usable tokenizer; the message names the file, the part at fault and the remedy.
    """
    return _load_tokenizer(folder, files_state(folder))


@functools.lru_cache(maxsize=1)
def _load_tokenizer(folder: Path, state: object) -> PreTrainedTokenizerFast:
    made = made_tokenizer_files(folder)
    if not made and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(f"{folder} has no usable tokenizer: download tokenizer.json and tokenizer_config.json too")
    config = folder / "tokenizer_config.json"
    if config.is_file():
        read_json(config)
    _refuse_huge_numbers(folder / "tokenizer.json")
    loaded: PreTrainedTokenizerFast = _guarded(lambda: _from_files(folder, made), folder)
    if not _guarded(lambda: loaded.encode("a", add_special_tokens=False), folder):
        raise InputError(f"{folder} has no usable tokenizer: it makes no token of the text 'a'; download it again")
    _refuse_dropout(loaded, folder)
    return loaded


def _from_files(folder: Path, made: Mapping[str, str] | None) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # takes seconds to import

    if made is None:
        found: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return cast("PreTrainedTokenizerFast", found)
    with tempfile.TemporaryDirectory(prefix="moe-export-") as place:
        copy_tokenizer_files(folder, Path(place), made)
        return cast("PreTrainedTokenizerFast", PreTrainedTokenizerFast.from_pretrained(place, local_files_only=True))


def copy_tokenizer_files(folder: Path, place: Path, made: Mapping[str, str] | None = None) -> None:
    """Copies the files that transformers makes the tokenizer from; those that had to be made are written instead.

    Args:
        folder: the checkpoint's folder.
        place: the folder to copy them to.
        made: the files that had to be made, if they are known already.

    Raises:
        InputError: a vocabulary that no ``tokenizer.json`` holds cannot be read.
    """
    made = made_tokenizer_files(folder) if made is None else made
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, place / name)
    if (folder / _TEMPLATES).is_dir():
        shutil.copytree(folder / _TEMPLATES, place / _TEMPLATES, dirs_exist_ok=True)
    for name, text in (made or {}).items():
        (place / name).write_text(text, encoding="utf-8")


def _refuse_dropout(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Refuses BPE dropout, meant for training: transformers leaves it on, and a text has other tokens each time."""
    dropout = getattr(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None), "dropout", None)
    if dropout:
        raise InputError(
            f"{folder / 'tokenizer.json'}: model.dropout is {dropout:.4g} (BPE dropout), so the same text gives other "
            "tokens each time, and nothing could be measured or repeated; set it to null"
        )


def tokens_of(folder: Path, texts: Sequence[str], *, read_special_as_text: bool = False) -> list[tuple[int, ...]]:
    """Returns the token ids of texts by the tokenizer of ``folder``, with nothing put before or behind them.

    Tokens that it calls special are recognised inside a text, unless they are to be read as text.

    Raises:
        InputError: as :func:`load_tokenizer`, or the tokenizer has no token for a part of a text.
    """
    tokenizer = open_tokenizer(folder)
    if isinstance(tokenizer, PlainTokenizer):
        plain = tokenizer.encode_all(texts, add_special_tokens=False, special_as_text=read_special_as_text)
        return [tuple(tokens) for tokens in plain]
    encoded = _guarded(
        lambda: tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=read_special_as_text, verbose=False
        ),
        folder,
    )
    return [tuple(tokens) for tokens in encoded["input_ids"]]


def class_with_other_words(folder: Path) -> str | None:
    """Returns transformers' class if it cuts text into words otherwise than ``tokenizer.json`` says.

    Some of its classes have expressions of their own. None where the file merges letters instead of bytes: spaces are
    written in several ways there that come to the same.

    Raises:
        InputError: as :func:`load_tokenizer`.
    """
    tokenizer = open_tokenizer(folder)
    if isinstance(tokenizer, PlainTokenizer):
        return None
    path = folder / "tokenizer.json"
    written = _words(read_json(path).get("pre_tokenizer")) if path.is_file() else []
    if not any(step.get("type") == "ByteLevel" for step in written):
        return None
    step = tokenizer.backend_tokenizer.pre_tokenizer
    loaded = [] if step is None else _words(json.loads(step.__getstate__()))
    return None if loaded == written else type(tokenizer).__name__


def _words(pre_tokenizer: Any) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, without the setting that changes no token."""
    if not isinstance(pre_tokenizer, dict):
        return []
    if pre_tokenizer.get("type") == "Sequence":
        return [step for part in pre_tokenizer.get("pretokenizers", ()) for step in _words(part)]
    return [{key: value for key, value in pre_tokenizer.items() if key != "trim_offsets"}]


def read_tokenizer_json(path: Path) -> Tokenizer:
    """Returns the tokenizer of one ``tokenizer.json``, as the ``tokenizers`` library alone reads it.

    Raises:
        InputError: the library refuses the file; the message names the part at fault and the remedy.
    """
    from tokenizers import Tokenizer

    _refuse_huge_numbers(path)
    tokenizer: Tokenizer = _guarded(lambda: Tokenizer.from_file(str(path)), path.parent)
    return tokenizer


def _refuse_huge_numbers(path: Path) -> None:
    """Refuses huge token ids, for which the library would have no room."""
    model = read_json(path).get("model") if path.is_file() else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    for token, number in vocabulary.items() if isinstance(vocabulary, dict) else ():
        if type(number) is int and number >= MOST_TOKENS:
            raise InputError(
                f"{path}: token {shown(token)} has number {number}, and no vocabulary is so large; download it again"
            )


def _guarded(action: Callable[[], Any], folder: Path) -> Any:
    """Turns all that the libraries raise into one sentence: exceptions, and panics, which are not exceptions."""
    try:
        with _quiet():
            return action()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic in Rust is not an Exception
        raise InputError(_sentence(folder, error)) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the libraries' warnings and a panic's stack off the terminal; our message says all that matters."""
    if sys.stderr is None:  # closed by whoever started us
        yield
        return
    sys.stderr.flush()
    shown = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(shown, 2)
        os.close(shown)


def _sentence(folder: Path, error: BaseException) -> str:
    from importlib.metadata import version

    path = folder / "tokenizer.json"
    reason = _first_line(error)
    if path.is_file():
        data = read_json(path)  # raises if it is not JSON
        part = _part_at_fault(data)
        if part is not None:
            return (
                f"{path}: its {_described(data, part)} cannot be read by the installed tokenizers "
                f"{version('tokenizers')} ({reason}); update it (pip install --upgrade tokenizers transformers), "
                "or download the file again if it is damaged"
            )
        return (
            f"{folder}: its tokenizer files cannot be read by the installed transformers {version('transformers')} "
            f"({reason}); download tokenizer_config.json and tokenizer.json again, or update transformers"
        )
    code = named_code(folder)
    if code is not None:
        return (
            f"{folder / 'tokenizer_config.json'} names Python code of its own ({code}), which is never run here, and "
            "there is no tokenizer.json to read instead: get or make one, with that code where you trust it"
        )
    return (
        f"{folder} has no tokenizer.json, and its other tokenizer files cannot be read ({reason}); make one where "
        "sentencepiece and tiktoken are installed: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def _part_at_fault(data: dict[str, Any]) -> str | None:
    """The one part of a ``tokenizer.json`` without which the library reads it; ``model`` if there is none."""
    if _is_readable(data):
        return None
    small = data | {"model": _EMPTY_MODEL, "added_tokens": []}  # a vocabulary takes long to read again and again
    if _is_readable(small):
        whole = data | {"added_tokens": []}
        return "added_tokens" if _is_readable(whole) else "model"
    for part in ("pre_tokenizer", "normalizer", "post_processor", "decoder"):
        if _is_readable(small | {part: None}):
            return part
    return "contents"


def _is_readable(data: dict[str, Any]) -> bool:
    from tokenizers import Tokenizer

    try:
        with _quiet():
            Tokenizer.from_str(json.dumps(data))
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException:
        return False
    return True


def _described(data: dict[str, Any], part: str) -> str:
    """Names a part, such as ``model of type 'SuperBPE'``, or ``pre_tokenizer (Split, ByteLevel)``."""
    settings = data.get(part)
    if not isinstance(settings, dict) or "type" not in settings:
        return part
    steps = settings.get("pretokenizers", settings.get("normalizers"))
    if isinstance(steps, list):
        kinds = [str(step.get("type")) for step in steps if isinstance(step, dict)]
        return f"{part} ({', '.join(kinds)[:80]})"
    return f"{part} of type {str(settings['type'])[:40]!r}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{lines[0][:200]}" if lines else type(error).__name__
