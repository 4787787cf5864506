"""Text to token ids and back, without losing a character.

A sentencepiece BPE model in LLaMA's style: identity normaliser, no dummy prefix, every space kept, newline a piece of its own, and 256
byte pieces for whatever the training texts did not contain. So `decode(encode(text)) == text` for any text, and text that looks like a
control token ("</s>", "<0x0A>") is ordinary text: only the code that builds sequences can place a control id.

Prompt and response are encoded separately and joined, the same way in every stage; BOS and EOS are added elsewhere. The four control
ids of a tokenizer trained here are unk 0, bos 1, eos 2, pad 3.

A `tokenizer.model` from elsewhere (LLaMA's) is read as well, if it is lossless. Many such files put a space before a text: then a prompt
that does not begin with one gets it, and a response never does, for it goes on where the prompt ended. These are the ids of transformers'
LlamaTokenizer (version 5, split_special_tokens=True) for the prompt, and for the text of prompt and response together wherever no piece
would reach across the boundary. One exception: the character U+2581, which is a space there and stays itself here.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from data.errors import CheckpointError, DataError, UsageError
from data.files import atomic_write

DEFAULT_SIZE = 1024
FLOOR = 256 + 4 + 1  # byte pieces, control pieces, newline
LINE_LENGTH = 1000  # characters; sentencepiece skips training lines of more than 4,192 bytes, so long ones are handed over in parts
LOWER_BLOCK = "\u2581"  # sentencepiece's own sign for a space; a text that contains it would come back with spaces
UNKNOWN_BLOCK = "\u2585"  # sentencepiece's own sign for an unknown character; it skips training lines that contain it
ANCHOR = "\0"  # a byte piece that merges with nothing, see Tokenizer
PROBE = f" a\n\n  b\t</s> <0x0A>\r\n{LOWER_BLOCK}\0\u00e9\uff21\U0001f600 "  # lost by every normaliser but the identity


def train_tokenizer(texts: Iterable[str], path: Path, vocab_size: int | None = None) -> None:
    """Learns a tokenizer of exactly `vocab_size` pieces from `texts`, or of as many as they fill up to DEFAULT_SIZE, and writes it to `path`,
    whole or not at all.

    The same texts in the same order give the same file. Raises UsageError, with the nearest size that works, where the texts have too
    many or too few different characters and words for `vocab_size`, and DataError where there is no text.
    """
    exactly = vocab_size is not None
    vocab_size = vocab_size if exactly else DEFAULT_SIZE
    lines = list(_training_lines(texts))
    if not lines:
        raise DataError("tokenizer: the training texts are empty; give data with text in it")
    if vocab_size < FLOOR:
        raise UsageError(f"--vocab-size {vocab_size} is too small: 256 bytes, 4 control pieces and the newline alone are {FLOOR}")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            hard_vocab_limit=False,  # too few merges: counted below, instead of sentencepiece's internal error
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            byte_fallback=True, character_coverage=0.9995, split_digits=True, user_defined_symbols=["\n"],
            unk_id=0, bos_id=1, eos_id=2, pad_id=3, num_threads=1, minloglevel=2,
        )
    except RuntimeError as error:
        needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        if not needed:
            raise
        raise UsageError(
            f"--vocab-size {vocab_size} is too small for the characters of these texts; the smallest possible is {needed[1]}"
        ) from error
    greatest = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if exactly and greatest < vocab_size:
        raise UsageError(
            f"--vocab-size {vocab_size} is more than these texts can fill; the greatest possible is {greatest}: choose that or less, "
            "or give more text"
        )
    atomic_write(path, model.getvalue())


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """The non-empty lines of the texts, none of which sentencepiece would skip."""
    for text in texts:
        _refuse_surrogates(text)
        for line in re.split(f"[\n{UNKNOWN_BLOCK}]", text):
            for start in range(0, len(line), LINE_LENGTH):
                yield line[start : start + LINE_LENGTH]


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"text with the lone surrogate {text[error.start]!a} at character {error.start}; half a character cannot be encoded: remove it"
        ) from error


def tokenizer_file(folder: Path) -> Path:
    """The tokenizer.model of a model's folder; raises CheckpointError, with the reason, where it has none."""
    path = Path(folder) / "tokenizer.model"
    if not path.parent.is_dir():
        raise CheckpointError(f"{path.parent}: no such folder")
    if not path.exists():
        others = [name for name in ("tokenizer.json", "vocab.json", "merges.txt") if (path.parent / name).exists()]
        hint = f"; {', '.join(others)} there hold a tokenizer of another kind, of which this program has no reader" if others else ""
        raise CheckpointError(f"{path}: missing; only sentencepiece tokenizers are supported{hint}: start from a model that comes with one")
    return path


