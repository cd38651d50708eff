"""The vocabulary that would be written against the checkpoint's tokenizer, inside llama.cpp, kind by kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from compressors.model.config.reading import read_spec
from compressors.model.config.special_tokens import special_tokens
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.files.gguf.pre_tokenizers import PRE_TOKENIZERS
from compressors.model.files.tokenizer_files import load_tokenizer, tokens_of
from exporter.validation.vocabulary_check import vocabulary_deviations
from exporter.writing.gguf.container import render_header, render_values, string
from exporter.writing.gguf.vocabulary.metadata import vocabulary_metadata
from exporter.writing.tokenizer_copy import write_tokenizer
from validate.vocabulary.tokenization import AWKWARD_TEXTS, texts_around
from validate.vocabulary.vocabulary_process import LlamaTokens, ask_llama_cpp

_ROWS = 4200
_FIRST_FREE = 4096
_IM_END = 2
_NOT_NFC = "not in Unicode's normal form C"
_FURTHER_END = "llama.cpp ends a text at <|im_end|> too, which the model's files do not name as end of a text"

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(fine_folder: Path, tmp_path: Path) -> Path:
    """The small files of a checkpoint with more rows than tokens."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(fine_folder / name, tmp_path / name)
    _edit(tmp_path / "config.json", vocab_size=_ROWS)
    return tmp_path


def _edit(path: Path, **changes: Any) -> None:
    before = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps(before | changes), encoding="utf-8")


