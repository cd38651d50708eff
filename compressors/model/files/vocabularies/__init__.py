"""Vocabularies that no ``tokenizer.json`` holds: tiktoken's ranks and SentencePiece's models, made into one."""
