"""Phrasings of support messages: what customers and agents write around the facts of a ticket.

Tables only. `{p}` is the product, `{n}` the customer, `{o}` the order, `{d}` the date, `{q}` the quantity. Every list is
split into a training and a held-out part by `values.part_of`, so each needs several entries; words that carry a
meaning stand in more than one entry, because a model of this size knows no synonyms that it has not read.
"""

from __future__ import annotations

Phrases = tuple[str, ...]

# fmt: off
ISSUES: dict[str, Phrases] = {
    "damaged": (
        "The {p} arrived broken.", "The {p} is damaged.", "The {p} came with a crack.",
        "There is a big crack in the {p}.", "The {p} was broken when we opened the box.",
        "My {p} is cracked on one side.", "One part of the {p} is broken.", "The {p} was damaged on the way.",
        "When I opened the box, the {p} was cracked.", "The box was crushed and the {p} is damaged.",
        "The {p} has a crack and does not work.", "Sadly the {p} was damaged in the box.",
        "The {p} that you sent is broken.", "We found a crack in the {p}.", "The {p} is broken into two parts.",
        "I received a damaged {p}.", "A broken {p} was in the box.", "The side of the {p} is badly damaged.",
    ),
    "late": (
        "The {p} has not arrived.", "I am still waiting for the {p}.", "The {p} is late.",
        "The delivery of the {p} is very late.", "Where is my {p}? It has not arrived.",
        "We are still waiting for the delivery of the {p}.", "The {p} should have arrived long ago.",
        "My {p} did not arrive yet.", "The delivery is late, the {p} is not here.",
        "I have been waiting for the {p} for weeks.", "The {p} never arrived.", "When will the {p} arrive? It is late.",
        "Nobody delivered the {p} yet.", "I wait and wait, and the {p} has not arrived.",
        "The {p} is still not delivered.", "The {p} was due last week and has not arrived.",
        "The delivery of the {p} did not arrive.", "It is late and I am still waiting for my {p}.",
    ),
    "wrong_item": (
        "I got the wrong item instead of the {p}.", "You sent something else instead of the {p}.",
        "The box holds another item, not the {p}.", "I ordered the {p} but got something else.",
        "This is the wrong item. I ordered the {p}.", "Instead of the {p} I received another item.",
        "We received the wrong thing, we wanted the {p}.", "The item is wrong, it is not the {p}.",
        "You sent the wrong item, not the {p}.", "I wanted the {p} and you sent the wrong one.",
        "What came is not the {p}, it is something else.", "Another item came instead of the {p}.",
        "There was a different item in the box instead of the {p}.", "This is not the {p} that I ordered.",
        "I received the wrong item for the {p}.", "The wrong item came, not the {p}.",
        "You mixed it up: I ordered the {p} and received another item.", "I did not get the {p} but the wrong item.",
    ),
    "missing_part": (
        "A part of the {p} is missing.", "The {p} came without its screws.", "The screws of the {p} are missing.",
        "The cable of the {p} is missing.", "The {p} is not complete, a part is missing.",
        "The lid of the {p} was not in the box.", "The {p} came without the cable.",
        "Some parts of the {p} were not in the box.", "There is a part missing from the {p}.",
        "The {p} is here, but the screws are missing.", "I cannot use the {p} because a part is missing.",
        "The {p} came without a lid.", "The manual and a part of the {p} are missing.",
        "The box of the {p} was not complete.", "The cable was not in the box of the {p}.",
        "One part is missing from my {p}.", "The {p} came incomplete, without its cable.", "The {p} lacks a part.",
    ),
    "refund": (
        "I want my money back for the {p}.", "Please refund the {p}.", "I would like a refund for the {p}.",
        "When do I get the refund for the {p}?", "I returned the {p} and want my money back.",
        "I sent the {p} back and still have no refund.", "Please pay me back for the {p}.",
        "I am not happy with the {p} and ask for a refund.", "I return the {p} and want a refund.",
        "Give me my money back for the {p}.", "The refund for the {p} has not come.",
        "I have returned the {p}. Where is my refund?", "We want to return the {p} for a refund.",
        "You owe me a refund for the {p}.", "I do not like the {p}, please refund it.",
        "My money for the {p} was not paid back.", "Refund me the {p}.", "The {p} went back to you, now I want the refund.",
    ),
    "cancel": (
        "Please cancel the {p}.", "I want to cancel my order of the {p}.", "I do not need the {p} any more.",
        "Please stop the order of the {p}.", "Cancel the {p}, I changed my mind.",
        "I changed my mind about the {p}, please cancel it.", "We would like to cancel the {p}.",
        "Do not send the {p}, I cancel it.", "Can you still cancel the {p}?", "I ordered the {p} by mistake, please cancel.",
        "Please take the {p} off my order, I do not need it.", "I no longer need the {p}, cancel it.",
        "Stop the {p} please, I changed my mind.", "The {p} is not needed any more, please cancel it.",
        "I must cancel the {p}.", "Kindly cancel the {p} before it is sent.", "Do not send me the {p} any more.",
        "Is it possible to cancel the {p}?",
    ),
    "billing": (
        "You charged me twice for the {p}.", "The bill for the {p} is wrong.", "The price on the bill of the {p} is too high.",
        "I was charged too much for the {p}.", "I paid for the {p} twice.", "The invoice of the {p} shows the wrong price.",
        "There are two charges for the {p} on my card.", "My card was charged twice for the {p}.",
        "The invoice for the {p} is not correct.", "I was billed twice for the {p}.",
        "The bill says another price than the shop for the {p}.", "Why was I charged again for the {p}?",
        "You took the money for the {p} twice.", "There is a mistake on the invoice of the {p}.",
        "The amount on the bill for the {p} is wrong.", "I see two invoices for one {p}.",
        "My bill shows the {p} two times.", "The charge for the {p} on my card is too high.",
    ),
    "setup": (
        "How do I set up the {p}?", "I do not know how to use the {p}.", "How do I switch the {p} on?",
        "I cannot set up the {p}.", "Can you explain how to use the {p}?", "I need help with the setup of the {p}.",
        "The manual does not explain how to use the {p}.", "How does the {p} work?", "Please tell me how to set up the {p}.",
        "I do not understand how the {p} works.", "What do I have to do to switch on the {p}?",
        "We need help to use the {p}.", "Is there a guide for the setup of the {p}?", "Please explain the {p} to me.",
        "I have a question about how to use the {p}.", "How can I connect the {p}?", "I fail to set up the {p}.",
        "Can somebody explain the setup of the {p}?",
    ),
}
"""Sentences in the first person, by issue type."""

