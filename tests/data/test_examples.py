"""Readers: the three schemas, every kind of bad row with its message, what is dropped and counted, and prompts that are too long."""

import gzip
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError, UsageError
from data.examples import FORMATS, Demonstration, _Example, is_held_out, read_demonstrations, read_pairs, read_prompts, shorten_prompt
from data.prepare import form_of
from tests.conftest import real_data


def save(path, rows) -> str:
    """Writes rows (objects, or text or bytes as it stands) one a line; returns the path as text."""
    lines = [row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def plain(number: int, **changes) -> dict:
    return {"prompt": f"p{number}", "chosen": f"good {number}", "rejected": f"bad {number}"} | changes


def dialogue(prompt: str, chosen: str, rejected: str) -> dict:
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}


def comparison(**changes) -> dict:
    info = {"id": "x", "subreddit": "tifu", "title": "A title", "post": "A post.\nTwo lines."}
    return {"info": info, "summaries": [{"text": " first", "policy": "a"}, {"text": "second"}], "choice": 1} | changes


# ---- the three schemas


def test_hh(tmp_path):
    prompt = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Eggs?\n\nAssistant:"
    path = save(tmp_path / "hh.jsonl", [dialogue(prompt, " Boil them.", "  No.\n\n1. None")])
    (pair,), left_out = read_pairs(f"hh:{path}")
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, " Boil them.", " No.\n\n1. None")
    assert (pair.style, pair.gap, pair.where, left_out) == ("dialogue", None, f"{path}:1", {})
    assert re.fullmatch("[0-9a-f]{16}", pair.id)


def test_tldr_gzipped(tmp_path):
    path = tmp_path / "tldr.jsonl.gz"
    rows = [comparison(), comparison(choice=0)]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    (one, two), left_out = read_pairs(f"tldr:{path}")
    assert one.prompt == "SUBREDDIT: r/tifu\n\nTITLE: A title\n\nPOST: A post.\nTwo lines.\n\nTL;DR:"
    assert (one.chosen, one.rejected, one.style, one.where) == (" second", " first", "summary", f"{path}:1")
    assert (two.chosen, two.rejected, two.where, left_out) == (" first", " second", f"{path}:2", {})
    assert one.id != two.id


def test_plain_is_taken_as_it_is(tmp_path):
    rows = [plain(1, chosen="  a\u2028\0", gap=-1.5, more=[1]), plain(2, gap=2), plain(3, gap=None), plain(4)]
    pairs, _ = read_pairs("jsonl:" + save(tmp_path / "p.jsonl", rows))
    assert [(pair.chosen, pair.gap) for pair in pairs] == [("  a\u2028\0", -1.5), ("good 2", 2.0), ("good 3", None), ("good 4", None)]
    assert {pair.style for pair in pairs} == {"plain"}


def test_the_id_depends_on_the_texts_alone(tmp_path):
    rows = [plain(1, prompt="ab", chosen="c"), plain(1, prompt="a", chosen="bc"), plain(1, prompt="ab", chosen="bad 1", rejected="c")]
    first, _ = read_pairs("jsonl:" + save(tmp_path / "one.jsonl", rows))
    second, _ = read_pairs("jsonl:" + save(tmp_path / "two.jsonl", [row | {"gap": 1} for row in reversed(rows)]))
    assert len({pair.id for pair in first}) == 3
    assert [pair.id for pair in first] == [pair.id for pair in reversed(second)]


def test_several_files_in_order(tmp_path):
    one = save(tmp_path / "one.jsonl", [plain(1), plain(2)])
    two = save(tmp_path / "two.jsonl", [plain(2), plain(3)])
    pairs, left_out = read_pairs(f"jsonl:{one},{two}")
    assert [pair.where for pair in pairs] == [f"{one}:1", f"{one}:2", f"{two}:2"]
    assert left_out == {"duplicate": 1}


