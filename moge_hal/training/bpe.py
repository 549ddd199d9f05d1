"""A tokenizer made from text: byte-level BPE, the same in every byte from run to run."""

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from moge_hal.errors import UserError
from moge_hal.tokenizer import SPECIAL_TOKENS, JsonEngine, Tokenizer

# The 256 bytes and the special tokens.
LEAST = len(pre_tokenizers.ByteLevel.alphabet()) + len(SPECIAL_TOKENS)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, the same in every byte from run to
    run.

    Any text can be encoded; NFC first, so decode(encode(s)) is NFC(s). Every digit is a token of
    its own. Few texts give fewer tokens
    than asked for: go by the result's vocab_size. bos is <s>, eos is [unused10], as in a released
    Pangu.
    Raises UserError if vocab_size has no room for the 256 bytes and the special tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < LEAST:
        raise UserError(f"a vocabulary needs at least {LEAST} tokens, not {vocab_size}")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bos, eos = SPECIAL_TOKENS.index("<s>"), SPECIAL_TOKENS.index("[unused10]")
    # For other programs that read the file; here `encode` puts bos in front itself.
    bpe.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", bos)])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "[unused10]",
        "pad_token": "<pad>",
        "additional_special_tokens": ["</s>", "[unused9]", "[unused16]", "[unused17]"],
        "clean_up_tokenization_spaces": False,
    }
    return Tokenizer(JsonEngine(bpe.to_str().encode(), SPECIAL_TOKENS), config, bos, eos)
