"""The tokenizer of a model folder, read from its files; only formats older than tokenizer.json need transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoints.json_files import check, is_there, read_json, unreadable
from ..checkpoints.schemas import AddedTokens, Count, Piece, StoredToken, TokenizerConfig
from ..errors import CheckpointError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def token_text(token: object) -> str | None:
    """Return the text of a token of tokenizer_config.json: a string, or a record with `content`; None for neither."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokenizer of one model folder; nothing is read before it is asked for."""

    folder: Path
    label: str
    """The model as the user named it, for messages."""

    @property
    def exists(self) -> bool:
        """True when the folder holds a tokenizer of any format."""
        return any(is_there(self.folder / name) for name in TOKENIZER_FILES)

    @cached_property
    def config(self) -> dict[str, Any]:
        """tokenizer_config.json, {} when there is none."""
        return read_json(self.folder / "tokenizer_config.json", TokenizerConfig)

    @cached_property
    def named(self) -> dict[str, str]:
        """Special tokens by their role: {"eos_token": "<|im_end|>", ...}."""
        legacy = self.folder / "special_tokens_map.json"
        older = {} if "added_tokens_decoder" in self.config else read_json(legacy, TokenizerConfig)
        texts = {role: token_text({**self.config, **older}.get(role)) for role in NAMED_TOKENS}
        return {role: text for role, text in texts.items() if text is not None}

    @cached_property
    def config_tokens(self) -> list[str]:
        """Tokens that the configuration files name, in the order in which loading would append unknown ones."""
        decoder = self.config.get("added_tokens_decoder")
        if decoder is None:
            legacy = read_json(self.folder / "added_tokens.json", AddedTokens)
            decoder = {index: token for token, index in legacy.items()}
        tokens = [token_text(token) for _, token in sorted(decoder.items(), key=lambda item: int(item[0]))]
        tokens += self.named.values()
        tokens += [token_text(value) for role, value in self.config.items() if role.endswith("_token")]
        extra = self.config.get("extra_special_tokens") or self.config.get("additional_special_tokens") or []
        tokens += [token_text(token) for token in (extra.values() if isinstance(extra, dict) else extra)]
        return list(dict.fromkeys(token for token in tokens if token))

    @cached_property
    def stored_tokens(self) -> dict[str, int] | None:
        """The "added_tokens" of tokenizer.json with their ids; None when there is no such file or list."""
        records = _stored(self.folder / "tokenizer.json", "added_tokens")
        if records is None:
            return None
        check(records, list[StoredToken], self.folder / "tokenizer.json")
        return {record["content"]: record["id"] for record in records}

    @property
    def appended(self) -> list[str]:
        """Tokens that loading adds to those of tokenizer.json because the configuration files name them."""
        return [token for token in self.config_tokens if token not in (self.stored_tokens or {})]

    @cached_property
    def added(self) -> dict[str, int]:
        """Added tokens (special and others) with their ids, without loading the rest of the vocabulary if possible."""
        if self.stored_tokens is not None and not self.appended:
            return self.stored_tokens
        return {token.content: index for index, token in self.tokenizer.get_added_tokens_decoder().items()}

    @cached_property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer` (or a stand-in with the three methods used here); never pads or truncates."""
        return self._load()

    def _load(self) -> Any:
        from tokenizers import AddedToken, Tokenizer

        file = self.folder / "tokenizer.json"
        try:
            if not file.is_file():
                return _converted_tokenizer(self.folder)
            tokenizer = _unpadded(Tokenizer.from_file(str(file)))
            # as transformers does: a token that the vocabulary knows keeps its id, others get ids behind it
            tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in self.appended])
        except BaseException as error:  # the tokenizers library raises bare Exception, and panics
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise CheckpointError(
                f"cannot read the tokenizer of {self.label}: {error}. Its files must be of a format that transformers "
                "loads without code from the model's folder."
            ) from error
        return tokenizer

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token -> id, added tokens included."""
        # A loaded tokenizer takes some 100 MiB for 150,000 tokens, their names and ids a third of it.
        if self.stored_tokens is not None and not self.appended:
            words = _stored(self.folder / "tokenizer.json", "vocab")
            if isinstance(words, list):  # Unigram: [token, score] in the order of the ids
                if not all(isinstance(word, list) and len(word) == 2 and isinstance(word[0], str) for word in words):
                    check({"vocab": words}, dict[str, list[Piece]], self.folder / "tokenizer.json")
                words = {token: index for index, (token, _) in enumerate(words)}
            if isinstance(words, dict):
                if not all(type(index) is int and 0 <= index < 2**63 for index in words.values()):
                    check({"vocab": words}, dict[str, dict[str, Count]], self.folder / "tokenizer.json")
                return {**words, **self.stored_tokens}
        return dict(self.tokenizer.get_vocab(with_added_tokens=True))

    def id_of(self, token: str) -> int | None:
        """Return the id of `token`, None when the vocabulary lacks it."""
        found = self.added.get(token)
        return found if found is not None else self.ids.get(token)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without the special tokens that tokenizers put around a text."""
        tokenizer = self.__dict__.get("tokenizer") or self._load()  # not kept for this alone
        return [list(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]


def _stored(file: Path, key: str) -> Any:
    """Return the list or object under `key` of a tokenizer.json without parsing the rest; None if there is none."""
    if not is_there(file) or file.stat().st_size == 0:
        return None
    data = file.read_bytes()
    found = re.search(rb'"%s"\s*:\s*(?=[\[{])' % key.encode(), data)
    window = 1 << 16
    while found is not None:
        text = data[found.end() : found.end() + window].decode("utf-8", errors="ignore")
        try:
            return json.JSONDecoder().raw_decode(text)[0]
        except RecursionError as error:
            raise unreadable(file, ValueError("it is nested too deeply")) from error
        except ValueError:  # cut off in the middle
            if found.end() + window >= len(data):
                return None
            window *= 4
    return None


class _SlowTokenizer:
    """A tokenizer of transformers without a fast form, behind the three methods of `tokenizers.Tokenizer` used here."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab())

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        return dict(self._tokenizer.added_tokens_decoder)

    def encode(self, text: str, add_special_tokens: bool = False) -> _SlowTokenizer:
        self.ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return self


def _converted_tokenizer(folder: Path) -> Any:
    """Load a tokenizer that has no tokenizer.json through transformers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return _SlowTokenizer(tokenizer) if backend is None else _unpadded(backend)


def _unpadded(tokenizer: Any) -> Any:
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