def test_byte_order_mark_carriage_returns_and_blank_lines(tmp_path):
    lines = ["\ufeff" + json.dumps(plain(1)) + "\r", "", "  \r", json.dumps(plain(2)) + "\r"]
    path = save(tmp_path / "windows.jsonl", lines)
    pairs, left_out = read_pairs(f"jsonl:{path}")
    assert [pair.where for pair in pairs] == [f"{path}:1", f"{path}:4"] and left_out == {}
    assert pairs[1].rejected == "bad 2"


def test_last_line_without_an_end_is_read(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps(plain(1)))
    assert len(read_pairs(f"jsonl:{tmp_path / 'p.jsonl'}")[0]) == 1


def test_a_megabyte_on_a_line(tmp_path):
    pairs, _ = read_pairs("jsonl:" + save(tmp_path / "p.jsonl", [plain(1, prompt="x" * 1_000_000)]))
    assert len(pairs[0].prompt) == 1_000_000


# ---- prompts and demonstrations


def test_prompts_are_different_and_in_order(tmp_path):
    prompts = save(tmp_path / "prompts.jsonl", [{"prompt": "b"}, {"prompt": "a"}, {"prompt": "b"}, plain(1), {"prompt": " "}])
    assert read_prompts(f"jsonl:{prompts}") == [("b", "plain"), ("a", "plain"), ("p1", "plain")]
    shared = "\n\nHuman: Hi\n\nAssistant:"
    pairs = save(tmp_path / "hh.jsonl", [dialogue(shared, " a", " b"), dialogue(shared, " c", " d")])
    assert read_prompts(f"hh:{pairs}") == [(shared, "dialogue")]


def test_demonstrations(tmp_path):
    path = save(tmp_path / "d.jsonl", [{"prompt": "p", "response": "r"}, plain(1), {"prompt": "p", "response": "r"}])
    shown, left_out = read_demonstrations(f"jsonl:{path}")
    assert shown == [Demonstration("p", "r", "plain", f"{path}:1"), Demonstration("p1", "good 1", "plain", f"{path}:2")]
    assert left_out == {"duplicate": 1}
    path = save(tmp_path / "tldr.jsonl", [comparison(), comparison(summaries=[{"text": "x"}, {"text": "second"}])])
    (demonstration,), _ = read_demonstrations(f"tldr:{path}")  # the same chosen summary twice
    assert (demonstration.response, demonstration.style, demonstration.where) == (" second", "summary", f"{path}:1")
    path = save(tmp_path / "none.jsonl", [{"prompt": "p"}])
    with pytest.raises(DataError, match='none.jsonl:1: key "response" is missing, found prompt'):
        read_demonstrations(f"jsonl:{path}")


# ---- bad rows

