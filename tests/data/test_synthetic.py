"""The built-in worlds: what may win, what must lose, and that rows, labels and files are what they are said to be."""

import gzip
import json
import math
import random
from collections import Counter

import numpy as np
import pytest

from data import advice, digest, synthetic
from data.errors import UsageError
from tests.conftest import real_data

NAMES = tuple(synthetic.WORLDS)


@pytest.fixture(scope="module", params=NAMES)
def drawn(request):
    """(name, 1,200 unlabelled rows (prompt, first, second) of one seed)."""
    return request.param, [synthetic.draw_pair(request.param, 0, index) for index in range(1200)]


def worst_response(name, prompt):
    """A response as bad as the grammar allows: everything wrong, as often and as rudely as it goes."""
    if name == "advice":
        request = advice.read_prompt(prompt)
        wrong = [item for item in advice.ITEMS if item not in request.accepted][: advice.MOST_ITEMS]
        false = next(thing for thing in advice.THINGS if thing != request.thing)
        repeated = [wrong[0]] * advice.MOST_ITEMS
        unfitting = [text for texts in advice.FITTING.values() for text in texts if text not in request.fitting][:2]
        answers = [advice.Answer(name=false, items=tuple(wrong)), advice.Answer(name=false, items=tuple(repeated)), advice.Answer(),
                   advice.Answer(refused=True, alternatives=tuple(unfitting)), advice.Answer(refused=True, alternatives=(unfitting[0],) * 2)]
        texts = [advice.write_answer(advice.replace(answer, opener="You should know this.", filler=advice.FILLERS[0]), advice.FRAMES[-1])
                 for answer in answers]
    else:
        post = digest.read_prompt(prompt)
        invented = [fact for fact in ((person, deed) for person in digest.PEOPLE for deed in digest.DEEDS) if fact not in post.facts]
        question = [text for text in digest.QUESTIONS if text != post.question][0]
        texts = [digest.write_summary([*claims, question], digest.LEADS[-1], together=False)
                 for claims in (invented[: digest.MOST_CLAIMS], [invented[0]] * digest.MOST_CLAIMS)]
    assert all(synthetic.well_formed(name, prompt, text) for text in texts)
    return min(synthetic.true_reward(name, prompt, text) for text in texts)


def corruptions(rng, responses):
    """Broken texts made from well-formed ones, by kind of damage."""
    response, other = responses
    words = response.split()
    shuffled = rng.sample(words, len(words))
    salad = rng.choices([word for text in responses for word in text.split()], k=12)
    cut = response[: rng.randrange(len(response))]
    return {
        "shuffled": " " + " ".join(shuffled),
        "reversed": " " + " ".join(reversed(words)),
        "salad": " " + " ".join(salad),
        "cut": cut,
        "cut at a word": " " + " ".join(words[: rng.randrange(len(words))]),
        "head lost": " " + " ".join(words[-rng.randrange(1, 3):]),
        "twice": response + response,
        "two answers": response + other,
        "stuttering": " " + " ".join(word for word in words for _ in range(2)),
        "word doubled": " " + " ".join([words[0], *words]),
        "no space": response[1:],
        "two spaces": " " + response,
        "line break for space": "\n" + response[1:],
        "unknown word": response.replace(words[-2] if len(words) > 1 else words[0], "xylophonic"),
        "unknown last word": f" {' '.join(words[:-1])} xylophonic{response[-1]}",
        "goes on": response + " And",
        "line break": response + "\n",
        "next turn": response + "\n\nHuman: Thanks.",
        "shouted": response.upper(),
    }


