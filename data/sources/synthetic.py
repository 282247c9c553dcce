"""A made-up shop whose relevance labels follow from what the query asks and what the ad offers.

The embedded default: nothing is downloaded, and every label has a reason. Lexical overlap alone does not decide: a case
for a phone shares its words with the phone and is only related, a "settee" answers a query for a "sofa" without a common
word, and a blue kettle shares brand and colour with a blue tent. Licence: the project's own.

Grades: 3 = the product asked for with every attribute asked for; 2 = the product, but an attribute differs; 1 = a
substitute, or an accessory of it; 0 = something else.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from data.contracts import Grade, GradeScale

LICENCE = "the project's own, Apache-2.0"
GRADING = "a grade follows from what the query asks and what the ad offers"
SCALE = GradeScale(
    grades=(
        Grade(name="irrelevant", definition="the ad offers something else than the query asks for."),
        Grade(name="related", definition="the ad offers a substitute for, or an accessory of, the product asked for."),
        Grade(name="partial", definition="the ad offers the product asked for, but an attribute asked for differs."),
        Grade(name="exact", definition="the ad offers the product asked for with every attribute asked for."),
    ),
    relevant_from=2,
)

# How often each grade is drawn, from 0 to 3.
GRADE_SHARES = (0.26, 0.24, 0.24, 0.26)
MISSPELT_SHARE = 0.06

COLOURS = ("black", "white", "red", "blue", "green")
BRANDS = {
    "sport": ("Velora", "Kestrel", "Northpeak"),
    "home": ("Hearthly", "Maplewood", "Casa Nova"),
    "tech": ("Zenix", "Orbitel", "Pixon"),
    "garden": ("Greenfold", "Rootwell", "Terra"),
}
FILLERS = ("new", "sale", "free delivery", "best price", "2026 model", "gift idea", "in stock", "limited offer")
SENTENCES = (
    "Order today and get it within two days.",
    "Rated highly by thousands of buyers.",
    "Thirty days to return it.",
    "Official shop with full warranty.",
    "Price checked every morning.",
)


@dataclass(frozen=True)
class ProductType:
    """One kind of product: what it is called, whose it is, what goes with it and what can replace it."""

    name: str
    department: str
    synonyms: tuple[str, ...]
    accessories: tuple[str, ...]
    substitutes: tuple[str, ...]
    sizes: tuple[str, ...] = ()


_SHOES = ("size 38", "size 40", "size 42")
_VOLUMES = ("mini", "standard", "family")
_SCREENS = ("compact", "wide", "giant")
_WEAR = ("small", "medium", "large")

TYPES = (
    ProductType(
        "running shoes", "sport", ("trainers", "joggers"), ("shoe laces", "insoles"), ("hiking boots",), _SHOES
    ),
    ProductType("hiking boots", "sport", ("trekking footwear",), ("boot wax", "insoles"), ("running shoes",), _SHOES),
    ProductType("tent", "sport", ("camping shelter",), ("tent pegs", "tent groundsheet"), ("hammock",)),
    ProductType("hammock", "sport", ("hanging bed",), ("hammock straps",), ("tent",)),
    ProductType("backpack", "sport", ("rucksack", "daypack"), ("backpack rain cover",), ("suitcase",), _WEAR),
    ProductType("suitcase", "sport", ("trolley luggage",), ("luggage tag", "suitcase lock"), ("backpack",), _WEAR),
    ProductType("bicycle", "sport", ("bike", "two wheeler"), ("bicycle pump", "bike lock"), ("scooter",), _WEAR),
    ProductType("scooter", "sport", ("kick board",), ("scooter grips",), ("bicycle",)),
    ProductType("sofa", "home", ("couch", "settee"), ("sofa cover", "sofa legs"), ("armchair",)),
    ProductType("armchair", "home", ("easy chair",), ("armchair cushion",), ("sofa",)),
    ProductType("kettle", "home", ("water boiler",), ("kettle filter", "descaler"), ("coffee maker",), _VOLUMES),
    ProductType("coffee maker", "home", ("espresso machine",), ("coffee filters", "descaler"), ("kettle",), _VOLUMES),
    ProductType("lamp", "home", ("light fixture",), ("lamp shade", "light bulb"), ("candle holder",)),
    ProductType("candle holder", "home", ("candlestick",), ("wax candles",), ("lamp",)),
    ProductType("duvet", "home", ("comforter", "quilt"), ("duvet cover",), ("blanket",), _WEAR),
    ProductType("blanket", "home", ("throw",), ("blanket clips",), ("duvet",), _WEAR),
    ProductType("phone", "tech", ("smartphone", "mobile"), ("phone case", "phone charger"), ("tablet",)),
    ProductType("tablet", "tech", ("slate computer",), ("tablet sleeve", "stylus pen"), ("phone",)),
    ProductType(
        "television", "tech", ("tv", "smart screen"), ("tv wall mount", "hdmi cable"), ("projector",), _SCREENS
    ),
    ProductType("projector", "tech", ("beamer",), ("projector bulb", "hdmi cable"), ("television",)),
    ProductType("headphones", "tech", ("headset", "earphones"), ("headphone stand", "ear pads"), ("speaker",)),
    ProductType("speaker", "tech", ("sound box",), ("speaker cable",), ("headphones",)),
    ProductType("lawn mower", "garden", ("grass cutter",), ("mower blade", "mower cover"), ("hedge trimmer",)),
    ProductType("hedge trimmer", "garden", ("bush shears",), ("trimmer battery",), ("lawn mower",)),
    ProductType("garden hose", "garden", ("water pipe",), ("hose nozzle", "hose reel"), ("watering can",)),
    ProductType("watering can", "garden", ("sprinkling jug",), ("can rose head",), ("garden hose",), _VOLUMES),
)
BY_NAME = {kind.name: kind for kind in TYPES}


@dataclass(frozen=True)
class Wish:
    """What a query asks for: a product type and some attributes (of brand, colour, size)."""

    kind: ProductType
    attributes: dict[str, str] = field(default_factory=dict)


def generate(rows: int, seed: int) -> Iterator[dict[str, object]]:
    """Yield `rows` labelled pairs, the same for the same seed.

    Each has query, ad_title, ad_text, attributes, grade, grade_raw and rationale (the label's reason). A query comes
    with three to six ads in a row. Pairs can repeat; whoever builds the table merges them.
    """
    rng = random.Random(f"synthetic:{seed}")
    made = 0
    while made < rows:
        wish = _wish(rng)
        query = _query(rng, wish)
        for _ in range(min(rng.randint(3, 6), rows - made)):
            yield _pair(rng, wish, query)
            made += 1


def _wish(rng: random.Random) -> Wish:
    kind = rng.choice(TYPES)
    options = {"brand": BRANDS[kind.department], "colour": COLOURS, "size": kind.sizes}
    names = [name for name, values in options.items() if values]
    asked = rng.sample(names, k=rng.choice((1, 1, 2)))
    return Wish(kind, {name: rng.choice(options[name]) for name in sorted(asked)})


def _query(rng: random.Random, wish: Wish) -> str:
    word = rng.choice((wish.kind.name, wish.kind.name, *wish.kind.synonyms))
    if len(word) > 3 and rng.random() < MISSPELT_SHARE:
        word = _misspell(rng, word)
    before = [wish.attributes[name] for name in ("brand", "colour") if name in wish.attributes]
    size = [wish.attributes["size"]] if "size" in wish.attributes else []
    return " ".join([*before, word, *size]).lower()


def _misspell(rng: random.Random, word: str) -> str:
    """Swap two neighbouring letters, or drop one, past the first."""
    place = rng.randrange(1, len(word) - 1)
    if rng.random() < 0.5:
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    return word[:place] + word[place + 1 :]


def _pair(rng: random.Random, wish: Wish, query: str) -> dict[str, object]:
    grade = rng.choices(range(4), weights=GRADE_SHARES)[0]
    if grade == 2 and not wish.attributes:
        grade = 3
    department = wish.kind.department
    offered = {"brand": rng.choice(BRANDS[department]), "colour": rng.choice(COLOURS)}
    # Ads of every grade share attributes with the query, so that those words alone say little.
    if grade >= 2 or rng.random() < 0.6:
        offered |= {name: value for name, value in wish.attributes.items() if name != "size" or grade >= 2}
    if grade >= 2:
        offered_type, noun = wish.kind.name, rng.choice((wish.kind.name, *wish.kind.synonyms))
        if wish.kind.sizes and "size" not in offered:
            offered["size"] = rng.choice(wish.kind.sizes)
        if grade == 2:
            _change_one(rng, wish, offered)
        relation = "same product"
    elif grade == 1 and rng.random() < 0.5:
        offered_type = noun = rng.choice(wish.kind.accessories)
        # An accessory often names what it is for, in full.
        if rng.random() < 0.5 and wish.kind.name not in noun:
            noun = f"{noun} for {wish.kind.name}"
        relation = "accessory"
    elif grade == 1:
        substitute = BY_NAME[rng.choice(wish.kind.substitutes)]
        offered_type, noun = substitute.name, rng.choice((substitute.name, *substitute.synonyms))
        relation = "substitute"
    else:
        offered_type, noun = _something_else(rng, wish)
        relation = "something else"
    return {
        "query": query,
        "ad_title": _title(rng, offered, noun),
        "ad_text": " ".join(rng.sample(SENTENCES, k=2)) if rng.random() < 0.5 else None,
        "attributes": {name: value for name, value in offered.items() if name == "colour" and rng.random() < 0.3},
        "grade": grade,
        "grade_raw": float(grade),
        "rationale": _rationale(wish, offered, offered_type, relation),
    }


def _change_one(rng: random.Random, wish: Wish, offered: dict[str, str]) -> None:
    """Give one attribute that was asked for another value."""
    name = rng.choice(sorted(wish.attributes))
    values = {"brand": BRANDS[wish.kind.department], "colour": COLOURS, "size": wish.kind.sizes}[name]
    offered[name] = rng.choice([value for value in values if value != wish.attributes[name]])


def _something_else(rng: random.Random, wish: Wish) -> tuple[str, str]:
    """A product (or an accessory) that has nothing to do with the wish: its type's name and the words of the ad."""
    near = {wish.kind.name, *wish.kind.substitutes}
    other = rng.choice([kind for kind in TYPES if kind.name not in near])
    mine = set(wish.kind.accessories)
    foreign = [accessory for accessory in other.accessories if accessory not in mine]
    if foreign and rng.random() < 0.3:
        accessory = rng.choice(foreign)
        return accessory, accessory
    return other.name, rng.choice((other.name, *other.synonyms))


def _title(rng: random.Random, offered: dict[str, str], noun: str) -> str:
    parts = [offered["brand"], offered["colour"], noun, offered.get("size", "")]
    if rng.random() < 0.3:
        parts = [noun, offered.get("size", ""), "by", offered["brand"], "in", offered["colour"]]
    if rng.random() < 0.5:
        parts.append(rng.choice(FILLERS))
    text = " ".join(part for part in parts if part)
    return text[0].upper() + text[1:]


def _rationale(wish: Wish, offered: dict[str, str], offered_type: str, relation: str) -> str:
    """The reason for the label, in the words that decide it. Attributes matter only when the product is right.

    Their values are not spelled out: a small decoder would have to copy names, and would spend its weights and its
    exploration on words that the label does not depend on.
    """
    reason = f"Asked: {wish.kind.name}. Offered: {offered_type}. Relation: {relation}."
    if relation != "same product":
        return reason
    for name, value in wish.attributes.items():
        reason += f" {name.capitalize()} {'as asked' if offered[name] == value else 'differs'}."
    return reason
