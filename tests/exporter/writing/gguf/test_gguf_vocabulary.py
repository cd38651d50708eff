"""llama.cpp must split text into exactly the tokens of the Hugging Face tokenizer."""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import llama_cpp.llama_cpp as api
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from compressors.model.config.reading import read_spec
from compressors.model.errors import InputError, UnsupportedError
from compressors.model.files.gguf.gguf_file import GgufFile
from compressors.model.files.gguf.gguf_tokenizer import generation_config, tokenizer_config, tokenizer_json
from exporter.writing.gguf.container import render_header, render_values
from exporter.writing.gguf.metadata import model_metadata
from exporter.writing.gguf.vocabulary.metadata import vocabulary_metadata
from tests.described_folder import DescribedFolder

_AWKWARD = (
    "  Don't we'LL  stop? 1234567 + 3.14\n\n\n\tdef f(x):\n        return x**2  # ok\r\n"
    "naïve café, Ünïcode, 東京は日本, Привет, שלום, 😀👍🏽 <|im_end|> end   \n "
)


def _write_vocabulary(folder: Path, path: Path) -> None:
    spec = read_spec(folder)
    metadata = {
        **model_metadata(spec, DescribedFolder(folder), "vocabulary", "F32"),
        **vocabulary_metadata(folder, spec.vocab_size),
    }
    path.write_bytes(render_header(len(metadata), render_values(metadata), []))


@contextmanager
def _llama_vocabulary(folder: Path, path: Path) -> Iterator[int]:
    _write_vocabulary(folder, path)
    params = api.llama_model_default_params()
    params.vocab_only = True
    model = api.llama_model_load_from_file(str(path).encode(), params)
    assert model is not None
    vocabulary = api.llama_model_get_vocab(model)
    assert vocabulary is not None
    yield vocabulary
    api.llama_model_free(model)


def _llama_tokens(vocabulary: int, text: str) -> list[int]:
    encoded = text.encode()
    tokens = (ctypes.c_int32 * (len(encoded) + 8))()
    count = api.llama_tokenize(vocabulary, encoded, len(encoded), tokens, len(tokens), True, True)
    assert count >= 0
    return list(tokens[:count])


def assert_same_tokens(folder: Path, path: Path, texts: Sequence[str]) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with _llama_vocabulary(folder, path) as vocabulary:
        for text in texts:
            assert _llama_tokens(vocabulary, text) == tokenizer.encode(text).ids
    _assert_turned_back(folder, path, texts)


def _assert_turned_back(folder: Path, path: Path, texts: Sequence[str]) -> None:
    """The files made of the vocabulary give the same tokens, and the same vocabulary when it is written again."""
    file, back = GgufFile(path), path.parent / "back"
    back.mkdir()
    makers = {"tokenizer": tokenizer_json, "tokenizer_config": tokenizer_config, "generation_config": generation_config}
    for name, make in makers.items():
        (back / f"{name}.json").write_text(json.dumps(make(file)), encoding="utf-8")
    vocab_size = read_spec(folder).vocab_size
    assert vocabulary_metadata(back, vocab_size) == vocabulary_metadata(folder, vocab_size)
    original, again = (Tokenizer.from_file(str(place / "tokenizer.json")) for place in (folder, back))
    for text in texts:
        tokens = again.encode(text, add_special_tokens=False).ids
        assert tokens == original.encode(text, add_special_tokens=False).ids
        assert again.encode(text).ids == original.encode(text).ids
        assert again.decode(tokens, skip_special_tokens=False) == text


def test_trained_models_tokenize_held_out_text_alike(family_folder: Path, tmp_path: Path, heldout_text: str) -> None:
    assert_same_tokens(family_folder, tmp_path / "vocabulary.gguf", [heldout_text, _AWKWARD])