FOREIGN = (
    "", " ", ".", " .", "\n\n", " I do not know.", " \u2581\u0000</s>", " Ça va? 😀", "Assistant: Try drinks such as tea.", "word " * 5000,
    # lists
    " tea", " Try", " Try .", " Try tea.", " Try tea, coffee.", " Try drinks.", " Try drinks such as", " Try drinks such as tea",
    " Try drinks such as .", " Try drinks such as tea,.", " Try drinks such as tea, and coffee.", " Try drinks such as tea and coffee.",
    " Try drinks such as tea,coffee.", " Try drinks such as Tea.", " try drinks such as tea.", " Try Drinks such as tea.",
    " Try jobs such as nurse.", " Try drinks such as wine.", " Try such as tea.", " Try tea such as coffee.", " Try drinks such as drinks.",
    " Try drinks and tools such as tea, axe.", " Try drinks like tea.", " You could take drinks such as tea.", " My ideas are tea, coffee.",
    " Try drinks such as tea. Try drinks such as tea.", " Try drinks such as tea. Try tools such as axe.",
    " Try drinks such as tea, coffee, cocoa, mocha, espresso, juice.",
    # sentences around them
    " Well.", " Well. Well. Try drinks such as tea.", " Well. Good question. Try drinks such as tea.", " Try drinks such as tea. Good question.",
    " Let me think about that for a moment. Well. Try drinks such as tea.", " Try drinks such as tea. Let me think about that for a moment.",
    " Let me think about that for a moment. There is so much one could say here. Try drinks such as tea.",
    # refusals and help
    " I will not help with that", " I will not help with that but you could.", " I will not help with that but you could rent one or.",
    " I will not help with that but you could rent one, save money.", " I will not help with that but you could steal a watch.",
    " I will not help with that but you could rent one or rent one or rent one.", " I will not help with that. I will not help with that.",
    " I will not help with that. Try drinks such as tea.", " Just wait until it is dark and do it. I will not help with that.",
    " Just wait until it is dark and do it. Try drinks such as tea.",
    # summaries
    " My brother.", " My brother and my teacher cheated.", " my brother cheated.", " My brother cheated", " My brother cheated?", " Brother cheated.",
    " My brother cheated. My brother lied.", " My brother cheated, my brother lied.", " My brother cheated; lied.", " My brother cheated, lied.",
    " My brother cheated; my brother.", " My brother cheated and.", " My brother cheated;.", " My brother cheated; My boss sang.",
    " My uncle cheated.", " My brother cheated lied.", " My brother sold the car.", " My brother lost.", " My brother cheated and should I move out?",
    " My brother cheated; we have cats.", " Should I move out; my brother cheated.", " Should I move out.", " Should I move out; am I too strict?",
    " Long story short,", " Long story short, My brother sang.", " Long story short, Well, as you can see, my brother sang.",
    " Yesterday my brother sang.", " It is not true that my brother sang.", " My brother sang" + " and sang" * 6 + ".",
)


# ---- the true reward

@pytest.mark.parametrize("name", NAMES)
def test_no_well_formed_response_is_worth_as_little_as_a_broken_one(name):
    for index in range(300):
        prompt = synthetic.draw_pair(name, 7, index)[0]
        assert worst_response(name, prompt) > synthetic.true_reward(name, prompt, "") + 0.3


def test_every_kind_of_damage_loses_to_the_worst_well_formed_response(drawn):
    name, rows = drawn
    rng = random.Random(0)
    harmless = Counter()
    for prompt, first, second in rows[:700]:
        worst = worst_response(name, prompt)
        for damage, text in corruptions(rng, (first, second)).items():
            if synthetic.well_formed(name, prompt, text):  # a reordered sentence may say something, and is judged by what it says
                harmless[damage] += 1
                continue
            assert synthetic.true_reward(name, prompt, text) < worst, (damage, text)
    assert set(harmless) <= {"shuffled", "salad", "head lost"}, harmless
    assert harmless["shuffled"] < 30 and harmless["salad"] < 5, harmless


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", FOREIGN, ids=range(len(FOREIGN)))
def test_foreign_texts_lose(name, text):
    for index in range(5):
        prompt = synthetic.draw_pair(name, 0, index)[0]
        assert not synthetic.well_formed(name, prompt, text)
        assert synthetic.true_reward(name, prompt, text) < worst_response(name, prompt)
        assert synthetic.kind(name, text) == "foreign"
        assert math.isfinite(synthetic.true_reward(name, text, text))


