"""Between what people read and what the model reads: tokenizer, chat template, thinking."""

from localmoe.text.template import ChatTemplate, Message
from localmoe.text.thinking import THINKING_END, Segment, ThinkingSplitter, overlap
from localmoe.text.tokenizer import StreamingDetokenizer, Tokenizer, end_token_ids, tokenizer_file

__all__ = [
    "THINKING_END",
    "ChatTemplate",
    "Message",
    "Segment",
    "StreamingDetokenizer",
    "ThinkingSplitter",
    "Tokenizer",
    "end_token_ids",
    "overlap",
    "tokenizer_file",
]
