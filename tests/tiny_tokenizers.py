"""Tiny tokenizers of the families that language models come with, trained in milliseconds on a few titles."""

import json

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TITLES = [
    "Toy Story",
    "Toy Story 2",
    "Heat",
    "Good, the Bad and the Ugly",
    'Say "Anything"...',
    "L.A. Confidential [Director's Cut] (Remastered)",
    "2001: A Space Odyssey",
    "1984",
    "Amélie Poulain & Café Del Mar",
    "千と千尋の神隠し",
    "'Til There Was You",
    "...And Justice for All",
    "M",
    "  Seven  ",
    "Who's Afraid of {Virginia} Woolf?",
]

TEMPLATES = [
    "This user watched {history}. Next comes one of these:\n{candidates}.\nAnswer:",
    "The choice is {candidates} after {history}; what next? Answer: ",
    "After {history} and then:",
]

TEXTS = [title.strip() for title in TITLES] + [template.replace("{", "").replace("}", "") for template in TEMPLATES]


def with_bos(tokenizer: Tokenizer, bos: str) -> None:
    pairs = [(bos, tokenizer.token_to_id(bos))]
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A $B", pairs)


def byte_level_bpe() -> PreTrainedTokenizerFast:
    """GPT-2: no bos, no pad, unknown is the same token as eos."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, *(" " + text for text in TEXTS)] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", unk_token="<|end|>")


def byte_level_bpe_with_bos() -> PreTrainedTokenizerFast:
    """Llama 3: bos, pad, its own splitting, up to three digits a token."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    )
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = ["<|begin|>", "<|eot|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, *(" " + text for text in TEXTS)] * 3, trainer)
    with_bos(tokenizer, "<|begin|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|eot|>", pad_token="<|pad|>"
    )


def sentencepiece_bpe(legacy: bool = True) -> PreTrainedTokenizerFast:
    """Llama 2: bos, no pad, bytes for unknown characters. `legacy` puts a space before every text, also before one."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # only for training: in use, a whole text is one word
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([text for text in TEXTS if text.isascii()] * 3, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    vocabulary = trained["vocab"] | {f"<0x{byte:02X}>": len(trained["vocab"]) + byte for byte in range(256)}
    merges = [tuple(merge) for merge in trained["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    with_bos(tokenizer, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", legacy=legacy
    )


def unigram(prepend_scheme: str = "always") -> PreTrainedTokenizerFast:
    """T5, and with "never" Gemma: eos and pad, the eos behind every text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    special_tokens = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=180, special_tokens=special_tokens, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, "a"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    """BERT: lower case without accents, cls and sep instead of bos and eos."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    special_tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=250, special_tokens=special_tokens, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, "a"], trainer)
    pairs = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", pairs)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )


def byte_level() -> PreTrainedTokenizerFast:
    """ByT5: every byte is a token."""
    vocabulary = {"<pad>": 0, "</s>": 1}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


FAMILIES = {
    "byte_level_bpe": byte_level_bpe,
    "byte_level_bpe_with_bos": byte_level_bpe_with_bos,
    "sentencepiece_bpe": sentencepiece_bpe,
    "sentencepiece_bpe_prefix_once": lambda: sentencepiece_bpe(legacy=False),
    "unigram": unigram,
    "unigram_without_prefix": lambda: unigram("never"),
    "word_piece": word_piece,
    "byte_level": byte_level,
}
