"""The tokenizer loses nothing, knows no control token in a text, and fails with a size that works."""

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.errors import CheckpointError, DataError, UsageError
from data.examples import read_pairs
from data.files import digest
from data.tokenizer import Tokenizer, tokenizer_file, train_tokenizer
from tests.conftest import real_data

TEXTS = [
    "\n\nHuman: How do I boil two eggs?\n\nAssistant: Put the eggs in water, and boil them for 7 minutes.",
    "\n\nHuman: Tell me 3 things about the sea.\n\nAssistant:  The sea is deep, the sea is salty, and the sea is blue.",
] * 3
LOOK_ALIKES = ["</s>", "<s>", "<unk>", "<pad>", "<0x0A>", "<0xE2>", "<|endoftext|>", "[PAD]"]
ODD_TEXTS = LOOK_ALIKES + ["", " ", "  a  ", "\n", "\n\n a\n", "\r\n\t", "\0", "a\0b", "\u2581", "a\u2581\u2581 b", "\u2585", "\ufeffx"]
ODD_TEXTS += ["é\u0301Ａ", "😀🏽", "\u2028"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(TEXTS, path, 330)
    return Tokenizer(path)


def save_model(path: Path, **options) -> Path:
    """A sentencepiece model with other options than ours, as a user may bring one."""
    model = io.BytesIO()
    defaults = dict(vocab_size=330, model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False,
                    byte_fallback=True, hard_vocab_limit=False, minloglevel=2)  # fmt: skip
    sentencepiece.SentencePieceTrainer.Train(sentence_iterator=iter(TEXTS), model_writer=model, **defaults | options)
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Tokenizer:
    """Like LLaMA's own file: a dummy space before the text, no newline piece, no pad piece."""
    return Tokenizer(save_model(tmp_path_factory.mktemp("llama") / "tokenizer.model", add_dummy_prefix=True, pad_id=-1))


texts = st.lists(st.sampled_from(ODD_TEXTS) | st.text(max_size=20), max_size=6).map("".join)


@settings(max_examples=300, deadline=None)
@given(prompt=texts, response=texts)
@example(prompt="a", response=" b")
def test_round_trip(tokenizer, llama, prompt, response):
    for each in (tokenizer, llama):
        ids = each.encode(prompt)
        spelled = f" {prompt}" if each is llama and prompt and not prompt.startswith(" ") else prompt
        assert each.decode(ids) == spelled
        assert each.decode(ids + each.encode_response(response)) == spelled + response
        assert each.decode(each.encode_response(response)) == response
        assert not {each.bos_id, each.eos_id, each.pad_id} & set(ids)


def test_every_character(tokenizer):
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    assert tokenizer.decode(tokenizer.encode(everything)) == everything


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_texts(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and not {0, 1, 2, 3} & set(ids)


def test_look_alikes_in_the_training_texts_are_ordinary(tmp_path):
    train_tokenizer(TEXTS + LOOK_ALIKES * 100, tmp_path / "t.model", 330)
    tokenizer = Tokenizer(tmp_path / "t.model")
    for text in LOOK_ALIKES:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and not {0, 1, 2, 3} & set(ids)
        assert len(ids) > 1  # no piece of its own, above all not the byte that <0x0A> names


def test_ids(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 2, 3, 330)
    assert tokenizer.encode("\n\n\n") == [4, 4, 4]  # a piece of its own, never part of a longer one
    assert tokenizer.encode("\0") == [5] and tokenizer.encode("\u2581") == [5 + 0xE2, 5 + 0x96, 5 + 0x81]
    assert tokenizer.encode("") == []
    assert len(tokenizer.encode(" the sea")) == 2  # two words of the training texts
    sea = tokenizer.encode(" sea")
    assert tokenizer.decode([1, *sea, 2, 3, 3, 0]) == " sea"


def test_numbers_are_read_digit_by_digit(tmp_path):
    train_tokenizer([*TEXTS, "1984 " * 50], tmp_path / "t.model", 330)
    ids = Tokenizer(tmp_path / "t.model").encode("1984")
    assert len(ids) == 4


def test_other_programs_read_the_file_alike(tmp_path):
    train_tokenizer(TEXTS, tmp_path / "t.model", 330)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    for text in [*TEXTS, *LOOK_ALIKES, "the sea", " the  sea\n "]:
        assert plain.encode(text) == Tokenizer(tmp_path / "t.model").encode(text) and plain.decode(plain.encode(text)) == text


def test_bytes_that_are_no_text_decode_to_the_replacement_character(tokenizer):
    assert tokenizer.decode([5 + 0xE2, 5 + 0x96]) == "\ufffd\ufffd"


def test_imported_file_without_pad(llama):
    assert (llama.bos_id, llama.eos_id, llama.pad_id) == (1, 2, 0)
    assert llama.adds_space


# ---- the same ids as transformers' LlamaTokenizer


@pytest.fixture(scope="module", params=["ours", "llama"])
def peers(request, tmp_path_factory):
    """A tokenizer and what transformers makes of its folder: of the file alone, and of the file with the config that a stage writes."""
    from transformers import AutoTokenizer, LlamaTokenizer

    folder = tmp_path_factory.mktemp("peers")
    if request.param == "ours":
        train_tokenizer(TEXTS, folder / "tokenizer.model", 330)
    else:
        save_model(folder / "tokenizer.model", add_dummy_prefix=True, pad_id=-1, split_digits=True)
    tokenizer = Tokenizer(folder / "tokenizer.model")
    theirs = [LlamaTokenizer.from_pretrained(folder, split_special_tokens=True)] if request.param == "llama" else []
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer.transformers_config()))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return tokenizer, [*theirs, AutoTokenizer.from_pretrained(folder)]


