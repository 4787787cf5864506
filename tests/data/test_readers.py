"""Readers on files that nobody wrote by hand: any texts in any layout, files with broken bytes, and what is no file of rows at all.

Whatever a file holds, reading it ends with rows or with one of the errors of data/errors.py, in bounded memory, and waits for nobody.
"""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.examples
from data.errors import DataError
from data.examples import read_demonstrations, read_pairs, read_prompts

ROOT = Path(__file__).resolve().parents[2]

# ---- any texts, in any layout

WHOLE = st.characters(exclude_categories=["Cs"])  # all but halves of characters
TEXT = st.one_of(st.text(WHOLE, max_size=12), st.sampled_from(["", " ", "a", "b", "\u2028", "\n", "\r\n", "</s>", "\0", "\ufeff"]))
TURNS = st.lists(st.sampled_from(["a", " ", "\n", "b c", "\n\nHuman:", "\n\nAssistant:", "\n\nAssistant", "\u00e9"]), max_size=6).map("".join)
DIALOGUES = st.one_of(  # of two texts that mostly begin alike, as they do in the published files
    st.tuples(TURNS, TURNS, TURNS).map(lambda parts: (parts[0] + parts[1], parts[0] + parts[2])),
    st.tuples(TURNS, TURNS),
)
LAYOUT = st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2))


def written(path, rows, layout):
    """Rows as JSON lines: with a mark, packed, with carriage returns, escaped, with blank lines between; the path as text."""
    mark, packed, returns, escaped, blanks = layout
    end = ("\r\n" if returns else "\n") * (1 + blanks)
    raw = (b"\xef\xbb\xbf" if mark else b"") + end.join(json.dumps(row, ensure_ascii=escaped) for row in rows).encode()
    path.write_bytes(gzip.compress(raw) if packed else raw)
    return str(path)


def expected(examples):
    """(prompt, chosen, rejected) of the rows that stay, and how many go; None stands for a row that has to go for a reason of its schema."""
    kept = []
    for example in examples:
        if example and all(text.strip() for text in example) and example[1] != example[2] and example not in kept:
            kept.append(example)
    return kept, len(examples) - len(kept)


def check_kept(spec, examples):
    """The reader keeps and counts what `expected` says; where nothing stays, it says so."""
    kept, gone = expected(examples)
    if not kept:
        with pytest.raises(DataError, match="usable|empty file"):
            read_pairs(spec)
        return
    pairs, left_out = read_pairs(spec)
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == kept and sum(left_out.values()) == gone
    assert len({pair.id for pair in pairs}) == len(pairs)
    if spec.startswith("jsonl"):  # where a prompt alone is a row
        assert [prompt for prompt, _ in read_prompts(spec)] == list(dict.fromkeys(prompt for prompt, *_ in examples if prompt.strip()))


def spaced(text):
    return " " + text.lstrip()


@settings(max_examples=150)
@given(st.lists(st.tuples(TEXT, TEXT, TEXT), max_size=15), LAYOUT)
def test_plain_rows_come_back_as_they_were(tmp_path_factory, rows, layout):
    path = tmp_path_factory.getbasetemp() / "plain.jsonl"
    check_kept("jsonl:" + written(path, [dict(zip(("prompt", "chosen", "rejected"), row)) for row in rows], layout), rows)


@settings(max_examples=150)
@given(st.lists(DIALOGUES, max_size=15), LAYOUT)
def test_dialogues_are_cut_where_a_second_implementation_cuts_them(tmp_path_factory, rows, layout):
    def cut(text):
        """The parts between the assistant's turns; the last one is the response."""
        *before, response = text.split("\n\nAssistant:")
        return "".join(part + "\n\nAssistant:" for part in before), response

    examples = []
    for chosen, rejected in rows:
        (prompt, better), (other, worse) = cut(chosen), cut(rejected)
        good = prompt and prompt == other and prompt.removesuffix("\n\nAssistant:").removeprefix("\n\nHuman:").strip()
        examples.append((prompt, spaced(better), spaced(worse)) if good else None)
    path = tmp_path_factory.getbasetemp() / "hh.jsonl"
    check_kept("hh:" + written(path, [{"chosen": chosen, "rejected": rejected} for chosen, rejected in rows], layout), examples)