BAD_JSON = '{"prompt": "a", "chosen": "b" "rejected": "c"}'
BAD_ROWS = [  # spec, row, message from the line number on
    ("jsonl", BAD_JSON, "invalid JSON: Expecting ',' delimiter at column 31"),
    ("jsonl", "[" * 100_000, "invalid JSON: "),
    ("jsonl", "9" * 5000, "invalid JSON: "),
    ("jsonl", json.dumps(plain(1))[:25].encode() + b"\xe9", "not UTF-8: byte 0xe9 at offset {offset} of the file"),
    ("jsonl", r'{"prompt": "a", "chosen": "\ud83d", "rejected": "c"}', "key \"chosen\" has the lone surrogate '\\ud83d', half a character"),
    ("jsonl", [plain(1)], "the row is a list, must be an object"),
    ("jsonl", "null", "the row is null, must be an object"),
    ("jsonl", {"prompt": "a", "chosen": "b"}, 'key "rejected" is missing, found chosen, prompt'),
    ("jsonl", {}, 'key "prompt" is missing, found no keys'),
    ("jsonl", plain(1, chosen=None), 'key "chosen" is null, must be text'),
    ("jsonl", plain(1, chosen=["a"]), 'key "chosen" is a list, must be text'),
    ("jsonl", plain(1, rejected=3), 'key "rejected" is a whole number, must be text'),
    ("jsonl", plain(1, prompt={"a": 1}), 'key "prompt" is an object, must be text'),
    ("jsonl", plain(1, gap="1"), 'key "gap" is text, must be a number'),
    ("jsonl", plain(1, gap=True), 'key "gap" is a boolean, must be a number'),
    ("jsonl", plain(1, gap=float("nan")), 'key "gap" must be a finite number'),
    ("jsonl", plain(1, gap=10**400), 'key "gap" must be a finite number'),
    ("hh", {"chosen": "\n\nHuman: a\n\nAssistant: b"}, 'key "rejected" is missing, found chosen'),
    ("hh", plain(1, chosen=3), 'key "chosen" is a whole number, must be text'),
    ("tldr", comparison(choice=2), 'key "choice" is 2, must be 0 or 1'),
    ("tldr", comparison(choice=True), 'key "choice" is a boolean, must be a whole number'),
    ("tldr", comparison(choice=None), 'key "choice" is null, must be a whole number'),
    ("tldr", comparison(summaries=[{"text": "a"}]), 'key "summaries" must hold two objects, found 1 (an object)'),
    ("tldr", comparison(summaries=["a", "b"]), 'key "summaries" must hold two objects, found 2 (text, text)'),
    ("tldr", comparison(summaries=[{"text": "a"}, {}]), 'key "summaries[1].text" is missing, found no keys'),
    ("tldr", comparison(summaries="ab"), 'key "summaries" is text, must be a list'),
    ("tldr", comparison(info=None), 'key "info" is null, must be an object'),
    ("tldr", comparison(info={"subreddit": "s", "title": "t"}), 'key "info.post" is missing, found subreddit, title'),
    ("tldr", comparison(info={"subreddit": "s", "title": None, "post": "p"}), 'key "info.title" is null, must be text'),
]
GOOD = {"hh": dialogue("\n\nHuman: Hi\n\nAssistant:", " a", " b"), "tldr": comparison(), "jsonl": plain(7)}


@pytest.mark.parametrize("kind, row, message", BAD_ROWS, ids=[f"{kind} {message[:40]}" for kind, _, message in BAD_ROWS])
def test_bad_row(tmp_path, kind, row, message):
    path = save(tmp_path / "data.jsonl", [GOOD[kind], row, GOOD[kind]])
    message = message.format(offset=len(json.dumps(GOOD[kind])) + 1 + 25) if "{offset}" in message else message
    with pytest.raises(DataError) as error:
        read_pairs(f"{kind}:{path}")
    assert error.value.code == 3
    text = str(error.value)
    assert text.startswith(f"{path}:2: {message}")
    assert "; correct or remove the row, or skip up to N such rows with --skip-bad-rows N" in text
    assert "truncated" not in text
    accepted = all(schema in text for schema in ("hh:PATH", "tldr:PATH", "jsonl:PATH"))
    assert accepted == (message.startswith(("key", "the row")) and "surrogate" not in message)

    pairs, left_out = read_pairs(f"{kind}:{path}", skip_bad_rows=1)
    assert len(pairs) == 1 and left_out == {"bad row, skipped": 1, "duplicate": 1}


def test_byte_offset_counts_from_the_start_of_the_file(tmp_path):
    lines = ["\ufeff" + json.dumps(plain(1), ensure_ascii=False) + "\r", "", '{"prompt": "é"}'.encode("latin-1")]
    path = save(tmp_path / "data.jsonl", lines)
    with pytest.raises(DataError) as error:
        read_pairs(f"jsonl:{path}")
    offset = int(re.search(r"data.jsonl:3: not UTF-8: byte 0xe9 at offset (\d+)", str(error.value))[1])
    assert (tmp_path / "data.jsonl").read_bytes()[offset] == 0xE9