@settings(max_examples=300, deadline=None)
@given(prompt=texts, words=texts)
@example(prompt="the sea", words="is blue")
@example(prompt="  two spaces", words="")
@example(prompt="\n\nHuman: </s><s>[INST]\n\nAssistant:", words="yes\n\n")
def test_ids_are_those_of_transformers(peers, prompt, words):
    tokenizer, theirs = peers
    prompt, words = prompt.replace("\u2581", ""), words.replace("\u2581", "")  # the one exception, see data/tokenizer.py
    for peer in theirs:
        assert tokenizer.encode(prompt) == peer.encode(prompt, add_special_tokens=False)
        whole = f"{prompt}\n {words}"  # no piece reaches across a newline: both ways to encode a response meet
        assert tokenizer.encode(f"{prompt}\n") + tokenizer.encode_response(f" {words}") == peer.encode(whole, add_special_tokens=False)


def test_control_ids_are_those_of_transformers(peers):
    tokenizer, theirs = peers
    mine = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert mine == (theirs[-1].bos_token_id, theirs[-1].eos_token_id, theirs[-1].pad_token_id)
    assert theirs[-1].encode("the sea") == [tokenizer.bos_id, *tokenizer.encode("the sea")]


def test_ids_beyond_the_tokenizer_spell_nothing(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("the sea"), 330, 999]) == "the sea"


@pytest.mark.parametrize("other", ["tokenizer.json", None])
def test_a_folder_without_a_sentencepiece_file_is_refused(other, tmp_path):
    if other:
        (tmp_path / other).write_text("{}")
    with pytest.raises(CheckpointError, match="only sentencepiece tokenizers are supported") as stopped:
        tokenizer_file(tmp_path)
    assert ("tokenizer.json there hold a tokenizer of another kind" in str(stopped.value)) == bool(other)


def test_lone_surrogate(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"lone surrogate '\\udc80' at character 2"):
        tokenizer.encode("ab\udc80")
    with pytest.raises(DataError, match="lone surrogate"):
        train_tokenizer(["ab\udc80"], tmp_path / "t.model", 300)


