"""Real tokenizers of the classes that Stable Diffusion 3.5 uses, with a vocabulary of this grammar's words.

CLIP's is byte-level BPE: every word of the grammar is one token, anything else falls apart into bytes. T5's is a
unigram model: the same words, single characters, and <unk> for the rest.
"""

from __future__ import annotations

from transformers import CLIPTokenizer, T5TokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tools.demo_model.scenes import WORDS

MAX_TOKENS = 20
EXTRA_WORDS = ("the", "of", "with", "picture", "shape", "large", "tiny", "centre", "light", "dark")


def clip_tokenizer() -> CLIPTokenizer:
    """Builds the tokenizer of both CLIP encoders; ids of start and end are the last two."""
    alphabet = list(bytes_to_unicode().values())
    vocab = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    merges: list[str] = []
    for word in (*WORDS, *EXTRA_WORDS):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = f"{parts[0]} {parts[1]}"
            if pair not in merges:
                merges.append(pair)
            parts = [parts[0] + parts[1], *parts[2:]]
            if parts[0] not in vocab:
                vocab.append(parts[0])
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(vocab)},
        merges=[tuple(merge.split(" ")) for merge in merges],
        model_max_length=MAX_TOKENS,
    )


def t5_tokenizer() -> T5TokenizerFast:
    """Builds the tokenizer of the T5 encoder."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'-"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("\u2581" + word, -3.0) for word in (*WORDS, *EXTRA_WORDS)]
    pieces += [("\u2581", -6.0), *((letter, -9.0) for letter in letters)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=MAX_TOKENS)
