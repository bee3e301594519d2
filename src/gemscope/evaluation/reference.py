"""The text on which a dictionary is checked before it is used: short, of many kinds, and always the same."""

TEXTS = (
    "The capital of France is Paris. The capital of Japan is Tokyo. Lyon is a city in France, and Osaka is a city in"
    " Japan. The country where Lyon is has the capital Paris.",
    "12 + 7 = 19. 5 + 8 = 13, so 5 + 8 + 2 = 15. The train leaves at 9 and arrives at 11, two hours later.",
    "SPORTS: Harriers beat Rovers in Lyon. BUSINESS: The bank raised its profit this year. SCIENCE: A new star was"
    " found by a team of students.",
    "She was happy when the letter came, and then sad and afraid, because her brother was not in it. They walked home"
    " in the rain without a word.",
    "def total(items):\n    count = 0\n    for item in items:\n        count = count + item\n    return count\n",
    "Le chat dort sur la table. The cat sleeps on the table, and the dog waits at the door for someone to open it.",
)
"""Running text."""

CHATS = (
    ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    ("How much is 4 + 9?", "4 + 9 = 13, because 4 + 6 is 10 and 3 more make 13."),
)
"""Questions and answers, for models that are instruction-tuned."""