@pytest.mark.parametrize("text", ["x" * 1_000_000, "the sea " * 125_000, "\u2581a" * 500_000], ids=["letters", "words", "blocks"])
def test_a_line_of_a_megabyte(tokenizer, text):
    """In seconds: what grew with the square of the length would not come to an end."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


# ---- training


def test_training_is_deterministic_silent_and_leaves_one_file(tmp_path, capfd):
    train_tokenizer(TEXTS, tmp_path / "one" / "t.model", 320)
    train_tokenizer(iter(TEXTS), tmp_path / "two" / "t.model", 320)
    assert (tmp_path / "one" / "t.model").read_bytes() == (tmp_path / "two" / "t.model").read_bytes()
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["t.model"]
    assert capfd.readouterr() == ("", "")
    assert Tokenizer(tmp_path / "one" / "t.model").digest == digest(tmp_path / "one" / "t.model")
    other = "import sys; from data.tokenizer import *; train_tokenizer(eval(sys.argv[1]), Path(sys.argv[2]), 320)"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", other, repr(TEXTS), tmp_path / "three"], cwd=root, check=True)
    assert (tmp_path / "three").read_bytes() == (tmp_path / "one" / "t.model").read_bytes()


@pytest.mark.parametrize("text", ["zebra " * 5000, "zebra \u2585 " * 50, "zebra \0 " * 50], ids=["long line", "reserved character", "NUL"])
def test_no_training_line_is_skipped(tmp_path, text):
    train_tokenizer([*TEXTS, text], tmp_path / "t.model", 330)
    assert len(Tokenizer(tmp_path / "t.model").encode(" zebra")) == 1


def test_vocabulary_too_large_names_the_greatest_possible(tmp_path):
    with pytest.raises(UsageError, match=r"--vocab-size 5000 is more than these texts can fill; the greatest possible is (\d+)") as error:
        train_tokenizer(TEXTS, tmp_path / "t.model", 5000)
    assert not list(tmp_path.iterdir())
    greatest = int(str(error.value).split("possible is ")[1].split(":")[0])
    train_tokenizer(TEXTS, tmp_path / "t.model", greatest)
    assert Tokenizer(tmp_path / "t.model").vocab_size == greatest
    with pytest.raises(UsageError, match="greatest"):
        train_tokenizer(TEXTS, tmp_path / "t.model", greatest + 1)
    train_tokenizer(TEXTS, tmp_path / "none-asked-for.model")
    assert Tokenizer(tmp_path / "none-asked-for.model").vocab_size == greatest


def test_vocabulary_too_small_names_the_smallest_possible(tmp_path):
    with pytest.raises(UsageError, match="--vocab-size 260 is too small: .* are 261"):
        train_tokenizer(TEXTS, tmp_path / "t.model", 260)
    # "abc" and the space that sentencepiece counts always: 261 + 4
    with pytest.raises(UsageError, match="--vocab-size 263 is too small for the characters of these texts; the smallest possible is 265"):
        train_tokenizer(["a b c " * 9], tmp_path / "t.model", 263)
    train_tokenizer(["a b c " * 9], tmp_path / "t.model", 265)


@pytest.mark.parametrize("texts", [[], [""], ["\n\n"]])
def test_no_text(tmp_path, texts):
    with pytest.raises(DataError, match="tokenizer: the training texts are empty"):
        train_tokenizer(texts, tmp_path / "t.model", 300)


def test_thousands_of_dialogues_of_thousands_of_words(tmp_path):
    """In seconds, as a line of a megabyte."""
    words = ["".join(letters) for letters in itertools.product("aeioust", "bcdfgst", "aeioust", "lmnrstv")]  # 2,401 different
    many = list(itertools.islice(itertools.cycle(words), 400_000))
    dialogues = ["\n\nHuman: " + " ".join(many[start : start + 100]) for start in range(0, 400_000, 100)]
    train_tokenizer(dialogues, tmp_path / "t.model", 2048)
    tokenizer = Tokenizer(tmp_path / "t.model")
    assert tokenizer.vocab_size == 2048 and tokenizer.decode(tokenizer.encode(dialogues[7])) == dialogues[7]


def test_real_dialogues(tmp_path):
    pairs, _ = read_pairs(f"hh:{real_data() / 'hh-rlhf/harmless-base-test.jsonl.gz'}")
    texts = [pair.prompt + response for pair in pairs for response in (pair.chosen, pair.rejected)]
    train_tokenizer(texts, tmp_path / "t.model", 2048)
    tokenizer = Tokenizer(tmp_path / "t.model")
    ids = [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(each) for each in ids] == texts
    assert 3 < sum(map(len, texts)) / sum(map(len, ids)) < 4.5  # characters a token: a useful vocabulary


# ---- files


def test_missing_tokenizer(tmp_path):
    with pytest.raises(UsageError, match="none.model: no tokenizer can be read there .No such file"):
        Tokenizer(tmp_path / "none.model")


@pytest.mark.parametrize("content", [b"", b"not a model", None], ids=["empty", "text", "half"])
def test_damaged_tokenizer(tmp_path, content):
    path = save_model(tmp_path / "t.model")
    path.write_bytes(path.read_bytes()[:3000] if content is None else content)
    with pytest.raises(CheckpointError, match="t.model: not a sentencepiece model, or a damaged one"):
        Tokenizer(path)


@pytest.mark.parametrize(
    "options", [{"normalization_rule_name": "nmt_nfkc"}, {"byte_fallback": False}, {"remove_extra_whitespaces": True}], ids=str
)
def test_lossy_tokenizer_is_refused(tmp_path, options):
    with pytest.raises(CheckpointError, match="changes or loses characters"):
        Tokenizer(save_model(tmp_path / "t.model", **options))


def test_tokenizer_without_end_piece_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no BOS or no EOS"):
        Tokenizer(save_model(tmp_path / "t.model", eos_id=-1))