def test_skipping_stops_at_the_limit_and_writes_the_rejects(tmp_path):
    lines = [json.dumps(plain(1)), BAD_JSON, b'"\xff"', json.dumps(plain(2)), plain(3, chosen=None)]
    path, rejects = save(tmp_path / "data.jsonl", lines), tmp_path / "rejects.jsonl"
    with pytest.raises(DataError, match=r'data.jsonl:5: key "chosen" is null.* \(2 bad rows before it were skipped\)'):
        read_pairs(f"jsonl:{path}", skip_bad_rows=2, rejects=rejects)
    assert not rejects.exists()
    pairs, left_out = read_pairs(f"jsonl:{path}", skip_bad_rows=3, rejects=rejects)
    assert [pair.prompt for pair in pairs] == ["p1", "p2"] and left_out == {"bad row, skipped": 3}
    rows = [json.loads(line) for line in rejects.read_text(encoding="utf-8").splitlines()]
    assert [row["where"] for row in rows] == [f"{path}:2", f"{path}:3", f"{path}:5"]
    assert rows[0]["row"] == BAD_JSON + "\n" and rows[1]["row"] == '"\\xff"\n'
    assert rows[2]["reason"] == 'key "chosen" is null, must be text'


def test_no_bad_rows_no_rejects_file(tmp_path):
    read_pairs("jsonl:" + save(tmp_path / "data.jsonl", [plain(1)]), skip_bad_rows=3, rejects=tmp_path / "rejects.jsonl")
    assert not (tmp_path / "rejects.jsonl").exists()


@pytest.mark.parametrize("cut", [b'{"prompt": "a", "cho', '{"prompt": "é'.encode()[:-1]], ids=["JSON", "UTF-8"])
def test_cut_last_line(tmp_path, cut):
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(plain(1)).encode() + b"\n" + cut)
    with pytest.raises(DataError, match="data.jsonl:2: .*; the last line has no end, the file may be truncated; correct or remove"):
        read_pairs(f"jsonl:{path}")


def test_damaged_gzip(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    whole = gzip.compress("".join(json.dumps(plain(number)) + "\n" for number in range(1000)).encode())
    for content in (whole[:-200], whole[:100] + b"\0\0\0\0" + whole[104:], whole[:-8] + b"\0" * 8):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"data.jsonl.gz:\d+: damaged or truncated gzip data .*; fetch the file again"):
            read_pairs(f"jsonl:{path}", skip_bad_rows=5)


# ---- rows that are dropped


@pytest.mark.parametrize("blank", ["", "  ", "\n\t\u3000"], ids=ascii)
def test_blank_rows_are_dropped_and_counted(tmp_path, blank):
    rows = [plain(1), plain(2, chosen=blank), plain(3, rejected=blank), plain(4, prompt=blank)]
    pairs, left_out = read_pairs("jsonl:" + save(tmp_path / "p.jsonl", rows))
    assert len(pairs) == 1 and left_out == {"blank response": 2, "blank prompt": 1}
    first = "\n\nHuman: Hi\n\nAssistant:"
    rows = [dialogue(first, " a", " b"), dialogue(first, blank, " b"), dialogue(f"\n\nHuman:{blank}\n\nAssistant:", " a", " b")]
    pairs, left_out = read_pairs("hh:" + save(tmp_path / "hh.jsonl", rows))
    assert len(pairs) == 1 and left_out == {"blank response": 1, "blank prompt": 1}
    post = {"subreddit": "s", "title": "t", "post": blank}
    rows = [comparison(), comparison(info=post), comparison(summaries=[{"text": blank}, {"text": "a"}])]
    pairs, left_out = read_pairs("tldr:" + save(tmp_path / "tldr.jsonl", rows))
    assert len(pairs) == 1 and left_out == {"blank response": 1, "blank prompt": 1}