def _change_tokenizer(folder: Path, change: Edit) -> None:
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text("utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def _add(folder: Path, texts: Sequence[str], **flags: bool) -> list[int]:
    """Adds tokens to tokenizer.json; returns their numbers."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    numbers = [_FIRST_FREE + number for number in range(len(texts))]
    entries = [{"id": number, "content": text, **plain, **flags} for number, text in zip(numbers, texts, strict=True)]
    _change_tokenizer(folder, lambda data: data["added_tokens"].extend(entries))
    return numbers


def _deviations(folder: Path, name: str = "toy") -> list[str]:
    return list(vocabulary_deviations(folder, read_spec(folder), name))


def _cuts(folder: Path) -> list[str]:
    """The deviations about cutting text, without the one that every tokenizer with NFC has."""
    return [said for said in _deviations(folder) if " cuts text " in said and _NOT_NFC not in said]


def _in_llama_cpp(folder: Path, texts: Sequence[str] = ()) -> LlamaTokens:
    values = {"general.architecture": string("qwen3moe"), **vocabulary_metadata(folder, read_spec(folder).vocab_size)}
    path = folder / "vocabulary.gguf"
    path.write_bytes(render_header(len(values), render_values(values), []))
    return ask_llama_cpp(path, texts)


def test_a_trained_model_differs_where_llama_cpp_cannot_do_better(folder: Path) -> None:
    normal_form, end = _deviations(folder)
    assert _NOT_NFC in normal_form
    assert r"cafe\u0301" in normal_form
    assert end == _FURTHER_END


@pytest.mark.parametrize("steps", [[], ["NFC"], [["NFC"], "NFC"]])
def test_sequences_of_normalizers_are_what_they_hold(folder: Path, steps: list[Any]) -> None:
    def normalizer(step: Any) -> dict[str, Any]:
        if isinstance(step, str):
            return {"type": step}
        return {"type": "Sequence", "normalizers": [normalizer(part) for part in step]}

    _change_tokenizer(folder, lambda data: data.update(normalizer=normalizer(steps)))
    assert any(_NOT_NFC in said for said in _deviations(folder)) == bool(steps)


@pytest.mark.parametrize("name", ["Lowercase", "NFKC", "StripAccents"])
def test_a_normalizer_inside_a_sequence_is_named(folder: Path, name: str) -> None:
    steps = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": name}]}
    _change_tokenizer(folder, lambda data: data.update(normalizer=steps))
    with pytest.raises(UnsupportedError, match=f"the normalizer {name}"):
        _deviations(folder)


@pytest.mark.parametrize(
    ("flag", "text"),
    [("lstrip", "the <|tool|> house"), ("rstrip", "the <|tool|> house"), ("single_word", "a<|tool|>b")],
)
def test_flags_of_added_tokens_that_llama_cpp_lacks_are_named(folder: Path, flag: str, text: str) -> None:
    _add(folder, ["<|tool|>"], **{flag: True})
    (said,) = _cuts(folder)
    assert text in said


@pytest.mark.parametrize("where", ["tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"])
def test_tokens_that_tokenizer_json_lacks_are_written(folder: Path, where: str) -> None:
    settings: dict[str, Any] = {"additional_special_tokens": ["<|turn|>"]}
    if where == "added_tokens.json":
        settings = {"<|turn|>": _FIRST_FREE}
    _edit(folder / where, **settings)
    assert load_tokenizer(folder).convert_tokens_to_ids("<|turn|>") == _FIRST_FREE
    text = "a<|turn|>b"
    assert _in_llama_cpp(folder, [text]).parsed == tuple(tokens_of(folder, [text]))
    assert not _cuts(folder)
    beside = folder / "beside"
    beside.mkdir()
    write_tokenizer(folder, beside)
    alone = Tokenizer.from_file(str(beside / "tokenizer.json"))
    shutil.copyfile(folder / "config.json", beside / "config.json")
    assert tuple(alone.encode(text).ids) == tokens_of(folder, [text])[0] == tokens_of(beside, [text])[0]


def test_more_tokens_than_rows_are_refused_wherever_they_are_from(folder: Path) -> None:
    _edit(folder / "tokenizer_config.json", additional_special_tokens=[f"<|turn {number}|>" for number in range(200)])
    with pytest.raises(InputError, match=f"has number {_ROWS}, but config.json says vocab_size {_ROWS}"):
        _deviations(folder)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_end_token_ends_a_text_and_no_other(folder: Path, count: int) -> None:
    ends = _add(folder, [f"<stop {number}>" for number in range(count)])
    _edit(folder / "generation_config.json", eos_token_id=ends)
    wanted = set(special_tokens(folder, _ROWS).ends)
    assert wanted == {0, *ends}
    assert _in_llama_cpp(folder).ends == wanted | {_IM_END}
    assert _deviations(folder)[-1] == _FURTHER_END


def test_an_end_token_too_many_for_a_file_is_named(folder: Path) -> None:
    ends = _add(folder, [f"<stop {number}>" for number in range(6)])
    _edit(folder / "generation_config.json", eos_token_id=ends)
    assert "llama.cpp does not end a text at <stop 5>, though the model does" in _deviations(folder)


def test_end_tokens_that_llama_cpp_knows_by_text_leave_the_keys_to_others(folder: Path) -> None:
    texts = ["<|eot_id|>", "<end_of_turn>", "<|end_of_text|>", "<|return|>", "<stop>"]
    _edit(folder / "generation_config.json", eos_token_id=_add(folder, texts))
    assert not [said for said in _deviations(folder) if "does not end" in said]


@pytest.mark.parametrize("rows", [_ROWS, _FIRST_FREE])
def test_without_any_end_token_the_comma_ends_no_text(folder: Path, rows: int) -> None:
    _edit(folder / "config.json", eos_token_id=None, vocab_size=rows)
    _edit(folder / "tokenizer_config.json", eos_token=None, pad_token=None)
    ends = _in_llama_cpp(folder).ends
    assert 11 not in ends
    ordinary = {token for text in tokens_of(folder, AWKWARD_TEXTS, read_special_as_text=True) for token in text}
    assert not ends & ordinary


def test_without_any_special_token_a_gguf_is_refused(folder: Path) -> None:
    _edit(folder / "config.json", eos_token_id=None, bos_token_id=None, pad_token_id=None, vocab_size=_FIRST_FREE)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}  # others of transformers bring an end token
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    _change_tokenizer(folder, lambda data: data.update(added_tokens=[]))
    with pytest.raises(UnsupportedError, match=r"names no token that ends a text.*eos_token_id"):
        _deviations(folder)


def _template(*around: str) -> Any:
    ids = {"<|im_start|>": 1, "<|im_end|>": _IM_END}
    return processors.TemplateProcessing(single=" ".join(around), special_tokens=list(ids.items()))


def test_what_is_put_around_a_text_is_compared(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = _template("<|im_start|>", "$A")
    tokenizer.save(str(path))
    assert _in_llama_cpp(folder, ["a"]).whole == ((1, *tokens_of(folder, ["a"])[0]),)
    assert not [said for said in _deviations(folder) if "puts" in said]
    tokenizer.post_processor = _template("<|im_start|>", "<|im_end|>", "$A", "<|im_end|>")
    tokenizer.save(str(path))
    before, behind = (said for said in _deviations(folder) if "puts" in said)
    assert before == "the model's tokenizer puts <|im_start|>, <|im_end|> before a text, llama.cpp nothing"
    assert behind == "the model's tokenizer puts <|im_end|> behind a text, llama.cpp nothing"
    _edit(folder / "generation_config.json", eos_token_id=[_IM_END])
    assert not [said for said in _deviations(folder) if "behind" in said]


def test_a_word_that_llama_cpp_takes_for_special_is_named(folder: Path) -> None:
    _change_tokenizer(folder, lambda data: data["model"]["vocab"].update({"</s>": _FIRST_FREE}))
    assert any("Hello</s>" in said for said in _cuts(folder))
    assert any("</s> too" in said for said in _deviations(folder))


def test_a_token_named_like_padding_is_no_duplicate(folder: Path) -> None:
    number = _add(folder, [f"[PAD{_ROWS - 1}]"])[0]
    assert _in_llama_cpp(folder, [f"[PAD{_ROWS - 1}]"]).parsed == ((number,),)


def test_two_tokens_of_one_number_are_refused(folder: Path) -> None:
    _change_tokenizer(folder, lambda data: data["model"]["vocab"].update(zzzzq=300))
    with pytest.raises(InputError, match="two tokens of its vocabulary have the same number"):
        _deviations(folder)


def test_tokens_that_the_library_numbers_anew_are_written_as_it_numbers_them(folder: Path) -> None:
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    far = {"id": _ROWS - 1, "content": "<|far|>", **entry}
    _change_tokenizer(folder, lambda data: data["added_tokens"].append(far))
    (number,) = tokens_of(folder, ["<|far|>"])[0]
    assert number == _FIRST_FREE
    assert _in_llama_cpp(folder, ["<|far|>"]).parsed == ((number,),)


def test_a_name_by_which_llama_cpp_expects_other_tokens_is_refused(folder: Path) -> None:
    with pytest.raises(UnsupportedError, match="another name"):
        _deviations(folder, name="my-Phi-3-moe")


def test_ordinary_text_cut_otherwise_is_refused_with_the_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of expressions is not believed: here it names GPT-2's words for Qwen's."""
    monkeypatch.setattr("exporter.writing.gguf.vocabulary.metadata.known_pre_tokenizer", lambda *_: PRE_TOKENIZERS[0])
    with pytest.raises(UnsupportedError, match=r"would cut text otherwise .* such as '.*' into \[.*\] instead of \["):
        _deviations(folder)


@pytest.fixture(scope="module")
def pieces(heldout_text: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges in SentencePiece's style: each way to put a piece together is a merge."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=first, limit_alphabet=80, show_progress=False)
    trained.train_from_iterator(heldout_text[:60_000].splitlines(), trainer)
    vocabulary = trained.get_vocab()
    words = sorted((piece for piece in vocabulary if len(piece) > 1), key=vocabulary.__getitem__)
    cuts = [(word[:cut], word[cut:]) for word in words for cut in range(1, len(word))]
    return vocabulary, [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]


@pytest.fixture
def sentencepiece(folder: Path, pieces: tuple[dict[str, int], list[tuple[str, str]]]) -> Callable[..., Path]:
    """A folder with such a tokenizer: ``sentencepiece(normalizer=..., pre_tokenizer=...)``."""
    vocabulary, merges = pieces

    def make(**parts: object) -> Path:
        model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        tokenizer = Tokenizer(model)
        for name, part in parts.items():
            setattr(tokenizer, name, part)
        tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<|im_start|>"])
        tokenizer.save(str(folder / "tokenizer.json"))
        _edit(folder / "tokenizer_config.json", bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token=None)
        _edit(folder / "config.json", bos_token_id=1, eos_token_id=2, pad_token_id=None)
        return folder

    return make


_OLDER = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
_SPACES = normalizers.Replace(" ", "▁")


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": _OLDER},
        {"normalizer": _SPACES},
        {"normalizer": _SPACES, "pre_tokenizer": pre_tokenizers.Split(" ", "merged_with_previous")},
        {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="never", split=True)},
        {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="never", split=False)},
    ],
    ids=["prepend", "replace", "split", "never", "never-unsplit"],
)
def test_sentencepiece_styles_that_agree(sentencepiece: Callable[..., Path], parts: dict[str, object]) -> None:
    assert _deviations(sentencepiece(**parts)) == []


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(("scheme", "around"), [("first", "<|im_start|>user"), ("always", "the <|im_start|> house")])
def test_metaspace_differs_at_spaces_and_special_tokens(
    sentencepiece: Callable[..., Path], scheme: str, around: str, split: bool
) -> None:
    folder = sentencepiece(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split))
    spaces, special = _deviations(folder)
    assert "text that begins with a space" in spaces
    assert "' begins with a space'" in spaces
    assert around in special


