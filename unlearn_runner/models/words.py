"""A small vocabulary for CLIP's tokenizer: every byte, and each of a few words as one token."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

END = "</w>"  # CLIP's mark of a word's last piece


def build_tokenizer(words: Sequence[str], max_length: int) -> "CLIPTokenizer":
    """CLIPTokenizer that knows any text byte by byte, and `words` (ASCII letters) mostly as one token each.

    Each word's merges put it together from the left: s e, se v, sev e, seve n</w>. A merge of an earlier word may cut
    a later one into more pieces, which is as good a spelling as any.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    pieces = [*alphabet, *(letter + END for letter in alphabet)]
    merges: dict[tuple[str, str], None] = {}
    for word in sorted({part.lower() for given in words for part in given.split()}):
        *letters, last = word
        left = ""
        for piece in (*letters, last + END):
            if left:
                merges[left, piece] = None
                pieces.append(left + piece)
            left += piece
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=max_length)
