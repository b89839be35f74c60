"""Write a data set of support tickets: `python examples/tickets.py OUT.jsonl`.

Each ticket is to be answered with JSON, `{"category": ..., "urgency": ...}`. Tickets are put together from sentence frames with
slots. The held-out tickets (split test) use frames of their own for every sentence, made of words that training tickets use too,
so a model has to understand how the words belong together; remembering sentences does not help. Sentences that speak of other
categories in passing are mixed in, so counting words is not enough either.
"""

from __future__ import annotations

import csv
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

SEED = 7
TRAIN_ROWS, TEST_ROWS = 2400, 320
SMALL_ROWS = 200
MAX_WORDS = 38
SETTLED_PART, ASIDE_PART, NEUTRAL_PART = 0.12, 0.5, 0.23
URGENCIES = {"low": 0.25, "normal": 0.45, "high": 0.3}

SLOTS: dict[str, list[str]] = {
    "product": [
        *("the router", "the headphones", "the coffee machine", "the printer", "the camera", "the keyboard"),
        *("the standing desk", "the office chair", "the monitor", "the speaker", "the tablet", "the lamp"),
    ],
    "amount": ["19 euros", "45 dollars", "120 euros", "9 dollars", "300 euros", "75 dollars", "60 euros", "250 dollars"],
    "date": ["Monday", "Tuesday", "Thursday", "Friday", "Sunday", "the first of May", "the third of June", "the ninth of March"],
    "plan": ["team", "basic", "family", "business", "student", "premium"],
    "app": ["the mobile app", "the web page", "the desktop program", "the search page", "the report page", "the calendar"],
    "order": ["4471", "1093", "8820", "5562", "2307", "9914"],
    "days": ["two days", "three days", "five days", "ten days", "two weeks", "three weeks"],
    "city": ["Berlin", "Lisbon", "Dublin", "Oslo", "Vienna", "Madrid"],
}

