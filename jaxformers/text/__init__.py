"""Tokenizers: bytes to integers and back."""

from jaxformers.text.byte import ByteTokenizer as ByteTokenizer
from jaxformers.text.hugging_face import (
  HuggingFaceTokenizer as HuggingFaceTokenizer,
)
from jaxformers.text.tokenizer import Tokenizer as Tokenizer
from jaxformers.text.tokenizer import token_dtype as token_dtype