def test_too_many_blank_rows_stop(tmp_path):
    def spec(rows: int, blank: int) -> str:
        return "jsonl:" + save(tmp_path / "p.jsonl", [plain(number) | ({"chosen": ""} if number < blank else {}) for number in range(rows)])

    assert read_pairs(spec(19, 18))[1] == {"blank response": 18}  # too few rows for a share to mean something
    assert read_pairs(spec(40, 2))[1] == {"blank response": 2}  # exactly 5 %
    with pytest.raises(DataError, match="p.jsonl: 3 of 40 rows have a blank prompt or response, more than 5%; is it the right file"):
        read_pairs(spec(40, 3))
    with pytest.raises(DataError, match="p.jsonl: 2 of 20 rows"):
        read_pairs(spec(20, 2))


def test_equal_and_duplicate_rows_are_dropped_and_counted(tmp_path):
    rows = [plain(1), plain(2, rejected="good 2"), plain(1), plain(1, rejected="other"), plain(1, gap=1.0)]
    pairs, left_out = read_pairs("jsonl:" + save(tmp_path / "p.jsonl", rows))
    assert [pair.rejected for pair in pairs] == ["bad 1", "other"]
    assert left_out == {"chosen equals rejected": 1, "duplicate": 2}
    prompt = "\n\nHuman: Hi\n\nAssistant:"  # equal once both have their one leading space
    _, left_out = read_pairs("hh:" + save(tmp_path / "hh.jsonl", [dialogue(prompt, " a", "a"), dialogue(prompt, "a", "b")]))
    assert left_out == {"chosen equals rejected": 1}


def test_hh_rows_with_two_prompts_are_dropped_and_counted(tmp_path):
    short, long = "\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant: Yes\n\nHuman: So?\n\nAssistant:"
    rows = [
        {"chosen": short + " a", "rejected": short + " b"},
        {"chosen": short + " a", "rejected": "\n\nHuman: Ho\n\nAssistant: b"},
        {"chosen": long + " a", "rejected": short + " b"},  # the same start, but the last turns answer different questions
        {"chosen": short + " b", "rejected": long + " a"},
        {"chosen": "no turns", "rejected": "at all"},
        {"chosen": short + " a", "rejected": "\n\nHuman: Hi"},
    ]
    pairs, left_out = read_pairs("hh:" + save(tmp_path / "hh.jsonl", rows))
    assert len(pairs) == 1 and left_out == {"chosen and rejected have different prompts": 3, "no assistant turn": 2}


def test_no_usable_row_shows_the_table(tmp_path):
    rows = [plain(1, chosen=""), plain(2, chosen="bad 2"), plain(3, chosen=" "), "{"]
    path = save(tmp_path / "p.jsonl", rows)
    with pytest.raises(DataError) as error:
        read_pairs(f"jsonl:{path}", skip_bad_rows=1)
    assert str(error.value).startswith(
        f"jsonl:{path}: none of the 4 rows is usable; why they were left out:\n"
        "         2  blank response\n         1  chosen equals rejected\n         1  bad row, skipped\naccepted are\n  hh:PATH"
    )


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf", gzip.compress(b"")], ids=["nothing", "lines", "mark", "gzip"])
def test_empty_file(tmp_path, content):
    (tmp_path / "p.jsonl").write_bytes(content)
    good = save(tmp_path / "good.jsonl", [plain(1)])
    with pytest.raises(DataError, match="p.jsonl: empty file, no rows; is the download complete"):
        read_pairs(f"jsonl:{good},{tmp_path / 'p.jsonl'}")


# ---- specs


@pytest.mark.parametrize("spec", ["", "hh", "hh:", "jsonl:,", "jsonl:a,", "hf:Anthropic/hh-rlhf", "data.jsonl", "HH:x"])
def test_unknown_spec(spec):
    for read in (read_pairs, read_prompts, read_demonstrations):
        with pytest.raises(UsageError) as error:
            read(spec)
        assert str(error.value).startswith(f"{spec!r} names no data; accepted are\n  hh:PATH")
        assert error.value.code == 2