# What the ticket is about: category -> (frames for training, frames held out).
PROBLEMS: dict[str, tuple[list[str], list[str]]] = {
    "account": (
        [
            "I cannot log in since {date}; the password is refused.",
            "My colleague gets no reset mail for the password.",
            "After one wrong attempt my login is locked.",
            "The code for signing in comes too late and is refused.",
            "I changed my phone and can no longer sign in with the code.",
            "Please change the mail address of my user to the new one.",
            "A colleague left the company and somebody needs access to her user.",
            "{app} signs me out again and again and asks for the password.",
            "My user name is taken, although I made the account myself.",
            "How do I give a new colleague access to our account?",
            "I forgot the password and the reset link has expired.",
            "After the reset I still cannot get into my account on {app}.",
        ],
        [
            "The link in the reset mail is refused, so I cannot sign in.",
            "Since I changed the password, my login is locked on {app}.",
            "My new phone gets no code, and without it I cannot log in.",
            "A new colleague needs a user name and access to {app}.",
            "{app} asks me for the code again after each login attempt.",
        ],
    ),
    "billing": (
        [
            "I was charged {amount} twice for {product}.",
            "The invoice from {date} shows {amount}, although we agreed on less.",
            "Why does my bill list a fee of {amount} that nobody mentioned?",
            "My card was charged {amount} on {date} and I do not know why.",
            "The tax on our invoice must be wrong by {amount}.",
            "Please send the invoice for {product} to our accounting team.",
            "The payment of {amount} failed, but the bank says my card is fine.",
            "Your price list says {amount}, yet the bill asks for more.",
            "We paid by bank transfer on {date} and still get reminders about late payments.",
            "I need a receipt with our tax number for the payment of {amount}.",
            "The discount did not change the price of {product} on the invoice.",
            "Can we pay the bill for the {plan} plan by card instead of bank transfer?",
        ],
        [
            "Two payments of {amount} left my bank for the same invoice.",
            "A fee of {amount} is on the bill and nobody can say why.",
            "The price on the invoice for {product} is not the price on your list.",
            "Can the receipt for {product} show the tax number of our company?",
            "Your reminders ask for a payment of {amount} that the bank sent on {date}.",
        ],
    ),
    "bug": (
        [
            "{app} crashes whenever I open a large file.",
            "I get an error message when I save a report in {app}.",
            "Since the update on {date}, {app} is very slow and freezes.",
            "The button for saving does nothing in {app}.",
            "{app} shows an empty screen after the update.",
            "The export stops with an error after a few seconds.",
            "The numbers in the report are added up wrongly by {app}.",
            "{app} freezes when two people edit the same file.",
            "Search in {app} finds nothing, although I saved the file there.",
            "The same error message comes up each time I start {app}.",
            "Pictures show up broken and the screen flickers in {app}.",
            "The update broke the export: each file is empty.",
        ],
        [
            "An error comes up in {app} and the file is not saved.",
            "When I start the export, {app} freezes and the screen is empty.",
            "The report is broken since the update: {app} shows wrong numbers.",
            "{app} is slow and crashes after a few seconds.",
            "In {app} the search button does nothing but show an error message.",
        ],
    ),
    "cancellation": (
        [
            "I want to cancel the {plan} plan at the end of the month.",
            "Please end our subscription; we do not need it any more.",
            "How do I keep the {plan} subscription from being renewed?",
            "We are moving to another provider and cancel our contract.",
            "Please confirm that my contract ends on {date}.",
            "Cancel my subscription before it renews on {date}.",
            "Our company closes, so the {plan} plan has to be ended.",
            "I no longer use {app} and think about leaving the {plan} plan.",
            "The cancel button for the {plan} plan is nowhere to be found.",
            "I cancelled the trial on {date}, yet the subscription goes on.",
            "What is the notice period if we want to leave the contract?",
            "Do not renew our {plan} contract for another year.",
        ],
        [
            "We no longer need the {plan} plan and want to end the contract.",
            "Please stop my subscription before the trial ends on {date}.",
            "Our {plan} contract must not be renewed; we are leaving for another provider.",
            "Confirm please that the {plan} subscription is cancelled at the end of the year.",
            "What do I have to do to leave the {plan} plan before the notice period ends?",
        ],
    ),
    "delivery": (
        [
            "My parcel with {product} has not arrived after {days}.",
            "The tracking page for order {order} has not moved for {days}.",
            "The courier brought the parcel to the wrong address in {city}.",
            "When will order {order} be shipped to {city}?",
            "The driver says nobody was home, but I waited all day.",
            "Order {order} was shipped to my old address.",
            "Only half of order {order} was in the parcel.",
            "The package with {product} is stuck at customs in {city}.",
            "Tracking says delivered, but there is no package at my door.",
            "Can the courier bring {product} on {date} in the evening?",
            "{product} should have been delivered on {date} and is still on its way.",
            "Please ship {product} to our office in {city} instead.",
        ],
        [
            "The courier says that order {order} was delivered, but nobody got a package.",
            "For {days} the parcel has been on its way to {city}.",
            "Where is {product}? Tracking says it was shipped on {date}.",
            "The driver brought half of the order to the wrong door.",
            "Can order {order} still be shipped to another address in {city}?",
        ],
    ),
    "feature": (
        [
            "It would be great if {app} had a dark mode.",
            "Could you add an option to sort by date in {app}?",
            "Please consider a shortcut for copying entries in {app}.",
            "I wish {app} could work without a connection.",
            "Is it planned that {app} will support more languages?",
            "A suggestion: let us choose the colours in {app}.",
            "We miss a way to group entries in {app}.",
            "It would help us if {app} could send a summary each day.",
            "Have you thought about adding a calendar view to {app}?",
            "My idea is an option to hide old entries in {app}.",
            "We would love to see support for templates in {app}.",
            "Will there be a way to connect {app} to our chat some day?",
        ],
        [
            "We would love an option to choose a dark view in {app}.",
            "An idea for {app}: add a shortcut that will hide old entries.",
            "Have you planned a way to sort and group entries in {app}?",
            "I wish there was support for more languages and templates in {app}.",
            "Could {app} some day send a summary to our chat? It would be great.",
        ],
    ),
    "privacy": (
        [
            "Please delete all personal data that you keep about me.",
            "Which of my data do you share with other companies?",
            "I want a copy of everything you have stored about me.",
            "Stop using my address for advertising.",
            "I never agreed that my data is used for advertising.",
            "Could you say where the personal data of our customers is stored?",
            "Our lawyer asks for the data protection agreement.",
            "I withdraw my consent to the newsletter and to tracking cookies.",
            "Who has looked at my personal records since {date}?",
            "Do customers hear that you keep recordings of their calls, and how long?",
            "Somebody else can see my personal records in {app}.",
            "Under data protection law I ask you to delete my records.",
        ],
        [
            "I withdraw my consent: delete the records that you keep about me.",
            "Do you share recordings of my calls with other companies?",
            "Our customers ask how long their personal data is stored.",
            "By law I want to know who has a copy of my personal data.",
            "I never agreed to the newsletter; stop using my data for it.",
        ],
    ),
    "returns": (
        [
            "I would like to return {product}; it does not fit.",
            "{product} arrived damaged and I want my money back.",
            "How do I send {product} back within the return period?",
            "Please exchange {product} for another colour.",
            "The return label for {product} cannot be printed.",
            "I sent {product} back {days} ago and wait for the refund.",
            "{product} broke after {days}; please replace it under warranty.",
            "You sent the wrong model of {product}; I want to exchange it.",
            "The refund for {product} is {amount} too low.",
            "The box of {product} was open and a part is missing, so I return it.",
            "Does the warranty cover a scratch on {product}?",
            "I do not like {product} and want to give it back.",
        ],
        [
            "The wrong colour of {product} arrived; how do I exchange it?",
            "A part of {product} is damaged, please replace it.",
            "I want a return label to send {product} back.",
            "Is {product} under warranty? It broke {days} ago.",
            "I gave {product} back within the period and got no refund.",
        ],
    ),
}

