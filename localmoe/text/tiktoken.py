"""Moonshot's tokenizers (Moonlight, Kimi-K2): a `tiktoken.model` turned into the text of a `tokenizer.json`.

A `tiktoken.model` holds a line for each token: its bytes in base64, and its rank, which is its id. How a text is split
before its bytes are merged stands in Python code beside it, which is never run here. So the file is read only where
`tokenizer_config.json` names a class whose pattern is known, and refused by that name otherwise: another pattern would
give other ids, and nothing would tell.
"""

from __future__ import annotations

import json
from binascii import Error as Base64Error
from binascii import a2b_base64
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from localmoe.errors import CheckpointError
from localmoe.text.files import read_json_object

if TYPE_CHECKING:
    from pathlib import Path

FILE = "tiktoken.model"
CLASSES = ("tokenization_moonshot.TikTokenTokenizer", "tokenization_kimi.TikTokenTokenizer")

# Both classes' `pat_str`: Chinese by itself; words, an English ending with them; digits by threes; the rest
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join([
    r"[\p{Han}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])  # fmt: skip

RESERVED = 256  # ids after the vocabulary: what `added_tokens_decoder` does not name is called <|reserved_token_ID|>

# Bounds against a file made to exhaust time or memory; the published one has 2.8 MB and 163,584 tokens
_MOST_BYTES = 32 * 2**20
_LONGEST_TOKEN = 512
_MOST_TOKENS = 1 << 20


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why a `tiktoken.model` beside this `tokenizer_config.json` cannot be read; None when it can."""
    auto_map = config.get("auto_map")
    named = auto_map.get("AutoTokenizer") if isinstance(auto_map, Mapping) else None
    name = named[0] if isinstance(named, list) and named else named
    if isinstance(name, str) and name.rpartition("--")[2] in CLASSES:  # before the "--": the repository with the code
        return None
    shown = repr(name)[:80] if name is not None else "no class"
    return f"{FILE} is read for {' and '.join(CLASSES)}, and tokenizer_config.json names {shown}"


def definition(directory: Path) -> str:
    """The `tokenizer.json` that gives the same ids as the checkpoint's `tiktoken.model`. Raises CheckpointError."""
    path = directory / FILE
    config = read_json_object(directory / "tokenizer_config.json")
    why = refusal(config)
    if why is not None:
        raise CheckpointError(f"{path}: cannot be used: {why}")
    size = read_json_object(directory / "config.json").get("vocab_size")
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        return _tokenizer_json(content, config.get("added_tokens_decoder"), size if isinstance(size, int) else None)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not a usable tokenizer: {error}") from error


def _tokenizer_json(content: bytes, named: object, vocab_size: int | None) -> str:
    """`vocab_size` is config.json's, None where it says none. Raises ValueError."""
    tokens = _tokens(content)
    if vocab_size is not None and len(tokens) > vocab_size:
        raise ValueError(f"it has {len(tokens):,} tokens and config.json's vocab_size is {vocab_size:,}")
    table = _byte_alphabet()
    spelled = [token.decode("latin-1").translate(table) for token in tokens]
    vocabulary = {text: rank for rank, text in enumerate(spelled)}
    added = _added_tokens(named, len(tokens), vocab_size)
    twice = next((token["content"] for token in added if token["content"] in vocabulary), None)
    if twice is not None:
        raise ValueError(f"the added token {twice!r} is a token of the vocabulary too")
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    # `ignore_merges`: as in tiktoken, a piece that is a token is that token, whatever merging would make of it
    model = {"type": "BPE", "vocab": vocabulary, "merges": _merges(vocabulary), "ignore_merges": True}
    whole = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_bytes]},
        "decoder": to_bytes,
        "model": model,
    }
    return json.dumps(whole, ensure_ascii=False)


def _tokens(content: bytes) -> list[bytes]:
    """Every token's bytes, by rank. Raises ValueError naming the line."""
    if len(content) > _MOST_BYTES:
        raise ValueError(f"it is larger than {_MOST_BYTES:,} bytes")
    by_rank: dict[int, bytes] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            text, rank_text = line.split()
            token, rank = a2b_base64(text, strict_mode=True), int(rank_text)
        except (Base64Error, ValueError):
            raise ValueError(f"line {number} is not a token in base64 and its rank") from None
        if not token or len(token) > _LONGEST_TOKEN or not 0 <= rank < _MOST_TOKENS:
            raise ValueError(f"line {number}: a token of {len(token):,} bytes with the rank {rank:,} cannot be")
        if rank in by_rank:
            raise ValueError(f"line {number}: rank {rank:,} stands there twice")
        by_rank[rank] = token
    missing = next((rank for rank in range(len(by_rank)) if rank not in by_rank), None)
    if missing is not None:
        raise ValueError(f"no token has rank {missing:,}")
    distinct = set(by_rank.values())
    if len(distinct) < len(by_rank):
        raise ValueError("two ranks have the same token")
    if any(bytes([byte]) not in distinct for byte in range(256)):
        raise ValueError("not every byte is a token")
    return [by_rank[rank] for rank in range(len(by_rank))]


def _merges(vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, in the order of what they make.

    tiktoken joins whichever neighbours make the token of the lowest rank, and a merge list says the same when it has
    every way to cut each token in two. (Of a vocabulary that was trained, one way per token ever comes up.)
    """
    return [
        (left, right)
        for text in vocabulary  # by rank
        for cut in range(1, len(text))
        if (left := text[:cut]) in vocabulary and (right := text[cut:]) in vocabulary
    ]


def _added_tokens(named: object, first: int, vocab_size: int | None) -> list[dict[str, Any]]:
    """The tokens after the vocabulary, each id from `first` on: those that are named, and reserved ones between."""
    if not isinstance(named, Mapping) or not named:
        raise ValueError("tokenizer_config.json has no added_tokens_decoder")
    end = first + RESERVED if vocab_size is None else min(first + RESERVED, vocab_size)
    tokens = {id_: _added_token(id_, f"<|reserved_token_{id_}|>", True) for id_ in range(first, end)}
    for key, entry in named.items():
        content = entry.get("content") if isinstance(entry, Mapping) else None
        id_ = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else -1
        if not isinstance(content, str) or not content or id_ not in tokens:
            raise ValueError(f"tokenizer_config.json: no added token can be {key[:20]!r}: {str(content)[:40]!r}")
        tokens[id_] = _added_token(id_, content, entry.get("special") is True)
    if len({token["content"] for token in tokens.values()}) < len(tokens):
        raise ValueError("tokenizer_config.json: two ids have the same added token")
    return list(tokens.values())


def _added_token(id_: int, content: str, special: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id_, "content": content, "special": special, **plain}


def _byte_alphabet() -> dict[int, int]:
    """GPT-2's character for each byte, which byte-level vocabularies are spelled in: printable ones as they are in
    Latin-1, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: 256 + place for place, byte in enumerate(others)}