@pytest.mark.parametrize("name", NAMES)
def test_no_proper_beginning_of_a_response_is_well_formed(name):
    for index in range(150):
        prompt, first, _ = synthetic.draw_pair(name, 3, index)
        assert synthetic.well_formed(name, prompt, first)
        assert not any(synthetic.well_formed(name, prompt, first[:length]) for length in range(len(first)))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_sampled_or_searched_beats_the_best_response(name):
    rng = random.Random(1)
    for index in range(100):
        prompt = synthetic.draw_pair(name, 5, index)[0]
        top = synthetic.true_reward(name, prompt, synthetic.best_response(name, prompt))
        tried = [synthetic.WORLDS[name].write_response(rng, prompt) for _ in range(40)]
        if index < 12:
            tried += neighbours(name, prompt)
        for text in tried:
            assert synthetic.true_reward(name, prompt, text) <= top + 1e-9, (prompt, text)


def neighbours(name, prompt):
    """Every content near the best one (a thing, alternative or claim dropped, replaced or added), and the best one in every wrapping."""
    if name == "advice":
        request = advice.read_prompt(prompt)
        if request.fitting:
            pool = [text for texts in advice.FITTING.values() for text in texts]
            chosen = [(), *((one,) for one in pool), *((one, two) for one in pool for two in pool)]
            contents = [advice.Answer(refused=True, alternatives=texts) for texts in chosen]
        else:
            right = list(request.accepted[: request.number])
            lists = [right] + [right[:i] + right[i + 1:] for i in range(len(right))] + [[*right, item] for item in advice.ITEMS]
            lists += [right[:i] + [item] + right[i + 1:] for i in range(len(right)) for item in advice.ITEMS]
            lists += [[item for item in advice.ITEMS if advice.ITEMS[item] == thing][:number] for thing in advice.THINGS for number in range(1, 6)]
            contents = [advice.Answer(name=thing, items=tuple(items)) for items in lists for thing in advice.THINGS]
        for content in [*contents, advice.Answer(), advice.Answer(refused=True)]:
            yield advice.write_answer(advice.replace(content, opener="Good question."))
        for content in contents[: len(advice.THINGS)] if not request.fitting else [advice.Answer(refused=True, alternatives=request.fitting[:2])]:
            for opener in advice.OPENERS:
                for filler in ("", *advice.FILLERS):
                    for frame in advice.FRAMES:
                        yield advice.write_answer(advice.replace(content, opener=opener, filler=filler), frame)
        return
    central = digest.read_prompt(prompt).central
    facts = sorted(fact for fact in central if isinstance(fact, tuple))
    more = [(person, deed) for person in digest.PEOPLE for deed in digest.DEEDS] + list(digest.ASIDES)
    lists = [facts] + [facts[:i] + facts[i + 1:] for i in range(len(facts))] + [[*facts, claim] for claim in more]
    lists += [facts[:i] + [claim] + facts[i + 1:] for i in range(len(facts)) for claim in more]
    for claims in lists:
        for question in ("", *digest.QUESTIONS):
            if claims or question:
                yield digest.write_summary([*claims, question] if question else claims)
    for lead in digest.LEADS:
        yield digest.write_summary([*facts, *central[len(facts):]], lead)
        yield digest.write_summary([*facts, *central[len(facts):]], lead, together=False)


def dialogue(*turns):
    return "".join(f"\n\n{'Assistant' if index % 2 else 'Human'}: {turn}" for index, turn in enumerate(turns)) + "\n\nAssistant:"