@settings(max_examples=150)
@given(st.lists(st.tuples(TEXT, TEXT, TEXT, TEXT, TEXT, st.integers(0, 1)), max_size=15), LAYOUT)
def test_comparisons_are_put_together_in_the_order_of_their_labels(tmp_path_factory, rows, layout):
    lines, examples = [], []
    for subreddit, title, post, first, second, choice in rows:
        info = {"subreddit": subreddit, "title": title, "post": post}
        lines.append({"info": info, "summaries": [{"text": first}, {"text": second}], "choice": choice})
        prompt = "SUBREDDIT: r/" + subreddit + "\n\nTITLE: " + title + "\n\nPOST: " + post + "\n\nTL;DR:"
        better, worse = (second, first) if choice else (first, second)
        examples.append((prompt, spaced(better), spaced(worse)) if post.strip() else None)
    check_kept("tldr:" + written(tmp_path_factory.getbasetemp() / "tldr.jsonl", lines, layout), examples)


# ---- broken bytes

CORPUS = {
    "jsonl": [
        {"prompt": "p", "chosen": "good", "rejected": "bad", "gap": -1.5},
        {"prompt": "Na\u00efve \U0001f600?", "chosen": "\u2028 yes", "rejected": "no\n", "response": "r", "more": [1, {"a": None}]},
        {"prompt": "p", "chosen": "good", "rejected": "worse", "gap": 3},
    ],
    "hh": [
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."},
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d", "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e"},
    ],
    "tldr": [
        {"info": {"id": "x", "subreddit": "u", "title": "A title", "post": "A post."}, "summaries": [{"text": " one"}, {"text": "two"}], "choice": 1},
        {"info": {"subreddit": "s", "title": "t", "post": "p\nq"}, "summaries": [{"text": "a"}, {"text": "b", "note": None}], "choice": 0},
    ],
}  # fmt: skip
PIECES = [
    b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r", b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf",
    b"\x1f\x8b", b"\x1f\x8b\x08", b"9" * 5000, b"\n" + b"[" * 3000, b"\n" + b'{"a":' * 3000, b"\n" * 50, b" " * 2000,
    b"\\ud800", b"\\u0000", b"\\udc00", b"null", b"true", b"1e999", b"-0", b"NaN",
    b'"chosen"', b'"prompt": ""', b'"\\ud83d": 1, ', b'"choice": 7',
]  # fmt: skip


def broken(raw, rng):
    """The bytes after one to six small accidents."""
    for _ in range(rng.randint(1, 6)):
        place, width = rng.randrange(len(raw) + 1), rng.choice([1, 2, 7, 40])
        match rng.randrange(6):
            case 0 if raw:  # a flipped bit
                place %= len(raw)
                raw = raw[:place] + bytes([raw[place] ^ 1 << rng.randrange(8)]) + raw[place + 1 :]
            case 1:  # something that means something
                raw = raw[:place] + rng.choice(PIECES) + raw[place:]
            case 2:  # a hole
                raw = raw[:place] + raw[place + width :]
            case 3:  # a stretch twice, or elsewhere
                raw = raw[:place] + raw[rng.randrange(len(raw) + 1) :][:width] + raw[place:]
            case 4 if rng.random() < 0.3:  # the end is missing
                raw = raw[:place]
            case 5:  # noise
                raw = raw[:place] + rng.randbytes(width) + raw[place + width :]
    return raw


def check_reading(kind, path, rejects):
    """All three readers end with rows or a documented error that names the file; what they give is well-formed and counted."""
    spec, outcomes = f"{kind}:{path}", []
    for read in (read_pairs, read_prompts, read_demonstrations):
        for options in ({},) if read is read_prompts else ({"rejects": rejects}, {"rejects": rejects, "skip_bad_rows": 10_000}):
            rejects.unlink(missing_ok=True)
            try:
                found = read(spec, **options)
            except DataError as error:
                assert str(path) in str(error) and error.code == 3
                str(error).encode(errors="backslashreplace")  # as it is printed
                outcomes.append("stopped")
                continue
            outcomes.append("read")
            if read is read_pairs:
                pairs, left_out = found
                texts = [text for pair in pairs for text in (pair.prompt, pair.chosen, pair.rejected)]
                assert pairs and all(text.strip() and text.encode() for text in texts) and all(pair.chosen != pair.rejected for pair in pairs)
                noted = rejects.read_bytes().splitlines() if rejects.exists() else []
                assert len(noted) == left_out.get("bad row, skipped", 0) and all(set(json.loads(line)) == {"where", "reason", "row"} for line in noted)
    return outcomes


