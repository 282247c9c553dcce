"""A made-up shop whose relevance labels follow from what the query asks and what the ad offers.

The embedded default: nothing is downloaded, and every label has a reason. Lexical overlap alone does not decide: a case
for a phone shares its words with the phone and is only related, a "settee" answers a query for a "sofa" without a common
word, and a blue kettle shares brand and colour with a blue tent. Licence: the project's own.

Grades: 3 = the product asked for with every attribute asked for; 2 = the product, but an attribute differs; 1 = a
substitute, or an accessory of it; 0 = something else.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from data.contracts import Grade, GradeScale
from data.sources.labels import Source, grade_numbers

SCALE = GradeScale(
    grades=(
        Grade(name="irrelevant", definition="the ad offers something else than the query asks for."),
        Grade(name="related", definition="the ad offers a substitute for, or an accessory of, the product asked for."),
        Grade(name="partial", definition="the ad offers the product asked for, but an attribute asked for differs."),
        Grade(name="exact", definition="the ad offers the product asked for with every attribute asked for."),
    ),
    relevant_from=2,
)
SOURCE = Source(
    licence="the project's own, Apache-2.0",
    grading="a grade follows from what the query asks and what the ad offers",
    scale=SCALE,
    labels=grade_numbers(SCALE.size - 1, "the grade is not on the scale"),
)

# How often each grade is drawn, from 0 to 3.
GRADE_SHARES = (0.26, 0.24, 0.24, 0.26)
MISSPELT_SHARE = 0.06
CATALOGUE = 12_000


@dataclass(frozen=True)
class ProductType:
    """One kind of product: what it is called, whose it is, what goes with it and what can replace it."""

    name: str
    department: str
    synonyms: list[str]
    accessories: list[str]
    substitutes: list[str]
    sizes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Wish:
    """What a query asks for: a product type and some attributes (of brand, colour, size)."""

    kind: ProductType
    attributes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Shop:
    """The words of the shop, as `synthetic.toml` holds them."""

    colours: list[str]
    fillers: list[str]
    sentences: list[str]
    brands: dict[str, list[str]]
    types: list[ProductType]

    def options(self, kind: ProductType) -> dict[str, list[str]]:
        """The values of each attribute that a product of this kind can have."""
        return {"brand": self.brands[kind.department], "colour": self.colours, "size": kind.sizes}


@cache
def shop() -> Shop:
    """The shop, read once."""
    words = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    return Shop(**words | {"types": [ProductType(**kind) for kind in words["types"]]})


def generate(rows: int, seed: int) -> Iterator[dict[str, Any]]:
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


def catalogue(seed: int) -> Iterator[dict[str, str]]:
    """Yield CATALOGUE facts about the shop's products, as rows of `TEXTS`, the same for the same seed; none is a label.

    They are what a shop knows before anyone has judged an ad: which kind of product a search means and a listing offers
    (any search beside any listing), and of kinds, which is an accessory or a substitute of which.
    """
    rng = random.Random(f"catalogue:{seed}")
    kinds = {kind.name: kind for kind in shop().types}
    owners = {accessory: kind for kind in shop().types for accessory in kind.accessories}
    offers = sorted({*kinds, *owners})
    for _ in range(CATALOGUE):
        wish, offer = _wish(rng), rng.choice(offers)
        if rng.random() < 0.6:
            kind = kinds.get(offer) or owners[offer]
            words = (offer, *kind.synonyms) if offer in kinds else (offer, _for_product(offer, kind))
            offered = {name: rng.choice(values) for name, values in shop().options(kind).items() if values}
            query, title = _query(rng, wish), _title(rng, offered, rng.choice(words))
            yield {"query": query, "ad_title": title, "text": f"Asked: {wish.kind.name}. Offered: {offer}."}
        else:
            if rng.random() < 0.6:
                offer = rng.choice([wish.kind.name, *wish.kind.accessories, *wish.kind.substitutes])
            text = f"Asked: {wish.kind.name}. Offered: {offer}. Relation: {_relation(wish.kind, offer)}."
            yield {"query": wish.kind.name, "ad_title": offer, "text": text}


def _for_product(accessory: str, kind: ProductType) -> str:
    return accessory if kind.name in accessory else f"{accessory} for {kind.name}"


def _relation(kind: ProductType, offer: str) -> str:
    if offer == kind.name:
        return "same product"
    if offer in kind.accessories:
        return "accessory"
    return "substitute" if offer in kind.substitutes else "something else"


def _wish(rng: random.Random) -> Wish:
    kind = rng.choice(shop().types)
    options = shop().options(kind)
    names = [name for name, values in options.items() if values]
    asked = rng.sample(names, k=rng.choice((1, 1, 2)))
    return Wish(kind, {name: rng.choice(options[name]) for name in sorted(asked)})


def _query(rng: random.Random, wish: Wish) -> str:
    word = rng.choice((wish.kind.name, wish.kind.name, *wish.kind.synonyms))
    if len(word) > 3 and rng.random() < MISSPELT_SHARE:
        # Two neighbouring letters change places, or one is missing, past the first.
        place = rng.randrange(1, len(word) - 1)
        changed = word[place + 1] + word[place] + word[place + 2 :] if rng.random() < 0.5 else word[place + 1 :]
        word = word[:place] + changed
    before = [wish.attributes[name] for name in ("brand", "colour") if name in wish.attributes]
    size = [wish.attributes["size"]] if "size" in wish.attributes else []
    return " ".join([*before, word, *size]).lower()


def _pair(rng: random.Random, wish: Wish, query: str) -> dict[str, Any]:
    grade = rng.choices(range(4), weights=GRADE_SHARES)[0]
    if grade == 2 and not wish.attributes:
        grade = 3
    options = shop().options(wish.kind)
    offered = {name: rng.choice(options[name]) for name in ("brand", "colour")}
    # Ads of every grade share attributes with the query, so that those words alone say little.
    if grade >= 2 or rng.random() < 0.6:
        offered |= {name: value for name, value in wish.attributes.items() if name != "size" or grade >= 2}
    if grade >= 2:
        offered_type, noun = wish.kind.name, rng.choice((wish.kind.name, *wish.kind.synonyms))
        if wish.kind.sizes and "size" not in offered:
            offered["size"] = rng.choice(wish.kind.sizes)
        if grade == 2:
            name = rng.choice(sorted(wish.attributes))
            others = [value for value in shop().options(wish.kind)[name] if value != wish.attributes[name]]
            offered[name] = rng.choice(others)
        relation = "same product"
    elif grade == 1 and rng.random() < 0.5:
        offered_type = noun = rng.choice(wish.kind.accessories)
        # An accessory often names what it is for, in full.
        if rng.random() < 0.5:
            noun = _for_product(noun, wish.kind)
        relation = "accessory"
    elif grade == 1:
        offered_type = rng.choice(wish.kind.substitutes)
        (substitute,) = (kind for kind in shop().types if kind.name == offered_type)
        noun = rng.choice((substitute.name, *substitute.synonyms))
        relation = "substitute"
    else:
        offered_type, noun = _something_else(rng, wish)
        relation = "something else"
    return {
        "query": query,
        "ad_title": _title(rng, offered, noun),
        "ad_text": " ".join(rng.sample(shop().sentences, k=2)) if rng.random() < 0.5 else None,
        "attributes": {name: value for name, value in offered.items() if name == "colour" and rng.random() < 0.3},
        "grade": grade,
        "grade_raw": float(grade),
        "rationale": _rationale(wish, offered, offered_type, relation),
    }


def _something_else(rng: random.Random, wish: Wish) -> tuple[str, str]:
    """A product (or an accessory) that has nothing to do with the wish: its type's name and the words of the ad."""
    near = {wish.kind.name, *wish.kind.substitutes}
    other = rng.choice([kind for kind in shop().types if kind.name not in near])
    foreign = [accessory for accessory in other.accessories if accessory not in wish.kind.accessories]
    if foreign and rng.random() < 0.3:
        accessory = rng.choice(foreign)
        return accessory, accessory
    return other.name, rng.choice((other.name, *other.synonyms))


def _title(rng: random.Random, offered: dict[str, str], noun: str) -> str:
    parts = [offered["brand"], offered["colour"], noun, offered.get("size", "")]
    if rng.random() < 0.3:
        parts = [noun, offered.get("size", ""), "by", offered["brand"], "in", offered["colour"]]
    if rng.random() < 0.5:
        parts.append(rng.choice(shop().fillers))
    text = " ".join(part for part in parts if part)
    return text[0].upper() + text[1:]


def _rationale(wish: Wish, offered: dict[str, str], offered_type: str, relation: str) -> str:
    """The reason for the label, in the words that decide it. Attributes matter only when the product is right.

    Their values are not spelled out: a small decoder would have to copy names, and would spend its weights and its
    exploration on words that the label does not depend on.
    """
    reason = f"Asked: {wish.kind.name}. Offered: {offered_type}. Relation: {relation}."
    for name, value in wish.attributes.items() if relation == "same product" else ():
        reason += f" {name.capitalize()} {'as asked' if offered[name] == value else 'differs'}."
    return reason
