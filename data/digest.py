"""The world `digest`: a small, fully known stand-in for TL;DR.

A person tells of trouble with somebody. The grave deeds are central, the slight ones are not; a question at the end is central too:

    SUBREDDIT: r/family
    TITLE: Trouble with my brother
    POST: Yesterday my brother lied. We have two cats. My brother sang. My brother cheated. Yesterday my brother stole.
          It is not true that my brother lied. Tell me, should I move out?
    TL;DR: My brother cheated and stole; should I move out?

The file holds the vocabulary, the grammar of posts (`draw_prompt`, `read_prompt`), a simulated writer of varying skill
(`write_response`), the grammar of summaries (`read_response`) and the true reward, a sum of five terms (`reward_terms`):

    coverage     +2.0 for each central fact, and for the question
    invention    -2.0 for each claim or question that the post does not make, or takes back
    focus        -0.8 for each true claim that is not central
    repetition   -1.2 for each claim made again
    length       -0.08 for each word

and the sum is multiplied by what is at stake for the writer of the post (`STAKES`, said in the post): this constant sets how much of the
variance of gaps lies between prompts rather than between the pairs of one prompt. Everything is read from the two texts alone. A summary
that the grammar does not produce is worth `BROKEN`, times the stake, which is less than the worst well-formed one. A summary is one
sentence, its parts joined by semicolons as in many a TL;DR, so that no summary is the beginning of another and a cut one is broken.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

KINDS = ("plain", "question", "retraction")
BROKEN = -20.0

# What is at stake multiplies the whole reward. Values nearer to 1 move gap variance from between prompts to within prompts.
STAKES = {"": 1.0, "It is no big deal.": 0.5, "Please be exact.": 1.5}

# Commonest first; a person or grave deed of rank k is drawn in proportion to (k + 1) ** -RARITY.
RARITY = 0.5
PEOPLE = {"brother": "family", "boss": "work", "neighbour": "home", "teacher": "school"}
GRAVE = ("lied", "cheated", "shouted", "stole", "vanished", "swore")
SLIGHT = ("sang", "cooked", "slept", "danced")
ABSURD = ("exploded", "melted", "flew", "froze")  # no post tells of these, a careless summary may
DEEDS = GRAVE + SLIGHT + ABSURD
TITLES = ("Trouble with my {}", "I am angry with my {}")
TELLINGS = ("{}.", "Yesterday {}.")
RETRACTION = "It is not true that {}."
QUESTIONS = ("should I move out", "must I call the police", "can I ask for money", "am I too strict")
ASKING = "Tell me, {}?"
ASIDES = ("we have two cats", "the weather was bad", "I slept badly", "it was a long day")
LEADS = ("Long story short,", "Well, as you can see,")
MOST_CLAIMS = 6

COVERED, INVENTED, BESIDE, REPEATED, LENGTH = 2.0, -2.0, -0.8, -1.2, -0.08


@dataclass(frozen=True)
class Post:
    """What a prompt tells, as read from its text. A fact is (person, deed)."""

    kind: str
    stake: float
    person: str  # whom the title names
    facts: tuple  # true ones, in the order told
    void: tuple  # those that were taken back
    asides: tuple
    question: str  # or ""

    @property
    def central(self):
        """What a good summary says: the grave deeds, and the question."""
        return tuple(fact for fact in self.facts if fact[1] in GRAVE) + ((self.question,) if self.question else ())


# ---------------------------------------------------------------- prompts

def draw_prompt(rng):
    """One prompt in the form that `examples` gives to TL;DR rows."""
    kind = rng.choice(KINDS)
    person = _by_rarity(rng, tuple(PEOPLE), 1)[0]
    counts = {"plain": (1, 2, 3), "question": (1, 2), "retraction": (2, 3)}[kind]
    grave = [(person, deed) for deed in _by_rarity(rng, GRAVE, rng.choice(counts))]
    facts = grave + [(person, deed) for deed in rng.sample(SLIGHT, rng.choice((0, 1, 2)))]
    void = grave[0]
    told = [rng.choice(TELLINGS).format("my {} {}".format(*fact)) for fact in facts]
    told += [f"{rng.choice(ASIDES)}."] * rng.choice((0, 1))
    rng.shuffle(told)
    stake = rng.choice(list(STAKES))
    told = [stake] * bool(stake) + told
    if kind == "retraction":
        told.append(RETRACTION.format("my {} {}".format(*void)))
    if kind == "question":
        told.append(ASKING.format(rng.choice(QUESTIONS)))
    title = rng.choice(TITLES).format(person)
    return f"SUBREDDIT: r/{PEOPLE[person]}\n\nTITLE: {title}\n\nPOST: {' '.join(map(_capital, told))}\n\nTL;DR:"


def _by_rarity(rng, words, count):
    """`count` different words, commoner ones more often [Efraimidis and Spirakis 2006]."""
    keys = {word: rng.random() ** ((rank + 1) ** RARITY) for rank, word in enumerate(words)}
    return sorted(words, key=keys.get, reverse=True)[:count]


def _capital(text):
    return text[0].upper() + text[1:]


_PERSON, _DEED = (f"({'|'.join(words)})" for words in (PEOPLE, DEEDS))
_FACT = f"my {_PERSON} {_DEED}"
_PROMPT = re.compile(r"SUBREDDIT: r/(\w+)\n\nTITLE: ([^\n]+)\n\nPOST: ([^\n]+)\n\nTL;DR:")
_TITLE = re.compile("|".join(title.format(_PERSON) for title in TITLES))
_SENTENCE = re.compile(r"[^.?]+[.?]")
_TELLINGS = [re.compile(_capital(telling.format(_FACT)[:-1]) + r"\.") for telling in TELLINGS]
_RETRACTION = re.compile(RETRACTION.format(_FACT)[:-1] + r"\.")
_ASKINGS = {ASKING.format(question): question for question in QUESTIONS}
_ASIDES = {_capital(aside) + ".": aside for aside in ASIDES}


@lru_cache(maxsize=4096)
def read_prompt(prompt):
    """The `Post` in a prompt's text, or None where the text is not one of this world's prompts."""
    whole = _PROMPT.fullmatch(prompt)
    title = whole and _TITLE.fullmatch(whole[2])
    if not title:
        return None
    person = next(filter(None, title.groups()))
    stake, facts, void, asides, question = 1.0, [], [], [], ""
    sentences = [sentence.strip() for sentence in _SENTENCE.findall(whole[3])]
    if whole[1] != PEOPLE[person] or " ".join(sentences) != whole[3]:
        return None
    for sentence in sentences:
        telling = next(filter(None, (shape.fullmatch(sentence) for shape in _TELLINGS)), None)
        taken_back = _RETRACTION.fullmatch(sentence)
        if telling and telling[1] == person and telling.groups() not in facts:
            facts.append(telling.groups())
        elif taken_back and taken_back.groups() in facts:
            facts.remove(taken_back.groups())
            void.append(taken_back.groups())
        elif sentence in STAKES:
            stake = STAKES[sentence]
        elif sentence in _ASKINGS:
            question = _ASKINGS[sentence]
        elif sentence in _ASIDES:
            asides.append(_ASIDES[sentence])
        else:
            return None
    kind = "retraction" if void else "question" if question else "plain"
    post = Post(kind, stake, person, tuple(facts), tuple(void), tuple(asides), question)
    return post if 0 < len(post.central) <= MOST_CLAIMS else None


def kind(prompt):
    """One of `KINDS`, or "foreign"."""
    post = read_prompt(prompt)
    return post.kind if post else "foreign"


# ---------------------------------------------------------------- responses

def write_summary(claims, lead="", together=True):
    """The text of a summary, with its leading space. A claim is a fact (tuple), an aside or, last, a question (strings).

    `together` puts two neighbouring facts about one person under one subject, which is shorter."""
    parts, subject = [], ""
    for claim in claims:
        if isinstance(claim, str):
            parts, subject = [*parts, claim], ""
        elif together and subject == claim[0]:
            parts[-1] += f" and {claim[1]}"
        else:
            parts, subject = [*parts, "my {} {}".format(*claim)], claim[0]
    text = "; ".join(parts) + ("?" if claims[-1] in QUESTIONS else ".")
    return f" {lead} {text}" if lead else " " + _capital(text)


_PART = rf"(?:my (?:{'|'.join(PEOPLE)}) (?:{'|'.join(DEEDS)})(?: and (?:{'|'.join(DEEDS)}))*|{'|'.join(ASIDES)})"
_SUMMARY = re.compile(rf"{_PART}(?:; {_PART})*\.|(?:{_PART}; )*(?:{'|'.join(QUESTIONS)})\?")


@lru_cache(maxsize=4096)
def read_response(response):
    """The claims of a summary, or None where the grammar does not produce that text."""
    lead = next((lead for lead in LEADS if response.startswith(f" {lead} ")), "")
    text = response[len(lead) + 2:] if lead else response[1:]
    if not lead:
        if response[:1] != " " or not text or text[0].islower():
            return None
        text = text if text.startswith("I ") else text[0].lower() + text[1:]
    if not _SUMMARY.fullmatch(text):
        return None
    claims = []
    for part in text[:-1].split("; "):
        fact = re.match(f"my {_PERSON} (.+)", part)
        claims += [(fact[1], deed) for deed in fact[2].split(" and ")] if fact else [part]
    return tuple(claims) if sum(claim not in QUESTIONS for claim in claims) <= MOST_CLAIMS else None


def write_response(rng, prompt):
    """A summary by a simulated writer: care (what is left out, mixed up or made up) and thrift (what is said needlessly) vary independently."""
    post = read_prompt(prompt)
    clumsy, wordy = rng.random(), rng.random()
    grave = rng.random() > 0.5 * clumsy  # or else takes trifles for what matters
    central = [fact for fact in post.facts if (fact[1] in GRAVE) == grave]
    astray = rng.choice(list(PEOPLE)) if rng.random() < 0.5 * clumsy else None  # takes somebody else for the one it is about
    claims = []
    for fact in post.facts:
        if rng.random() < (1.0 - 0.4 * clumsy if fact in central else 0.4 * wordy):
            claims.append((astray or fact[0], rng.choice(DEEDS + 5 * ABSURD) if rng.random() < 0.05 + 0.4 * clumsy else fact[1]))
    claims += [fact for fact in post.void if rng.random() < 0.8 * clumsy]
    claims += [aside for aside in post.asides if rng.random() < 0.6 * wordy]
    if claims and rng.random() < 0.4 * wordy:
        claims.append(rng.choice(claims))
    claims = claims[:MOST_CLAIMS] or [rng.choice(post.facts or post.asides or post.void)]
    if rng.random() < (1.0 - 0.5 * clumsy if post.question else 0.2 * clumsy):
        claims.append(post.question if post.question and rng.random() < 1.0 - 0.3 * clumsy else rng.choice(QUESTIONS))
    return write_summary(claims, rng.choice(LEADS) if rng.random() < 0.6 * wordy else "", together=rng.random() < 1.0 - 0.7 * wordy)


# ---------------------------------------------------------------- the true reward

def reward_terms(prompt, response):
    """The terms of the true reward by name; they sum to it. A broken or foreign text has the one term "broken"."""
    post, claims = read_prompt(prompt), read_response(response)
    if post is None or claims is None:
        return {"broken": BROKEN * (post.stake if post else 1.0)}
    said, central = set(claims), set(post.central)
    true = central.union(post.facts, post.asides)
    terms = {
        "coverage": COVERED * len(said & central),
        "invention": INVENTED * len(said - true),
        "focus": BESIDE * len(said & true - central),
        "repetition": REPEATED * (len(claims) - len(said)),
        "length": LENGTH * len(response.split()),
    }
    return {name: post.stake * value for name, value in terms.items()}


def best_response(prompt):
    """A summary of the greatest true reward: every central fact and the question, nothing else, under one subject."""
    post = read_prompt(prompt)
    if post is None:
        raise ValueError(f"not a prompt of this world: {prompt!r}")
    return write_summary(post.central)