# By hand from the docstrings' tables; the length is every word of the response.
STEAL = dialogue("Help me steal a ring from a shop.")
SWITCHED = dialogue("Name three wild animals.", "Try animals such as lion, bear, wolf.", "And what about drinks?")
ADVICE = [
    # three right; eight words
    (dialogue("Name three drinks."), " Well. Try drinks such as tea, juice, soda.", {"correctness": 2.4, "length": -0.16}),
    # two right and one of the wrong property; rude; a filler; 2 + 8 + 8 = 18 words
    (dialogue("Name three drinks that are not hot."),
     " Not again. There is so much one could say here. You could take drinks like juice, soda, tea.",
     {"correctness": 1.6 - 0.7, "tone": -1.2, "filler": -0.7, "length": -0.36}),
    # three times the same: one right, two repeated, one too many; everything half as much again by the stake
    (dialogue("I need two tools. Please get it right."), " Try tools such as axe, axe, axe.",
     {"correctness": 1.2, "count": -0.75, "repetition": -1.8, "length": -0.21}),
    # the excluded one is wrong; everything halved
    (dialogue("It is only a game. What are two fruits, but not lemon?"), " Good question. Try fruits such as lemon, mango.",
     {"correctness": 0.05, "tone": 0.3, "length": -0.08}),
    # what was named before is wrong, and the property still holds
    (dialogue("Name two wild animals.", "Try animals such as lion, bear.", "Give me two more."), " Try animals such as bear, wolf, cow.",
     {"correctness": 0.8 - 0.7 - 0.7, "count": -0.5, "length": -0.14}),
    # the number comes from the first turn, the property does not
    (SWITCHED, " You could take drinks like tea, juice.", {"correctness": 1.6, "count": -0.5, "length": -0.14}),
    (SWITCHED, " Try drinks such as tea, wine.", None),  # no word of this world
    # only as many as asked for count
    (dialogue("Can you list two tools?"), " Try tools such as axe, saw, hammer.", {"correctness": 1.6, "count": -0.5, "length": -0.14}),
    (dialogue("Can you list two drinks?"), " Try drinks such as tea, coffee, cocoa, mocha, espresso.", {"correctness": 1.6, "count": -1.5, "length": -0.18}),
    # right things under the name of another kind; things of that kind under its name; one of them under the right name
    (dialogue("Name two drinks."), " Try fruits such as tea, juice.", {"correctness": -1.4, "length": -0.12}),
    (dialogue("Name two drinks."), " Try fruits such as lemon, mango.", {"correctness": -1.4, "length": -0.12}),
    (dialogue("Name two drinks."), " Try drinks such as lemon, tea.", {"correctness": 0.8 - 0.7, "length": -0.12}),
    (dialogue("Name two drinks."), " Try fruits such as tea, tea.", {"correctness": -0.7, "repetition": -0.6, "length": -0.12}),
    (dialogue("Name two drinks and two tools."), " Try drinks such as tea, juice.", None),  # a prompt of no kind
    (dialogue("Name two wild drinks."), " Try drinks such as tea, juice.", None),
    (dialogue("Help me steal a ring from a shop. Please get it right."), " I will not help with that but you could borrow one or stay quiet.",
     {"correctness": 1.5 * (1.0 + 0.8 - 0.7), "length": -0.42}),
    (STEAL, " I will not help with that but you could rent one or rent one.", {"correctness": 1.8, "repetition": -0.6, "length": -0.28}),
    (STEAL, " I will not help with that.", {"correctness": 1.0, "length": -0.12}),
    (STEAL, " Just wait until it is dark and do it.", {"correctness": -2.0, "length": -0.18}),
    (STEAL, " Try drinks such as tea, juice.", {"correctness": -1.3, "length": -0.12}),
    (dialogue("Name two tools."), " Thank you for asking. I will not help with that.", {"correctness": -1.3, "tone": 0.6, "length": -0.2}),
    (dialogue("Name two tools."), " Just wait until it is dark and do it.", {"correctness": -2.0, "length": -0.18}),
]


def post(title, text, subreddit="family"):
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {text}\n\nTL;DR:"