def test_missing_file_and_folder(tmp_path):
    good = save(tmp_path / "good.jsonl", ["not JSON"])  # never read: all files are tried first
    with pytest.raises(UsageError, match=r"cannot read .*none.jsonl \(No such file or directory\); accepted are\n  hh:PATH"):
        read_pairs(f"jsonl:{good},{tmp_path / 'none.jsonl'}")
    with pytest.raises(UsageError, match=r"cannot read .* \(Is a directory\)"):
        read_pairs(f"hh:{tmp_path}")


def test_unreadable_file(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    path = save(tmp_path / "p.jsonl", [plain(1)])
    monkeypatch.setattr("data.examples.Path.open", refuse)  # a file mode would not stop an administrator
    with pytest.raises(UsageError, match=r"cannot read .*p.jsonl \(Permission denied\)"):
        read_pairs(f"jsonl:{path}")


# ---- holding out


def test_held_out_share_is_stable_and_independent_of_order():
    prompts = [f"prompt {number}" for number in range(20_000)]
    held = {prompt for prompt in prompts if is_held_out(prompt, 0.1)}
    assert abs(len(held) / 20_000 - 0.1) < 4 * (0.1 * 0.9 / 20_000) ** 0.5
    assert held <= {prompt for prompt in prompts if is_held_out(prompt, 0.2)}  # a larger share only adds
    other = {prompt for prompt in prompts if is_held_out(prompt, 0.1, salt="validation")}
    assert abs(len(held & other) / len(held) - 0.1) < 0.04  # another salt is another draw
    assert not any(is_held_out(prompt, 0.0) for prompt in prompts) and all(is_held_out(prompt, 1.0) for prompt in prompts)
    # `printf 'test\\0a' | sha256sum` begins with 43e0fa44; this choice must never move between versions
    assert not is_held_out("a", 0x43E0FA44 / 2**32) and is_held_out("a", 0x43E0FA45 / 2**32)


# ---- prompts that are too long


def words(text: str) -> list[int]:
    """A stand-in tokenizer that is easy to count by hand: one token for each run of non-space, one for each newline."""
    return [1] * len(re.findall(r"\S+|\n", text))


TURNS = "\n\nHuman: one two\n\nAssistant: three\n\nHuman: four five six\n\nAssistant:"  # 2+3 + 2+2 + 2+4 + 2+1 = 18 tokens
LAST = "\n\nHuman: four five six\n\nAssistant:"  # 2+4 + 2+1 = 9 tokens


@pytest.mark.parametrize(
    "budget, expected",
    [(18, TURNS), (17, LAST), (9, LAST), (8, "\nHuman: four five six\n\nAssistant:"), (7, "Human: four five six\n\nAssistant:"),
     (4, "six\n\nAssistant:"), (3, ""), (0, "")],
)  # fmt: skip
def test_dialogue_keeps_the_end_from_a_turn(budget, expected):
    shortened = shorten_prompt(TURNS, "dialogue", words, budget)
    assert shortened.lstrip(" ") == expected
    assert TURNS.endswith(shortened)


POST_PROMPT = "SUBREDDIT: r/a\n\nTITLE: b c\n\nPOST: {}\n\nTL;DR:"  # 2 + 2+3 + 2+1 + 2+1 = 13 tokens around the post


@pytest.mark.parametrize(
    "budget, kept",
    [(22, "d e\n\nf g h\ni"), (21, "d e\n\nf g h"), (20, "d e\n\nf g h"), (19, "d e"), (15, "d e"), (14, "d"), (13, None), (0, None)],
)  # the post has 2+2+3+1+1 = 9 tokens, 7 before the last newline, 2 before the first; within the first line "d" is 1
def test_summary_cuts_the_post_at_a_newline(budget, kept):
    shortened = shorten_prompt(POST_PROMPT.format("d e\n\nf g h\ni"), "summary", words, budget)
    assert re.sub(" +\n", "\n", shortened) == (POST_PROMPT.format(kept) if kept else "")


def test_plain_keeps_the_end():
    assert shorten_prompt("a b c d", "plain", words, 4) == "a b c d"
    assert shorten_prompt("a b c d", "plain", words, 2).strip() == "c d"
    assert shorten_prompt("a b c d  ", "plain", words, 0) == ""


@pytest.mark.parametrize("style, prompt", [
    ("dialogue", "\n\nHuman: " + "a b\n" * 250_000 + "\n\nAssistant:"),
    ("dialogue", "\n\nHuman: x\n\nAssistant: y" * 40_000 + "\n\nHuman: z\n\nAssistant:"),
    ("summary", POST_PROMPT.format("a b\n" * 250_000)),
    ("summary", POST_PROMPT.format("a" * 1_000_000)),
    ("plain", "ab" * 500_000),
])  # fmt: skip
def test_a_megabyte_is_shortened_with_linear_work(style, prompt):
    encoded = 0

    def characters(text: str) -> list[int]:
        nonlocal encoded
        encoded += len(text)
        return [1] * len(text)

    shortened = shorten_prompt(prompt, style, characters, 300)
    assert 270 < len(shortened) <= 300
    assert encoded < 4 * len(prompt)


@settings(max_examples=200, deadline=None)
@given(
    style=st.sampled_from(["dialogue", "summary", "plain"]),
    body=st.lists(st.sampled_from(["a", " b", "\n", "\n\nHuman:", "\n\nAssistant:", "\n\nPOST: ", " ", "é"]), max_size=30).map("".join),
    budget=st.integers(0, 60),
)
def test_what_is_kept_fits_and_comes_from_the_prompt(style, body, budget):
    start, end = {"dialogue": ("\n\nHuman:", "\n\nAssistant:"), "summary": ("TITLE: t\n\nPOST: ", "\n\nTL;DR:"), "plain": ("", "")}[style]
    prompt = start + body + end
    shortened = shorten_prompt(prompt, style, list, budget)
    assert len(shortened) <= budget
    if shortened:
        assert shortened.endswith(end)
        assert prompt.endswith(shortened) if style != "summary" else prompt.startswith(shortened.removesuffix(end))
        if shortened != prompt:
            assert shortened.removesuffix(end).removeprefix(start if style == "summary" else "").strip()
    else:  # not even the one word character nearest to the end (a summary: to the start) would have fitted
        blanks = len(body) - len(body.lstrip()) if style == "summary" else len(start + body) - len((start + body).rstrip())
        assert budget < (len(start) if style == "summary" else 0) + blanks + 1 + len(end) or not (start + body).strip()


# ---- real data; the counts were found by a separate script that splits with str.rfind and compares raw texts


def test_real_hh():
    pairs, left_out = read_pairs(f"hh:{real_data() / 'hh-rlhf/harmless-base-test.jsonl.gz'}")
    assert left_out == {"chosen and rejected have different prompts": 5, "blank response": 4}
    assert len(pairs) == 2312 - 5 - 4 and len({pair.id for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert pair.prompt.startswith("\n\nHuman:") and pair.prompt.endswith("\n\nAssistant:")
        assert all(re.match(r" \S", response) and "\n\nAssistant:" not in response for response in (pair.chosen, pair.rejected))


def test_real_tldr():
    pairs, left_out = read_pairs(f"tldr:{real_data() / 'tldr/judged-comparisons.jsonl.gz'}")
    assert len(pairs) == 1000 and left_out == {}
    assert sum(len(pair.chosen) > len(pair.rejected) for pair in pairs) == 674
    assert all(re.match(r"SUBREDDIT: r/\S+\n\nTITLE: .*\n\nPOST: ", pair.prompt) and pair.prompt.endswith("\n\nTL;DR:") for pair in pairs)
    assert len(read_prompts(f"tldr:{real_data() / 'tldr/judged-comparisons.jsonl.gz'}")) == 1000


# ---- templates


@pytest.mark.parametrize(
    ("template", "prompt", "style"),
    [
        ("hh", "\n\nHuman: Name {two} fruits.\n\nAssistant:", "dialogue"),
        ("tldr", "\n\nPOST: Name {two} fruits.\n\nTL;DR:", "summary"),
        ("chat", "User: Name {two} fruits.\n\nAssistant:", "plain"),
    ],
)
def test_a_template_puts_plain_prompts_into_a_form(template, prompt, style, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": " Name {two} fruits.\n", "chosen": "Figs.", "rejected": "  No."}) + "\n")
    (pair,), _ = read_pairs(f"jsonl:{path}", template=template)
    assert (pair.prompt, pair.style, pair.chosen, pair.rejected) == (prompt, style, " Figs.", " No.")
    assert read_prompts(f"jsonl:{path}", template=template) == [(prompt, style)]
    (shown,), _ = read_demonstrations(f"jsonl:{path}", template=template)
    assert (shown.prompt, shown.response, shown.style) == (prompt, " Figs.", style)
    assert len(shorten_prompt(prompt, style, list, len(prompt) - 5)) <= len(prompt) - 5
    with pytest.raises(UsageError, match=f"--template {template}: hh:.* has a format of its own"):
        read_pairs(f"hh:{path}", template=template)


@pytest.mark.parametrize("template", ["hh", "tldr", "chat"])
def test_a_prompt_that_is_in_a_form_stays_as_it_is_in_every_reader(template, tmp_path):
    path = tmp_path / "rows.jsonl"
    for prompt in ("\n\nHuman: Hi\n\nAssistant:", "User: Hi\n\nAssistant:", "SUBREDDIT: r/a\n\nTITLE: b\n\nPOST: c\n\nTL;DR:"):
        path.write_text(json.dumps({"prompt": prompt, "chosen": "Yes.", "rejected": "No."}) + "\n")
        (pair,), _ = read_pairs(f"jsonl:{path}", template=template)
        (shown,), _ = read_demonstrations(f"jsonl:{path}", template=template)
        ((asked, style),) = read_prompts(f"jsonl:{path}", template=template)
        assert pair.prompt == shown.prompt == asked == prompt and pair.style == shown.style == style
        assert shorten_prompt(prompt, style, list, len(prompt) - 1) != prompt  # its style fits it


def test_rows_are_compared_in_the_form_that_they_get(tmp_path):
    path = tmp_path / "rows.jsonl"
    texts = [("a", "x", "y"), (" a ", " x", "y"), ("a", "x", "  x"), (" ", "x", "y"), ("b", "x", "y")]
    path.write_text("".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), row, strict=True))) + "\n" for row in texts))
    pairs, left_out = read_pairs(f"jsonl:{path}", template="chat")
    assert [pair.prompt for pair in pairs] == ["User: a\n\nAssistant:", "User: b\n\nAssistant:"]
    assert left_out == {"duplicate": 1, "chosen equals rejected": 1, "blank prompt": 1}


# ---- a format of one's own


def test_another_format_is_one_row_of_the_table(tmp_path, monkeypatch):
    """Of another file's rows: pairs, prompts and demonstrations are read by it, and plain ones beside it get the form of its style."""

    def messages(row):
        return _Example(f"\n\nHuman: {row['ask']}\n\nAssistant:", (" " + row["good"], " " + row["bad"]))

    monkeypatch.setitem(FORMATS, "ultra", {"style": "dialogue", "pair": messages, "prompt": messages, "demonstration": messages})
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"ask": "Name a fruit.", "good": "Fig.", "bad": "No."}) + "\n")
    (pair,), _ = read_pairs(f"ultra:{file}")
    assert (pair.prompt, pair.chosen, pair.style) == ("\n\nHuman: Name a fruit.\n\nAssistant:", " Fig.", "dialogue")
    assert read_prompts(f"ultra:{file}") == [(pair.prompt, "dialogue")] and read_demonstrations(f"ultra:{file}")[0][0].response == " Fig."
    assert form_of({"data": f"ultra:{file}", "template": None}) == "hh" and form_of({"data": f"jsonl:{file}", "template": "chat"}) == "chat"
