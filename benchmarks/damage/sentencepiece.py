"""An original with a tokenizer converted from SentencePiece, for which llama.cpp merges by scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from exporter.hub import bundled_text

__all__ = ["make_sentencepiece_original"]

_TOKENS = 2000


def make_sentencepiece_original(original: Path, folder: Path) -> Path:
    """The original with another tokenizer: BPE with byte fallback, and every split of a piece as a merge."""
    shutil.copytree(original, folder)
    text = "\n".join(file.read_text(encoding="utf-8") for file in sorted(bundled_text("heldout").glob("*.txt")))
    _train(text[:200_000]).save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    path.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder


def _train(text: str) -> Tokenizer:
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=_TOKENS,
        special_tokens=["<unk>", "<s>", "</s>", *byte_tokens],
        limit_alphabet=80,
        show_progress=False,
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
    return tokenizer