@pytest.fixture
def folder_with_tokenizer(fine_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint's small files; tests put their own tokenizer there."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(fine_folder / name, tmp_path / name)
    return tmp_path


def _edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def _train_sentencepiece_style(text: str, path: Path) -> None:
    """A tokenizer as converted from SentencePiece: BPE with byte fallback, and every split of a piece as a merge."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], limit_alphabet=80, show_progress=False
    )
    trained.train_from_iterator(text.splitlines(), trainer)
    vocabulary = trained.get_vocab()
    pieces = sorted((piece for piece in vocabulary if len(piece) > 1), key=vocabulary.__getitem__)
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.save(str(path))


def test_sentencepiece_style_tokenizes_alike(folder_with_tokenizer: Path, heldout_text: str) -> None:
    _train_sentencepiece_style(heldout_text[:200_000], folder_with_tokenizer / "tokenizer.json")
    _edit_json(folder_with_tokenizer / "tokenizer_config.json", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    path = folder_with_tokenizer / "vocabulary.gguf"
    assert_same_tokens(folder_with_tokenizer, path, [heldout_text[200_000:230_000], _AWKWARD])
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert fields["tokenizer.ggml.unknown_token_id"].contents() == 0
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types.count(gguf.TokenType.BYTE) == 256
    assert types[4095] == gguf.TokenType.UNUSED  # the model has more rows than the tokenizer has tokens


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
def test_chat_template_is_kept_byte_for_byte(folder_with_tokenizer: Path, where: str) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\u00e9<|im_end|>\n{% endfor %}"
    if where.endswith(".json"):
        _edit_json(folder_with_tokenizer / where, chat_template=template)
    else:
        (folder_with_tokenizer / where).write_text(template, encoding="utf-8")
    _write_vocabulary(folder_with_tokenizer, folder_with_tokenizer / "v.gguf")
    assert gguf.GGUFReader(folder_with_tokenizer / "v.gguf").fields["tokenizer.chat_template"].contents() == template


@pytest.mark.parametrize("templates", [[{"name": "default", "template": True}], [{"name": 3, "template": "x"}]])
def test_chat_templates_that_are_no_texts_are_refused(folder_with_tokenizer: Path, templates: object) -> None:
    _edit_json(folder_with_tokenizer / "tokenizer_config.json", chat_template=templates)
    with pytest.raises(InputError, match=r"tokenizer_config\.json: chat_template must be a text, or texts by name"):
        vocabulary_metadata(folder_with_tokenizer, 4096)


def test_named_chat_templates_are_all_kept(folder_with_tokenizer: Path) -> None:
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    _edit_json(folder_with_tokenizer / "tokenizer_config.json", chat_template=templates)
    _write_vocabulary(folder_with_tokenizer, folder_with_tokenizer / "v.gguf")
    fields = gguf.GGUFReader(folder_with_tokenizer / "v.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == "plain"
    assert fields["tokenizer.chat_templates"].contents() == ["tool_use"]
    assert fields["tokenizer.chat_template.tool_use"].contents() == "tools"


def test_changed_tokenizer_is_noticed(folder_with_tokenizer: Path) -> None:
    before = vocabulary_metadata(folder_with_tokenizer, 4096)
    _edit_json(folder_with_tokenizer / "tokenizer_config.json", chat_template="new")
    assert vocabulary_metadata(folder_with_tokenizer, 4096) != before


def test_tokenizers_that_llama_cpp_lacks_are_refused(folder_with_tokenizer: Path) -> None:
    path = folder_with_tokenizer / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,7}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.save(str(path))
    with pytest.raises(UnsupportedError, match=r"\{1,7\}"):
        vocabulary_metadata(folder_with_tokenizer, 4096)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    with pytest.raises(UnsupportedError, match="Whitespace"):
        vocabulary_metadata(folder_with_tokenizer, 4096)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(path))
    with pytest.raises(UnsupportedError, match="Lowercase"):
        vocabulary_metadata(folder_with_tokenizer, 4096)
    Tokenizer(models.WordLevel({"a": 0}, "a")).save(str(path))
    with pytest.raises(UnsupportedError, match="none of type WordLevel"):
        vocabulary_metadata(folder_with_tokenizer, 4096)


def test_damaged_tokenizers_are_refused(folder_with_tokenizer: Path) -> None:
    with pytest.raises(InputError, match="vocab_size 100"):
        vocabulary_metadata(folder_with_tokenizer, 100)
    path = folder_with_tokenizer / "tokenizer.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="damaged"):
        vocabulary_metadata(folder_with_tokenizer, 4096)
    path.unlink()
    with pytest.raises(InputError, match="has no tokenizer"):
        vocabulary_metadata(folder_with_tokenizer, 4096)
