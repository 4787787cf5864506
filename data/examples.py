r"""Preference pairs, prompts and demonstrations from files, with every doubtful row named or counted.

    spec                 a row of the file (.jsonl or .jsonl.gz, one JSON object a line)
    hh:PATH[,PATH...]     HH-RLHF: {"chosen": "\n\nHuman: ...\n\nAssistant: ...", "rejected": ...}; the prompt is everything up to and
                          including the last "\n\nAssistant:", which both texts must share
    tldr:PATH[,PATH...]   OpenAI's TL;DR comparisons: {"info": {"subreddit", "title", "post"}, "summaries": [{"text"}, {"text"}],
                          "choice": 0 or 1}
    jsonl:PATH[,PATH...]  {"prompt", "chosen", "rejected"}, optionally "gap" (a number: the reward gap, where one is known)

Three things can be wrong with a row:
  bad      not JSON, not UTF-8, a missing key, a wrong type, half a character: stops with file:line (exit 3), or up to --skip-bad-rows of
           them are counted and copied to a rejects file
  dropped  a well-formed row that teaches nothing: blank prompt or response, chosen equal to rejected, an exact duplicate, two HH prompts;
           counted by reason. More than 5 % blank rows in a file stop the run: then it is probably the wrong file or key
  long     a prompt beyond the model's room is shortened by `shorten_prompt`, here; responses are cut where batches are made

Responses of dialogues and summaries start with exactly one space (the published TL;DR demonstrations lack the one that the comparisons
have, and a reward model notices); plain JSONL is taken as it is, or put into one of TEMPLATES. Files are read line by line, and no line may
be longer than MAX_LINE; only the kept rows stay in memory.
"""

import gzip
import hashlib
import json
import re
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError, ResourceError, UsageError
from data.files import atomic_write

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
POST, SUMMARY = "\n\nPOST: ", "\n\nTL;DR:"
TEMPLATES = {  # what --template makes of a JSONL row's prompt, and the style by which that is shortened; responses begin with one space
    "hh": (f"{HUMAN} {{}}{ASSISTANT}", "dialogue"),
    "tldr": (f"{POST}{{}}{SUMMARY}", "summary"),
    "chat": ("User: {}\n\nAssistant:", "plain"),
}
ACCEPTED = r"""accepted are
  hh:PATH[,PATH]     rows {"chosen": "\n\nHuman: ...\n\nAssistant: ...", "rejected": "..."}
  tldr:PATH[,PATH]   rows {"info": {"subreddit", "title", "post"}, "summaries": [{"text"}, {"text"}], "choice": 0 or 1}
  jsonl:PATH[,PATH]  rows {"prompt", "chosen", "rejected"}, optionally "gap"; for --demonstrations {"prompt", "response"}; for PPO's --prompts {"prompt"}
  advice or digest   the built-in worlds (--data alone)"""
KINDS = {type(None): "null", bool: "a boolean", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "an object"}
MAX_LINE = 16 * 2**20  # bytes, unpacked; one line without end, or a few kilobytes of gzip that unpack to one, must not fill the memory
BLANK_SHARE, BLANK_MIN_ROWS = 0.05, 20  # a few blank responses are usual (HH-RLHF: 0.2 %), many mean a wrong file or key


@dataclass(frozen=True)
class Pair:
    """One comparison. `id` is a hash of the three texts, `gap` a known reward gap, `where` the file and line."""

    id: str
    prompt: str
    chosen: str
    rejected: str
    style: str
    gap: float | None = None
    where: str = ""


@dataclass(frozen=True)
class Demonstration:
    """One response to imitate."""

    prompt: str
    response: str
    style: str
    where: str = ""


@dataclass(frozen=True)
class _Example:
    """What a schema makes of a row: a prompt and none, one or two responses (chosen first)."""

    prompt: str
    responses: tuple[str, ...]
    gap: float | None = None

    @property
    def id(self) -> str:
        return hashlib.sha256(json.dumps([self.prompt, *self.responses]).encode()).hexdigest()[:16]