@pytest.mark.parametrize("seed, count", [(0, 40), pytest.param(1, 2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", CORPUS)
def test_broken_bytes_end_in_rows_or_in_a_documented_error(tmp_path, kind, seed, count):
    """`count` files whose lines are broken, as many broken and then packed, as many packed and then broken."""
    whole = "".join(json.dumps(row, ensure_ascii=index % 2 == 0) + "\n" for index, row in enumerate(CORPUS[kind] * 2)).encode()
    rng, path, outcomes = random.Random(f"{seed} {kind}"), tmp_path / "rows", []
    for _ in range(count):
        for raw in (broken(whole, rng), gzip.compress(broken(whole, rng)), broken(gzip.compress(whole), rng)):
            path.write_bytes(raw)
            outcomes += check_reading(kind, path, tmp_path / "rejects.jsonl")
    assert 0.2 < outcomes.count("read") / len(outcomes) < 0.9  # both ends are common, so both were tried


def test_names_of_keys_in_a_message_are_short_and_whole(tmp_path):
    (tmp_path / "rows").write_bytes(b'{"\\ud800": 1, "' + b"k" * 100_000 + b'": 2}\n' + b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(DataError) as error:
        read_pairs(f"jsonl:{tmp_path / 'rows'}")
    assert f"found {'k' * 40}, \\ud800" in str(error.value) and len(str(error.value)) < 2000
    read_pairs(f"jsonl:{tmp_path / 'rows'}", skip_bad_rows=1, rejects=tmp_path / "rejects")
    assert "\\ud800" in json.loads((tmp_path / "rejects").read_text())["reason"]


# ---- what is no file of rows

CHILD = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from data.errors import Stop
from data.examples import read_pairs
resource.setrlimit(resource.RLIMIT_AS, (400 * 2**20, resource.RLIM_INFINITY))
try:
    print(len(read_pairs(sys.argv[2])[0]))
except Stop as error:
    print(error.code, error)
print(next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))  # ru_maxrss would count the parent's
"""


def apart(spec):
    """What a process of its own makes of a spec, with 400 MiB of address space and half a minute: its answer and its peak in MiB."""
    done = subprocess.run([sys.executable, "-c", CHILD, str(ROOT), spec], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr[-2000:]
    answer, _, peak = done.stdout.strip().rpartition("\n")
    return answer, int(peak)


@pytest.mark.parametrize("form", ["plain", "packed"])
def test_a_line_of_a_gigabyte_is_refused_in_little_memory(tmp_path, form):
    """Plain it is a hole in a file, packed 64 parts of gzip of 16 KiB each: neither takes a gigabyte of disk."""
    path = tmp_path / "rows"
    first = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}).encode() + b"\n"
    if form == "plain":
        path.write_bytes(first)
        os.truncate(path, 2**30)
    else:
        path.write_bytes(gzip.compress(first) + 64 * gzip.compress(bytes(2**24)))
        assert path.stat().st_size < 2**21
    answer, peak = apart(f"jsonl:{path}")
    assert answer.startswith(f"3 {path}:2: the line is longer than 16,777,216 bytes") and peak < 120


def test_the_longest_line(tmp_path, monkeypatch):
    row = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}).encode()
    monkeypatch.setattr(data.examples, "MAX_LINE", len(row) + 1)
    path = tmp_path / "rows"
    for raw in (row + b"\n", row + b" ", row + b"\n" + row + b"\n"):
        for content in (raw, gzip.compress(raw)):
            path.write_bytes(content)
            assert len(read_pairs(f"jsonl:{path}")[0]) == 1
    for raw in (row + b" \n", row + b"  ", row + b"\n" + row + b"\r\n"):
        for content in (raw, gzip.compress(raw)):
            path.write_bytes(content)
            with pytest.raises(DataError, match=rf"rows:{raw.count(row)}: the line is longer than {len(row) + 1} bytes"):
                read_pairs(f"jsonl:{path}", skip_bad_rows=9)


def test_pipes_devices_and_links_in_a_circle_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to-pipe").symlink_to(tmp_path / "pipe")
    (tmp_path / "one").symlink_to(tmp_path / "other")
    (tmp_path / "other").symlink_to(tmp_path / "one")
    reasons = {"pipe": "a pipe, socket or device", "to-pipe": "a pipe, socket or device", "one": "Too many levels of symbolic links"}
    for name, reason in reasons.items():
        answer, _ = apart(f"jsonl:{tmp_path / name}")
        assert answer.startswith(f"2 jsonl:{tmp_path / name}: cannot read {tmp_path / name} ({reason}"), answer
    assert "a pipe, socket or device" in apart("jsonl:/dev/zero")[0]


def test_a_link_to_a_file_is_that_file(tmp_path):
    (tmp_path / "rows").write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}))
    (tmp_path / "link").symlink_to(tmp_path / "rows")
    assert len(read_pairs(f"jsonl:{tmp_path / 'link'}")[0]) == 1
