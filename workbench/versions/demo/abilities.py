"""What the tools of generated tasks can do: names, parameters, requests, results and answers.

Tables only. Tool and parameter names have several forms, so that a model must read them from the list of
tools. In templates `{0}`, `{1}` are arguments and `{r0}`, `{r1}` are result values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from workbench.versions.demo.values import JOBS, Values

_SKIES = ["sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "stormy", "clear"]
_STATES = ["shipped", "delayed", "packed", "delivered", "waiting", "cancelled", "returned", "lost"]
_ROOMS = [
    "kitchen",
    "bedroom",
    "office",
    "garage",
    "cellar",
    "bathroom",
    "hall",
    "attic",
    "nursery",
    "library",
]
_LANGUAGES = [
    "French",
    "Spanish",
    "German",
    "Italian",
    "Polish",
    "Turkish",
    "Swahili",
    "Hindi",
    "Greek",
    "Danish",
]


@dataclass(frozen=True, slots=True)
class Slot:
    """A parameter or a result field: the names it may have, and what it holds."""

    names: tuple[str, ...]
    draw: Callable[[Values], str]


@dataclass(frozen=True, slots=True)
class Ability:
    """What one tool can do. In templates `{0}`, `{1}` are arguments; `{r0}`, `{r1}` are result values."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    arguments: tuple[Slot, ...]
    requests: tuple[str, ...]
    results: tuple[Slot, ...]
    answer: str


_TOWN = Slot(("city", "town", "place", "location", "where"), Values.name)
_PERSON = Slot(("name", "person", "contact", "who", "to"), Values.name)
_PRODUCT = Slot(("product", "item", "article", "thing", "goods"), Values.noun)
_ORDER = Slot(("order_id", "order", "id", "number", "code"), Values.identifier)
_DATE = Slot(("date", "day", "when", "on", "due"), Values.date)
_TIME = Slot(("time", "at", "hour", "start", "clock"), Values.clock)
_COUNT = Slot(("count", "quantity", "amount", "how_many", "pieces"), lambda v: v.number(2, 60))