class _BadRow(Exception):
    """A row that stops the run; the text is the reason."""


class _BadKey(_BadRow):
    """A key that is missing or holds the wrong type: perhaps the file has another schema."""


class _DroppedRow(Exception):
    """A row that is left out and counted; the text is the reason."""


# ---- the readers


def read_pairs(spec: str, *, skip_bad_rows: int = 0, rejects: Path | None = None, template: str | None = None) -> tuple[list[Pair], dict[str, int]]:
    """The pairs of `spec` in file order, and reason -> number of rows left out (rows read = pairs + the sum of these).

    Raises UsageError for a spec or file that cannot be read; DataError for more than `skip_bad_rows` bad rows, too many blank ones, an
    empty file, a line beyond MAX_LINE, or no usable row. Bad rows that were skipped are written to `rejects`, as {"where", "reason", "row"} a line.
    """
    rows, left_out = _read(spec, "pair", skip_bad_rows, rejects, template)
    return [Pair(row.id, row.prompt, *row.responses, style, row.gap, where) for row, style, where in rows], left_out


def read_prompts(spec: str, *, template: str | None = None) -> list[tuple[str, str]]:
    """The different prompts of `spec` with their style, in order; plain ones `in_form` of the template. JSONL rows need only "prompt".
    Errors as in `read_pairs`, no bad row is skipped."""
    rows, _ = _read(spec, "prompt", None, None, None)
    return list(dict.fromkeys(in_form(row.prompt, template) if style == "plain" else (row.prompt, style) for row, style, _ in rows))


def read_demonstrations(
    spec: str, *, skip_bad_rows: int = 0, rejects: Path | None = None, template: str | None = None
) -> tuple[list[Demonstration], dict[str, int]]:
    """The different (prompt, response) of `spec`, in order: JSONL rows with "response", or the chosen halves of pairs; and what was left out.
    Errors as in `read_pairs`."""
    rows, left_out = _read(spec, "demonstration", skip_bad_rows, rejects, template)
    first = {}
    for row, style, where in rows:
        first.setdefault((row.prompt, row.responses[0]), Demonstration(row.prompt, row.responses[0], style, where))
    return list(first.values()), left_out


def in_form(prompt: str, template: str | None, raw: bool = False) -> tuple[str, str]:
    """A prompt in one of TEMPLATES, if one is given and the prompt is neither raw nor blank nor in one of these forms already, and its style."""
    if template and not raw and prompt.strip() and not any(mark in prompt for mark in (HUMAN, ASSISTANT, SUMMARY)):
        text, style = TEMPLATES[template]
        return text.format(prompt.strip()), style
    if template == "tldr" and POST in prompt and prompt.endswith(SUMMARY):
        return prompt, "summary"
    return prompt, "dialogue" if template == "hh" else "plain"


def opening(prompt: str) -> str:
    """A prompt up to the assistant's first turn: a dialogue that goes on has the same one. Others as they are."""
    first, found, _ = prompt.partition(ASSISTANT)
    return first + found


def is_held_out(prompt: str, share: float, salt: str = "test") -> bool:
    """Whether a prompt belongs to the held-out `share`: by its hash alone, so neither the order nor the other rows matter."""
    number = int.from_bytes(hashlib.sha256(f"{salt}\0{prompt}".encode()).digest()[:8], "big")
    return number < share * 2**64


# ---- from a row to an example, one function per schema


def _hh(row: dict) -> _Example:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    prompt, found, better = chosen.rpartition(ASSISTANT)
    other_prompt, other_found, worse = rejected.rpartition(ASSISTANT)
    if not found or not other_found:
        raise _DroppedRow("no assistant turn")
    if prompt != other_prompt:  # also where one text is a turn longer: then the last turns answer different questions
        raise _DroppedRow("chosen and rejected have different prompts")
    if not prompt.removeprefix(HUMAN).strip():
        raise _DroppedRow("blank prompt")
    return _Example(prompt + ASSISTANT, (_spaced(better), _spaced(worse)))