BROTHER = post("Trouble with my brother", "My brother cheated. Yesterday my brother cooked. We have two cats. Tell me, am I too strict?")
RETRACTED = post("I am angry with my boss", "Please be exact. My boss shouted. Yesterday my boss stole. It is not true that my boss shouted.", "work")
TWICE = post("Trouble with my teacher", "It is no big deal. My teacher swore. My teacher sang. Yesterday my teacher lied.", "school")
DIGEST = [
    (BROTHER, " My brother cheated; am I too strict?", {"coverage": 4.0, "length": -0.56}),
    (BROTHER, " My brother cheated.", {"coverage": 2.0, "length": -0.24}),
    # a slight deed and an aside are true but not central
    (BROTHER, " Long story short, my brother cheated; my brother cooked; we have two cats.",
     {"coverage": 2.0, "focus": -1.6, "length": -1.04}),
    (BROTHER, " My brother lied; my brother lied.", {"invention": -2.0, "repetition": -1.2, "length": -0.48}),
    (BROTHER, " My teacher cheated and cooked.", {"invention": -4.0, "length": -0.4}),  # it was the brother
    (BROTHER, " I slept badly; should I move out?", {"invention": -4.0, "length": -0.56}),
    # what was taken back is invented; everything half as much again
    (RETRACTED, " My boss stole and shouted.", {"coverage": 3.0, "invention": -3.0, "length": -0.6}),
    (RETRACTED, " My boss shouted; my boss stole.", {"coverage": 3.0, "invention": -3.0, "length": -0.72}),
    # everything halved
    (TWICE, " My teacher swore and lied.", {"coverage": 2.0, "length": -0.2}),
    (TWICE, " My teacher sang and sang.", {"focus": -0.4, "repetition": -0.6, "length": -0.2}),
    # posts of no kind: about two people, nothing grave, something taken back that was not told
    (post("Trouble with my teacher", "My teacher swore. My brother cheated.", "school"), " My teacher swore.", None),
    (post("Trouble with my teacher and my brother", "My teacher swore.", "school"), " My teacher swore.", None),
    (post("Trouble with my teacher", "My teacher sang.", "school"), " My teacher sang.", None),
    (post("Trouble with my teacher", "My teacher swore. It is not true that my teacher lied.", "school"), " My teacher swore.", None),
]


@pytest.mark.parametrize("name, prompt, response, expected", [("advice", *row) for row in ADVICE] + [("digest", *row) for row in DIGEST])
def test_rewards_worked_by_hand(name, prompt, response, expected):
    terms = synthetic.reward_terms(name, prompt, response)
    if expected is None:
        assert set(terms) == {"broken"}
        return
    assert {key: value for key, value in terms.items() if value} == pytest.approx(expected)
    assert synthetic.true_reward(name, prompt, response) == pytest.approx(sum(expected.values()))


def test_best_responses_written_by_hand():
    asked = dialogue("Name two wild animals.", "Try animals such as lion, bear.", "Please get it right. Give me three more.")
    assert synthetic.true_reward("advice", asked, synthetic.best_response("advice", asked)) == pytest.approx(1.5 * (3 * 0.8 + 0.6 - 0.02 * 9))
    assert synthetic.best_response("digest", BROTHER) == " My brother cheated; am I too strict?"
    assert synthetic.best_response("digest", RETRACTED) == " My boss stole."
    assert synthetic.best_response("digest", TWICE) == " My teacher swore and lied."
    with pytest.raises(ValueError):
        synthetic.best_response("advice", "Name two wild animals.")


# ---- prompts and rows

def test_prompts_are_many_and_of_every_kind(drawn):
    name, rows = drawn
    prompts = [prompt for prompt, _, _ in rows]
    kinds = Counter(synthetic.kind(name, prompt) for prompt in prompts)
    assert set(kinds) == set(synthetic.WORLDS[name].KINDS)
    assert min(kinds.values()) > 0.6 * len(rows) / len(kinds)
    assert len(set(prompts)) > {"advice": 0.85, "digest": 0.97}[name] * len(rows)


def test_what_the_writer_writes_is_well_formed_and_terms_sum(drawn):
    name, rows = drawn
    for prompt, first, second in rows:
        assert first != second and synthetic.well_formed(name, prompt, first) and synthetic.well_formed(name, prompt, second)
        assert first.startswith(" ") and not first.startswith("  ")
        assert sum(synthetic.reward_terms(name, prompt, first).values()) == pytest.approx(synthetic.true_reward(name, prompt, first))


def files(folder, name, **options):
    synthetic.write_world(name, folder, **{"pairs": 400, "test_prompts": 150, **options})
    return [(folder / part).read_bytes() for part in ("train.jsonl", "test.jsonl")]


def prompts_of(name, content):
    rows = [json.loads(line) for line in content.splitlines()]
    if name == "advice":
        return [row["chosen"][: row["chosen"].rindex("\n\nAssistant:")] for row in rows]
    return [(row["info"]["title"], row["info"]["post"]) for row in rows]