class Tokenizer:
    """A tokenizer file in use.

    bos_id, eos_id, pad_id: int. Where a file has no pad piece (LLaMA's), pad_id is its unk id, which no text is ever encoded to.
    vocab_size: int, the number of pieces. adds_space: whether a prompt that begins with no space gets one.
    digest: SHA-256 of the file, in hexadecimal.
    """

    def __init__(self, path: Path):
        try:
            content = Path(path).read_bytes()
            self._model = sentencepiece.SentencePieceProcessor()
            self._model.LoadFromSerializedProto(content)
        except OSError as error:
            raise UsageError(f"{path}: no tokenizer can be read there ({error.strerror}); train one with --stage tokenizer") from error
        except RuntimeError as error:
            raise CheckpointError(f"{path}: not a sentencepiece model, or a damaged one; train one with --stage tokenizer") from error
        self.digest = hashlib.sha256(content).hexdigest()
        self.vocab_size = self._model.vocab_size()
        self.bos_id, self.eos_id = self._model.bos_id(), self._model.eos_id()
        self.pad_id = self._model.pad_id() if self._model.pad_id() >= 0 else self._model.unk_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise CheckpointError(f"{path}: this tokenizer has no BOS or no EOS piece; both are needed")
        # LLaMA's file puts a space before every text that it encodes and takes one away when decoding. Both happen once, at the very
        # start, so everything here is encoded and decoded behind an anchor that is cut off again, and texts can be joined.
        self._anchor = self._model.encode(ANCHOR)
        self.adds_space = self._model.id_to_piece(self._anchor[0]).startswith(LOWER_BLOCK)
        self._skipped = {token for token in range(self.vocab_size) if self._model.is_control(token) or self._model.is_unknown(token)}
        self._lower_block = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in LOWER_BLOCK.encode()]
        if self.decode(self.encode_response(PROBE)) != PROBE:
            raise CheckpointError(
                f"{path}: this tokenizer changes or loses characters (it normalises, or has no byte pieces); "
                "train one with --stage tokenizer"
            )

    def encode(self, text: str) -> list[int]:
        """The ids of a text that begins a sequence (a prompt), without BOS; raises DataError for a lone surrogate."""
        return self.encode_response(f" {text}" if self.adds_space and text and not text.startswith(" ") else text)

    def encode_response(self, text: str) -> list[int]:
        """The ids of a text that goes on where another ended, without EOS; raises DataError for a lone surrogate."""
        _refuse_surrogates(text)
        first, *others = [self._model.encode(ANCHOR + part)[len(self._anchor) :] for part in text.split(LOWER_BLOCK)]
        return first + [token for part in others for token in self._lower_block + part]

    def decode(self, tokens: list[int]) -> str:
        """The text that the ids spell, with the space before a prompt where `encode` added one; control and unknown ids are skipped, as
        are ids beyond the tokenizer (a model's matrix may have spare rows), and bytes that are not UTF-8 become U+FFFD."""
        kept = [token for token in tokens if token not in self._skipped and token < self.vocab_size]
        return self._model.decode(self._anchor + kept)[len(ANCHOR) :]

    def transformers_config(self) -> dict:
        """tokenizer_config.json, with which transformers' AutoTokenizer gives the same ids on this tokenizer.model."""
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self._model.unk_id(), "pad_token": self.pad_id}
        pieces = {name: self._model.id_to_piece(token) for name, token in names.items()}
        fixed = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "split_special_tokens": True, "add_bos_token": True}
        return fixed | {"add_prefix_space": self.adds_space} | pieces