def _tldr(row: dict) -> _Example:
    info = _value(row, "info", dict)
    subreddit, title, post = (_text(info, key, "info.") for key in ("subreddit", "title", "post"))
    summaries = _value(row, "summaries", list)
    if len(summaries) != 2 or not all(isinstance(summary, dict) for summary in summaries):
        found = ", ".join(_kind(summary) for summary in summaries[:3]) or "nothing"
        raise _BadKey(f'key "summaries" must hold two objects, found {len(summaries)} ({found})')
    texts = [_text(summary, "text", f"summaries[{index}].") for index, summary in enumerate(summaries)]
    choice = _value(row, "choice", int)
    if choice not in (0, 1):
        raise _BadKey(f'key "choice" is {choice}, must be 0 or 1')
    if not post.strip():
        raise _DroppedRow("blank prompt")
    prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}{POST}{post}{SUMMARY}"
    return _Example(prompt, (_spaced(texts[choice]), _spaced(texts[1 - choice])))


def _plain_pair(row: dict) -> _Example:
    prompt, chosen, rejected = (_text(row, key) for key in ("prompt", "chosen", "rejected"))
    gap = row.get("gap")
    if gap is not None:
        if not abs(_value(row, "gap", float)) < 1e9:  # NaN fails this, too
            raise _BadKey('key "gap" must be a finite number')
        gap = float(gap)
    return _Example(prompt, (chosen, rejected), gap)


def _plain_prompt(row: dict) -> _Example:
    return _Example(_text(row, "prompt"), ())


def _plain_demonstration(row: dict) -> _Example:
    key = "chosen" if "chosen" in row and "response" not in row else "response"
    return _Example(_text(row, "prompt"), (_text(row, key),))


def _spaced(response: str) -> str:
    """A response with exactly one space before its first word; a blank one stays blank."""
    return " " + response.lstrip()


def _kind(value) -> str:
    return KINDS[type(value)]


def _value(row: dict, key: str, kind: type, parent: str = ""):
    """row[key], if it is of that type; an int passes for a float, a bool for neither. Otherwise _BadKey with key and found type."""
    if key not in row:
        found = ", ".join(name[:40].encode(errors="backslashreplace").decode() for name in sorted(row)[:8])  # half a character cannot be written
        raise _BadKey(f'key "{parent}{key}" is missing, found {found or "no keys"}')
    value = row[key]
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise _BadKey(f'key "{parent}{key}" is {_kind(value)}, must be {_kind(kind())}')
    return value


def _text(row: dict, key: str, parent: str = "") -> str:
    text = _value(row, key, str, parent)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _BadRow(f'key "{parent}{key}" has the lone surrogate {text[error.start]!a}, half a character') from error
    return text


FORMATS = {  # of files: the style of their prompts, and what makes a row a pair, a prompt or a demonstration
    "hh": {"style": "dialogue", "pair": _hh, "prompt": _hh, "demonstration": _hh},
    "tldr": {"style": "summary", "pair": _tldr, "prompt": _tldr, "demonstration": _tldr},
    "jsonl": {"style": "plain", "pair": _plain_pair, "prompt": _plain_prompt, "demonstration": _plain_demonstration},
}


# ---- from files to rows


