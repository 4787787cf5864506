"""The world `digest`: a small, fully known stand-in for TL;DR.

A person tells of trouble with somebody; the title says with whom. What that somebody did is central, and so is a question at the end:

    SUBREDDIT: r/family
    TITLE: Trouble with my brother
    POST: Yesterday my brother broke my lamp. We have two cats. My sister sold my bike last week. I heard that my brother hid my coat.
          Correction: my brother hid my watch, not my coat. Tell me, should I move out?
    TL;DR: My brother broke my lamp and hid my watch; should I move out?

The file holds the vocabulary, the grammar of posts (`draw_prompt`, `read_prompt`), a simulated writer of varying skill
(`write_response`), the grammar of summaries (`read_response`) and the true reward, a sum of five terms (`reward_terms`):

    coverage     +0.8 for each central fact, and for the question
    invention    -0.8 for each claim or question that the post does not make (any word of it differs, or it was corrected)
    focus        -0.3 for each true claim that is not central
    repetition   -0.5 for each claim made again
    length       -0.03 for each word

and the sum is multiplied by what is at stake for the writer of the post (`STAKES`, said in the post): this constant sets how much of the
variance of gaps lies between prompts rather than between the pairs of one prompt. Everything is read from the two texts alone. A summary
that the grammar does not produce is worth `BROKEN`, which is less than the worst well-formed one. A summary is one sentence, its parts
joined by semicolons as people do in a TL;DR, so that no summary is the beginning of another and a cut one is a broken one.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from data.advice import listed

KINDS = ("plain", "pair", "question", "correction")
BROKEN = -7.0

# What is at stake multiplies the whole reward. Values nearer to 1 move gap variance from between prompts to within prompts.
STAKES = {"": 1.0, "It is no big deal.": 0.5, "Please be exact.": 2.0}

# Commonest first; a person or deed of rank k is drawn in proportion to (k + 1) ** -RARITY.
RARITY = 0.5
PEOPLE = {"brother": "family", "boss": "work", "neighbour": "home", "sister": "family", "teacher": "school", "roommate": "home"}
DEEDS = ("broke the lamp", "lost the keys", "sold the car", "burned the dinner", "hid the letter", "painted the door", "forgot the rent",
         "borrowed the tent", "insulted the guests", "woke the baby", "kicked the dog", "stole the money", "cut the tree", "flooded the kitchen",
         "read the diary", "missed the wedding")
TITLES = ("Trouble with my {}", "I am angry with my {}")
TELLINGS = ("{}.", "Yesterday {}.", "I heard that {}.")
RETRACTION = "It is not true that {}."
QUESTIONS = ("should I move out", "must I call the police", "can I ask for money", "am I too strict")
ASKING = "Tell me, {}?"
ASIDES = ("we have two cats", "the weather was bad", "I slept badly", "it was a long day")
LEADS = ("Long story short,", "Well, as you can see,")
MOST_CLAIMS = 5

COVERED, INVENTED, BESIDE, REPEATED, LENGTH = 0.8, -0.8, -0.3, -0.5, -0.03


@dataclass(frozen=True)
class Post:
    """What a prompt tells, as read from its text. A fact is (person, deed, thing), all words of the lists above."""

    kind: str
    stake: float
    people: tuple  # whom the title names
    facts: tuple  # true ones, in the order told
    void: tuple  # those that were corrected
    asides: tuple
    question: str  # or ""

    @property
    def central(self):
        """What a good summary says: the facts about the people of the title, and the question."""
        return tuple(fact for fact in self.facts if fact[0] in self.people) + ((self.question,) if self.question else ())


# ---------------------------------------------------------------- prompts

def draw_prompt(rng):
    """One prompt in the form that `examples` gives to TL;DR rows."""
    kind = rng.choice(KINDS)
    people = _by_rarity(rng, tuple(PEOPLE), 5)
    named, others = (people[:2], people[2:]) if kind == "pair" else (people[:1], people[1:])
    things = iter(_by_rarity(rng, THINGS, 8))
    counts = {"plain": (2, 3, 4), "pair": (1, 2), "question": (1, 2, 3), "correction": (2, 3)}[kind]
    facts = [(person, rng.choice(DEEDS), next(things)) for person in named for _ in range(rng.choice(counts))]
    facts += [(rng.choice(others), rng.choice(DEEDS), next(things)) for _ in range(rng.choice((0, 1, 2)))]
    told = [rng.choice(TELLINGS).format(_say(fact)) for fact in facts]
    told += [f"{aside}." for aside in rng.sample(ASIDES, rng.choice((0, 1, 1, 2)))]
    rng.shuffle(told)
    if kind == "correction":
        person, deed, thing = facts[0]
        told.append(f"Correction: {_say((person, deed, next(things)))}, not my {thing}.")
    if kind == "question":
        told.append(rng.choice(ASKINGS).format(rng.choice(QUESTIONS)))
    level = rng.choice(sorted(set(STAKES.values())))
    stake = rng.choice([phrase for phrase, value in STAKES.items() if value == level])
    told = [stake] * bool(stake) + told
    title = rng.choice(TITLES).format(" and my ".join(named))
    post = " ".join(_capital(sentence) for sentence in told)
    return f"SUBREDDIT: r/{PEOPLE[named[0]]}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def _by_rarity(rng, words, count):
    """`count` different words, commoner ones more often."""
    keys = {word: rng.random() ** ((rank + 1) ** RARITY) for rank, word in enumerate(words)}
    return sorted(words, key=keys.get, reverse=True)[:count]


def _say(fact):
    return "my {} {} my {}".format(*fact)


def _capital(text):
    return text[0].upper() + text[1:]


_PERSON, _DEED, _THING = (f"(?:{'|'.join(words)})" for words in (PEOPLE, DEEDS, THINGS))
_FACT = rf"my ({_PERSON}) ({_DEED}) my ({_THING})"
_PROMPT = re.compile(r"SUBREDDIT: r/(\w+)\n\nTITLE: ([^\n]+)\n\nPOST: ([^\n]+)\n\nTL;DR:")
_TITLE = re.compile("|".join(title.format(f"({_PERSON})(?: and my ({_PERSON}))?") for title in TITLES))
_SENTENCE = re.compile(r"[^.?]+[.?]")
_CORRECTION = re.compile(rf"Correction: {_FACT}, not my ({_THING})\.")
_TELLING = re.compile("|".join(_capital(re.escape(telling).replace(r"\{\}", _FACT)) for telling in TELLINGS if telling != "{}.")
                      + "|M" + _FACT[1:] + r"\.")


@lru_cache(maxsize=4096)
def read_prompt(prompt):
    """The `Post` in a prompt's text, or None where the text is not one of this world's prompts."""
    whole = _PROMPT.fullmatch(prompt)
    title = whole and _TITLE.fullmatch(whole[2])
    if not title:
        return None
    people = tuple(filter(None, title.groups()))
    stake, facts, void, asides, question = 1.0, [], [], [], ""
    sentences = [sentence.strip() for sentence in _SENTENCE.findall(whole[3])]
    if whole[1] != PEOPLE[people[0]] or " ".join(sentences) != whole[3]:
        return None
    for sentence in sentences:
        correction, telling = _CORRECTION.fullmatch(sentence), _TELLING.fullmatch(sentence)
        if correction:
            *fact, before = correction.groups()
            old = (fact[0], fact[1], before)
            if old not in facts:
                return None
            facts[facts.index(old)] = tuple(fact)
            void.append(old)
        elif telling:
            facts.append(tuple(filter(None, telling.groups())))
        elif sentence in STAKES:
            stake = STAKES[sentence]
        elif sentence[-1] == "?" and sentence in [asking.format(text) for asking in ASKINGS for text in QUESTIONS]:
            question = next(text for text in QUESTIONS if text in sentence)
        elif sentence in [_capital(aside) + "." for aside in ASIDES]:
            asides.append(next(aside for aside in ASIDES if _capital(aside) + "." == sentence))
        else:
            return None
    kind = "pair" if len(people) == 2 else "correction" if void else "question" if question else "plain"
    post = Post(kind, stake, people, tuple(facts), tuple(void), tuple(asides), question)
    return post if post.central else None


def kind(prompt):
    """One of `KINDS`, or "foreign"."""
    post = read_prompt(prompt)
    return post.kind if post else "foreign"


# ---------------------------------------------------------------- responses

def write_summary(claims, lead="", together=True):
    """The text of a summary, with its leading space. A claim is a fact (tuple), an aside or, last, a question (strings).

    `together` joins neighbouring facts about one person under one subject, which is shorter."""
    parts, deeds, who = [], [], None
    for claim in claims:
        if isinstance(claim, tuple):
            if deeds and not (together and claim[0] == who):
                parts.append(f"my {who} {listed(deeds)}")
                deeds = []
            who = claim[0]
            deeds.append(f"{claim[1]} my {claim[2]}")
            continue
        if deeds:
            parts.append(f"my {who} {listed(deeds)}")
            deeds = []
        parts.append(claim)
    if deeds:
        parts.append(f"my {who} {listed(deeds)}")
    text = "; ".join(parts) + ("?" if claims[-1] in QUESTIONS else ".")
    return f" {lead} {text}" if lead else " " + _capital(text)


_DONE = rf"{_DEED} my {_THING}"
_PART = rf"(?:my {_PERSON} {_DONE}(?:(?:, {_DONE})* and {_DONE})?|{'|'.join(ASIDES)})"
_ASK = f"(?:{'|'.join(QUESTIONS)})"
_SUMMARY = re.compile(rf"({_PART}(?:; {_PART})*\.|(?:{_PART}; )*{_ASK}\?)")


@lru_cache(maxsize=4096)
def read_response(response):
    """The claims of a summary and its lead-in, or None where the grammar does not produce that text."""
    lead = next((lead for lead in LEADS if response.startswith(f" {lead} ")), "")
    text = response[len(lead) + 2:] if lead else response[1:]
    if not lead and text:
        if text[0].islower() or response[0] != " ":
            return None
        text = text if text.startswith("I ") else text[0].lower() + text[1:]
    if not _SUMMARY.fullmatch(text):
        return None
    claims = []
    for part in text[:-1].split("; "):
        found = re.match(f"my ({_PERSON}) ", part)
        if found:
            claims += [(found[1], deed, thing) for deed, thing in re.findall(f"({_DEED}) my ({_THING})", part)]
        else:
            claims.append(part)
    return (tuple(claims), lead) if len([claim for claim in claims if claim not in QUESTIONS]) <= MOST_CLAIMS else None


def write_response(rng, prompt):
    """A summary by a simulated writer: care (what is left out or made up) and thrift (what is said needlessly) vary independently."""
    post = read_prompt(prompt)
    care, thrift = rng.random(), rng.random()
    claims = []
    for fact in post.facts:
        wanted = rng.random() < (0.45 + 0.4 * care if fact[0] in post.people else 0.6 * (1 - thrift))
        if wanted:
            claims.append(_blur(rng, post, fact) if rng.random() < 0.1 + 0.3 * (1 - care) else fact)
    claims += [fact for fact in post.void if rng.random() < 0.7 * (1 - care)]
    claims += [aside for aside in post.asides if rng.random() < 0.5 * (1 - thrift)]
    if rng.random() < 0.2 * (1 - care):
        claims.append(_blur(rng, post, rng.choice(post.facts)))
    if claims and rng.random() < 0.25 * (1 - thrift):
        claims.append(rng.choice(claims))
    claims = claims[:MOST_CLAIMS] or [rng.choice(post.facts)]
    together = rng.random() < 0.3 + 0.6 * thrift
    if together:  # facts about one person side by side
        first = {}
        claims.sort(key=lambda claim: first.setdefault(claim[0] if isinstance(claim, tuple) else claim, len(first)))
    if rng.random() < (0.5 + 0.45 * care if post.question else 0.15 * (1 - care)):
        claims.append(post.question if post.question and rng.random() < 0.7 + 0.3 * care else rng.choice(QUESTIONS))
    return write_summary(claims, rng.choice(LEADS) if rng.random() < 0.6 * (1 - thrift) else "", together)


def _blur(rng, post, fact):
    """A fact misremembered: another person of the post, another deed, or another thing."""
    person, deed, thing = fact
    which = rng.randrange(3)
    if which == 0:
        return rng.choice([name for name in PEOPLE if name != person]), deed, thing
    if which == 1:
        return person, rng.choice([word for word in DEEDS if word != deed]), thing
    return person, deed, rng.choice([word for word in THINGS if word != thing])


# ---------------------------------------------------------------- the true reward

def reward_terms(prompt, response):
    """The terms of the true reward by name; they sum to it. A broken or foreign text has the one term "broken"."""
    post, summary = read_prompt(prompt), read_response(response)
    if post is None or summary is None:
        return {"broken": BROKEN * (post.stake if post else 1.0)}
    claims = summary[0]
    central, true = set(post.central), {*post.facts, *post.asides, *post.central}
    said = set(claims)
    terms = {
        "coverage": COVERED * len(said & central),
        "invention": INVENTED * len(said - true),
        "focus": BESIDE * len(said & true - central),
        "repetition": REPEATED * (len(claims) - len(said)),
        "length": LENGTH * len(response.split()),
    }
    return {name: post.stake * value for name, value in terms.items()}


def best_response(prompt):
    """A summary of the greatest true reward: every central fact, the question, nothing else, one subject for each person."""
    post = read_prompt(prompt)
    if post is None:
        raise ValueError(f"not a prompt of this world: {prompt!r}")
    order = {person: place for place, person in enumerate(post.people)}
    facts = sorted((claim for claim in post.central if isinstance(claim, tuple)), key=lambda fact: order[fact[0]])
    return write_summary([*facts, *(claim for claim in post.central if not isinstance(claim, tuple))])