# Said in passing, about something else: category spoken of -> (training, held out). Never used for a ticket of that category.
ASIDES: dict[str, tuple[list[str], list[str]]] = {
    "account": (
        ["My login works fine, by the way.", "I have changed my password already, that is not the point."],
        ["The password works fine, that is not the point."],
    ),
    "billing": (
        ["The invoice was right, by the way.", "The payment is done, so that is not my question."],
        ["My question is not about the invoice, the payment was right."],
    ),
    "bug": (
        ["I saw no error, everything runs well.", "The last update is fine, by the way."],
        ["By the way, the update runs well and I saw no error."],
    ),
    "cancellation": (
        ["I do not want to cancel anything.", "We are happy with the {plan} plan and stay."],
        ["We are happy and do not want to cancel the {plan} plan."],
    ),
    "delivery": (
        ["The parcel itself came on time.", "The courier was friendly and quick, by the way."],
        ["By the way, the courier was quick and the parcel came on time."],
    ),
    "feature": (
        ["I do not ask for new options in {app}.", "The dark mode is great, by the way."],
        ["I do not ask for a dark mode, {app} is great."],
    ),
    "privacy": (
        ["I have no worries about my personal data.", "The newsletter is welcome, by the way."],
        ["My personal data is fine with you, I have no worries."],
    ),
    "returns": (
        ["I do not want to send anything back.", "The refund for {product} came quickly, thanks."],
        ["Thanks for the refund, I do not want to send {product} back."],
    ),
}

# Quotes an earlier problem, of another category, in front of the present one or behind it: only the order of words tells which.
SETTLED: tuple[list[str], list[str]] = (
    [
        "My earlier question is settled: {quote}",
        "Please forget my mail from {date}: {quote}",
        "You solved this last time, thanks: {quote}",
        "Done already, no answer needed: {quote}",
    ],
    [
        "My mail from {date} is settled already: {quote}",
        "You solved my earlier question, thanks, no answer needed: {quote}",
    ],
)

NEUTRAL: tuple[list[str], list[str]] = (
    [
        "I have been a customer for many years.",
        "I gave your help pages a look first and found nothing.",
        "My colleague in {city} has the same question.",
        "I wrote to you on {date} and got no answer yet.",
        "We use your service every day in our office in {city}.",
        "I tried to call, but nobody answered the phone.",
        "I bought {product} from you some time ago.",
        "We have about fifty people in our company.",
    ],
    [
        "Nobody answered when I tried to call on {date}.",
        "My company in {city} has been a customer for some time.",
        "Your help pages gave no answer to my question.",
        "Many people in our office use your service.",
    ],
)

URGENCY: dict[str, tuple[list[str], list[str]]] = {
    "low": (
        [
            "There is no hurry.",
            "Take your time with the answer.",
            "It is not urgent at all.",
            "This can wait until next month.",
            "Whenever you find the time is fine.",
        ],
        ["Take all the time you want, it can wait.", "An answer next month is fine, no hurry."],
    ),
    "normal": (["An answer this week would be nice.", "Please tell me what to do next.", ""], ["Please tell me this week.", ""]),
    "high": (
        [
            "This is urgent, we need help today!",
            "Our whole team cannot work because of this.",
            "Please act at once.",
            "Every minute counts for us.",
            "We lose money each hour.",
            "It has to be solved right now.",
        ],
        ["Help us right now, every hour counts and we lose money!", "This has to be solved today because the team cannot work."],
    ),
}