HEADLINES: dict[str, Phrases] = {
    "damaged": ("{p} broken", "{p} damaged", "crack in the {p}", "broken {p}", "{p} is cracked", "damaged {p}", "{p} came broken", "{p} damaged on the way", "box crushed, {p} damaged", "{p} with a crack", "{p} arrived damaged", "{p} cracked and broken"),
    "late": ("{p} not arrived", "{p} is late", "still waiting for the {p}", "late delivery of the {p}", "{p} not delivered", "delivery late, {p}", "waiting for the {p}", "{p} did not arrive", "{p} has not arrived yet", "no {p} delivered yet", "{p} still not here, late", "{p} delivery late"),
    "wrong_item": ("wrong item instead of the {p}", "got something else, not the {p}", "another item instead of the {p}", "wrong item, wanted the {p}", "item is not the {p}", "received the wrong item for the {p}", "something else came instead of the {p}", "different item, not the {p}", "wrong item sent, ordered the {p}", "not the {p} but another item", "wrong thing came, not the {p}", "received another item, ordered the {p}"),
    "missing_part": ("part of the {p} missing", "{p} without its cable", "screws of the {p} missing", "{p} not complete", "{p} came without the lid", "part missing from the {p}", "cable of the {p} missing", "{p} incomplete", "{p} lacks a part", "lid missing, {p}", "missing part, {p}", "parts of the {p} not in the box"),
    "refund": ("refund for the {p}", "wants money back for the {p}", "{p} returned, no refund", "asks for a refund, {p}", "money back for the {p}", "refund of the {p} has not come", "please refund the {p}", "returned the {p}, wants refund", "pay back the {p}", "no refund yet for the {p}", "return of the {p} for a refund", "{p} sent back, wants money back"),
    "cancel": ("cancel the {p}", "please cancel {p}", "wants to cancel the {p}", "{p} not needed any more", "cancel order of the {p}", "changed mind, cancel {p}", "stop the order of the {p}", "do not send the {p}", "{p} ordered by mistake, cancel", "no longer needs the {p}", "cancel {p} before it is sent", "take the {p} off the order"),
    "billing": ("charged twice for the {p}", "bill for the {p} is wrong", "wrong price on the invoice of the {p}", "{p} billed twice", "invoice of the {p} not correct", "charged too much for the {p}", "two charges for the {p}", "paid twice for the {p}", "mistake on the bill of the {p}", "price of the {p} too high on the bill", "two invoices for the {p}", "wrong amount charged for the {p}"),
    "setup": ("how to set up the {p}", "help with the setup of the {p}", "cannot switch on the {p}", "how to use the {p}", "does not know how the {p} works", "question on how to use the {p}", "needs a guide for the {p}", "how to connect the {p}", "explain the {p}", "setup of the {p} fails", "asks how the {p} works", "cannot set up the {p}"),
}
"""The same in a few words, for forms, chats and notes of calls."""