def test_sentencepiece_without_end_token_does_not_end_at_the_default(sentencepiece: Callable[..., Path]) -> None:
    folder = sentencepiece(normalizer=_OLDER)
    _edit(folder / "config.json", eos_token_id=None)
    _edit(folder / "tokenizer_config.json", eos_token=None)
    _change_tokenizer(folder, lambda data: data["model"]["vocab"].pop("</s>"))
    _change_tokenizer(folder, lambda data: data["model"]["vocab"].update({"e": 2}))
    _change_tokenizer(folder, lambda data: data["added_tokens"].pop(2))
    assert 2 not in _in_llama_cpp(folder).ends


def test_llama_cpp_dying_of_a_vocabulary_is_a_refusal(
    sentencepiece: Callable[..., Path], pieces: tuple[dict[str, int], list[tuple[str, str]]]
) -> None:
    folder = sentencepiece(normalizer=_OLDER)
    for byte in range(256):
        _change_tokenizer(folder, lambda data, text=f"<0x{byte:02X}>": data["model"]["vocab"].pop(text))
    with pytest.raises(UnsupportedError, match=r"cannot be brought into a GGUF file \(llama.cpp died.*SIGABRT"):
        _deviations(folder)


def test_the_onnx_folder_cuts_the_page_as_the_source_does(folder: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in tokenizer["model"]["merges"]), "utf-8")
    (folder / "tokenizer.json").unlink()
    _edit(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    beside = tmp_path / "beside"
    beside.mkdir()
    write_tokenizer(folder, beside)
    texts = [*AWKWARD_TEXTS, *texts_around(load_tokenizer(folder).get_added_vocab())]
    alone = Tokenizer.from_file(str(beside / "tokenizer.json"))
    assert [tuple(alone.encode(text).ids) for text in texts] == tokens_of(folder, texts)
