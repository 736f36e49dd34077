"""The kinds of made-up facts that questions are asked about: people, products, orders, events.

Tables only. Each attribute says how its value is drawn, how a passage states it, how a question asks for
it, and how the answer says it. In templates `{e}` is the entity (`{E}`: at the start of a sentence),
`{v}` the value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from workbench.versions.demo.values import COLOURS, JOBS, PETS, Values


@dataclass(frozen=True, slots=True)
class Attribute:
    """One kind of fact. Templates: `{e}` the entity, `{v}` the value."""

    draw: Callable[[Values], str]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str


@dataclass(frozen=True, slots=True)
class Subject:
    """A kind of entity with the attributes that it can have."""

    draw: Callable[[Values], str]
    attributes: tuple[Attribute, ...]


_EVENTS = ("concert", "fair", "race", "festival", "lecture", "workshop", "market", "meeting")


def _price(values: Values) -> str:
    return f"{values.number(2, 990)} euros"


# fmt: off
PERSON = Subject(
    Values.person,
    (
        Attribute(
            Values.name,
            ("{e} lives in {v}.", "{e} has a flat in {v}.", "The home of {e} is in {v}.", "{e} moved to {v}.",
             "{v} is the town where {e} lives.", "{e} settled in {v} some years ago."),
            ("Where does {e} live?", "In which town does {e} live?", "What is the home town of {e}?",
             "Which town does {e} live in?", "Tell me where {e} lives.", "Where is the home of {e}?"),
            "{e} lives in {v}",
        ),
        Attribute(
            lambda v: v.one_of(JOBS),
            ("{e} works as a {v}.", "{e} is a {v}.", "{e} earns a living as a {v}.", "By trade {e} is a {v}.",
             "{e} has been a {v} for years.", "{e} found work as a {v}."),
            ("What is the job of {e}?", "What does {e} do for a living?", "What work does {e} do?",
             "Which job does {e} have?", "What is {e}'s trade?", "Tell me the job of {e}."),
            "{e} works as a {v}",
        ),
        Attribute(
            lambda v: v.one_of(PETS),
            ("{e} has a {v}.", "{e} keeps a {v}.", "{e} owns a {v}.", "A {v} lives with {e}.",
             "{e} takes care of a {v}.", "The pet of {e} is a {v}."),
            ("Which pet does {e} have?", "What animal does {e} keep?", "What pet does {e} own?",
             "What is the pet of {e}?", "Tell me which pet {e} has.", "Which animal lives with {e}?"),
            "{e} has a {v}",
        ),
        Attribute(
            lambda v: v.number(1920, 2012),
            ("{e} was born in {v}.", "The birth year of {e} is {v}.", "{e} came into the world in {v}.",
             "In {v} {e} was born.", "Born in {v}, {e} grew up by the sea.", "{e} dates from {v}."),
            ("When was {e} born?", "In which year was {e} born?", "What is the birth year of {e}?",
             "What year was {e} born in?", "Tell me the birth year of {e}.", "Which year was {e} born?"),
            "{e} was born in {v}",
        ),
        Attribute(
            lambda v: v.number(10000, 99999),
            ("The phone number of {e} is {v}.", "{e} can be called at {v}.", "Call {e} at {v}.",
             "{e} answers the phone at {v}.", "To reach {e}, dial {v}.", "{e} has the phone number {v}."),
            ("What is the phone number of {e}?", "How can I call {e}?", "Which number do I dial for {e}?",
             "What is {e}'s phone number?", "Give me the phone number of {e}.", "At which number is {e} reached?"),
            "The phone number of {e} is {v}",
        ),
    ),
)
PRODUCT = Subject(
    lambda v: f"the {v.name()} {v.noun()}",
    (
        Attribute(
            _price,
            ("{E} costs {v}.", "The price of {e} is {v}.", "{E} sells for {v}.", "You pay {v} for {e}.",
             "{E} is offered at {v}.", "For {v} you get {e}."),
            ("How much is {e}?", "What does {e} cost?", "What is the price of {e}?", "How much does {e} cost?",
             "Tell me the price of {e}.", "What do I pay for {e}?"),
            "{E} costs {v}",
        ),
        Attribute(
            lambda v: v.one_of(COLOURS),
            ("{E} is {v}.", "The colour of {e} is {v}.", "{E} comes in {v}.", "{E} is painted {v}.",
             "{E} is sold only in {v}.", "{v} is the colour of {e}."),
            ("What colour is {e}?", "Which colour does {e} have?", "What is the colour of {e}?",
             "In which colour is {e} sold?", "Tell me the colour of {e}.", "Which colour is {e}?"),
            "{E} is {v}",
        ),
        Attribute(
            lambda v: f"{v.number(2, 99)} kg",
            ("{E} weighs {v}.", "The weight of {e} is {v}.", "With {v}, {e} is not easy to carry.",
             "{E} has a weight of {v}.", "The scale shows {v} for {e}.", "{E} comes to {v}."),
            ("How heavy is {e}?", "What does {e} weigh?", "What is the weight of {e}?", "How much does {e} weigh?",
             "Tell me the weight of {e}.", "Which weight does {e} have?"),
            "{E} weighs {v}",
        ),
        Attribute(
            Values.name,
            ("{E} is made in {v}.", "{E} comes from a factory in {v}.", "Workers in {v} build {e}.",
             "{v} is where {e} is made.", "{E} is built in {v}.", "A small shop in {v} makes {e}."),
            ("Where is {e} made?", "In which town is {e} made?", "Where does {e} come from?",
             "Which town makes {e}?", "Tell me where {e} is made.", "Where is {e} built?"),
            "{E} is made in {v}",
        ),
        Attribute(
            Values.identifier,
            ("The part number of {e} is {v}.", "{E} has the part number {v}.", "{E} is listed as {v}.",
             "Order {e} under {v}.", "In the catalogue {e} is {v}.", "{v} is the part number of {e}."),
            ("What is the part number of {e}?", "Under which part number is {e} listed?",
             "Which part number does {e} have?", "Give me the part number of {e}.",
             "Tell me the part number of {e}.", "Which code do I use to order {e}?"),
            "The part number of {e} is {v}",
        ),
    ),
)
ORDER = Subject(
    lambda v: f"order {v.identifier()}",
    (
        Attribute(
            Values.person,
            ("{E} was placed by {v}.", "{v} placed {e}.", "The customer of {e} is {v}.", "{E} belongs to {v}.",
             "{v} is waiting for {e}.", "{E} is for {v}."),
            ("Who placed {e}?", "Whose is {e}?", "Who is the customer of {e}?", "To whom does {e} belong?",
             "Tell me who placed {e}.", "Which customer placed {e}?"),
            "{E} was placed by {v}",
        ),
        Attribute(
            Values.date,
            ("{E} arrives on {v}.", "{E} will be delivered on {v}.", "The delivery of {e} is on {v}.",
             "Expect {e} on {v}.", "On {v} {e} will arrive.", "{E} is due on {v}."),
            ("When does {e} arrive?", "When will {e} be delivered?", "On which date does {e} arrive?",
             "What is the delivery date of {e}?", "Tell me when {e} arrives.", "When is {e} due?"),
            "{E} arrives on {v}",
        ),
        Attribute(
            lambda v: f"a {v.one_of(COLOURS)} {v.noun()}",
            ("{E} contains {v}.", "{E} is for {v}.", "In {e} there is {v}.", "The content of {e} is {v}.",
             "{E} holds {v}.", "We packed {v} into {e}."),
            ("What is in {e}?", "What does {e} contain?", "What is the content of {e}?", "What was packed into {e}?",
             "Tell me what is in {e}.", "Which item is in {e}?"),
            "{E} contains {v}",
        ),
        Attribute(
            Values.name,
            ("{E} goes to {v}.", "{E} is sent to {v}.", "The address of {e} is in {v}.", "{E} is on its way to {v}.",
             "We ship {e} to {v}.", "{E} will be brought to {v}."),
            ("Where does {e} go?", "To which town is {e} sent?", "Where is {e} sent?", "Where do we ship {e}?",
             "Tell me where {e} goes.", "Which town is {e} sent to?"),
            "{E} goes to {v}",
        ),
    ),
)
EVENT = Subject(
    lambda v: f"the {v.name()} {v.one_of(_EVENTS)}",
    (
        Attribute(
            Values.date,
            ("{E} is on {v}.", "{E} takes place on {v}.", "The date of {e} is {v}.", "{E} was planned for {v}.",
             "On {v} there is {e}.", "Come to {e} on {v}."),
            ("When is {e}?", "On which date is {e}?", "What is the date of {e}?", "When does {e} take place?",
             "Tell me the date of {e}.", "Which day is {e}?"),
            "{E} is on {v}",
        ),
        Attribute(
            Values.clock,
            ("{E} starts at {v}.", "{E} begins at {v}.", "The doors of {e} open at {v}.", "At {v} {e} begins.",
             "Be there at {v} for {e}.", "The start of {e} is at {v}."),
            ("At what time does {e} start?", "When does {e} start?", "What time does {e} begin?",
             "At which hour does {e} start?", "Tell me the starting time of {e}.", "What is the starting time of {e}?"),
            "{E} starts at {v}",
        ),
        Attribute(
            Values.name,
            ("{E} is held in {v}.", "{E} takes place in {v}.", "The place of {e} is {v}.", "{v} hosts {e}.",
             "People come to {v} for {e}.", "You find {e} in {v}."),
            ("Where is {e}?", "Where is {e} held?", "In which town is {e}?", "Which town hosts {e}?",
             "Tell me where {e} is held.", "Where does {e} take place?"),
            "{E} is held in {v}",
        ),
        Attribute(
            _price,
            ("A ticket for {e} costs {v}.", "Tickets for {e} are {v}.", "The entrance to {e} is {v}.",
             "You get into {e} for {v}.", "Visitors of {e} pay {v}.", "{E} charges {v} at the door."),
            ("What does a ticket for {e} cost?", "How much is {e}?", "How much is a ticket for {e}?",
             "What is the ticket price of {e}?", "Tell me the ticket price of {e}.", "What do I pay at {e}?"),
            "A ticket for {e} costs {v}",
        ),
    ),
)
# fmt: on
SUBJECTS = (PERSON, PRODUCT, ORDER, EVENT)