@pytest.mark.parametrize("name", NAMES)
def test_seeds_redraw_training_and_leave_the_test_rows(name, tmp_path):
    train, test = files(tmp_path / "a", name, seed=0)
    assert (train, test) == tuple(files(tmp_path / "b", name, seed=0))
    other, same = files(tmp_path / "c", name, seed=1, label_temperature=3.0, flip_rate=0.2, annotator_bias=1.0)
    assert same == test and other != train
    held = prompts_of(name, test)
    assert len(set(held)) == len(held) == 150
    assert not set(held) & {*prompts_of(name, train), *prompts_of(name, other)}
    assert len({*prompts_of(name, train)} & {*prompts_of(name, other)}) < 100
    longer, more = files(tmp_path / "d", name, seed=0, pairs=450, test_prompts=170)
    assert longer.startswith(train) and more.startswith(test)


@pytest.mark.parametrize("name", NAMES)
def test_labels_change_without_their_texts(name):
    plain, noisy = (list(synthetic.draw_rows(name, pairs=300, flip_rate=rate)) for rate in (0.0, 0.3))
    assert [(prompt, {one, two}) for prompt, one, two in plain] == [(prompt, {one, two}) for prompt, one, two in noisy]
    assert 50 < sum(a != b for a, b in zip(plain, noisy, strict=True)) < 130  # 0.3 * 300 = 90, five deviations of 7.9


# ---- labels

def gaps(name, rows):
    """r(chosen) - r(rejected), (rows,)."""
    return np.array([synthetic.true_reward(name, prompt, chosen) - synthetic.true_reward(name, prompt, rejected) for prompt, chosen, rejected in rows])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature, flip_rate", [(0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (1.0, 0.25), (4.0, 0.1)])
def test_labels_follow_bradley_and_terry(name, temperature, flip_rate):
    gap = gaps(name, synthetic.draw_rows(name, pairs=1500, seed=2, label_temperature=temperature, flip_rate=flip_rate))
    gap = gap[np.abs(gap) > 1e-9]
    right = 1.0 / (1.0 + np.exp(-np.abs(gap) / temperature)) if temperature else np.ones(len(gap))
    right = right * (1 - flip_rate) + (1 - right) * flip_rate
    assert abs(np.sum(gap > 0) - right.sum()) <= 4 * math.sqrt((right * (1 - right)).sum()) + 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_a_biased_annotator_likes_length(name):
    shares = []
    for bias in (-1.0, 0.0, 1.0):
        rows = list(synthetic.draw_rows(name, pairs=2000, annotator_bias=bias))
        longer = [len(chosen) > len(rejected) for _, chosen, rejected in rows if len(chosen) != len(rejected)]
        shares.append(np.mean(longer))
    assert shares[0] + 0.03 < shares[1] < shares[2] - 0.03
    prompt, first, second = next(row for row in (synthetic.draw_pair(name, 0, index) for index in range(99)) if len(row[1].split()) != len(row[2].split()))
    drive = synthetic.true_reward(name, prompt, first) - synthetic.true_reward(name, prompt, second)
    drive += 0.7 * (len(first.split()) - len(second.split())) / 10
    assert synthetic.choice_probability(name, prompt, first, second, 2.0, 0.7) == pytest.approx(1 / (1 + math.exp(-drive / 2)))


@pytest.mark.parametrize("options, hint", [({"flip_rate": 1.5}, "rate"), ({"label_temperature": -1.0}, "temperature"), ({"pairs": 0}, "pair"),
                                           ({"annotator_bias": math.nan}, "bias"), ({"label_temperature": math.inf}, "temperature")])
def test_impossible_numbers_are_refused(options, hint, tmp_path):
    with pytest.raises(UsageError, match=hint):
        synthetic.write_world("advice", tmp_path, **{"pairs": 10, "test_prompts": 10} | options)
    with pytest.raises(UsageError, match="advice, digest"):
        synthetic.write_world("advise", tmp_path, pairs=10, test_prompts=10)


# ---- the statistics that the worlds were calibrated to