def _read(
    spec: str, what: str, skip_bad_rows: int | None, rejects: Path | None, template: str | None
) -> tuple[list[tuple[_Example, str, str]], dict[str, int]]:
    """The usable rows of all files as (example, style, where), and reason -> count of the others; what: "pair", "prompt" or "demonstration";
    skip_bad_rows None: no flag could skip one."""
    kind, paths = paths_of(spec)
    schema = FORMATS[kind][what]
    if template and kind != "jsonl":
        raise UsageError(f"--template {template}: {spec} has a format of its own; templates are for jsonl:PATH")
    rows, left_out, seen, bad = [], Counter(), set(), []
    for path in paths:
        read, blank = 0, 0
        for line in _lines(path):
            read += 1
            where = f"{path}:{line.number}"
            try:
                example, style = schema(_object(line)), FORMATS[kind]["style"]
                if template:
                    prompt, style = in_form(example.prompt, template)
                    example = _Example(prompt, tuple(map(_spaced, example.responses)), example.gap)
                _check_useful(example, seen)
                rows.append((example, style, where))
            except _DroppedRow as reason:
                left_out[str(reason)] += 1
                blank += str(reason).startswith("blank")
            except _BadRow as reason:
                if len(bad) == (skip_bad_rows or 0):
                    raise DataError(_bad_row_message(where, reason, skip_bad_rows)) from reason
                bad.append({"where": where, "reason": str(reason), "row": line.content.decode(errors="backslashreplace")})
        if not read:
            raise DataError(f"{path}: empty file, no rows; is the download complete?")
        if read >= BLANK_MIN_ROWS and blank > BLANK_SHARE * read:
            raise DataError(
                f"{path}: {blank} of {read} rows have a blank prompt or response, more than {BLANK_SHARE:.0%}; "
                "is it the right file for this spec? If they are meant, remove those rows"
            )
    if bad:
        left_out["bad row, skipped"] = len(bad)
        if rejects:
            atomic_write(rejects, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in bad))
    if not rows:
        table = "\n".join(f"  {count:8}  {reason}" for reason, count in left_out.most_common())
        raise DataError(f"{spec}: none of the {left_out.total()} rows is usable; why they were left out:\n{table}\n{ACCEPTED}")
    return rows, dict(left_out)


def paths_of(spec: str) -> tuple[str, list[Path]]:
    """The kind and the files of a spec; raises UsageError where one of them cannot be opened, before any is read."""
    kind, _, names = spec.partition(":")
    if kind not in FORMATS or not all(names.split(",")):
        raise UsageError(f"{spec!r} names no data; {ACCEPTED}")
    paths = [Path(name) for name in names.split(",")]
    for path in paths:
        try:
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a pipe would wait for its other end
                raise OSError(None, "a pipe, socket or device; write what it gives to a file")
            path.open("rb").close()
        except OSError as error:
            raise UsageError(f"{spec}: cannot read {path} ({error.strerror}); {ACCEPTED}") from error
    return kind, paths


@dataclass(frozen=True)
class _Line:
    number: int  # from 1
    offset: int  # in bytes, of `content` in the (unpacked) file
    content: bytes

    @property
    def hint(self) -> str:
        """For a line with an error: the likely reason when it is the last and has no line end."""
        return "" if self.content.endswith(b"\n") else "; the last line has no end, the file may be truncated"


def _lines(path: Path) -> Iterator[_Line]:
    """The lines of a plain or gzipped file that are not blank; a byte order mark at the start is skipped.

    Raises DataError for damaged gzip data and for a line beyond MAX_LINE, ResourceError where reading fails.
    """
    number, offset = 0, 0
    try:
        with path.open("rb") as plain:
            packed = plain.peek(2)[:2] == b"\x1f\x8b"
            file = gzip.open(plain) if packed else plain
            while content := file.readline(MAX_LINE + 1):
                number += 1
                if len(content) > MAX_LINE:
                    raise DataError(
                        f"{path}:{number}: the line is longer than {MAX_LINE:,} bytes; one JSON object is expected on each line (is the whole"
                        " file one list?)"
                    )
                if content.startswith(b"\xef\xbb\xbf") and number == 1:
                    content, offset = content[3:], 3
                if content.strip():
                    yield _Line(number, offset, content)
                offset += len(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}:{number + 1}: damaged or truncated gzip data ({error}); fetch the file again") from error
    except OSError as error:
        raise ResourceError(f"{path}: reading failed after line {number} ({error.strerror})") from error