ABILITIES = (
    Ability(
        ("get_weather", "weather", "fetch_weather", "look_up_weather", "weather_report", "forecast"),
        ("weather of a place", "the weather now", "tells the weather", "current weather"),
        (_TOWN,),
        (
            "What is the weather in {0}?",
            "How is the weather in {0}?",
            "Weather in {0}, please.",
            "Tell me the weather in {0}.",
            "I travel to {0}. How is the weather there?",
            "Is the weather good in {0}?",
        ),
        (
            Slot(("sky", "weather", "state"), lambda v: v.one_of(_SKIES)),
            Slot(("degrees", "temperature", "celsius"), lambda v: v.number(1, 39)),
        ),
        "It is {r0} in {0}, {r1} degrees.",
    ),
    Ability(
        ("track_order", "order_status", "find_order", "get_order", "check_order", "look_up_order"),
        ("status of an order", "finds an order", "where an order is", "order state"),
        (_ORDER,),
        (
            "Where is order {0}?",
            "Please check order {0}.",
            "What is the status of order {0}?",
            "I am waiting for {0}. Where is the order?",
            "Can you track order {0}?",
            "Look up order {0} for me.",
        ),
        (
            Slot(("status", "state", "progress"), lambda v: v.one_of(_STATES)),
            Slot(("date", "due", "day"), Values.date),
        ),
        "Order {0} is {r0}, date {r1}.",
    ),
    Ability(
        ("get_price", "price", "look_up_price", "price_of", "find_price", "check_price"),
        ("price of a product", "what a product costs", "looks up a price", "product price"),
        (_PRODUCT,),
        (
            "How much is the {0}?",
            "What does the {0} cost?",
            "Tell me the price of the {0}.",
            "What is the price of a {0}?",
            "I want a {0}. How much is it?",
            "Price of the {0}, please.",
        ),
        (Slot(("price", "euros", "cost"), lambda v: v.number(2, 990)),),
        "The {0} costs {r0} euros.",
    ),
    Ability(
        ("add_to_cart", "cart_add", "buy", "put_in_cart", "order_item", "add_item"),
        ("puts a product into the cart", "adds to the cart", "orders a product", "adds items"),
        (_PRODUCT, _COUNT),
        (
            "Add {1} of the {0} to my cart.",
            "I want {1} pieces of the {0}.",
            "Put the {0} in my cart, {1} times.",
            "Please order {1} of the {0}.",
            "Buy the {0}, quantity {1}.",
            "I need the {0}, {1} pieces.",
        ),
        (Slot(("cart", "cart_id", "basket"), Values.identifier),),
        "I added {1} of the {0} to cart {r0}.",
    ),
    Ability(
        ("book_table", "reserve_table", "table_booking", "reserve", "make_reservation", "book_restaurant"),
        ("books a table", "reserves at a restaurant", "makes a reservation", "table reservation"),
        (
            Slot(("restaurant", "place", "venue", "where"), Values.name),
            Slot(("people", "guests", "seats", "persons"), lambda v: v.number(2, 30)),
            _TIME,
        ),
        (
            "Book a table at {0} for {1} people at {2}.",
            "We are {1} people and want to eat at {0} at {2}.",
            "Reserve {0} at {2} for {1} guests.",
            "A table for {1} at {0}, {2}, please.",
            "Can you get us a table at {0}? We are {1} and come at {2}.",
            "At {2} we need {1} seats at {0}.",
        ),
        (Slot(("booking", "confirmation", "reference"), Values.identifier),),
        "The table at {0} is booked for {1} people at {2}, reference {r0}.",
    ),
    Ability(
        ("send_message", "message", "text", "send_text", "write_message", "notify"),
        ("sends a message", "writes to a person", "sends a text", "message to a contact"),
        (
            _PERSON,
            Slot(
                ("text", "body", "message", "content"),
                lambda v: v.phrase(
                    f"I am in {v.name()}",
                    f"please bring the {v.noun()}",
                    f"call me at {v.clock()}",
                    f"the code is {v.identifier()}",
                    f"see you on {v.date()}",
                    f"I found your {v.noun()}",
                    f"the {v.noun()} is late",
                ),
            ),
        ),
        (
            "Tell {0}: {1}",
            "Send {0} the message: {1}",
            "Write to {0}: {1}",
            "Message {0} this: {1}",
            "Text {0}: {1}",
            "Let {0} know: {1}",
        ),
        (Slot(("message_id", "id", "receipt"), Values.identifier),),
        "I sent the message to {0}, id {r0}.",
    ),
    Ability(
        ("create_event", "add_event", "calendar_add", "schedule", "new_event", "plan_meeting"),
        ("adds an event to the calendar", "plans a meeting", "makes an appointment", "new calendar entry"),
        (_PERSON, _DATE, _TIME),
        (
            "Plan a meeting with {0} on {1} at {2}.",
            "I meet {0} on {1} at {2}. Put it in my calendar.",
            "Schedule {0} for {1} at {2}.",
            "Add a meeting with {0}: {1}, {2}.",
            "On {1} at {2} I see {0}, note it.",
            "Make an appointment with {0} on {1}, {2}.",
        ),
        (Slot(("event", "event_id", "entry"), Values.identifier),),
        "The meeting with {0} is on {1} at {2}, entry {r0}.",
    ),
    Ability(
        ("set_temperature", "heat", "heating", "set_heating", "thermostat", "adjust_temperature"),
        ("sets the temperature of a room", "heats a room", "controls the heating", "room temperature"),
        (
            Slot(("room", "where", "zone", "place"), lambda v: v.one_of(_ROOMS)),
            Slot(("degrees", "celsius", "value", "temperature"), lambda v: v.number(5, 30)),
        ),
        (
            "Set the {0} to {1} degrees.",
            "Heat the {0} to {1} degrees.",
            "Make it {1} degrees in the {0}.",
            "I want {1} degrees in the {0}.",
            "The {0} should have {1} degrees.",
            "Warm the {0} up to {1} degrees.",
        ),
        (Slot(("minutes", "wait", "time_left"), lambda v: v.number(2, 90)),),
        "The {0} will have {1} degrees in {r0} minutes.",
    ),
    Ability(
        ("translate", "translate_word", "translation", "get_translation", "to_language", "word_in"),
        (
            "translates a word",
            "a word in another language",
            "looks up a translation",
            "translation of a word",
        ),
        (
            Slot(("word", "text", "term", "source"), Values.noun),
            Slot(("language", "target", "into", "lang"), lambda v: v.one_of(_LANGUAGES)),
        ),
        (
            "What is {0} in {1}?",
            "Translate {0} into {1}.",
            "How do you say {0} in {1}?",
            "The word {0} in {1}, please.",
            "Give me the {1} word for {0}.",
            "I need {0} translated into {1}.",
        ),
        (Slot(("translation", "result", "word"), lambda v: v.name().lower()),),
        "In {1}, {0} is {r0}.",
    ),
    Ability(
        ("find_worker", "search_worker", "find_help", "get_worker", "look_for", "find_person"),
        ("finds a worker in a town", "searches for a trade", "finds people for a job", "help nearby"),
        (Slot(("job", "trade", "work", "profession"), lambda v: v.one_of(JOBS)), _TOWN),
        (
            "Find a {0} in {1}.",
            "I need a {0} in {1}.",
            "Is there a {0} in {1}?",
            "Look for a {0} near {1}.",
            "Who works as a {0} in {1}?",
            "Search a {0} in {1} for me.",
        ),
        (
            Slot(("name", "person", "worker"), Values.name),
            Slot(("phone", "number", "call"), lambda v: v.number(10000, 99999)),
        ),
        "{r0} is a {0} in {1}, phone {r1}.",
    ),
    Ability(
        ("get_phone", "phone_of", "phone_book", "find_phone", "contact_number", "look_up_phone"),
        (
            "phone number of a person",
            "finds a phone number",
            "searches the phone book",
            "number of a contact",
        ),
        (_PERSON,),
        (
            "What is the phone number of {0}?",
            "I want to call {0}.",
            "Find the number of {0}.",
            "How do I reach {0} by phone?",
            "Give me {0}'s phone number.",
            "Look up the phone of {0}.",
        ),
        (Slot(("phone", "number", "call"), lambda v: v.number(10000, 99999)),),
        "The phone number of {0} is {r0}.",
    ),
    Ability(
        ("set_timer", "timer", "start_timer", "countdown", "alarm_in", "remind_in"),
        ("starts a timer", "counts down minutes", "sets an alarm", "minutes timer"),
        (Slot(("minutes", "duration", "length", "time"), lambda v: v.number(2, 240)),),
        (
            "Set a timer for {0} minutes.",
            "Start a timer of {0} minutes.",
            "Wake me in {0} minutes.",
            "Ring in {0} minutes.",
            "I need a {0} minute timer.",
            "Count down {0} minutes.",
        ),
        (Slot(("timer", "timer_id", "alarm"), Values.identifier),),
        "Timer {r0} rings in {0} minutes.",
    ),
)
