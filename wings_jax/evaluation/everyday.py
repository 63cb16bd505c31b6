"""Multiple-choice questions about common knowledge, from tables that ship with the package.

A table has a question and, for every subject, the right answer. Wrong choices are drawn from the
other answers of the same table, so no answer in a table may also be right for another row of it.
The question is complete without the choices, each of which is a possible answer (an order names
them in its question). `choice_file` reads a user's questions.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence

CHOICES = 4  # of every question
EACH = 6  # questions of an order
ALL, PER_TOKEN = "all questions", "all questions, per token"  # rows of reports, so not kinds


@dataclasses.dataclass(frozen=True)
class ChoiceQuestion:
    """One multiple-choice question."""

    # Identifier in reports and messages, unique in a set of questions.
    id: str
    # Row of the report that it counts in, "" for none but the total.
    kind: str
    # The question, complete without the choices.
    question: str
    # Possible answers, all different.
    choices: tuple[str, ...]
    # Index of the right choice.
    answer: int


# Kind -> (question with {} for the subject, "subject: right answer; ...").
TABLES: Mapping[str, tuple[str, str]] = {
    "capitals": (
        "What is the capital of {}? Answer with its name only.",
        """
        Australia: Canberra; Austria: Vienna; Canada: Ottawa; China: Beijing; Cuba: Havana;
        Egypt: Cairo; England: London; Finland: Helsinki; France: Paris; Germany: Berlin;
        Greece: Athens; Hungary: Budapest; Ireland: Dublin; Italy: Rome; Japan: Tokyo; Kenya:
        Nairobi; Norway: Oslo; Peru: Lima; Poland: Warsaw; Portugal: Lisbon; Russia: Moscow;
        Spain: Madrid; Sweden: Stockholm; Thailand: Bangkok
        """,
    ),
    "languages": (
        "Which language do most people in {} speak at home? Answer with one word.",
        """
        Australia: English; Austria: German; Brazil: Portuguese; Egypt: Arabic; France: French;
        Greece: Greek; Italy: Italian; Japan: Japanese; Mexico: Spanish; Poland: Polish; Russia:
        Russian; Sweden: Swedish; Turkey: Turkish
        """,
    ),
    "continents": (
        "On which continent is {}? Answer with its name only.",
        """
        Brazil: South America; Canada: North America; Germany: Europe; India: Asia; Kenya:
        Africa; Mexico: North America; Nigeria: Africa; Peru: South America; Poland: Europe;
        Sweden: Europe; Uganda: Africa; Vietnam: Asia
        """,
    ),
    "opposites": (
        'What is the opposite of "{}"? Answer with one word.',
        """
        alive: dead; asleep: awake; big: small; black: white; buy: sell; clean: dirty; day:
        night; far: near; fast: slow; first: last; friend: enemy; full: empty; happy: sad; high:
        low; hot: cold; inside: outside; left: right; loud: quiet; love: hate; north: south;
        open: closed; push: pull; remember: forget; rich: poor; strong: weak; summer: winter;
        thick: thin; true: false; up: down; war: peace; wet: dry; win: lose; young: old
        """,
    ),
    "young animals": (
        "What is a baby {} called? Answer with one word.",
        """
        bear: cub; cat: kitten; cow: calf; dog: puppy; duck: duckling; eagle: eaglet; frog:
        tadpole; goat: kid; goose: gosling; horse: foal; kangaroo: joey; owl: owlet; pig:
        piglet; sheep: lamb; swan: cygnet
        """,
    ),
    "sounds": (
        "What sound does {} make? Answer with one word.",
        """
        a bee: buzz; a cat: meow; a cow: moo; a dog: bark; a donkey: bray; a duck: quack; a frog:
        croak; a horse: neigh; a lion: roar; an owl: hoot; a pig: oink; a pigeon: coo; a sheep:
        baa; a turkey: gobble
        """,
    ),
    "colours": (
        "What colour {}? Answer with one word.",
        """
        do black and white paint make together: grey; do blue and yellow paint make together:
        green; do red and blue paint make together: purple; do red and white paint make
        together: pink; do red and yellow paint make together: orange; is a clear sky at noon:
        blue; is a raven: black; is a ripe lemon: yellow; is a ripe strawberry: red; is a ruby:
        red; is a stop sign: red; is an emerald: green; is fresh grass: green; is milk: white;
        is milk chocolate: brown; is snow: white; are most carrots: orange
        """,
    ),
    "made of": (
        "What {} made from? Answer with one word.",
        """
        are French fries: potatoes; are paraffin candles: wax; are most car tyres: rubber; are
        pickles: cucumbers; are raisins: grapes; is a snowman: snow; is a warm winter sweater:
        wool; is butter: milk; is cheese: milk; is glass: sand; is ketchup:
        tomatoes; is paper: wood; is popcorn: corn; is tofu: soybeans; is wine: grapes
        """,
    ),
    "tools": (
        "What do you use to {}? Answer with one word.",
        """
        boil water for tea: kettle; brush your teeth: toothbrush; cut paper: scissors; cut
        planks: saw; dig a hole in the garden: shovel; drive a nail into a wall: hammer; dry
        yourself after a bath: towel; eat soup: spoon; find out the temperature: thermometer;
        find out where north is: compass; keep off the rain: umbrella; look at bacteria:
        microscope; look at distant stars: telescope; see what time it is: clock; sew on a
        button: needle; sweep the floor: broom; take a photograph: camera; unlock a door: key;
        weigh flour: scale; write on a blackboard: chalk
        """,
    ),
    "months": (
        "Which month comes right after {}? Answer with one word.",
        """
        January: February; February: March; March: April; April: May; May: June; June: July;
        July: August; August: September; September: October; October: November; November:
        December; December: January
        """,
    ),
    "weekdays": (
        "Which day of the week comes right after {}? Answer with one word.",
        """
        Monday: Tuesday; Tuesday: Wednesday; Wednesday: Thursday; Thursday: Friday; Friday:
        Saturday; Saturday: Sunday; Sunday: Monday
        """,
    ),
    "plurals": (
        'What is the plural of "{}"? Answer with one word.',
        """
        baby: babies; box: boxes; child: children; city: cities; foot: feet; goose: geese;
        knife: knives; leaf: leaves; loaf: loaves; man: men; mouse: mice; ox: oxen; tooth:
        teeth; wife: wives; wolf: wolves; woman: women
        """,
    ),
    "past tense": (
        'What is the past tense of "{}"? Answer with one word.',
        """
        begin: began; break: broke; buy: bought; catch: caught; come: came; drink: drank; eat:
        ate; fly: flew; give: gave; go: went; know: knew; make: made; run: ran; see: saw; sing:
        sang; sleep: slept; speak: spoke; swim: swam; take: took; teach: taught; think: thought;
        write: wrote
        """,
    ),
    "arithmetic": (
        "What is {}? Answer with the number only.",
        """
        2 plus 2: 4; 3 plus 4: 7; 5 plus 4: 9; 6 plus 5: 11; 8 plus 7: 15; 9 plus 9: 18; 10 plus
        3: 13; 20 plus 5: 25; 5 minus 3: 2; 9 minus 4: 5; 10 minus 7: 3; 12 minus 6: 6; 15 minus
        7: 8; 20 minus 1: 19; 2 times 5: 10; 3 times 4: 12; 4 times 5: 20; 5 times 6: 30; 6
        times 7: 42; 10 times 10: 100
        """,
    ),
    "how many": (
        "How many {}? Answer with a number in words.",
        """
        cents are in a dollar: one hundred; days are in a week: seven; eyes does a healthy
        person have: two; hours are in a day: twenty-four; legs does a dog have: four; legs does
        a spider have: eight; legs does an insect have: six; letters are in the English
        alphabet: twenty-six; minutes are in an hour: sixty; months are in a year: twelve; noses
        does a face have: one; planets go around the sun: eight; sides does a pentagon have:
        five; sides does a square have: four; sides does a triangle have: three; toes are on one
        foot: five; wheels does a bicycle have: two; years are in a century: one hundred; years
        are in a decade: ten
        """,
    ),
    "categories": (
        "What kind of thing is {}? Answer with one or two words.",
        """
        a bus: vehicle; a carrot: vegetable; a chair: furniture; a cobra: snake; a hammer: tool;
        a salmon: fish; a shirt: clothing; a sparrow: bird; a tulip: flower; a violin: musical
        instrument; aluminium: metal; an ant: insect; an oak: tree; Europe: continent; French:
        language; Mars: planet; oxygen: gas; tennis: sport; the Nile: river; the Pacific: ocean;
        a circle: shape; a strawberry: fruit
        """,
    ),
    "jobs": (
        "Who {}? Answer with one word.",
        """
        bakes bread: baker; catches fish for a living: fisherman; cuts men's hair: barber; fixes
        teeth: dentist; flies airplanes: pilot; grows crops: farmer; puts out fires:
        firefighter; repairs car engines: mechanic; serves the food in a restaurant: waiter;
        sews suits: tailor; teaches children at school: teacher; writes novels: author
        """,
    ),
}

# Kind -> (question with {} for the choices, subjects in ascending order: the last one named in
# the question is the right answer).
ORDERS: Mapping[str, tuple[str, Sequence[str]]] = {
    "largest animal": (
        "Which animal is the largest: {}? Answer with its name only.",
        ("an ant", "a mouse", "a cat", "a sheep", "a horse", "an elephant", "a blue whale"),
    ),
    "heaviest thing": (
        "Which is the heaviest: {}? Answer with its name only.",
        ("a feather", "an apple", "a chair", "a piano", "a car", "a train", "a mountain"),
    ),
    "fastest thing": (
        "Which is the fastest: {}? Answer with its name only.",
        ("a snail", "a tortoise", "a runner", "a racing car", "an airliner", "a moon rocket"),
    ),
    "longest time": (
        "Which is the longest time: {}? Answer with its name only.",
        ("a second", "a minute", "an hour", "a day", "a week", "a month", "a year"),
    ),
    "largest number": (
        "Which number is the largest: {}? Answer with the number only.",
        ("3", "8", "14", "27", "52", "90", "145"),
    ),
}


def answers_by_subject(kind: str) -> dict[str, str]:
    """Returns the table of a kind: subject -> right answer.

    >>> answers_by_subject("weekdays")["Monday"]
    'Tuesday'
    """
    rows = (row.split(":") for row in TABLES[kind][1].split(";"))
    return {" ".join(subject.split()): " ".join(answer.split()) for subject, answer in rows}


def embedded_questions() -> list[ChoiceQuestion]:
    """Returns the questions of all tables and orders, the same ones at every call."""
    questions = [question for kind in TABLES for question in _table_questions(kind)]
    return questions + [question for kind in ORDERS for question in _order_questions(kind)]


def _table_questions(kind: str) -> Iterator[ChoiceQuestion]:
    template, answers = TABLES[kind][0], answers_by_subject(kind)
    for number, (subject, answer) in enumerate(answers.items()):
        # A generator per question: other questions of a table do not depend on it.
        rng = random.Random(f"{kind}-{number}")
        wrong_answers = rng.sample(sorted({*answers.values()} - {answer}), CHOICES - 1)
        yield _question(rng, kind, number, template.format(subject), [*wrong_answers, answer])


def _order_questions(kind: str) -> Iterator[ChoiceQuestion]:
    template, ascending = ORDERS[kind]
    rng = random.Random(kind)
    combinations = rng.sample(list(itertools.combinations(ascending, CHOICES)), EACH)
    for number, subjects in enumerate(combinations):
        # The question names them in a random order, the answer is the last of the ascending one.
        *first, last = rng.sample(subjects, CHOICES)
        question = template.format(f"{', '.join(first)} or {last}")
        yield _question(rng, kind, number, question, subjects)


def _question(
    rng: random.Random, kind: str, number: int, question: str, choices: Sequence[str]
) -> ChoiceQuestion:
    """Returns the question with its choices shuffled; the last of `choices` is the right one."""
    shuffled = rng.sample(choices, len(choices))
    answer = shuffled.index(choices[-1])
    return ChoiceQuestion(f"{kind}-{number}", kind, question, tuple(shuffled), answer)