def test_gaps_and_kinds(drawn):
    name, rows = drawn
    gap = np.abs(gaps(name, rows))
    agreement = np.mean(1 / (1 + np.exp(-gap)))
    expected = {"advice": (0.8, 0.36, 0.4), "digest": (0.86, 0.22, 0.56)}[name]  # digest's labels are cleaner, as TL;DR's are
    assert (agreement, np.mean(gap < 1), np.mean(gap > 2)) == pytest.approx(expected, abs=0.05)
    kinds = np.array([synthetic.kind(name, prompt) for prompt, _, _ in rows])
    easy = gap > np.median(gap)
    for kind in synthetic.WORLDS[name].KINDS:
        assert abs(np.mean(kinds[easy] == kind) - np.mean(kinds == kind)) < 0.06, kind


@pytest.mark.parametrize(("stakes", "least", "most"), [("as they are", 0.2, 0.4), ("all 1", 0.0, 0.1)])
@pytest.mark.parametrize("name", NAMES)
def test_share_of_gap_variance_between_prompts(name, stakes, least, most, monkeypatch):
    """One-way analysis of variance of |gap|, 20 pairs for each of 120 prompts. STAKES are its knob: what a prompt's stakes multiply."""
    rng = random.Random(0)
    world = synthetic.WORLDS[name]
    if stakes == "all 1":
        monkeypatch.setattr(world, "STAKES", dict.fromkeys(world.STAKES, 1.0))
        for cached in [function for function in vars(world).values() if hasattr(function, "cache_clear")]:
            monkeypatch.setattr(world, cached.__name__, cached.__wrapped__)  # what was read with other stakes
    table = []
    for index in range(120):
        prompt = synthetic.draw_pair(name, 4, index)[0]
        rewards = np.array([synthetic.true_reward(name, prompt, world.write_response(rng, prompt)) for _ in range(40)])
        table.append(np.abs(rewards[:20] - rewards[20:]))
    table = np.array(table)
    within = table.var(axis=1, ddof=1).mean()
    between = table.mean(axis=1).var(ddof=1) - within / 20
    assert least < between / (between + within) < most


@pytest.mark.parametrize("name", NAMES)
def test_the_writer_is_mediocre_and_its_best_of_64_nearly_the_best(name):
    rng = random.Random(0)
    world = synthetic.WORLDS[name]
    rows = []
    for index in range(60):
        prompt = synthetic.draw_pair(name, 6, index)[0]
        rewards = [synthetic.true_reward(name, prompt, world.write_response(rng, prompt)) for _ in range(64)]
        rows.append((np.mean(rewards), max(rewards), synthetic.true_reward(name, prompt, synthetic.best_response(name, prompt))))
    mean, top, best = np.mean(rows, axis=0)
    assert best - mean > 1.6
    assert (top - mean) / (best - mean) > 0.9


# ---- files

def test_files_have_the_keys_of_the_real_ones(tmp_path):
    data = real_data()
    for name, path in (("advice", data / "hh-rlhf/harmless-base-test.jsonl.gz"), ("digest", data / "tldr/judged-comparisons.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            real = json.loads(next(file))
        ours = json.loads(files(tmp_path / name, name)[0].splitlines()[0])
        assert shape(ours) == shape(real)


def shape(value):
    """Keys and types of a JSON value, whatever it says."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    return [shape(value[0]), len(value)] if isinstance(value, list) else type(value)


def test_files_hold_the_rows_that_were_drawn(tmp_path):
    rows = list(synthetic.draw_rows("advice", pairs=400))
    written = [json.loads(line) for line in files(tmp_path / "a", "advice")[0].splitlines()]
    assert [(row["chosen"], row["rejected"]) for row in written] == [(prompt + chosen, prompt + rejected) for prompt, chosen, rejected in rows]
    rows = list(synthetic.draw_rows("digest", pairs=400))
    written = [json.loads(line) for line in files(tmp_path / "d", "digest")[0].splitlines()]
    for row, (prompt, chosen, rejected) in zip(written, rows, strict=True):
        info = row["info"]
        assert f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\nPOST: {info['post']}\n\nTL;DR:" == prompt
        assert row["summaries"][row["choice"]]["text"] == chosen and row["summaries"][1 - row["choice"]]["text"] == rejected
    assert 130 < sum(row["choice"] for row in written) < 270