def _object(line: _Line) -> dict:
    """The JSON object on a line; raises _BadRow."""
    try:
        row = json.loads(line.content.decode())
    except UnicodeDecodeError as error:
        byte = line.content[error.start]
        raise _BadRow(f"not UTF-8: byte 0x{byte:02x} at offset {line.offset + error.start} of the file{line.hint}") from error
    except json.JSONDecodeError as error:
        raise _BadRow(f"invalid JSON: {error.msg} at column {error.colno}{line.hint}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand nested lists
        raise _BadRow(f"invalid JSON: {error}") from error
    if not isinstance(row, dict):
        raise _BadKey(f"the row is {_kind(row)}, must be an object")
    return row


def _bad_row_message(where: str, reason: _BadRow, skip_bad_rows: int | None) -> str:
    skip = "" if skip_bad_rows is None else ", or skip up to N such rows with --skip-bad-rows N"
    skipped = f" ({skip_bad_rows} bad rows before it were skipped)" if skip_bad_rows else ""
    schemas = f"; {ACCEPTED}" if isinstance(reason, _BadKey) else ""
    return f"{where}: {reason}{skipped}; correct or remove the row{skip}{schemas}"


def _check_useful(example: _Example, seen: set[str]) -> None:
    """Raises _DroppedRow for a row that teaches nothing; notes its id in `seen`."""
    if not example.prompt.strip():
        raise _DroppedRow("blank prompt")
    if not all(response.strip() for response in example.responses):
        raise _DroppedRow("blank response")
    if len(example.responses) == 2 and example.responses[0] == example.responses[1]:
        raise _DroppedRow("chosen equals rejected")
    if example.id in seen:
        raise _DroppedRow("duplicate")
    seen.add(example.id)


# ---- prompts that are too long


def shorten_prompt(prompt: str, style: str, encode: Callable[[str], list[int]], budget: int) -> str:
    """`prompt` cut to at most `budget` tokens, or "" where no useful part fits (the caller drops the row and counts it).

    dialogue  keeps the end, from the start of a human turn; where even the last turn is too long, from within it
    summary   keeps the title and "TL;DR:", and cuts the post at its last newline that makes it fit; without one, within a line
    plain     keeps the end
    The work is linear in the prompt's length: it is halved until it fits.
    """

    def longest(cuts: Sequence[int], cut_at: Callable[[int], str]) -> str:
        """The first text that fits, of cuts ordered from the longest text to the shortest."""
        low, high = 0, len(cuts)
        while low < high:  # bisection; everything from `high` on fits
            middle = (low + high) // 2
            low, high = (low, middle) if len(encode(cut_at(cuts[middle]))) <= budget else (middle + 1, high)
        return cut_at(cuts[high]) if high < len(cuts) else ""

    if len(encode(prompt)) <= budget:
        return prompt
    if style == "summary":
        head, post = prompt.removesuffix(SUMMARY).split(POST, 1)
        newlines = [match.start() for match in re.finditer(r"(?<=\S)\s*\n", post)]
        inside = range(len(post), len(post) - len(post.lstrip()), -1)  # at least one character that is not blank

        def keep_start(end: int) -> str:
            return head + POST + post[:end] + SUMMARY

        return longest(newlines[::-1], keep_start) or longest(inside, keep_start)

    end = ASSISTANT if style == "dialogue" else ""
    turns = [match.start() for match in re.finditer(HUMAN, prompt)] if style == "dialogue" else []
    inside = range(1, len(prompt.removesuffix(end).rstrip()))  # at least one character that is not blank, besides the end
    return longest(turns, lambda start: prompt[start:]) or longest(inside, lambda start: prompt[start:])
