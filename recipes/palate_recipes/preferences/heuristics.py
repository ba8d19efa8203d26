"""Heuristics for text: its language, and patterns of personal data. Knows words and patterns, no rows.

They run on a sample and are reported as information, never as errors.
"""

from __future__ import annotations

import re
from collections import Counter

_SCRIPTS = (
    ("Japanese", 0x3040, 0x30FF),
    ("Chinese", 0x4E00, 0x9FFF),
    ("Korean", 0xAC00, 0xD7AF),
    ("Russian or another Cyrillic language", 0x0400, 0x04FF),
    ("Arabic", 0x0600, 0x06FF),
    ("Hebrew", 0x0590, 0x05FF),
    ("Hindi or another Devanagari language", 0x0900, 0x097F),
    ("Thai", 0x0E00, 0x0E7F),
    ("Greek", 0x0370, 0x03FF),
)

_WORDS = {
    "English": "the and of to is in that it you for with are this what not",
    "German": "der die und das ist nicht ein eine ich mit auf für sie wie was",
    "French": "le la les et est une des vous pas dans pour que qui sur avec",
    "Spanish": "el los las y es una que por para con del como más pero está",
    "Italian": "il che di è una per con non sono della come più anche gli nel",
    "Portuguese": "o que não uma para com os do da em você mais como está por",
    "Dutch": "de het een en van ik niet dat is op te voor met zijn maar",
    "Polish": "nie się na to jest że do z jak w co ale czy tak za",
    "Turkish": "bir ve bu için ne değil ile çok da de daha ben mi var gibi",
    "Vietnamese": "và của là có không được cho một trong người những với này các khi",
    "Indonesian": "yang dan di untuk dengan ini itu dari tidak ada adalah saya akan pada bisa",
}
_LANGUAGES: dict[str, list[str]] = {}
for _language, _words in _WORDS.items():
    for _word in _words.split():
        _LANGUAGES.setdefault(_word, []).append(_language)

_WORD = re.compile(r"[^\W\d_]+")
_WORDS_READ = 80

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]+\.[\w.]*\w")  # bounded: a long run of letters is met often
_PHONE = re.compile(r"(?<![\w+])\+\d{1,3}[ .-]?(?:\(?\d{1,4}\)?[ .-]?){2,5}\d{2,4}(?!\w)")
_CARD = re.compile(r"(?<![\w-])(?:\d{4}[ -]?){3}\d{3,4}(?![\w-])")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b")


def language(text: str) -> str:
    """Returns the likely language of a text, or "" if unknown."""
    if not text.isascii():
        letters = [ord(letter) for letter in text[:400] if letter.isalpha()]
        for name, first, last in _SCRIPTS:
            if sum(first <= letter <= last for letter in letters) * 5 > len(letters) > 0:
                return name
    votes: Counter[str] = Counter()
    for word in _WORD.findall(text.lower()[:600])[:_WORDS_READ]:
        for name in _LANGUAGES.get(word, ()):
            votes[name] += 1
    best = votes.most_common(2)
    if not best or (len(best) > 1 and best[0][1] == best[1][1]):
        return ""
    return best[0][0]


def personal_data(text: str) -> str:
    """Returns the kind of personal data that a text seems to contain, such as `an e-mail address`, or ""."""
    if "@" in text and _EMAIL.search(text):
        return "an e-mail address"
    if "+" in text and _PHONE.search(text):
        return "a phone number"
    for match in _CARD.finditer(text):
        if _luhn(re.sub(r"\D", "", match.group())):
            return "a card number"
    for match in _IBAN.finditer(text):
        if _iban(match.group().replace(" ", "")):
            return "a bank account (IBAN)"
    return ""


def _luhn(digits: str) -> bool:
    doubled = [int(digit) * (2 if place % 2 else 1) for place, digit in enumerate(reversed(digits))]
    return len(set(digits)) > 1 and sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


def _iban(text: str) -> bool:
    """ISO 13616: the rearranged IBAN as a number must be 1 modulo 97."""
    return int("".join(str(int(letter, 36)) for letter in text[4:] + text[:4])) % 97 == 1