OPENERS: tuple[list[str], list[str]] = (
    ["Hello,", "Hi there,", "Good morning,", "Dear team,", "Dear support team,", "To whom it may concern,", ""],
    ["Good morning dear team,", "Hello there,", "Hi dear support,", ""],
)
CLOSERS: tuple[list[str], list[str]] = (
    ["Thanks, {name}", "Kind regards, {name}", "Many thanks in advance", "Best wishes, {name}", "", ""],
    ["Many kind wishes, {name}", "Thanks in advance and best regards, {name}", "", ""],
)
SLOTS["name"] = ["Anna", "Ben", "Carla", "David", "Eva", "Felix", "Grace", "Hugo"]


def ticket(rng: random.Random, category: str, urgency: str, held_out: bool) -> str:
    """Return the text of one ticket."""
    which = int(held_out)
    other = rng.choice([name for name in PROBLEMS if name != category])
    sentences = [rng.choice(PROBLEMS[category][which])]
    opener, closer = rng.choice(OPENERS[which]), rng.choice(CLOSERS[which])
    kind = rng.random()
    if kind < SETTLED_PART:
        quote = rng.choice(PROBLEMS[other][which])
        sentences.insert(rng.randrange(2), rng.choice(SETTLED[which]).replace("{quote}", quote))
        opener = closer = ""
    elif kind < SETTLED_PART + ASIDE_PART:
        sentences.insert(rng.randrange(2), rng.choice(ASIDES[other][which]))
    elif kind < SETTLED_PART + ASIDE_PART + NEUTRAL_PART:
        sentences.insert(rng.randrange(2), rng.choice(NEUTRAL[which]))
    sentences.insert(rng.choice([0, len(sentences), len(sentences)]), rng.choice(URGENCY[urgency][which]))
    parts = [opener, *sentences, closer]
    text = " ".join(part for part in parts if part)
    filled = text.format(**{slot: rng.choice(values) for slot, values in SLOTS.items()})
    return sentence_case(filled)


def sentence_case(text: str) -> str:
    """Put a capital where a sentence begins with a slot."""
    letters = list(text)
    for at, letter in enumerate(letters):
        if at == 0 or (at > 1 and letters[at - 1] == " " and letters[at - 2] in ".?!"):
            letters[at] = letter.upper()
    return "".join(letters)


def rows(seed: int = SEED, train: int = TRAIN_ROWS, test: int = TEST_ROWS) -> Iterator[dict[str, str]]:
    """Yield the tickets, none twice: as many of each category, training first."""
    rng = random.Random(seed)
    seen: set[str] = set()
    categories = sorted(PROBLEMS)
    for split, count in (("train", train), ("test", test)):
        made = 0
        while made < count:
            category = categories[made % len(categories)]
            urgency = rng.choices(list(URGENCIES), list(URGENCIES.values()))[0]
            text = ticket(rng, category, urgency, split == "test")
            if text in seen or len(text.split()) > MAX_WORDS:
                continue
            seen.add(text)
            made += 1
            answer = json.dumps({"category": category, "urgency": urgency})
            yield {"prompt": text, "completion": answer, "label": category, "split": split}


def write_jsonl(path: Path) -> int:
    """Write the data set and return the number of its rows."""
    everything = list(rows())
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in everything), encoding="utf-8")
    return len(everything)


def write_csv(path: Path) -> int:
    """Write a small table with a help desk's own column names, Body and Queue, and return the number of its rows."""
    everything = list(rows(seed=SEED + 1, train=SMALL_ROWS, test=0))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["Ticket", "Body", "Queue"])
        writer.writerows([1000 + number, row["prompt"], row["label"]] for number, row in enumerate(everything))
    return len(everything)


def main() -> None:
    """Write the data set to the path given."""
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/tickets.py OUT.jsonl (or OUT.csv for the small table)")
    path = Path(sys.argv[1])
    print(f"wrote {(write_csv if path.suffix == '.csv' else write_jsonl)(path):,} tickets to {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
