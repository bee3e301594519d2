"""The second language: simple Spanish sentences, and what their words mean in English."""

import random

from gemscope.microworld.documents import Document, Writer
from gemscope.microworld.splits import Split

NOUNS = {
    "perro": "dog", "gato": "cat", "caballo": "horse", "oso": "bear", "burro": "donkey", "conejo": "rabbit",
    "pato": "duck", "martillo": "hammer", "coche": "car", "tren": "train", "barco": "ferry", "sombrero": "hat",
    "zapato": "shoe", "castillo": "castle", "bosque": "forest", "lago": "lake", "desierto": "desert",
    "libro": "novel", "piano": "piano", "maestro": "teacher", "piloto": "pilot", "soldado": "soldier",
    "hermano": "brother", "primo": "cousin", "brazo": "arm", "dedo": "finger", "queso": "pizza", "limon": "lemon",
    "coco": "coconut", "vino": "wine",
}  # fmt: skip
"""Spanish nouns (all masculine) and what they mean."""
VERBS = {
    "mira": "looks at", "busca": "looks for", "encuentra": "finds", "compra": "buys", "vende": "sells",
    "lleva": "carries", "quiere": "wants", "tiene": "has", "pinta": "paints", "lava": "washes", "sigue": "follows",
    "pierde": "loses",
}  # fmt: skip
ADJECTIVES = {
    "rojo": "red", "negro": "black", "blanco": "white", "amarillo": "yellow", "pequeno": "small", "enorme": "huge",
    "viejo": "old", "nuevo": "new", "rapido": "fast", "alegre": "happy", "triste": "sad", "furioso": "furious",
}  # fmt: skip
_MARKS = {
    "n": "spanish_noun",
    "m": "spanish_noun",
    "v": "spanish_verb",
    "a": "spanish_adjective",
    "b": "spanish_adjective",
}
_TEMPLATES = (
    "El {n} {v} el {m}.",
    "El {n} {a} {v} el {m}.",
    "El {n} {v} un {m} {a}.",
    "El {n} es {a} y el {m} es {b}.",
    "Hoy el {n} {v} el {m} {b}.",
    "Mi {n} {v} tu {m} porque es {a}.",
    "El {n} no {v} el {m}, pero es {a}.",
)


def write_spanish(writer: Writer, rng: random.Random, sentences: int) -> None:
    """Append Spanish sentences."""
    with writer.marked("spanish"):
        for i in range(sentences):
            n, m = rng.sample(list(NOUNS), 2)
            a, b = rng.sample(list(ADJECTIVES), 2)
            values = {"n": n, "m": m, "v": rng.choice(list(VERBS)), "a": a, "b": b}
            writer.add(" " if i else "").fill(rng.choice(_TEMPLATES), values, _MARKS)


def spanish(rng: random.Random, _split: Split) -> Document:
    """A few Spanish sentences, or a few translations of words."""
    writer = Writer()
    if rng.random() < 0.7:
        write_spanish(writer, rng, rng.randint(3, 6))
        return writer.finish("spanish")
    meanings = {**NOUNS, **ADJECTIVES}
    for i, word in enumerate(rng.sample(list(meanings), rng.randint(3, 5))):
        mark = "spanish_noun" if word in NOUNS else "spanish_adjective"
        writer.add(" " if i else "").fill(
            "The Spanish word {w} means {e}.", {"w": word, "e": meanings[word]}, {"w": mark}
        )
    return writer.finish("translation")