GREETINGS: Phrases = (
    "Hello,", "Hi,", "Dear team,", "Good morning,", "Good evening,", "Hello there,", "Dear support,", "Hey,",
    "To whom it may concern,", "Hi support,", "Dear sir or madam,", "Hello support,",
)
INTRODUCTIONS: Phrases = (
    "My name is {n}.", "I am {n}.", "This is {n}.", "Here is {n}.", "My name: {n}.", "{n} here.", "I am called {n}.",
    "You are talking to {n}.", "{n} is my name.", "This message is from {n}.", "It is {n} writing.", "The name is {n}.",
)
SIGN_OFFS: Phrases = (
    "Regards, {n}", "Best, {n}", "Thanks, {n}", "Kind regards, {n}", "Yours, {n}", "Greetings, {n}", "Thank you, {n}",
    "Many thanks, {n}", "Best regards, {n}", "Cheers, {n}", "Sincerely, {n}", "With kind regards, {n}",
)
CLOSINGS: Phrases = (
    "Thank you.", "Thanks.", "Please help.", "Please answer me.", "Regards", "Many thanks.", "Best regards", "Cheers",
    "Waiting for your answer.", "Thanks a lot.", "Please let me know.", "Thank you for your help.",
)
ORDERS: Phrases = (
    "The order number is {o}.", "My order is {o}.", "It is order {o}.", "Order number: {o}.", "It was order {o}.",
    "The number of the order is {o}.", "This is about order {o}.", "You find it under order {o}.", "My order number: {o}.",
    "I am writing about order {o}.", "Order {o}.", "See order {o}.", "The order is {o}.", "It belongs to order {o}.",
    "It came with order {o}.", "The order has the number {o}.", "Please look at order {o}.", "It is in order {o}.",
)
DATES: Phrases = (
    "I bought it on {d}.", "I ordered it on {d}.", "It was ordered on {d}.", "I ordered on {d}.", "The date was {d}.",
    "We bought it on {d}.", "The order is from {d}.", "It was bought on {d}.", "I placed the order on {d}.",
    "On {d} I ordered it.", "The order was made on {d}.", "It is from {d}.", "My order was on {d}.",
    "Date of the order: {d}.", "I paid on {d}.", "I paid for it on {d}.", "Ordered on {d}.", "It was {d} when I ordered.",
)
QUANTITIES: Phrases = (
    "I ordered {q} of them.", "There are {q} of them.", "It is about {q} pieces.", "I bought {q} pieces.", "Quantity: {q}.",
    "The quantity is {q}.", "We ordered {q} pieces.", "In total {q} pieces.", "I have {q} of them.", "It was {q} pieces.",
    "The order has {q} pieces.", "We bought {q} of them.", "{q} pieces in all.", "I paid for {q} pieces.",
    "The number of pieces is {q}.", "All in all {q} of them.", "It concerns {q} pieces.", "We have {q} of these.",
)
URGENT: Phrases = (
    "It is urgent.", "Please hurry.", "I need it today.", "This is very urgent.", "Please answer at once.",
    "I need an answer today.", "Be quick please, it is urgent.", "Please be quick.", "As soon as possible please.",
    "I need help as soon as possible.", "It cannot wait.", "Please hurry, it cannot wait.", "I need this at once.",
    "Urgent!", "We need it as soon as possible.", "Please help today, it is urgent.", "Really urgent.", "Hurry please.",
)
UNHURRIED: Phrases = (
    "There is no hurry.", "It is not urgent.", "Take your time.", "No hurry.", "It can wait.", "No rush.",
    "Whenever you have time.", "Not urgent at all.", "There is no rush.", "Please take your time.", "It can wait a while.",
    "No rush at all.", "I am in no hurry.", "It has time.", "This can wait until next week.", "This is not urgent.",
    "Answer whenever you have time.", "Take all the time you need.",
)
FILLERS: Phrases = (
    "I have been a customer for many years.", "I like your shop.", "I wrote to you before.", "My family uses it every day.",
    "It was a present for my mother.", "I called you but nobody answered.", "The box looked fine.", "I live far from your shop.",
    "I hope you can help me.", "I am a bit sad about it.", "Your shop was always good to me.", "I looked at your page first.",
    "A friend told me about your shop.", "I tried many things already.", "It is for our office.", "We have a small garden.",
    "My old one was from another shop.", "The colour is nice.",
)
OTHER_ORDERS: Phrases = (
    "My other order {o} was fine.", "Order {o} came without trouble, it is not about that one.",
    "It is not about order {o}.", "I also have order {o}, which is fine.", "Order {o} was fine.",
    "The earlier order {o} was good.", "Please do not touch my other order {o}.", "My last order {o} was good.",
    "With my other order {o} all was well.", "Do not change order {o}, it is fine.", "Order {o} is another matter.",
    "Not to be mixed up with order {o}.",
)
OTHER_PEOPLE: Phrases = (
    "My neighbour {n} has the same one.", "{n} from your shop sold it to me.", "I spoke with {n} from your team.",
    "My friend {n} told me to write.", "My sister {n} uses it too.", "{n} from your team did not help.",
    "I gave it to my brother {n}.", "My neighbour {n} took the parcel.", "Your colleague {n} knows about it.",
    "I asked {n} in the shop.", "My friend {n} has one too.", "{n} from your team told me to write.",
)
CALLERS: Phrases = (
    "Caller: {n}.", "Call from {n}.", "{n} called.", "Customer {n} called.", "Caller is {n}.", "Phone call, customer {n}.",
    "Spoke with customer {n}.", "Customer: {n}.", "{n} on the phone.", "Call with {n}.", "Customer name {n}.",
    "The caller is {n}.",
)
NAMELESS_CALLS: Phrases = (
    "Caller gave no name.", "Call without a name.", "No name given.", "Name unknown.", "The caller did not say a name.",
    "Unknown caller.", "Customer gave no name.", "Call, no name.", "Caller unknown.", "The name was not given.",
)
CALL_ORDERS: Phrases = (
    "Order {o}.", "Order number {o}.", "About order {o}.", "Gave order {o}.", "Order: {o}.", "Order no. {o}.",
    "Refers to order {o}.", "The order is {o}.", "Says order {o}.", "Under order {o}.", "Ticket for order {o}.", "Order is {o}.",
)
CALL_DATES: Phrases = (
    "Ordered on {d}.", "Bought on {d}.", "Order of {d}.", "Date {d}.", "Paid on {d}.", "From {d}.", "Order date {d}.",
    "Ordered {d}.", "Bought {d}.", "Date of order: {d}.", "Order from {d}.", "Date: {d}.",
)
CALL_QUANTITIES: Phrases = (
    "{q} pieces.", "Quantity {q}.", "Quantity: {q}.", "{q} of them.", "Pieces: {q}.", "Ordered {q} pieces.", "In all {q}.",
    "{q} pieces in all.", "Number of pieces {q}.", "About {q} pieces.", "{q} units.", "Units: {q}.",
)
CALL_ISSUES: Phrases = (
    "Problem: {h}.", "Says: {h}.", "Reports: {h}.", "Issue: {h}.", "Reason: {h}.", "Topic: {h}.", "Complaint: {h}.",
    "It is about this: {h}.", "What: {h}.", "Reason of the call: {h}.", "Matter: {h}.", "The problem is: {h}.",
)
CALL_URGENT: Phrases = (
    "Urgent.", "Very urgent.", "Needs it today.", "Wants an answer at once.", "Cannot wait.", "As soon as possible.",
    "Priority high.", "In a hurry.", "High priority.", "Must be done today.", "Says it is urgent.", "Needs help at once.",
)
CALL_UNHURRIED: Phrases = (
    "Not urgent.", "No hurry.", "Can wait.", "No rush.", "Priority low.", "Low priority.", "Says it can wait.",
    "Has time.", "Not in a hurry.", "Says there is no hurry.", "May wait.", "Said no rush.",
)
CHAT_ORDERS: Phrases = (
    "order {o}", "its order {o}", "order number {o}", "my order is {o}", "order no {o}", "order nr {o}", "about order {o}",
    "order is {o}", "order: {o}", "the order is {o}", "number of the order {o}", "see order {o}",
)
CHAT_DATES: Phrases = (
    "ordered {d}", "from {d}", "bought {d}", "ordered on {d}", "date {d}", "bought it {d}", "paid {d}", "order of {d}",
    "i ordered {d}", "was on {d}", "date was {d}", "bought on {d}",
)
CHAT_QUANTITIES: Phrases = (
    "{q} of them", "{q} pieces", "i have {q}", "quantity {q}", "all {q}", "{q} pcs", "ordered {q}", "bought {q}",
    "its {q} pieces", "{q} in all", "got {q} of them", "total {q}",
)
CHAT_NAMES: Phrases = (
    "im {n}", "name is {n}", "{n} here", "this is {n}", "my name {n}", "name {n}", "its {n}", "here is {n}", "i am {n}",
    "name: {n}", "{n} is my name", "customer {n}",
)
CHAT_URGENT: Phrases = (
    "urgent", "asap", "asap please", "its urgent", "need it today", "hurry pls", "need help today", "pls be quick", "very urgent",
    "cant wait", "at once pls", "quick pls",
)
CHAT_UNHURRIED: Phrases = (
    "no hurry", "no rush", "not urgent", "take your time", "can wait", "its not urgent", "no rush at all", "it can wait",
    "no hurry at all", "whenever you have time", "no stress, can wait", "not in a hurry",
)
CHAT_FILLERS: Phrases = (
    "hi", "hey", "hello", "thx", "pls help", "so sad", "ok", "hi there", "thanks", "yo", "help pls", "hmm",
)
FORM_NAMES: Phrases = ("Name", "Customer", "Customer name", "Your name", "Full name", "Name of customer", "Contact", "Contact name")
FORM_ORDERS: Phrases = ("Order", "Order number", "Order no.", "Order id", "Number of order", "Your order", "Order no", "Order code")
FORM_DATES: Phrases = ("Date", "Order date", "Date of order", "Ordered on", "Bought on", "Date ordered", "Ordered", "Purchase date")
FORM_QUANTITIES: Phrases = ("Quantity", "Qty", "Pieces", "How many", "Number of pieces", "Amount", "Units", "Number of units")
FORM_ISSUES: Phrases = ("Problem", "Message", "Issue", "What happened", "Subject", "Description", "Your problem", "Topic")
FORM_URGENCIES: Phrases = ("Priority", "Urgency", "How urgent", "Urgent", "Priority of this", "Importance")
FORM_HIGH: Phrases = ("high", "urgent", "very high", "today", "very urgent", "high, please hurry")
FORM_LOW: Phrases = ("low", "not urgent", "no hurry", "very low", "can wait", "low, no hurry")
FORM_NORMAL: Phrases = ("normal", "medium", "as usual", "usual", "middle", "normal, as usual")
FORM_EMPTY: Phrases = ("-", "none", "unknown", "not known", "n/a", "?", "(empty)", "no")
# fmt: on
